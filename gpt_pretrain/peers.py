"""The other processes of a run: noticed within seconds when one of them is gone.

A process that dies leaves the others waiting for it in a computation, in JAX's coordination service or in Orbax, each of
which gives up after minutes. So each process keeps a connection to the first one, on which nothing is said: it breaks
when a process is killed, and the kernel finds out within 20 s when a machine is lost. Who notices says so in one
line and ends at once, whatever its other threads wait for.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator

_DONE, _FAILED, _LOST = b"done", b"failed", b"lost"  # "lost 3": process 3 is gone
_GRACE_SECS = 5.0  # for a process that has the same error as one that failed, and says it itself
_CONNECT_SECS = 20.0


class Peers:
    """This process's watch over the others.

    Args:
      advice: what to do once a process is gone.
    """

    def __init__(self, process_id: int, num_processes: int, advice: str):
        self._id, self._num_processes, self._advice = process_id, num_processes, advice
        self._connections: dict[socket.socket, int] = {}
        self._lock = threading.Lock()

    def listen(self) -> int:
        """Of process 0: waits for the others in a thread; returns the port."""
        server = socket.create_server(("", 0))
        threading.Thread(target=self._accept, args=(server,), daemon=True, name="peers-accept").start()
        return server.getsockname()[1]

    def connect(self, host: str, port: int) -> None:
        """Of the others: connects to process 0. OSError where that cannot be."""
        connection = socket.create_connection((host, port), timeout=_CONNECT_SECS)
        connection.settimeout(None)
        _keep_alive(connection)
        connection.sendall(b"%d\n" % self._id)
        self._connections[connection] = 0
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def say_done(self) -> None:
        """This process has nothing left to do: its end is no loss."""
        self._say(_DONE)

    def say_failed(self) -> None:
        """This process ends with an error, which it prints."""
        self._say(_FAILED)

    def _say(self, word: bytes) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(word + b"\n")

    def _accept(self, server: socket.socket) -> None:
        with server:
            server.settimeout(_CONNECT_SECS)
            while len(self._connections) < self._num_processes - 1:
                try:
                    connection, _ = server.accept()
                    connection.settimeout(_CONNECT_SECS)
                    peer = int(_line(connection))
                except (OSError, ValueError):
                    # The others are there: JAX has met them. A network may let nothing else through.
                    print("Not all processes can be watched: a lost one is noticed after minutes.", flush=True)
                    break
                connection.settimeout(None)
                _keep_alive(connection)
                with self._lock:
                    self._connections[connection] = peer
        self._watch()

    def _watch(self) -> None:
        """Reads what the others say, until all have said that they are done."""
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    connection: socket.socket = key.fileobj  # pyright: ignore
                    try:
                        word, _, number = _line(connection).partition(b" ")
                    except OSError:
                        word, number = b"", b""
                    if word == _DONE:
                        selector.unregister(connection)  # kept open: it may still wait for us
                        continue
                    peer = int(number) if word == _LOST else self._connections[connection]
                    self._stop(peer, has_failed=word == _FAILED)

    def _stop(self, peer: int, *, has_failed: bool) -> None:
        if has_failed:
            time.sleep(_GRACE_SECS)
        if self._id == 0:
            self._say(_LOST + b" %d" % peer)
        what = (
            "ended with an error, which it has printed"
            if has_failed
            else "is gone: it was killed, or its machine or the network between is lost"
        )
        end_at_once(f"error: process {peer} of {self._num_processes} {what}. This one stops, too. {self._advice}")


def end_at_once(message: str, status: int = 1) -> None:
    """Says it and ends the process, whatever its threads wait for."""
    sys.stdout.flush()
    os.write(2, f"{message}\n".encode(errors="replace"))
    os._exit(status)


@contextlib.contextmanager
def limited(secs: float, message: str) -> Iterator[None]:
    """Ends the process where the block, which may be in C++, has not ended after that time."""
    ended = threading.Event()

    def watch() -> None:
        if not ended.wait(secs):
            end_at_once(message)

    threading.Thread(target=watch, daemon=True, name="time-limit").start()
    try:
        yield
    finally:
        ended.set()


def _line(connection: socket.socket) -> bytes:
    """What was said; empty where the other end is closed."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            return b""
        line += byte
    return line.strip()


def _keep_alive(connection: socket.socket) -> None:
    """Has the kernel ask every 5 s whether the other machine is there, and give up after three times."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
