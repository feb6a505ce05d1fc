"""TensorBoard's event files, without TensorFlow."""

import os
import textwrap
import time
from typing import Any

import numpy as np
from tensorboardX import summary as tb_summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)

from gpt_pretrain.train.writers.base import RunWriter
from gpt_pretrain.train.writers.heat_maps import pictures_of

# What the HPARAMS tab shows of a run beside its settings: the last value of each.
HPARAMS_METRICS = ("train/loss", "train/accuracy", "validation/loss", "validation/accuracy")


class TensorBoardWriter(RunWriter):
    """Writes a TensorBoard event file, without TensorFlow.

    Args:
      logdir: created if needed; a resumed run takes the same one and gets a new file in it.
      purge_step: TensorBoard hides what earlier files hold for this step and later ones, so that
        the curves of a killed and resumed run do not double up. None hides nothing.
    """

    FLUSH_INTERVAL_SECS = 10.0  # What a killed process can lose, if nobody calls `flush()`.

    def __init__(self, logdir: str | os.PathLike[str], *, purge_step: int | None = None):
        os.makedirs(logdir, exist_ok=True)
        # Not tensorboardX.SummaryWriter: its flush() does not wait for the events in its queue.
        # Nanoseconds, as the rest of the name is in seconds and a name used twice is overwritten.
        self._events = EventsWriter(os.path.join(logdir, "events"), f".{time.time_ns()}")
        self._flushed_at_secs = time.monotonic()
        if purge_step is not None:
            self._write_event(purge_step, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed_at_secs > self.FLUSH_INTERVAL_SECS:
            self.flush()

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self._write_event(step, summary=tb_summary.scalar(name, value))
        if pictures := pictures_of(scalars):
            self.write_images(step, pictures)

    def write_texts(self, step, texts):
        """TensorBoard takes texts for Markdown; indented, they are shown as they are."""
        for name, text in texts.items():
            self._write_event(step, summary=tb_summary.text(name, textwrap.indent(text, "    ")))

    def write_images(self, step, images):
        """Of (height, width, channels) arrays."""
        for name, image in images.items():
            self._write_event(step, summary=tb_summary.image(name, np.asarray(image), dataformats="HWC"))

    def write_histograms(self, step, arrays, num_buckets=None):
        for name, array in arrays.items():
            bins = (num_buckets or {}).get(name) or 30
            self._write_event(step, summary=tb_summary.histogram(name, array, bins))

    def write_hparams(self, hparams):
        kinds = (bool, int, float, str)
        flat = {name: x if isinstance(x, kinds) else str(x) for name, x in hparams.items()}
        # The third summary says that the run has ended.
        for summary in tb_summary.hparams(flat, dict.fromkeys(HPARAMS_METRICS, 0.0))[:2]:
            self._write_event(0, summary=summary)

    def flush(self):
        self._events.flush()
        self._flushed_at_secs = time.monotonic()

    def close(self):
        self._events.close()
