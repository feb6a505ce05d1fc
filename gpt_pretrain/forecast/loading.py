"""How fast this machine's loader delivers the batches of a run."""

import glob
import os
import time

import numpy as np

from data_prep.store.buckets import is_bucket
from data_prep.store.dataset_files import reaches
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.loader import load
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.feed import fetch_ahead
from gpt_pretrain.train.start import Start


def is_there(data: DataConfig) -> bool:
    """Whether all that the configuration reads is on this machine, or in a bucket that it reaches."""
    paths = [data.dir] if data.mixture is None else [stream[0] for stream in data.mixture.values()]
    return all(reaches(path) if is_bucket(path) else os.path.exists(path) or bool(glob.glob(path)) for path in paths)


def offered_tokens_per_sec(built: Built, start: Start, *, max_secs: float = 3.0) -> float | None:
    """Of one process's rows, from the second batch on. What the run's own feed reads, but for the copy to devices.

    None for a run of one batch.
    """
    fetching = fetch_ahead(built, start)
    batches = Batches(
        built.data.sources("train"),
        start.plan,
        vocab_size=built.spec.vocab_size,
        first_index=start.step,
        num_steps=built.total_steps - start.step,
        rows_of=lambda batch_size: _rows_of_one_process(built, batch_size),
        on_step=fetching.at,
    )
    iterator = load(batches)
    next(iterator, None)
    num_tokens, started = 0, time.perf_counter()
    for batch in iterator:
        num_tokens += batch.tokens.shape[0] * batch.tokens.shape[1] * (batch.tokens.shape[2] - 1)
        if time.perf_counter() - started > max_secs:
            break
    fetching.close()
    return num_tokens / (time.perf_counter() - started) if num_tokens else None


def _rows_of_one_process(built: Built, batch_size: int) -> np.ndarray:
    """As `Placement.rows` has it, for devices that are not here: those of the first one's process."""
    layout, sharding = built.placement.layout(batch_size), built.placement.sharding
    process = built.mesh.devices.flat[0].process_index
    shape = (layout.num_microbatches, layout.microbatch)
    indices = sharding.devices_indices_map(shape)
    held = [index for device, index in indices.items() if device.process_index == process and index]
    rows = np.unique(np.concatenate([np.arange(layout.microbatch)[index[1]] for index in held]))
    return np.arange(layout.num_microbatches)[:, None] * layout.microbatch + rows
