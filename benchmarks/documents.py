"""Looking a document up in a dataset of 10 B tokens, as one JSON line.

    python benchmarks/documents.py [--num_tables 100]

Writes documents tables and indexes as a preparation would (150,000 documents of about 667 tokens for each 100 M tokens,
no token files) and times whole look-ups, opening the dataset included. The first of a process compares the files that
it consults with their digests, so it is timed with the files on disk (as far as the system lets us) and in memory.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.store import files
from data_prep.store import manifest as manifest_lib
from data_prep.store.document_index import index_table, write_index
from data_prep.store.documents import DOCUMENT_COLUMNS, GROUP_ROWS, DocumentTables
from data_prep.store.files import digest_of
from data_prep.store.manifest import DOCUMENTS, INDEX, Manifest, Shard, Split
from data_prep.store.spec import Spec

SHARD_TOKENS, NUM_ROWS = 100_000_000, 150_000

SPEC = Spec(
    source="benchmark",
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


def uuid_of(index: int, row: int) -> str:
    """The id of a row of a table."""
    return f"<urn:uuid:{uuid.UUID(int=index * NUM_ROWS + row << 64 | row * 7919)}>"


def write_table(folder: str, index: int, rng: np.random.Generator) -> list[Shard]:
    """One table and its index; fills its range of the stream exactly."""
    lengths = np.maximum(2, rng.lognormal(6, 1, NUM_ROWS)).astype(np.int64)
    lengths = np.maximum(2, lengths * SHARD_TOKENS // lengths.sum())
    lengths[-1] += SHARD_TOKENS - lengths.sum()
    starts = index * SHARD_TOKENS + np.cumsum(lengths) - lengths
    ids = [uuid_of(index, row) for row in range(NUM_ROWS)]
    urls = [f"https://example.org/{index}/{row}/some-page-of-a-site" for row in range(NUM_ROWS)]
    constant = [["CC-MAIN-2024-10"] * NUM_ROWS, ["en"] * NUM_ROWS, [f"sample/10BT/{index:03d}.parquet"] * NUM_ROWS]
    columns = [starts, lengths, lengths * 4, ids, urls, *constant, np.arange(NUM_ROWS)]
    table = pa.table(columns, schema=DOCUMENT_COLUMNS)
    names = [f"documents_train_{index:06d}.parquet", f"documents_train_{index:06d}.index"]
    pq.write_table(table, f"{folder}/{names[0]}", compression="zstd", row_group_size=GROUP_ROWS)
    entries = write_index(f"{folder}/{names[1]}", index_table(table))
    sizes = [os.path.getsize(f"{folder}/{name}") for name in names]
    digests = [digest_of(f"{folder}/{name}") for name in names]
    return [
        Shard(names[0], DOCUMENTS, "train", SHARD_TOKENS, NUM_ROWS, sizes[0], digests[0]),
        Shard(names[1], INDEX, "train", SHARD_TOKENS, entries, sizes[1], digests[1]),
    ]


def drop_from_memory(folder: str) -> None:
    """Takes what is under the folder out of the page cache, where the system lets us."""
    os.sync()
    for name in os.listdir(folder):
        descriptor = os.open(f"{folder}/{name}", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def look_up(folder: str, what: str, num_tables: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Milliseconds of whole look-ups, opening the dataset included.

    Medians of: those that are the first of a process, with files on disk, and in memory; later ones of the same
    process, when all that they need has been compared with its digest.
    """
    times: tuple[list[float], ...] = ([], [], [])
    for kind, number in enumerate((5, 25, 50)):
        for turn in range(number + (kind == 2) * num_tables):
            if kind == 0:
                drop_from_memory(folder)
            if kind < 2:
                files._known_problem.cache_clear()
            warming = kind == 2 and turn < num_tables
            index = turn if warming else int(rng.integers(num_tables))
            row = int(rng.integers(NUM_ROWS))
            start = time.perf_counter()
            tables = DocumentTables(folder)
            if what == "token":
                tables.at(index * SHARD_TOKENS + int(rng.integers(SHARD_TOKENS)))
            else:
                url = f"https://example.org/{index}/{row}/some-page-of-a-site"
                (found,) = tables.find(what, uuid_of(index, row) if what == "id" else url)
                assert found.row == row
            if not warming:
                times[kind].append(1e3 * (time.perf_counter() - start))
    disk, memory, later = (round(statistics.median(each), 1) for each in times)
    return disk, memory, later


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_tables", type=int, default=100)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shards = [shard for index in range(args.num_tables) for shard in write_table(folder, index, rng)]
        split = Split(args.num_tables * SHARD_TOKENS, args.num_tables * NUM_ROWS, "", 0.0)
        manifest_lib.save(
            Manifest(manifest_lib.FORMAT_VERSION, "fineweb", SPEC, {"train": split}, tuple(shards), ""), folder
        )
        times = {what: look_up(folder, what, args.num_tables, rng) for what in ("token", "id", "url")}
        total, table_bytes = (sum(s.num_bytes for s in shards if s.format == kind) for kind in (INDEX, DOCUMENTS))
    print(
        json.dumps(
            {
                "documents": args.num_tables * NUM_ROWS,
                "tokens": args.num_tables * SHARD_TOKENS,
                "index bytes a document": round(total / args.num_tables / NUM_ROWS, 1),
                "table, MB": round(table_bytes / args.num_tables / 1e6, 1),
                "from disk, first of a process, ms": {what: each[0] for what, each in times.items()},
                "from memory, first of a process, ms": {what: each[1] for what, each in times.items()},
                "later, ms": {what: each[2] for what, each in times.items()},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
