"""Which files a `--input` means. Datasets of TFDS, `tfds:name`, are left to `tfds.py`."""

import glob
import os
import re
from typing import NamedTuple, cast

from data_prep.store.locations import (
    EMBEDDED,
    InputError,
    check_reachable,
    describe,
    file_name,
    file_system_of,
    is_remote,
)
from data_prep.store.secrets import Location, public_names

TFDS = "tfds:"
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
PRESET = re.compile(r"(edu-)?(?:sample-(\d+BT)|(CC-MAIN-\d{4}-\d{2}))")
SAMPLE_SIZES = ("10BT", "100BT", "350BT")
PRESETS = "sample, sample-10BT, sample-100BT, sample-350BT, CC-MAIN-YYYY-WW, and the last four with edu- in front"


class Preset(NamedTuple):
    patterns: str
    output_dir: str
    val_tokens: int


def find_preset(name: str) -> Preset | None:
    """The preset of this name, or None where `name` means files.

    >>> find_preset("sample-10BT")[:2]
    ('hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet', 'data/fineweb-10BT')
    """
    if name == "sample":
        return Preset(EMBEDDED + "sample.parquet", "data/sample", 100_000)
    match = PRESET.fullmatch(name)
    if not match:
        return None
    edu, size, crawl = match.groups()
    if size and size not in SAMPLE_SIZES:
        raise InputError(
            f"{name}: no such preset; FineWeb's samples are " + ", ".join(f"sample-{size}" for size in SAMPLE_SIZES)
        )
    dataset = "fineweb-edu" if edu else "fineweb"
    folder = f"sample/{size}" if size else f"data/{crawl}"
    return Preset(
        f"hf://datasets/HuggingFaceFW/{dataset}/{folder}/*.parquet",
        f"data/{dataset}-{size or crawl}",
        10_485_760,
    )


def expand(patterns: str, suffixes: tuple[str, ...] = SUFFIXES, presets: str = PRESETS) -> list[str]:
    """Comma-separated paths, globs and URLs -> the files, in the order of the stream.

    A glob's files come sorted by name.

    Args:
      suffixes: how the names of the files may end.
      presets: what to suggest for a name that is no file.

    Raises InputError: nothing matches, a kind of file that cannot be read, a file named twice.
    """
    paths: list[str] = []
    for pattern in (piece.strip() for piece in patterns.split(",")):
        pattern = Location(pattern)
        if not pattern:
            raise InputError(f"--input={public_names(patterns)!r}: an empty name between commas")
        paths += map(Location, _expand_one(pattern, presets))
    for path in paths:
        if path.startswith(TFDS) and suffixes == SUFFIXES:
            continue
        if not file_name(path).endswith(suffixes):
            raise InputError(f"{path}: unknown kind of file; expected a name ending in {', '.join(suffixes)}")
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise InputError(f"{min(repeated)}: named more than once in --input={public_names(patterns)!r}")
    return paths


def _expand_one(pattern: str, presets: str) -> list[str]:
    if pattern.startswith((EMBEDDED, TFDS)):
        return [pattern]
    if not is_remote(pattern):
        if os.path.isdir(pattern):
            raise InputError(f"{pattern}: is a directory; write {pattern.rstrip('/')}/*.parquet")
        if os.path.exists(pattern):  # also a name that contains [ or ?
            return [pattern]
        found = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        if not found:
            problem = "no file matches" if glob.has_magic(pattern) else "no such file"
            raise InputError(f"{pattern}: {problem}{_did_you_mean_preset(pattern, presets)}")
        return found
    check_reachable(pattern)
    if "*" not in pattern:  # `?` and `[` are ordinary in a URL
        return [pattern]
    try:
        file_system, path = file_system_of(pattern)
        found = sorted(cast(list[str], file_system.glob(path)))
    except Exception as error:  # each file system raises its own types
        raise InputError(f"{pattern}: cannot be listed: {describe(error)}") from error
    if not found:
        raise InputError(f"{pattern}: no file matches")
    return [file_system.unstrip_protocol(path) for path in found]


def _did_you_mean_preset(pattern: str, presets: str) -> str:
    return "" if re.search(r"[./*]", pattern) else f". The presets are {presets}"
