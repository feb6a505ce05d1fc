"""Speed of preparing data, whole pipelines side by side, as one JSON line.

    python benchmarks/prepare.py 'texts/*.parquet' [--copies 4] [--turns 3] [--num_workers 2]

In turns (A B A B ...), medians: wall-clock seconds of
  data_prep   `data_prep.fineweb`: parquet -> .bin and ArrayRecord, digests, documents tables, index, card, manifest
  start-up    the same on the first 50 documents: processes, imports, tokenizer
  plain loop  two processes that each take every second file: parquet -> tiktoken -> one .bin file, nothing else

`--copies K` enlarges the corpus: in each further copy one word in 60 is respelled, so that new words, which cost a
tokenizer's cache most, keep coming at the rate of the second half of the original.

Ratios are net of each one's start-up. Peak memory is the sum of all processes' proportional shares (PSS). `--profile`
prints where one worker's time goes instead.
"""

import argparse
import glob
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import pyarrow.parquet as pq

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
PLAIN = """
import sys, numpy as np, pyarrow.parquet as pq
from multiprocessing import Process
from data_prep.store.tokenizers import user_tokenizer

def write(paths, out):
    encode = user_tokenizer("gpt2")._encoding.encode_to_numpy
    with open(out, "wb") as file:
        file.write(np.zeros(256, "<u4").data)
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
                for text in batch["text"].to_pylist():
                    ids = encode(text, disallowed_special=())
                    file.write(np.array([50256], "<u2").data)
                    file.write(ids.astype("<u2").data)

if __name__ == "__main__":
    out, n, *paths = sys.argv[1:]
    jobs = [Process(target=write, args=(paths[i :: int(n)], f"{out}/{i}.bin")) for i in range(int(n))]
    [job.start() for job in jobs]
    [job.join() for job in jobs]
"""


def total_pss(group: int) -> int:
    """Bytes that the processes of a process group have to themselves, shared pages divided."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getpgid(int(pid)) == group:
                with open(f"/proc/{pid}/smaps_rollup") as file:
                    total += next(int(line.split()[1]) for line in file if line.startswith("Pss:")) << 10
        except (OSError, StopIteration):
            continue
    return total


def measure(command: list[str]) -> tuple[float, float, int]:
    """Runs the command; (wall-clock seconds, CPU seconds with its children's, peak bytes)."""
    peak = 0
    start = time.monotonic()
    before = os.times()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        nonlocal peak
        while process.returncode is None:
            peak = max(peak, total_pss(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    secs = time.monotonic() - start
    watcher.join()
    after = os.times()
    assert status == 0, command
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return secs, cpu, peak


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    paths = sorted(glob.glob(args.pattern))
    folder = tempfile.mkdtemp(prefix="prepare-")
    try:
        paths += [respelled(path, copy, folder) for copy in range(1, args.copies) for path in paths]
        print(json.dumps(compare(paths, folder, args)) if not args.profile else profile(paths, folder))
    finally:
        shutil.rmtree(folder)
    return 0


def respelled(path: str, copy: int, folder: str) -> str:
    """A copy of a file in which one word in 60 has its letters replaced."""
    rng = random.Random(f"{copy}/{os.path.basename(path)}")
    out = f"{folder}/{copy}-{os.path.basename(path)}"
    file = pq.ParquetFile(path)
    with pq.ParquetWriter(out, file.schema_arrow) as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            texts = []
            for text in table["text"].to_pylist():
                words = text.split(" ")
                first = rng.randrange(60)
                words[first::60] = ["".join(rng.choices(LETTERS, k=len(word))) for word in words[first::60]]
                texts.append(" ".join(words))
            writer.write_table(table.set_column(0, "text", [texts]))
    return out


def compare(paths: list[str], folder: str, args: argparse.Namespace) -> dict:
    """The measurements."""
    num_bytes = 0
    for path in paths:
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
            num_bytes += len(text.encode())
    few = f"{folder}/few.parquet"
    pq.write_table(pq.ParquetFile(paths[0]).read_row_group(0).slice(0, 50), few)

    def prepare(inputs: list[str]) -> list[str]:
        out = tempfile.mkdtemp(dir=folder)
        flags = [f"--input={','.join(inputs)}", f"--output_dir={out}", f"--num_workers={args.num_workers}"]
        return [sys.executable, "-m", "data_prep.fineweb", *flags, "--val_tokens=1000"]

    def plain(inputs: list[str]) -> list[str]:
        out = tempfile.mkdtemp(dir=folder)
        script = f"{folder}/plain.py"  # not -c: its processes import it again
        with open(script, "w") as file:
            file.write(PLAIN)
        return [sys.executable, script, out, str(args.num_workers), *inputs]

    os.environ["PYTHONPATH"] = os.getcwd()
    runs: dict[str, list[tuple[float, float, int]]] = {
        "data_prep": [],
        "start-up": [],
        "plain loop": [],
        "plain start-up": [],
    }
    for _ in range(args.turns):
        runs["data_prep"].append(measure(prepare(paths)))
        runs["plain loop"].append(measure(plain(paths)))
        runs["start-up"].append(measure(prepare([few])))
        runs["plain start-up"].append(measure(plain([few])))
    wall = {name: statistics.median(secs for secs, _, _ in values) for name, values in runs.items()}
    cpu = {name: statistics.median(secs for _, secs, _ in values) for name, values in runs.items()}
    net = wall["data_prep"] - wall["start-up"]
    plain_net = wall["plain loop"] - wall["plain start-up"]
    return {
        "MB of text": round(num_bytes / 1e6, 1),
        "seconds": {name: round(value, 2) for name, value in wall.items()},
        "CPU seconds": {name: round(value, 2) for name, value in cpu.items()},
        "net MB/s": {"data_prep": round(num_bytes / 1e6 / net, 1), "plain loop": round(num_bytes / 1e6 / plain_net, 1)},
        "ratio": round(plain_net / net, 1),
        "ratio with start-up": round(wall["plain loop"] / wall["data_prep"], 1),
        "peak MB": {name: round(max(peak for _, _, peak in values) / 1e6) for name, values in runs.items()},
    }


def profile(paths: list[str], folder: str) -> str:
    """The functions that one worker spends its time in."""
    import cProfile
    import pstats

    from data_prep import fineweb

    flags = [f"--input={','.join(paths)}", f"--output_dir={folder}/out", "--num_workers=1", "--val_tokens=1000"]
    profiler = cProfile.Profile()
    profiler.runcall(fineweb.main, flags)
    out = io.StringIO()
    pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(30)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
