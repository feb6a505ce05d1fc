"""How often each of many documents was seen, and where words are in many tokens, as one JSON line.

    python benchmarks/exposures.py [--num_tables 100] [--num_tokens 400e6]

Tables of documents are those of `documents.py`: 150,000 documents for each 100 M tokens, without the tokens, which
exposures do not need: the plan of one epoch in batches of 512 x 1,024 is counted through. The search is for two texts
of three and four tokens in one .bin file that is in memory, with one thread and with two, in turns.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time

import numpy as np

from data_prep.store import manifest as manifest_lib
from data_prep.store import token_bin
from data_prep.store.manifest import Manifest, Split
from data_prep.store.token_sources import BinSource
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.run import RunData
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.history import text_search
from gpt_pretrain.history.exposures import write_exposures
from gpt_pretrain.history.opened_run import OpenedRun

_TURNS = 3


def exposures(folder: str, num_tables: int) -> dict[str, float]:
    """Seconds of wall and processor time, and the peak of memory."""
    from documents import NUM_ROWS, SHARD_TOKENS, SPEC, write_table  # the script beside this one

    rng = np.random.default_rng(0)
    shards = [shard for index in range(num_tables) for shard in write_table(folder, index, rng)]
    split = Split(num_tables * SHARD_TOKENS, num_tables * NUM_ROWS, "f" * 64, 0.0)
    manifest_lib.save(
        Manifest(manifest_lib.FORMAT_VERSION, "fineweb", SPEC, {"train": split}, tuple(shards), "f" * 64), folder
    )
    fingerprint = manifest_lib.load(folder).fingerprint
    stage = Stage(0, 1024, ((0, 512),), (Stream("", fingerprint, split.num_tokens),))
    plan = Plan((stage,))
    num_steps = plan.num_steps(split.num_tokens)
    save_dir = os.path.join(folder, "run")
    os.makedirs(save_dir)
    RunData(save_dir, plan, {"": folder, fingerprint: folder}, num_steps).write()
    start, cpu = time.perf_counter(), time.process_time()
    found = write_exposures(OpenedRun(save_dir), os.path.join(folder, "exposures.parquet"), num_steps)
    assert found.num_documents == num_tables * NUM_ROWS
    return {
        "documents": found.num_documents,
        "wall, s": round(time.perf_counter() - start, 1),
        "processor, s": round(time.process_time() - cpu, 1),
        "peak of memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def search(folder: str, num_tokens: int) -> dict[str, float]:
    """Tokens a second, in billions, with one thread and with two: medians of turns."""
    tokens = np.random.default_rng(0).zipf(1.3, num_tokens)
    tokens = (tokens % 50_000).astype("<u2")
    path = os.path.join(folder, "tokens.bin")
    token_bin.write_tokens(path, [tokens], num_tokens)
    source = BinSource([path])
    patterns = [tokens[1000:1004].tolist(), tokens[5000:5003].tolist()]
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(_TURNS):
        for threads, found in speeds.items():
            text_search._THREADS = threads
            start = time.perf_counter()
            text_search.places_of(source, patterns)
            found.append(num_tokens / (time.perf_counter() - start) / 1e9)
    return {f"{threads} threads, B tokens/s": round(statistics.median(each), 2) for threads, each in speeds.items()}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_tables", type=int, default=100)
    parser.add_argument("--num_tokens", type=float, default=400e6)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {"exposures": exposures(folder, args.num_tables)}
    with tempfile.TemporaryDirectory() as folder:
        found["search"] = search(folder, int(args.num_tokens))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
