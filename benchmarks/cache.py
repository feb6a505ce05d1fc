"""Speed of the loader from the cache of a bucket: warm, against the files themselves; and while it fills.

    python benchmarks/cache.py [--blocks 64 --batches 3000 --latency_ms 20 --mb_per_sec 200]

Makes a dataset of random tokens and serves it on loopback as S3 would, after a pause for each request and no faster
than the given rate. First, from the page cache, files and a warm cache take turns (A B A B ...), medians of seven
turns. Then one epoch, in block shuffle, through a cache of a quarter of the dataset: time to the first batch, tokens a
second, and how many bytes came for each of the dataset's. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from data_prep.store import manifest
from data_prep.store.block_cache import BlockCache
from data_prep.store.blocks_file import write_blocks
from data_prep.store.datasets import TokenDataset, open_dataset
from data_prep.store.files import digest_of
from data_prep.store.fingerprints import BLOCK_TOKENS, block_digests, fingerprint
from data_prep.store.names import shard_name
from data_prep.store.spec import Spec
from data_prep.store.token_bin import write_tokens
from gpt_pretrain.data import loader
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.fetching import FetchAhead
from gpt_pretrain.data.order import Shuffle
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream

NUM_TURNS = 7
SHARD_TOKENS = 20_000_000
_BUCKET = "bucket/data"


def make_dataset(directory: Path, num_blocks: int) -> None:
    """Of random ids of 16 bits."""
    tokens = np.random.default_rng(0).integers(0, 50257, num_blocks * BLOCK_TOKENS).astype(np.uint16)
    firsts, shards = range(0, len(tokens), SHARD_TOKENS), []
    for index, first in enumerate(firsts):
        piece, name = tokens[first : first + SHARD_TOKENS], shard_name("bin", "train", index, len(firsts))
        write_tokens(directory / name, [piece], len(piece))
        path = directory / name
        shards.append(
            manifest.Shard(name, "bin", "train", len(piece), len(piece), path.stat().st_size, digest_of(path))
        )
    digests = list(block_digests([tokens]))
    write_blocks(directory, "train", digests)
    spec = Spec(
        source="random",
        inputs=(),
        tokenizer="gpt2",
        tokenizer_digest="",
        vocab_size=50257,
        end_of_text=50256,
        text_column="text",
        formats=("bin",),
        bin_header="short",
        shard_tokens=SHARD_TOKENS,
        record_tokens=2048,
        record_compression="none",
        val_tokens=0,
    )
    splits = {"train": manifest.Split(len(tokens), 0, fingerprint(digests), 1.0)}
    whole = manifest.dataset_fingerprint(splits, "")
    manifest.save(manifest.Manifest(manifest.FORMAT_VERSION, "fineweb", spec, splits, tuple(shards), whole), directory)


@contextlib.contextmanager
def serving(
    directory: Path, latency_secs: float, bytes_per_sec: float, asked: list[str] | None = None
) -> Iterator[str]:
    """The files below a directory as objects of an S3 bucket, read only; gives its URL.

    Args:
      asked: gets the method and path of each request.
    """
    lock, free_at = threading.Lock(), [0.0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format, *args) -> None:
            pass

        def do_GET(self) -> None:
            time.sleep(latency_secs)
            if asked is not None:
                asked.append(f"{self.command} {self.path}")
            path = directory / self.path.partition("?")[0].removeprefix(f"/{_BUCKET}/")
            if "list-type" in self.path or not path.is_file():
                found = "list-type" in self.path
                body = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>" if found else b""
                return self.answer(200 if found else 404, {}, body)
            size = path.stat().st_size
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            first = int(match[1]) if match else 0
            last = min(size - 1, int(match[2])) if match and match[2] else size - 1
            headers = {"etag": f'"{size:x}"', "last-modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
            if match:
                headers["content-range"] = f"bytes {first}-{last}/{size}"
            if self.command == "HEAD":
                return self.answer(200, headers | {"content-length": str(size)}, b"")
            with open(path, "rb") as file:
                file.seek(first)
                self.answer(206 if match else 200, headers, file.read(last - first + 1))

        do_HEAD = do_GET

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in ({"content-length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            for begin in range(0, len(body), 1 << 18):
                piece = body[begin : begin + (1 << 18)]
                with lock:  # all connections share one line
                    now = time.monotonic()
                    free_at[0] = max(now, free_at[0]) + len(piece) / bytes_per_sec
                    pause = free_at[0] - now
                time.sleep(pause)
                self.wfile.write(piece)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield f"s3://{_BUCKET}"
    finally:
        server.shutdown()


def plan_of(dataset: TokenDataset, args, shuffle: Shuffle) -> Plan:
    stream = Stream("", dataset.fingerprint, dataset.splits["train"].num_tokens)
    stage = Stage(
        seed=0,
        seq_len=args.seq_len,
        batch_sizes=((0, args.batch_size),),
        streams=(stream,),
        shuffle=shuffle,
        block_windows=BLOCK_TOKENS // args.seq_len,
        group_blocks=args.group_blocks,
    )
    return Plan((stage,))


def tokens_per_sec(dataset: TokenDataset, args, num_steps: int, shuffle: Shuffle) -> tuple[float, float]:
    """(of the loader, from its first batch on, as the trainer iterates it; seconds to that batch)"""
    plan, source = plan_of(dataset, args, shuffle), dataset.splits["train"]
    started = time.perf_counter()
    fetching = FetchAhead({"": source}, plan, first_index=0, num_steps=num_steps)
    fetching.start()
    batches = Batches({"": source}, plan, vocab_size=2**16, num_steps=num_steps, on_step=fetching.at)
    iterator = loader.load(batches)
    next(iterator)
    first_secs = time.perf_counter() - started
    count = sum(1 for _ in iterator)
    rate = count * args.batch_size * args.seq_len / (time.perf_counter() - started - first_secs)
    fetching.close()
    return rate, first_secs


def warm(folder: Path, url: str, args) -> dict[str, float]:
    cache = BlockCache(folder / "warm")
    there, here = open_dataset(url, cache=cache), open_dataset(str(folder / "data"))
    source = there.splits["train"]
    list(cache.threads.map(source.bring, range(args.blocks)))  # pyright: ignore[reportAttributeAccessIssue]
    results = {}
    orders: tuple[Shuffle, ...] = ("global", "block")
    for shuffle in orders:
        rates: dict[str, list[float]] = {"files": [], "cache": []}
        for turn in range(NUM_TURNS + 1):
            for name, dataset in (("files", here), ("cache", there)):
                rate, _ = tokens_per_sec(dataset, args, args.batches, shuffle)
                if turn:  # the first one maps and compares digests
                    rates[name].append(rate)
        files, cached = (statistics.median(each) / 1e6 for each in rates.values())
        print(f"{shuffle} shuffle: files {files:.1f}, warm cache {cached:.1f} M tokens/s: {cached / files:.2f}")
        results |= {f"{shuffle}_files": files, f"{shuffle}_warm": cached, f"{shuffle}_ratio": cached / files}
    return results


def filling(folder: Path, url: str, args) -> dict[str, float]:
    num_bytes = args.blocks * BLOCK_TOKENS * 2
    cache = BlockCache(folder / "quarter", num_bytes // 4)
    dataset = open_dataset(url, cache=cache)
    num_steps = args.blocks * BLOCK_TOKENS // (args.seq_len * args.batch_size)
    before, began = cache.meter.read()[0], time.perf_counter()
    rate, first_secs = tokens_per_sec(dataset, args, num_steps, "block")
    secs = time.perf_counter() - began
    fetched = cache.meter.read()[0] - before
    ratio = fetched / num_bytes
    print(
        f"an epoch through a quarter: first batch after {first_secs:.2f} s, then {rate / 1e6:.1f} M tokens/s; "
        f"{ratio:.2f} bytes came for each of the dataset, at {fetched / secs / 1e6:.0f} MB/s of {args.mb_per_sec:g}"
    )
    return {"first_batch_secs": first_secs, "filling": rate / 1e6, "fetched_ratio": ratio, "mb_s": fetched / secs / 1e6}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--group_blocks", type=int, default=4)
    parser.add_argument("--latency_ms", type=float, default=20)
    parser.add_argument("--mb_per_sec", type=float, default=200)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cache-"))
    try:
        (folder / "data").mkdir()
        make_dataset(folder / "data", args.blocks)
        with serving(folder / "data", args.latency_ms / 1e3, args.mb_per_sec * 1e6) as url:
            results = warm(folder, url, args) | filling(folder, url, args)
        print(json.dumps({name: round(value, 3) for name, value in results.items()}))
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
