"""Texts by the model, during the run and at its end."""

import logging
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_prep.pages.text import printable
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.train.actions.action import Action, Now, Schedule
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.writers import MetricWriter

log = logging.getLogger(__name__)


class WriteSamples(Action):
    """Continues the texts of `train.sample_prompt` at an interval, and when the run is complete: `samples/1`, ...

    Each by random numbers of its own, the same at every step: samples of two steps differ by the weights alone. The
    sampler is compiled once. One that fails is logged once; training goes on.
    """

    def __init__(self, built: Built, writer: MetricWriter):
        self._schedule = Schedule(built.config.sample_interval)
        self._built, self._writer, self._tokenizer = built, writer, built.data.tokenizer
        self._has_failed = False

    def due(self, step: int) -> bool:
        return self._schedule(step) and step < self._built.total_steps  # those of the last step come at the end

    def run(self, now: Now) -> None:
        try:
            params = _on_one_device(now.state.params)
            if params is not None:
                self._writer.write_texts(now.step, self._texts(params))
        except Exception:
            if not self._has_failed:
                log.exception("No samples after step %d; training goes on, more of it is not said.", now.step)
            self._has_failed = True

    def at_end(self, now: Now) -> None:
        if now.is_last:
            self.run(now)

    def _texts(self, params: Any) -> dict[str, str]:
        config, tokenizer, texts = self._built.config, self._tokenizer, {}
        for index, prompt in enumerate(self._built.data.prompts):
            new = sample(
                params,
                self._built.spec,
                np.concatenate([[tokenizer.end_of_text], prompt]),
                seq_len=config.data.seq_len,
                num_tokens=config.sample_tokens,
                seed=index,
                stop=tokenizer.end_of_text,
            )
            texts[f"samples/{index + 1}"] = printable(tokenizer.decode(prompt) + tokenizer.decode(new))
        return texts


def _on_one_device(params: Any) -> Any | None:
    """Whole parameters on a device of the first process; None on the others, which help to gather them."""
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return jax.device_put(params, jax.local_devices()[0]) if jax.process_index() == 0 else None
