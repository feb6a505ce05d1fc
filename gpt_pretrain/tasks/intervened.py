"""Interventions where tasks are asked: the hook of the model that answers."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from gpt_pretrain.model.intervening import Doses, Rows, doses_at, make_hook
from gpt_pretrain.model.interventions import Intervention, check_use
from gpt_pretrain.model.sites import Hook
from gpt_pretrain.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Intervened:
    """What is done to a model while it answers.

    Attributes:
      seed: of the random numbers; see `checks.key_seed`.

    Raises ValueError for what cannot be done there; see `check_use`.
    """

    spec: ModelSpec
    interventions: tuple[Intervention, ...] = ()
    seed: int = 0

    def __post_init__(self):
        spec = self.spec
        check_use(self.interventions, n_layer=spec.n_layer, n_head=spec.n_head, n_embd=spec.n_embd)

    def __bool__(self) -> bool:
        return bool(self.interventions)

    @property
    def may_share(self) -> bool:
        """Whether continuations may lie behind each other in one row. Our kinds change each token by itself, if they
        know its position; a function of the user's sees the whole row."""
        return not any(each.is_own for each in self.interventions)

    def doses(self, step: int) -> tuple[Doses, ...]:
        """As strong as at `step`, counted from 1."""
        return doses_at(step, self.interventions)

    def hook(self, tokens_BT, numbers_B, doses: Sequence[Doses], *, start=0, positions_BT=None) -> Hook:
        """Inside a compiled function. What follows `tokens_BT`: see `Rows`, and `numbers_of`."""
        rows = Rows(tokens_BT, numbers_B, start, self.seed, positions_BT) if doses else None
        return make_hook(self.interventions, self.spec.n_layer, self.spec.n_head, doses[0] if doses else None, rows)


def numbers_of(texts: Sequence[Sequence[int]], num_rows: int) -> np.ndarray:
    """A number for each row, by its context: the same one has the same random numbers, whatever else is asked.

    >>> numbers_of([[1, 2], [3], [1, 2]], 4)
    array([ 29395902, 435730553,  29395902,         0], dtype=int32)
    """
    numbers = [zlib.crc32(np.array(text, "<i4").tobytes()) >> 1 for text in texts]
    return np.array(numbers + [0] * (num_rows - len(numbers)), np.int32)
