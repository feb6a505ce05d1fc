"""Opening a dataset of 150,000 shards (15 T tokens), to its first batch, as one JSON line.

    python benchmarks/scale.py [--num_shards 150000]

Writes what a preparation would write of that size, but for the content: sparse files with a header each, and a
manifest. Times, in a process of its own: opening it, building order and plan, and the first batch of 512 windows in
each shuffle; and says how much memory that takes and how many files stay open.
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any

from data_prep.store import manifest as manifest_lib
from data_prep.store.manifest import DOCUMENTS, INDEX, Manifest, Shard, Split
from data_prep.store.spec import Spec

SHARD_TOKENS = 100_000_000
DIGEST = "0" * 64


def write_dataset(folder: str, num_shards: int) -> None:
    """150,000 times 200 MB that take no room."""
    spec = Spec(
        source="benchmark",
        inputs=tuple({"path": f"CC-MAIN-2024-10/{number:05d}.parquet", "size": 2 << 30} for number in range(27_000)),
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
        name = f"bench_train_{number:06d}.bin"
        with open(f"{folder}/{name}", "wb") as file:
            file.write(struct.pack("<3I", 20240520, 1, SHARD_TOKENS))
            file.truncate(num_bytes)
        shards.append(Shard(name, "bin", "train", SHARD_TOKENS, SHARD_TOKENS, num_bytes, DIGEST))
        for suffix, format in (("parquet", DOCUMENTS), ("index", INDEX)):
            name = f"documents_train_{number:06d}.{suffix}"
            shards.append(Shard(name, format, "train", SHARD_TOKENS, 150_000, 20_000_000, DIGEST))
    split = Split(num_shards * SHARD_TOKENS, num_shards * 150_000, DIGEST, 7.0)
    manifest_lib.save(Manifest(2, "bench", spec, {"train": split}, tuple(shards), "bench"), folder)


def measure(folder: str, shuffle: Any) -> dict[str, float]:
    """In this process, from the first import on."""
    from gpt_pretrain.data.batches import Batches
    from gpt_pretrain.data.config import DataConfig
    from gpt_pretrain.data.plan import Plan

    imported, memory_before, began = time.perf_counter(), _peak_memory_mib(), time.process_time()
    config = DataConfig(dir=folder, shuffle=shuffle)
    datasets = config.open()
    opened = time.perf_counter()
    plan = Plan((config.stage(datasets, ((0, 512),)),))
    planned = time.perf_counter()
    sources = {name: dataset.splits["train"] for name, dataset in datasets.items()}
    batch = Batches(sources, plan, vocab_size=50257, first_index=10**9, num_steps=1)[0]
    assert batch.tokens.shape == (1, 512, 1025)
    done = time.perf_counter()
    return {
        "open_secs": opened - imported,
        "plan_secs": planned - opened,
        "first_batch_secs": done - planned,
        "total_secs": done - imported,
        "total_cpu_secs": time.process_time() - began,
        "memory_mib": _peak_memory_mib() - memory_before,
        "num_open_files": len(os.listdir("/proc/self/fd")),
    }


def _peak_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_shards", type=int, default=150_000)
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "SHUFFLE"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, args.num_shards)
        size = os.path.getsize(f"{folder}/manifest.json")
        found: dict[str, object] = {"num_shards": args.num_shards, "manifest_mb": round(size / 1e6, 1)}
        for shuffle in ("global", "block"):
            command = [sys.executable, __file__, "--measure", folder, shuffle]
            answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            found[shuffle] = {name: round(value, 3) for name, value in answer.items()}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
