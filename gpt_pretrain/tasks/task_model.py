"""A model as tasks ask it: with its tokenizer, and compiled once."""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.tasks.generation import Generator
from gpt_pretrain.tasks.packing import Request
from gpt_pretrain.tasks.scoring import Score, Scorer

Between = Callable[[int], None]
"""Called between batches with the number of requests done; may raise."""


class TaskModel:
    """Answers by the parameters that `params` holds at the moment.

    Args:
      spec: the model. It is run plain: without dropout and its own interventions.
      tokenizer: the one that made its data.
      dtype: of the computation; None for the spec's.
      end_of_text_first: every context begins with end-of-text, as documents did in training. None: only where the
        model was trained with the document mask, so that others are asked as everywhere else.
      interventions, seed: see `Intervened`.

    Attributes:
      params: on the mesh.
      step: from 1; interventions are as strong as at this one.
      between: see `Between`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        tokenizer: Tokenizer,
        *,
        dtype: str | None = None,
        end_of_text_first: bool | None = None,
        interventions: Sequence[Intervention] = (),
        seed: int = 0,
    ):
        self.spec, self.tokenizer = spec.plain(dtype), tokenizer
        self.end_of_text_first = spec.document_mask if end_of_text_first is None else end_of_text_first
        self.interventions = tuple(interventions)
        self.params: dict = {}
        self.step = 1
        self.between: Between = lambda num_done: None
        self._scorer = Scorer(spec, mesh, dtype=dtype, interventions=interventions, seed=seed)
        self._generator = Generator(spec, mesh, dtype=dtype, interventions=interventions, seed=seed)

    @property
    def end_of_text(self) -> int:
        return self.spec.end_of_text

    @property
    def max_length(self) -> int:
        """Tokens that the model can see at once."""
        return self.spec.num_positions

    def context(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids of a context as the model is given them: never none."""
        if self.end_of_text_first and list(ids[:1]) != [self.end_of_text]:
            return [self.end_of_text, *ids]
        return ids if len(ids) else [self.end_of_text]

    def scores(self, requests: Sequence[Request]) -> list[Score]:
        """See `Scorer`."""
        return self._scorer(self.params, requests, step=self.step, between=self.between)

    def continue_all(self, prompts: Sequence[Sequence[int]], **how) -> list[list[int]]:
        """See `Generator`."""
        return self._generator(self.params, prompts, step=self.step, between=self.between, **how)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without end-of-text."""
        return self.tokenizer.decode(np.array([each for each in ids if each != self.end_of_text], np.int64))
