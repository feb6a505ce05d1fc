"""A text by the model at the end of a run."""

import logging

import jax
import numpy as np

from data_prep.pages.text import printable
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.train.actions.action import Action, Now
from gpt_pretrain.train.build import Built

log = logging.getLogger(__name__)


class PrintSample(Action):
    """Continues `train.sample_prompt` and prints it, when the run is complete."""

    def __init__(self, built: Built, prompt: np.ndarray):
        self._built, self._prompt = built, prompt

    def at_end(self, now: Now) -> None:
        if not now.is_last or jax.process_index() != 0:
            return
        if jax.process_count() > 1:
            log.info("No text sample: with several processes, use gpt_pretrain.generate on the checkpoint.")
            return
        config, tokenizer = self._built.config, self._built.data.tokenizer
        new = sample(
            jax.device_put(now.state.params, jax.devices()[0]),
            self._built.spec,
            np.concatenate([[tokenizer.end_of_text], self._prompt]),
            seq_len=config.data.seq_len,
            num_tokens=config.sample_tokens,
            stop=tokenizer.end_of_text,
        )
        text = printable(tokenizer.decode(self._prompt) + tokenizer.decode(new))
        print(f"\n--- a sample ---\n{text}\n----------------", flush=True)
