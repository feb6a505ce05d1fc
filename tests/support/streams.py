"""Token streams that are arrays, and plans and batches over them."""

import numpy as np

from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream


class ArraySource:
    """A token source over an array."""

    def __init__(self, tokens, dtype=np.uint16):
        self.tokens = np.asarray(tokens, dtype)
        self.num_tokens, self.dtype = len(tokens), self.tokens.dtype

    def read(self, starts, length):
        return self.tokens[np.asarray(starts)[:, None] + np.arange(length)]


def make_plan(source, *, batch_size=8, seq_len=8, **changes) -> Plan:
    """One stream, one stage."""
    stream = Stream("", "fingerprint", source.num_tokens)
    return Plan((Stage(seed=0, seq_len=seq_len, batch_sizes=((0, batch_size),), streams=(stream,), **changes),))


def make_batches(source, *, batch_size=8, seq_len=8, **changes) -> Batches:
    """Batches of that plan."""
    settings = {"vocab_size": 2**16, "num_steps": 10}
    return Batches({"": source}, make_plan(source, batch_size=batch_size, seq_len=seq_len), **(settings | changes))
