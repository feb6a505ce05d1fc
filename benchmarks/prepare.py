"""Speed of preparing data, against bare tiktoken on the same texts, as one JSON line.

    python benchmarks/prepare.py 'texts/*.parquet'

In turns (A B A B ...), medians of three, one worker each: CPU seconds of `data_prep.fineweb` for both formats, digests
and documents tables, and CPU seconds of a loop of tiktoken's `encode_ordinary` over the texts, which writes nothing.
"""

import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile

NUM_TURNS = 3
BARE = """
import sys, pyarrow.parquet as pq
from data_prep.tokenizers import GPT2Tokenizer
encode = GPT2Tokenizer()._encoding.encode_ordinary
for path in sys.argv[1:]:
    for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
        for text in batch["text"].to_pylist():
            encode(text)
"""


def cpu_secs(command: list[str]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    import pyarrow.parquet as pq

    paths = sorted(glob.glob(sys.argv[1]))
    tables = [pq.ParquetFile(path).read(columns=["text"]) for path in paths]
    num_bytes = sum(len(text.encode()) for table in tables for text in table["text"].to_pylist())
    times: dict[str, list[float]] = {"data_prep": [], "tiktoken": []}
    for _ in range(NUM_TURNS):
        with tempfile.TemporaryDirectory() as out:
            flags = [f"--input={','.join(paths)}", f"--output_dir={out}/x", "--num_workers=1", "--val_tokens=100000"]
            times["data_prep"].append(cpu_secs([sys.executable, "-m", "data_prep.fineweb", *flags]))
        times["tiktoken"].append(cpu_secs([sys.executable, "-c", BARE, *paths]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {f"{name}, MB per CPU-second": round(num_bytes / 1e6 / secs, 2) for name, secs in medians.items()}
    print(json.dumps(result | {"ratio": round(medians["tiktoken"] / medians["data_prep"], 2), "MB": num_bytes / 1e6}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
