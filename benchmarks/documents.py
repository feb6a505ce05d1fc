"""Looking a document up in a dataset of 10 B tokens, as one JSON line.

    python benchmarks/documents.py [--num_tables 100]

Writes documents tables and indexes as a preparation would (150,000 documents of about 667 tokens for each 100 M tokens,
no token files), drops them from the page cache where it may, and times whole look-ups, opening the dataset included:
the first of a process, and the median of the following.
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
        os.sync()
        for shard in shards:
            descriptor = os.open(f"{folder}/{shard.name}", os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        times: dict[str, list[float]] = {"token": [], "id": [], "url": []}
        for what in times:
            for _ in range(50):
                index, row = int(rng.integers(args.num_tables)), int(rng.integers(NUM_ROWS))
                start = time.perf_counter()
                tables = DocumentTables(folder)
                if what == "token":
                    tables.at(int(rng.integers(tables.num_tokens)))
                elif what == "id":
                    (found,) = tables.find("id", uuid_of(index, row))
                    assert found.row == row
                else:
                    (found,) = tables.find("url", f"https://example.org/{index}/{row}/some-page-of-a-site")
                    assert found.row == row
                times[what].append(1e3 * (time.perf_counter() - start))
        total = sum(shard.num_bytes for shard in shards if shard.format == INDEX)
    print(
        json.dumps(
            {
                "documents": args.num_tables * NUM_ROWS,
                "tokens": args.num_tables * SHARD_TOKENS,
                "index bytes a document": round(total / args.num_tables / NUM_ROWS, 1),
                "first, ms": {what: round(values[0], 1) for what, values in times.items()},
                "median, ms": {what: round(statistics.median(values[1:]), 1) for what, values in times.items()},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
