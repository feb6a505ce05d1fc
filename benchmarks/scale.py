"""Opening a dataset of 150,000 shards (15 T tokens), to its first batch, as one JSON line.

    python benchmarks/scale.py [--num_shards 150000 --bucket --mixture 110]

Writes what a preparation would write of that size, but for the content: sparse files with a header each, and a
manifest. Times, in a process of its own: opening it, building order and plan, and the first batch of 512 windows in
each shuffle; and says how much memory that takes at most, how much of it is files that are mapped, and how many files
stay open. With --mixture, the shards are those of
so many datasets. With --bucket, they are served on loopback as S3 would, and the requests until the first batch are
counted; all blocks that it needs are equal, so one of them is fetched: what is measured is everything else.
"""

import argparse
import collections
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from blake3 import blake3

from data_prep.store import manifest as manifest_lib
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.manifest import DOCUMENTS, INDEX, Manifest, Shard, Split
from data_prep.store.names import blocks_name
from data_prep.store.spec import Spec

SHARD_TOKENS = 100_000_000
DIGEST = "0" * 64
NUM_INPUTS = 27_000
BATCH_SIZE, FIRST_INDEX = 512, 10**9
SHUFFLES = ("global", "block")


def write_dataset(folder: str, num_shards: int, name: str, num_inputs: int, digests: np.ndarray | None) -> None:
    """So many times 200 MB that take no room. `digests` of its blocks, where it is for a bucket."""
    os.makedirs(folder, exist_ok=True)
    paths = (f"CC-MAIN-2024-10/{number:05d}.parquet" for number in range(num_inputs))
    spec = Spec(
        source="benchmark",
        inputs=tuple({"path": path, "size": 2 << 30} for path in paths),
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
    shards, num_bytes = [], 12 + 2 * SHARD_TOKENS
    for number in range(num_shards):
        file_name = f"bench_train_{number:06d}.bin"
        with open(f"{folder}/{file_name}", "wb") as file:
            file.write(struct.pack("<3I", 20240520, 1, SHARD_TOKENS))
            file.truncate(num_bytes)
        shards.append(Shard(file_name, "bin", "train", SHARD_TOKENS, SHARD_TOKENS, num_bytes, DIGEST))
        for suffix, format in (("parquet", DOCUMENTS), ("index", INDEX)):
            file_name = f"documents_train_{number:06d}.{suffix}"
            shards.append(Shard(file_name, format, "train", SHARD_TOKENS, 150_000, 20_000_000, DIGEST))
    fingerprint = DIGEST
    if digests is not None:
        digests.tofile(f"{folder}/{blocks_name('train')}")
        fingerprint = blake3(digests.data.cast("B")).hexdigest()
    split = Split(num_shards * SHARD_TOKENS, num_shards * 150_000, fingerprint, 7.0)
    manifest_lib.save(Manifest(2, "bench", spec, {"train": split}, tuple(shards), name), folder)


def settings_of(root: str, num_datasets: int, shuffle: Any) -> dict[str, Any]:
    """Of a DataConfig that reads what lies below a directory or URL."""
    if num_datasets == 1:
        return {"dir": f"{root}/bench", "shuffle": shuffle}
    return {"mixture": {name: (f"{root}/{name}", 1.0) for name in names_of(num_datasets)}, "shuffle": shuffle}


def names_of(num_datasets: int) -> list[str]:
    return [f"bench{number:03d}" for number in range(num_datasets)] if num_datasets > 1 else ["bench"]


def digests_of(num_datasets: int, num_shards: int) -> Mapping[str, np.ndarray]:
    """Random ones for all blocks but those that the first batch needs: uint8 (num_blocks, 32) for each dataset."""
    from gpt_pretrain.data.config import DataConfig
    from gpt_pretrain.data.plan import Plan

    num_tokens, rng = num_shards * SHARD_TOKENS, np.random.default_rng(0)
    size = -(-num_tokens // BLOCK_TOKENS), 32
    digests = {name: rng.integers(0, 256, size, np.uint8) for name in names_of(num_datasets)}
    zeros = np.frombuffer(blake3(bytes(2 * BLOCK_TOKENS)).digest(), np.uint8)
    for shuffle in SHUFFLES:
        config = DataConfig(**settings_of("/x", num_datasets, shuffle))
        streams: Any = {
            key: SimpleNamespace(fingerprint=name, splits={"train": SimpleNamespace(num_tokens=num_tokens)})
            for key, name in zip(config.directories, names_of(num_datasets), strict=True)
        }
        stage = config.stage(streams, ((0, BATCH_SIZE),))
        batch = Plan((stage,)).batch(FIRST_INDEX)
        for index, name in enumerate(names_of(num_datasets)):
            first = batch.windows[batch.streams == index] * stage.seq_len
            digests[name][np.concatenate([first, first + stage.seq_len]) // BLOCK_TOKENS] = zeros
    return digests


def measure(root: str, num_datasets: int, cache_dir: str | None, shuffle: str) -> dict[str, float]:
    """In this process, from the first import on."""
    from gpt_pretrain.data.batches import Batches
    from gpt_pretrain.data.config import DataConfig
    from gpt_pretrain.data.fetching import FetchAhead
    from gpt_pretrain.data.plan import Plan

    if cache_dir:
        import s3fs  # noqa: F401

    imported, memory_before, began = time.perf_counter(), _memory_mib("VmHWM"), time.process_time()
    mapped_before = _memory_mib("RssFile")
    config = DataConfig(**settings_of(root, num_datasets, shuffle), cache_dir=cache_dir)
    datasets = config.open()
    opened = time.perf_counter()
    plan = Plan((config.stage(datasets, ((0, BATCH_SIZE),)),))
    planned = time.perf_counter()
    sources = {name: dataset.splits["train"] for name, dataset in datasets.items()}
    fetching = FetchAhead(sources, plan, first_index=FIRST_INDEX, num_steps=1)
    fetching.start()
    batch = Batches(sources, plan, vocab_size=50257, first_index=FIRST_INDEX, num_steps=1, on_step=fetching.at)[0]
    assert batch.tokens.shape == (1, BATCH_SIZE, 1025)
    done = time.perf_counter()
    fetching.close()
    return {
        "open_secs": opened - imported,
        "plan_secs": planned - opened,
        "first_batch_secs": done - planned,
        "total_secs": done - imported,
        "total_cpu_secs": time.process_time() - began,
        "memory_mib": _memory_mib("VmHWM") - memory_before,
        "mapped_mib": _memory_mib("RssFile") - mapped_before,
        "num_open_files": len(os.listdir("/proc/self/fd")),
    }


def _memory_mib(kind: str) -> float:
    """VmHWM: the peak, of this program alone (`ru_maxrss` begins with what its parent had). RssFile: of this, what is
    mapped of files now, which the kernel takes back when it needs room."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) / 1024


def _measured(root: str, args: argparse.Namespace, shuffle: str, cache_dir: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--mixture", str(args.mixture), "--measure", root, shuffle, cache_dir]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {name: round(value, 3) for name, value in answer.items()}


def _kinds(asked: list[str]) -> dict[str, int]:
    """How many requests there were for what."""
    kinds = {"manifest": manifest_lib.MANIFEST_NAME, "blocks": "blocks-", "shards": ".bin"}
    found = (next((kind for kind, part in kinds.items() if part in each), "others") for each in asked)
    return dict(collections.Counter(found), all=len(asked))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_shards", type=int, default=150_000, help="in all datasets together")
    parser.add_argument("--mixture", type=int, default=1, metavar="DATASETS", help="how many datasets there are")
    parser.add_argument("--bucket", action="store_true", help="from a bucket on loopback")
    parser.add_argument("--shuffle", choices=SHUFFLES, help="only this one")
    parser.add_argument("--measure", nargs=3, metavar=("ROOT", "SHUFFLE", "CACHE"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.measure:
        root, shuffle, cache_dir = args.measure
        print(json.dumps(measure(root, args.mixture, cache_dir or None, shuffle)))
        return
    with tempfile.TemporaryDirectory() as folder:
        num_shards = args.num_shards // args.mixture
        digests = digests_of(args.mixture, num_shards) if args.bucket else {}
        for name in names_of(args.mixture):
            write_dataset(f"{folder}/data/{name}", num_shards, name, NUM_INPUTS // args.mixture, digests.get(name))
        del digests
        size = sum(path.stat().st_size for path in Path(folder).glob(f"data/*/{manifest_lib.MANIFEST_NAME}"))
        found: dict[str, object] = {"num_shards": args.num_shards, "manifest_mb": round(size / 1e6, 1)}
        for shuffle in [args.shuffle] if args.shuffle else SHUFFLES:
            if not args.bucket:
                found[shuffle] = _measured(f"{folder}/data", args, shuffle, "")
                continue
            from cache import serving  # the benchmark beside this one

            asked: list[str] = []
            with serving(Path(folder, "data"), 0.0, 1e12, asked) as url:
                answer = _measured(url, args, shuffle, f"{folder}/cache-{shuffle}")
            found[shuffle] = answer | {"requests": _kinds(asked)}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
