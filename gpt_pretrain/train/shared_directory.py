"""The directory of this machine that the processes of a run in a bucket share, and how they wait for one another."""

import secrets
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_pretrain.train.config import TrainConfig


def shared_token(config: TrainConfig) -> str:
    """A text that is the same in all processes. ValueError unless all of them see `config.directory`."""
    if jax.process_count() == 1:
        return ""
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(8), np.uint8))
    text = np.asarray(token).tobytes().hex()
    probe = Path(config.directory, f".shared-{text}")
    if jax.process_index() == 0:
        probe.touch()
    is_there = _is_seen(probe, secs=0.0 if jax.process_index() == 0 else 5.0, after=f"{text}/probe")
    everywhere = np.asarray(multihost_utils.process_allgather(np.bool_(is_there))).reshape(-1)
    if jax.process_index() == 0:
        probe.unlink(missing_ok=True)
    if not everywhere.all():
        blind, directory = ", ".join(map(str, np.flatnonzero(~everywhere))), config.directory
        raise ValueError(
            f"{config.save_dir}: the processes of a run in a bucket share a directory, and {directory} is not "
            f"the same one for process {blind} as for process 0. Set train.work_dir to a directory on a disk that "
            "all of them see."
        )
    return text


def _is_seen(probe: Path, *, secs: float, after: str) -> bool:
    if jax.process_index() == 0:
        say_to_others(after)
        return True
    wait_for_first_process(after)
    deadline = time.monotonic() + secs
    while not (found := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def say_to_others(what: str) -> None:
    if jax.process_count() > 1:
        _store_of_keys().key_value_set(f"gpt_pretrain/{what}", "yes")


def wait_for_first_process(what: str) -> None:
    """However long it takes: a computation would be given up after minutes."""
    while True:
        try:
            _store_of_keys().blocking_key_value_get(f"gpt_pretrain/{what}", 10_000)
            return
        except RuntimeError as error:  # JAX's own
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _store_of_keys():
    from jax._src import distributed  # it is not public

    client = distributed.global_state.client
    assert client is not None
    return client
