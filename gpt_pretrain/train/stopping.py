"""Stopping on SIGTERM or Ctrl-C: after the step, with a checkpoint; at the second signal, at once."""

import os
import signal
import threading
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Notes SIGTERM and SIGINT while it is entered.

    A thread is woken through a pipe, so signals are seen even while the main thread is inside a long
    compilation, where a Python signal handler would not run.

    Attributes:
      received: the number of the first signal, or None.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        threading.Thread(target=self._watch, daemon=True, name="stop-signal").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._writer)  # ends the thread

    def _watch(self) -> None:
        while data := os.read(self._reader, 1):
            number = data[0]
            if number not in _SIGNALS:
                continue
            name = signal.Signals(number).name
            if self.received is not None:
                print(f"\nSecond signal ({name}): stopping at once, without saving.", flush=True)
                os._exit(128 + number)
            self.received = number
            print(f"\n{name}: finishing this step, then saving. Once more to stop at once.", flush=True)
        os.close(self._reader)


class Agreement:
    """Lets all processes stop after the same step, whichever of them got the signal.

    Each step sends every process's flag through a tiny reduction that is read one step later, so nobody
    waits. With one process there is nothing to agree on and nothing is sent.
    """

    def __init__(self, mesh: Mesh):
        self._several = jax.process_count() > 1
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._num_devices = mesh.size
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._pending: jax.Array | None = None

    def should_stop(self, wanted: bool) -> bool:
        """Call once a step. True in every process at the same step, once any of them wanted it."""
        if not self._several:
            return wanted
        previous = self._pending
        everywhere = np.full(self._num_devices, wanted)
        flags = jax.make_array_from_callback(everywhere.shape, self._sharding, lambda index: everywhere[index])
        self._pending = self._any(flags)
        return previous is not None and bool(previous)
