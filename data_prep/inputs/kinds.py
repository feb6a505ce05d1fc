"""What kind of input a file is, by its name: parquet, JSON lines or plain text, the last two perhaps compressed.

How a file is compressed is not asked of its name but of its first bytes: see `unpacking.py`.
"""

import re

from data_prep.store.locations import file_name

PARQUET, JSON_LINES, TEXT = "parquet", "JSON lines", "text"
_COMPRESSED = r"(?:\.(?:gz|gzip|zst|zstd|bz2|xz))?"
_NAMES = {
    PARQUET: r".*\.(?:parquet|parq|pq)",
    JSON_LINES: rf".*\.(?:jsonl|ndjson|jsonlines|json){_COMPRESSED}",
    TEXT: rf".*\.(?:txt|text){_COMPRESSED}",
}
EXPECTED = ".parquet, .jsonl, .ndjson, .json or .txt, the last four also with .gz, .zst, .bz2 or .xz"
# What lies beside data and is JSON, but no data.
_NOTES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "features.json", "index.json"}


def kind_of(path: str) -> str | None:
    """PARQUET, JSON_LINES, TEXT, or None for a name that says nothing.

    >>> kind_of("a/B.JSONL.zst"), kind_of("https://example.org/a.parquet?download=true"), kind_of("a.csv")
    ('JSON lines', 'parquet', None)
    """
    name = file_name(path)
    return next((kind for kind, names in _NAMES.items() if re.fullmatch(names, name, re.IGNORECASE | re.DOTALL)), None)


def is_note(path: str) -> bool:
    """Whether a file is one that tools put beside their data."""
    return file_name(path) in _NOTES
