"""Speed of the loader alone, against plain gathers from the same file, as one JSON line.

    python benchmarks/loader.py --data_dir data/sample [--seq_len 1024 --batch_size 64 --batches 300]

Each contender produces batches of random windows on one core, in turns (A B C D A B C D ...): medians of five turns, in
million tokens per second, and each one's ratio to the bare gather.
"""

import argparse
import json
import statistics
import sys
import time

import numpy as np

from gpt_pretrain.data import loader
from gpt_pretrain.data.token_sources import open_dataset

NUM_TURNS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=300)
    args = parser.parse_args()
    sources = {name: open_dataset(args.data_dir, format=name).splits["train"] for name in ("bin", "array_record")}
    num_windows = loader.num_windows(sources["bin"], args.seq_len)

    def bare_gather():
        rng = np.random.default_rng(0)
        for _ in range(args.batches):
            yield sources["bin"].read(rng.integers(0, num_windows, args.batch_size) * args.seq_len, args.seq_len + 1)

    def one_row_at_a_time():
        """What a `get_batch` in Python does: slice, convert and stack each row."""
        rng = np.random.default_rng(0)
        for _ in range(args.batches):
            starts = rng.integers(0, num_windows, args.batch_size) * args.seq_len
            rows = [
                sources["bin"].read(starts[i : i + 1], args.seq_len + 1)[0].astype(np.int64) for i in range(len(starts))
            ]
            yield np.stack([row[:-1] for row in rows]), np.stack([row[1:] for row in rows])

    def grain_loader(name):
        batches = loader.Batches(
            sources[name], seed=0, seq_len=args.seq_len, vocab_size=2**16, num_microbatches=1,
            microbatch=args.batch_size, num_batches=args.batches,
        )  # fmt: skip
        return loader.load(batches)

    contenders = {
        "bare gather": bare_gather,
        "loader, .bin": lambda: grain_loader("bin"),
        "loader, ArrayRecord": lambda: grain_loader("array_record"),
        "row by row": one_row_at_a_time,
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(NUM_TURNS):
        for name, make in contenders.items():
            start = time.perf_counter()
            for _ in make():
                pass
            num_tokens = args.batches * args.batch_size * args.seq_len
            speeds[name].append(num_tokens / (time.perf_counter() - start) / 1e6)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    base = medians["bare gather"]
    print(json.dumps({name: {"M tokens/s": round(m, 1), "ratio": round(m / base, 3)} for name, m in medians.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
