"""An HTTP proxy between a client and one server, which breaks what goes through it as it is told."""

import http.client
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ALWAYS = 1 << 30


@dataclass
class Request:
    method: str
    path: str  # with its query
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.path.partition("?")[2], keep_blank_values=True))


@dataclass
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass
class Fault:
    """What happens to the next `times` requests that fit, after `skip` others that do.

    status: that answer, with `body`. reset: the connection is reset before the server sees the request. lost: the
    server does what is asked, and the answer is lost. silent: no answer for `secs`. truncated: half of the body, then
    the connection ends. short: half of the body, as if it were all. wrong: other bytes in the answer.
    damaged: other bytes in the request.
    """

    kind: str
    status: int = 503
    body: bytes = b""
    secs: float = 0.0
    times: int = 1
    skip: int = 0
    method: str = ""
    having: str = ""  # part of the path and query
    content_type: str = "application/json"

    def fits(self, request: Request) -> bool:
        if self.method not in ("", request.method) or self.having not in request.path:
            return False
        self.skip -= 1
        return self.skip < 0


@dataclass
class FaultProxy:
    """`rules` is asked instead of the server, with a function that asks the server."""

    host: str
    port: int
    rules: Callable[[Request, Callable[[Request], Reply]], Reply]
    faults: list[Fault] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def fault_of(self, request: Request) -> Fault | None:
        with self.lock:
            self.seen.append(request)
            for fault in self.faults:
                if fault.fits(request):
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def ask_server(self, request: Request) -> Reply:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            headers = {name: text for name, text in request.headers.items() if name not in ("connection", "expect")}
            connection.request(request.method, request.path, request.body or None, headers)
            response = connection.getresponse()
            body = response.read()
            return Reply(response.status, {name.lower(): text for name, text in response.getheaders()}, body)
        finally:
            connection.close()


@contextmanager
def running(proxy: FaultProxy) -> Iterator[FaultProxy]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer: in two, the second waits for the first to be acknowledged
        disable_nagle_algorithm = True

        def log_message(self, *_) -> None:
            pass

        def handle_expect_100(self) -> bool:
            super().handle_expect_100()
            self.wfile.flush()
            return True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): text for name, text in self.headers.items()}
            request = Request(self.command, self.path, headers, body)
            fault = proxy.fault_of(request)
            kind = fault.kind if fault else ""
            if fault and kind == "status":
                return self.send(Reply(fault.status, {"content-type": fault.content_type}, fault.body))
            if fault and kind == "silent":
                proxy.ended.wait(fault.secs)
                return self.hang_up()
            if kind == "reset":
                return self.hang_up()
            if kind == "damaged":
                request.body = flipped(body)
            try:
                reply = proxy.rules(request, proxy.ask_server)
            except Exception as error:  # of the rules themselves, or the emulator
                reply = Reply(501, {"content-type": "text/plain"}, f"{request.path}: {error!r}".encode())
            if kind == "lost":
                return self.hang_up()
            if kind == "wrong":
                reply.body = flipped(reply.body)
            if kind == "short":
                reply.body = reply.body[: len(reply.body) // 2]
            self.send(reply, cut=kind == "truncated")

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def send(self, reply: Reply, *, cut: bool = False) -> None:
            self.send_response_only(reply.status)
            for name, text in reply.headers.items():
                if name not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                    self.send_header(name, text)
            length = reply.headers.get("content-length", "0") if self.command == "HEAD" else str(len(reply.body))
            if reply.status != 204:
                self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[: len(reply.body) // 2] if cut else reply.body)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            time.sleep(0.01)
            # A reset, not an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_) -> None:
            pass  # clients hang up, and are hung up on

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        proxy.ended.set()
        server.shutdown()
        server.server_close()


def flipped(body: bytes) -> bytes:
    """With another byte in the middle of its longest line, which is content and no header."""
    if not body:
        return body
    place = body.find(max(body.split(b"\n"), key=len)) + len(max(body.split(b"\n"), key=len)) // 2
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
