"""Stands for the Hub: a server on this machine that speaks what huggingface_hub's client asks for a model."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "a" * 40


@contextlib.contextmanager
def hub_of(models: dict[str, Path], renamed: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub with these models, by id, and the files it has sent so far.

    Args:
      renamed: old ids, for which the Hub sends the client on.
    """
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer(with_body=True)

        def do_HEAD(self):
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0].removeprefix("/api/models").lstrip("/")
            for old, new in renamed.items():
                if path.startswith(f"{old}/"):
                    return self._send(307, b"", Location=self.path.replace(f"/{old}/", f"/{new}/", 1))
            name = next((name for name in models if path.startswith(f"{name}/")), None)
            if name is None:
                return self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
            files = sorted(models[name].iterdir())
            what, _, rest = path.removeprefix(f"{name}/").partition("/")
            if what == "revision":
                siblings = [{"rfilename": file.name} for file in files]
                return self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            if what == "tree":
                entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                return self._send(200, json.dumps(entries).encode())
            content = (models[name] / rest.partition("/")[2]).read_bytes()
            if with_body:
                sent.append(rest.partition("/")[2])
            self._send(200, content, with_body=with_body, **{"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"'})

        def _send(self, status: int, content: bytes, *, with_body: bool = True, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
