"""`gpt_pretrain.main` in a process of its own, writing down what it consumes.

    python -m support.recorded_run CONSUMED_FILE SECS_PER_STEP [flags of gpt_pretrain.main]

Each batch, as the training loop takes it, becomes a line "position windows... digest of its tokens" of the file.
"""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator

from gpt_pretrain import main, runtime


@contextlib.contextmanager
def recording(consumed: str | os.PathLike, secs_per_step: float = 0.0) -> Iterator[None]:
    """Runs in this process are recorded, and slowed down, in the block."""
    from gpt_pretrain.train import feed

    prefetch = feed.prefetch_to_devices

    def recorded(batches, placement, **kwargs):
        with open(consumed, "a") as file:
            for batch, tokens in prefetch(batches, placement, **kwargs):
                digest = hashlib.sha256(batch.tokens.tobytes()).hexdigest()
                windows = " ".join(map(str, batch.windows.reshape(-1)))
                file.write(f"{batch.position} {windows} {digest}\n")
                file.flush()
                time.sleep(secs_per_step)
                yield batch, tokens

    feed.prefetch_to_devices = recorded
    try:
        yield
    finally:
        feed.prefetch_to_devices = prefetch


if __name__ == "__main__":
    runtime.configure()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    program, consumed, secs_per_step, *flags = sys.argv
    sys.argv = [program, *flags]
    with recording(consumed, float(secs_per_step)):
        status = main.main()  # as the process's own command, which the time ledger counts from the process's start
    sys.exit(status)
