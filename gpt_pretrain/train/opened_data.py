"""The data of a run, opened and checked: before anything is computed."""

import dataclasses

import jax
import numpy as np

from data_prep.store.datasets import TokenDataset
from data_prep.store.token_sources import TokenSource
from data_prep.store.tokenizers import Tokenizer, recorded_tokenizer, user_tokenizer
from gpt_pretrain.data.asked_edits import Edits, inserted_name
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage
from gpt_pretrain.tasks.suite import Suite
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.validation import open_validation


@dataclasses.dataclass(frozen=True)
class OpenedData:
    """The datasets of a run, all of one tokenizer.

    Attributes:
      datasets: by the name of their stream; one alone has the name "".
      wanted: the stage that the configuration asks for.
      edits: in place, that it asks for.
      inserted: the datasets that documents are inserted from, by the name that the plan has for them.
      prompts: ids of the texts that the run's samples continue.
      tokenizer_name: as the user typed it, if at all.
      validation: other streams to validate on, by name.
      suite: tasks to ask, if any.
    """

    datasets: dict[str, TokenDataset]
    wanted: Stage
    edits: Edits = dataclasses.field(default_factory=Edits)
    inserted: dict[str, TokenDataset] = dataclasses.field(default_factory=dict)
    prompts: tuple[np.ndarray, ...] = ()
    tokenizer_name: str | None = None
    validation: dict[str, TokenSource] = dataclasses.field(default_factory=dict)
    suite: Suite | None = None

    @property
    def first(self) -> TokenDataset:
        """Any of them, for what they share: vocabulary, end-of-text, tokenizer."""
        return next(iter(self.datasets.values()))

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that made the data, by its digest; where nobody recorded it, the user's, or GPT-2's.

        Raises ValueError where it is not to be had or is another one.
        """
        data, users = self.first, self.tokenizer_name
        if data.tokenizer is not None:
            return recorded_tokenizer(data.tokenizer, data.tokenizer_digest, data.directory, users=users)
        tokenizer = user_tokenizer(users or "gpt2")
        if (tokenizer.vocab_size, tokenizer.end_of_text) != (data.vocab_size, data.end_of_text):
            raise ValueError(
                f"data.tokenizer={tokenizer.name} has {tokenizer.vocab_size} ids and ends texts by "
                f"{tokenizer.end_of_text}; bare .bin shards are read as of {data.vocab_size} ids, ended by "
                f"{data.end_of_text}. Convert them: `python -m data_prep.convert {data.directory} OUT --tokenizer=...`."
            )
        return tokenizer

    def sources(self, split: str) -> dict[str, TokenSource]:
        """One split's streams by name, of those datasets that have it."""
        return {name: each.splits[split] for name, each in self.datasets.items() if split in each.splits}

    def read_sources(self) -> dict[str, TokenSource]:
        """All that batches are read from, by name."""
        return self.sources("train") | {name: each.splits["train"] for name, each in self.inserted.items()}


def open_data(config: TrainConfig) -> OpenedData:
    """Opens the datasets. ValueError for what is not there, is damaged, or does not fit the rest of the run."""
    datasets = config.data.open()
    stage = config.data.stage(datasets, config.batch_sizes)
    inserted = config.data.open_inserted(datasets)
    data = OpenedData(
        datasets,
        stage,
        config.data.edits(datasets, inserted),
        {inserted_name(directory): each for directory, each in inserted.items()},
        tokenizer_name=config.data.tokenizer,
        validation=open_validation(config.validation, next(iter(datasets.values())), config.data, config.eval_tokens),
    )
    if config.data.tokenizer:
        _ = data.tokenizer  # another one than made the data is an error, whether or not it will be asked
    vocab_size = data.first.vocab_size
    if vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {vocab_size} ids of "
            f"{data.first.directory}; expected at least {vocab_size}."
        )
    if Plan((data.wanted,)).num_steps(config.num_tokens) < 1:
        size, seq_len = data.wanted.batch_size(0), data.wanted.seq_len
        raise ValueError(
            f"train.num_tokens={config.num_tokens} is less than one step: batch_size {size} x seq_len {seq_len} = "
            f"{size * seq_len} tokens"
        )
    if config.eval_tasks:
        suite = Suite(config.eval_tasks, data.tokenizer, limit=config.eval_tasks_limit)
        if suite.harness is not None and jax.process_count() > 1:
            raise ValueError(
                "train.eval_tasks: tasks of lm-evaluation-harness are asked by a run of one process. With several, use "
                "files of HellaSwag, and `python -m gpt_pretrain.evaluate` on the checkpoints"
            )
        data = dataclasses.replace(data, suite=suite)
    if not config.sample_prompts:
        return data
    tokenizer = data.tokenizer
    prompts = tuple(np.asarray(tokenizer.encode(text)) for text in config.sample_prompts)
    longest = max(map(len, prompts))
    if longest >= config.data.seq_len:
        raise ValueError(
            f"train.sample_prompt has {longest} tokens; expected fewer than data.seq_len={config.data.seq_len}"
        )
    return dataclasses.replace(data, prompts=prompts)
