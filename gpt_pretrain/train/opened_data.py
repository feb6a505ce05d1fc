"""The data of a run, opened and checked: before anything is computed."""

import dataclasses

import numpy as np

from data_prep.store.datasets import TokenDataset
from data_prep.store.streams import TokenSource
from data_prep.store.tokenizers import Tokenizer, get_tokenizer
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage
from gpt_pretrain.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class OpenedData:
    """The datasets of a run, all of one tokenizer.

    Attributes:
      datasets: by the name of their stream; one alone has the name "".
      wanted: the stage that the configuration asks for.
      prompt: ids of the text that the run's sample continues, if it makes one.
    """

    datasets: dict[str, TokenDataset]
    wanted: Stage
    prompt: np.ndarray | None = None

    @property
    def first(self) -> TokenDataset:
        """Any of them, for what they share: vocabulary, end-of-text, tokenizer."""
        return next(iter(self.datasets.values()))

    @property
    def tokenizer(self) -> Tokenizer:
        """GPT-2's where nobody recorded it."""
        return get_tokenizer(self.first.tokenizer or "gpt2")

    def sources(self, split: str) -> dict[str, TokenSource]:
        """One split's streams by name, of those datasets that have it."""
        return {name: each.splits[split] for name, each in self.datasets.items() if split in each.splits}


def open_data(config: TrainConfig) -> OpenedData:
    """Opens the datasets. ValueError for what is not there, is damaged, or does not fit the rest of the run."""
    datasets = config.data.open()
    data = OpenedData(datasets, config.data.stage(datasets, config.batch_sizes))
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
    if config.sample_prompt is None:
        return data
    prompt = data.tokenizer.encode(config.sample_prompt)
    if len(prompt) >= config.data.seq_len:
        raise ValueError(
            f"train.sample_prompt has {len(prompt)} tokens; expected fewer than data.seq_len={config.data.seq_len}"
        )
    return dataclasses.replace(data, prompt=np.asarray(prompt))
