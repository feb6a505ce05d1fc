"""User names, passwords and signatures of URLs are for fetching: nothing that is written or printed has them."""

import base64
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from support.prepared import write_parquet

from data_prep import check, convert, fineweb
from data_prep.store.manifest import load
from data_prep.store.secrets import Location, hide_secrets, public_name, whole_url
from data_prep.store.token_bin import write_tokens

SECRETS = ("hunter2", "s3cr3tsig", "hf_topsecret", "AKIASECRET", "n3wsig")
QUERY = "X-Amz-Credential=AKIASECRET&X-Amz-Signature=s3cr3tsig&token=hf_topsecret&version=2"


@pytest.fixture
def server(tmp_path):
    """Serves a folder to who has password and signature; the address, and the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    needed = "Basic " + base64.b64encode(b"alice:hunter2").decode()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def send_head(self):
            if self.headers.get("Authorization") != needed or "sig" not in self.path.lower():
                self.send_error(403)
                return None
            return super().send_head()

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{running.server_port}", folder
    running.shutdown()
    running.server_close()


def leaks(text: bytes | str) -> list[str]:
    content = text if isinstance(text, bytes) else text.encode()
    return [secret for secret in (*SECRETS, "alice") if secret.encode() in content]


def leaks_in(directory: Path) -> dict[str, list[str]]:
    found = {str(path): leaks(path.read_bytes()) for path in directory.rglob("*") if path.is_file()}
    return {path: secrets for path, secrets in found.items() if secrets}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_secret_of_an_input_is_written_or_printed_and_the_work_continues(
    server, tmp_path, monkeypatch, capfd, num_workers
):
    host, folder = server
    write_parquet(folder / "a.parquet", [f"text number {i}" for i in range(100)])
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"line {i}", "id": str(i)}) + "\n" for i in range(100)))
    out = tmp_path / "out"

    def options(signature):
        urls = [
            f"http://alice:hunter2@{host}/{name}?{QUERY.replace('s3cr3tsig', signature)}"
            for name in ("a.parquet", "b.jsonl")
        ]
        return [
            f"--input={','.join(urls)}",
            f"--output_dir={out}",
            "--tokenizer=byte",
            "--val_tokens=500",
            f"--num_workers={num_workers}",
        ]

    def stop(*_):
        raise ValueError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pipeline.save", stop)
        assert fineweb.main(options("s3cr3tsig")) == 1
    assert (out / ".work" / "spec.json").exists() and not leaks_in(out)
    assert fineweb.main(options("n3wsig")) == 0  # signed anew: it is the same file
    assert fineweb.main(options("s3cr3tsig")) == 0  # complete
    assert not leaks_in(out)
    assert [entry["path"] for entry in load(out).spec.inputs] == [
        f"http://{host}/{n}?version=2" for n in ("a.parquet", "b.jsonl")
    ]
    (out / "documents_train_000000.parquet").unlink()
    assert check.main([str(out), "--repair", "--num_workers=1"]) == 1
    captured = capfd.readouterr()
    assert "passwords and signatures of a URL are not recorded" in captured.err
    assert not leaks(captured.out + captured.err)


def test_no_secret_is_in_an_error(server, tmp_path, capfd):
    host, folder = server
    (folder / "cut.parquet").write_bytes(b"PAR1")
    (folder / "bad.jsonl").write_text("{")
    for name in ("missing.jsonl", "cut.parquet", "bad.jsonl", "bad.xyz", "*.jsonl", "bad.jsonl%00"):
        for user in ("alice:hunter2", "alice:hunter2wrong", "bob:hunter2/x"):
            url = f"http://{user}@{host}/{name}?{QUERY}"
            for more in ([], [f"--output_dir={tmp_path / 'out'}"]):
                assert fineweb.main([f"--input={url}", "--tokenizer=byte", "--num_workers=1", *more]) == 1
            assert fineweb.main([f"--input={url},{url}", f"--output_dir={tmp_path / 'out'}", "--num_workers=1"]) == 1
            assert convert.main([url, str(tmp_path / "converted"), "--num_workers=1"]) == 1
    captured = capfd.readouterr()
    assert captured.err.count("error: ") >= 60 and not leaks(captured.out + captured.err)
    assert not leaks_in(tmp_path / "out")


def test_no_secret_of_shards_made_elsewhere_is_written(server, tmp_path, capfd):
    host, folder = server
    write_tokens(folder / "x_train_0.bin", [np.tile(np.array([50256, 5, 6], np.uint16), 99)], 297)
    url = f"http://alice:hunter2@{host}/x_train_0.bin?{QUERY}"
    assert convert.main([url, str(tmp_path / "out"), "--num_workers=1"]) == 0
    assert not leaks_in(tmp_path / "out") and not leaks(capfd.readouterr().err)


@pytest.mark.parametrize(
    "url, name",
    [
        ("https://me:pw@host/a.parquet", "https://host/a.parquet"),
        ("https://hf_token@host/a.parquet", "https://host/a.parquet"),
        ("s3://key:secret@bucket/a.parquet?X-Amz-Security-Token=1", "s3://bucket/a.parquet"),
        ("https://host/a.parquet?sig=a%2Bb&se=2026&sv=1", "https://host/a.parquet"),
        ("https://host/a.parquet?download=true&unheard_of=1", "https://host/a.parquet?download=true"),
        ("https://host/a.parquet?version=eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIx", "https://host/a.parquet"),
        ("https://host/a.parquet#access_token=1", "https://host/a.parquet"),
        ("https://me:p/w@host/a.parquet", "https://host/a.parquet"),
        ("https://me:p@w@host:80/a.parquet", "https://host:80/a.parquet"),
        ("simplecache::https://me:pw@host/a.parquet?sig=1", "simplecache::https://host/a.parquet"),
        ("zip://a.parquet::https://me:pw@host/x.zip?sig=1", "zip://a.parquet::https://host/x.zip"),
        ("hf://datasets/a/b@main/c.parquet", "hf://datasets/a/b@main/c.parquet"),
        ("https://[::1]:80/p@1/a.parquet", "https://[::1]:80/p@1/a.parquet"),
        ("a?b#c@d.jsonl", "a?b#c@d.jsonl"),
        ("embedded://sample.parquet", "embedded://sample.parquet"),
    ],
)
def test_the_public_name_of_a_url(url, name):
    assert public_name(url) == name == str(Location(url)) and public_name(name) == name
    assert whole_url(Location(Location(url))) == url
    assert hide_secrets(f"cannot get '{url}', sorry") == f"cannot get '{name}', sorry" or "://" not in url
