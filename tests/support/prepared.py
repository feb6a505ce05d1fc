"""Preparing small datasets with the command that users run."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import fineweb


def write_parquet(path: Path, texts: list[str | None], rows_per_group: int = 50) -> None:
    """A FineWeb-shaped file."""
    table = pa.table(
        {
            "text": pa.array(texts, pa.string()),
            "id": [f"<{path.stem}:{i}>" for i in range(len(texts))],
            "url": [f"https://example.org/{i}" for i in range(len(texts))],
            "dump": ["test"] * len(texts),
        }
    )
    pq.write_table(table, path, row_group_size=rows_per_group)


def run(*options: str) -> int:
    """The command line, in this process."""
    return fineweb.main([*options])


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def words(num_documents: int, length: int = 30) -> list[str | None]:
    """Texts of `length` bytes each, all different."""
    return [f"{i:06d} ".ljust(length, "x") for i in range(num_documents)]


def byte_options(corpus: Path, output: Path, **changes) -> list[str]:
    """Options for a small dataset with several shards; `changes` replace them."""
    options = {
        "input": f"{corpus}/*.parquet",
        "output_dir": output,
        "tokenizer": "byte",
        "val_tokens": 1000,
        "shard_tokens": 5000,
        "record_tokens": 64,
        "num_workers": 1,
    }
    return [f"--{name}={value}" for name, value in (options | changes).items()]
