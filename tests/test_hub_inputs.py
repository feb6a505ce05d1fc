"""`hf://` inputs by the Hub's own client, from a server on this machine that breaks off in the middle of what it sends."""

import http.server
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.training_runs import REPO, environment

COMMIT = "c" * 40
FILES = ("texts/a.parquet", "texts/b.jsonl")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Two files of 1 MB each that do not compress."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    lines = ["".join(map(chr, rng.integers(97, 123, 5000))) for _ in range(400)]
    pq.write_table(pa.table({"text": lines[:200]}), folder / FILES[0], compression="none", row_group_size=50)
    (folder / FILES[1]).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[200:]))
    return folder


class Hub(http.server.ThreadingHTTPServer):
    """One dataset, me/texts. The first answers with a piece of a file, so many of each, end after half of it."""

    daemon_threads = True

    def __init__(self, folder: Path, *, num_broken: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.num_broken = folder, num_broken
        self.broken: Counter[str] = Counter()
        self.unknown: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_) -> None:
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/datasets/me/texts/resolve/[^/]+/(.*)", path):
            return self.file(match[1])
        if re.fullmatch(r"/api/datasets/me/texts(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in FILES]
            return self.send(200, json.dumps({"id": "me/texts", "sha": COMMIT, "siblings": siblings}).encode())
        if match := re.fullmatch(r"/api/datasets/me/texts/tree/[^/]+(/.*)?", path):
            below = (match[1] or "").strip("/")
            found = [self.entry(name) for name in FILES if name.startswith(f"{below}/" if below else "")]
            return self.send(200, json.dumps(found).encode())
        self.server.unknown.append(f"{self.command} {self.path}")
        self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not re.fullmatch(r"/api/datasets/me/texts/paths-info/[^/]+", self.path.partition("?")[0]):
            self.server.unknown.append(f"POST {self.path}")
            return self.send(404, b"{}")
        found = [self.entry(name) for name in FILES if name in body or name.replace("/", "%2F") in body]
        self.send(200, json.dumps(found).encode())

    def entry(self, name: str) -> dict:
        return {"type": "file", "path": name, "size": (self.server.folder / name).stat().st_size, "oid": "d" * 40}

    def file(self, name: str) -> None:
        content = (self.server.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.send(200, content, name=name, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(206, content[first : last + 1], name=name, **headers)

    def send(self, status: int, content: bytes, *, name: str = "", **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(content) < 10_000 or self.server.broken[name] == self.server.num_broken:
            self.wfile.write(content)
            return
        self.server.broken[name] += 1
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        time.sleep(0.05)
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_) -> None:
        pass


def prepare(inputs: str, out: Path, **variables: str) -> subprocess.CompletedProcess:
    options = ["--tokenizer=byte", "--val_tokens=10000", "--formats=bin", "--num_workers=1"]
    return subprocess.run(
        [sys.executable, "-m", "data_prep.fineweb", f"--input={inputs}", f"--output_dir={out}", *options],
        env=environment() | {"HF_HUB_DISABLE_TELEMETRY": "1", **variables},
        cwd=REPO,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.slow
def test_files_of_the_hub_that_break_off_are_read_to_their_end(texts, tmp_path):
    hub = Hub(texts, num_broken=2)
    try:
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        inputs = ",".join(f"hf://datasets/me/texts/{name}" for name in FILES)
        done = prepare(inputs, tmp_path / "remote", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"))
    finally:
        hub.shutdown()
    assert done.returncode == 0, (done.stderr, hub.unknown)
    assert hub.broken == {name: 2 for name in FILES}
    assert prepare(",".join(str(texts / name) for name in FILES), tmp_path / "local").returncode == 0
    shards = sorted(path.name for path in (tmp_path / "local").glob("*.bin"))
    assert shards
    for name in shards:
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
