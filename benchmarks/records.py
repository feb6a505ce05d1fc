"""ArrayRecord compression: write speed, size and random-read speed, on real tokens, as one JSON line.

    python benchmarks/records.py --data_dir data/sample [--record_tokens 2048]

Takes turns (none, zstd, none, zstd ...), medians, one process, page-cached. Ratios are zstd to none.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

import numpy as np

from data_prep.store import manifest as manifest_lib
from data_prep.store.streams import read_tokens
from data_prep.store.token_bin import token_dtype
from data_prep.store.token_records import COMPRESSION, open_records, write_records


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--record_tokens", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--num_tokens", type=int, default=20_000_000)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    manifest = manifest_lib.load(args.data_dir)
    num_tokens = min(args.num_tokens, manifest.splits["train"].num_tokens)
    tokens = read_tokens(args.data_dir, manifest, "train", 0, num_tokens)
    dtype = token_dtype(manifest.spec.vocab_size)
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]]
    found = {name: {"write MB/s": [], "size": [], "records/s": []} for name in COMPRESSION}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            for name in COMPRESSION:
                path = f"{folder}/{name}-{turn}"
                start = time.perf_counter()
                write_records(
                    path, [tokens], num_tokens, record_tokens=args.record_tokens, dtype=dtype, compression=name
                )
                found[name]["write MB/s"].append(tokens.nbytes / 1e6 / (time.perf_counter() - start))
                found[name]["size"].append(os.path.getsize(path) / tokens.nbytes)
                reader = open_records([path], args.record_tokens, dtype)
                reader.read([0])
                start = time.perf_counter()
                for _ in range(20):
                    reader.read(rng.integers(0, len(reader), 1024))
                found[name]["records/s"].append(20 * 1024 / (time.perf_counter() - start))
    medians = {
        name: {what: round(statistics.median(v), 3) for what, v in values.items()} for name, values in found.items()
    }
    ratios = {what: round(medians["zstd"][what] / medians["none"][what], 2) for what in medians["none"]}
    print(json.dumps({"record_tokens": args.record_tokens, **medians, "zstd / none": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
