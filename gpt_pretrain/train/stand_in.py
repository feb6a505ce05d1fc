"""Random tokens in the place of a dataset: to measure a step, or to compile it, where no data is at hand."""

import numpy as np

from data_prep.store.datasets import TokenDataset
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.opened_data import OpenedData

GPT2_VOCAB_SIZE = 50257
_TABLE_TOKENS = 2**20


class _RandomTokens:
    """A stream of `num_tokens` uniformly distributed ids, which repeats itself: it is made of 2 MB."""

    def __init__(self, vocab_size: int, num_tokens: int):
        self.num_tokens = num_tokens
        self._tokens = np.random.default_rng(0).integers(0, vocab_size, _TABLE_TOKENS, np.uint16)
        self.dtype = self._tokens.dtype

    def read(self, starts, length):
        return self._tokens[(np.asarray(starts)[:, None] + np.arange(length)) % _TABLE_TOKENS]


def random_data(config: TrainConfig) -> OpenedData:
    """One stream of ids of GPT-2's vocabulary, as far as the model has it, as long as the run; no validation split."""
    vocab_size = min(GPT2_VOCAB_SIZE, config.model.vocab_size)
    num_tokens = config.num_tokens + config.data.seq_len + 1
    dataset = TokenDataset(
        directory="random tokens",
        format="none",
        fingerprint="",
        splits={"train": _RandomTokens(vocab_size, num_tokens)},
        vocab_size=vocab_size,
        tokenizer=None,
        tokenizer_digest=None,
        end_of_text=vocab_size - 1,
        unigram_entropy=None,
    )
    streams = (Stream("", "", num_tokens),)
    stage = Stage(seed=0, seq_len=config.data.seq_len, batch_sizes=config.batch_sizes, streams=streams)
    return OpenedData({"": dataset}, stage)
