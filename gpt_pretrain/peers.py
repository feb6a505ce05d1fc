"""The other processes of a run: noticed within seconds when one of them is gone.

A process that dies leaves the others waiting for it in a computation, in JAX's coordination service or in Orbax, each
of which gives up after minutes, with a trace of its C++. So each process has a small helper, and the helpers keep
connections to the first one's, on which nothing is said: they break when a process is killed, and the kernel finds
out within 20 s when a machine is lost. The helper that notices says so in one line and kills its process, whatever
that waits for. A thread could not: it would need the interpreter, which a compilation may hold.

This file is also the helper's program; it needs the standard library alone, so that it starts at once.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
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
        self._arguments = [str(process_id), str(num_processes), advice]
        self._helper: subprocess.Popen[bytes] | None = None

    def listen(self) -> int:
        """Of process 0: the port at which it meets the others."""
        return int(self._start("0"))

    def connect(self, host: str, port: int) -> None:
        """Of the others: meets process 0. OSError where that cannot be."""
        if answer := self._start(f"{host}:{port}"):
            raise OSError(answer)

    def _start(self, where: str) -> str:
        self._helper = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, where, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
        assert self._helper.stdout
        return self._helper.stdout.readline().decode().strip()

    def say_done(self) -> None:
        """This process has nothing left to do: its end is no loss."""
        self._say(_DONE)

    def say_failed(self) -> None:
        """This process ends with an error, which it prints."""
        self._say(_FAILED)

    def _say(self, word: bytes) -> None:
        assert self._helper and self._helper.stdin
        with contextlib.suppress(OSError):
            self._helper.stdin.write(word + b"\n")
            self._helper.stdin.flush()


def end_at_once(message: str) -> None:
    """Says it and ends the process, whatever its threads wait for."""
    sys.stdout.flush()
    os.write(2, f"{message}\n".encode(errors="replace"))
    os._exit(1)


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


# ---- the helper ----


class _Helper:
    """Meets the helpers of the other processes, and waits for what they and its own process say."""

    def __init__(self, process_id: int, num_processes: int, advice: str):
        self._id, self._num_processes, self._advice = process_id, num_processes, advice
        self._process = os.getppid()
        self._connections: dict[socket.socket, int] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        self._server: socket.socket | None = None

    def listen(self) -> int:
        if socket.has_dualstack_ipv6():
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._server = socket.create_server(("", 0))
        self._selector.register(self._server, selectors.EVENT_READ)
        return self._server.getsockname()[1]

    def connect(self, host: str, port: int) -> None:
        connection = socket.create_connection((host, port), timeout=_CONNECT_SECS)
        connection.sendall(b"%d\n" % self._id)
        self._add(connection, 0)

    def _add(self, connection: socket.socket, peer: int) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        self._connections[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)

    def watch(self) -> None:
        """Until our process is gone; then the others see our connections break."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin.buffer:
                    if not (word := os.read(0, 100).strip()):
                        return
                    self._say(word)
                elif key.fileobj is self._server:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)

    def _accept(self) -> None:
        assert self._server
        with contextlib.suppress(OSError, ValueError):
            connection, _ = self._server.accept()
            connection.settimeout(_CONNECT_SECS)
            self._add(connection, int(_line(connection)))

    def _hear(self, connection: socket.socket) -> None:
        try:
            word, _, number = _line(connection).partition(b" ")
        except OSError:
            word, number = b"", b""
        if word == _DONE:
            self._selector.unregister(connection)  # kept open: that process may still wait for ours
            return
        peer = int(number) if word == _LOST else self._connections[connection]
        self._stop(peer, has_failed=word == _FAILED)

    def _say(self, word: bytes) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(word + b"\n")

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
        if os.getppid() == self._process:  # else it has ended by itself
            message = f"error: process {peer} of {self._num_processes} {what}. This one stops, too. {self._advice}\n"
            os.write(2, message.encode(errors="replace"))
            os.kill(self._process, signal.SIGKILL)
        os._exit(0)


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


def _main(where: str, process_id: str, num_processes: str, advice: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler tells all processes; ours ends when it is ready
        signal.signal(number, signal.SIG_IGN)
    helper = _Helper(int(process_id), int(num_processes), advice)
    try:
        if process_id == "0":
            answer = str(helper.listen())
        else:
            host, _, port = where.rpartition(":")
            helper.connect(host, int(port))
            answer = ""
    except OSError as error:
        print(error, flush=True)
        return
    print(answer, flush=True)
    helper.watch()


if __name__ == "__main__":
    _main(*sys.argv[1:])
