"""Which files a `--input` means. Datasets of TFDS, `tfds:name`, are left to `tfds.py`."""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from data_prep.inputs.folders import files_below, remote_files_below
from data_prep.inputs.kinds import EXPECTED, kind_of
from data_prep.inputs.patterns import at_home, expand_braces, split_names
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


@dataclass(frozen=True)
class Wanted:
    """Which files are looked for."""

    fits: Callable[[str], bool]  # by a file's name
    expected: str  # what to say in errors where one does not
    folder: Callable[[str], list[str]]  # the files that a directory means
    presets: str = PRESETS  # what to suggest for a name that is no file
    remote_folders: bool = False  # whether `folder` takes URLs, too, of servers that list files as web pages included


TEXTS = Wanted(lambda path: path.startswith(TFDS) or kind_of(path) is not None, EXPECTED, files_below)


def expand(patterns: str, wanted: Wanted = TEXTS) -> list[str]:
    """Comma-separated paths, directories, globs and URLs -> the files, in the order of the stream.

    A glob's files come sorted by name, a directory's by path.

    Raises InputError: nothing matches, a kind of file that cannot be read, a file named twice.
    """
    paths: list[str] = []
    for name in split_names(patterns, _is_there):
        if not name:
            raise InputError(f"--input={public_names(patterns)!r}: an empty name between commas")
        literal = [name] if _is_there(name) else expand_braces(name)
        for pattern in literal:
            paths += map(Location, _expand_one(Location(pattern), wanted))
    for path in paths:
        if not wanted.fits(path):
            raise InputError(
                f"{path}: unknown kind of file{_advice(path)}; expected a name ending in {wanted.expected}"
            )
    _refuse_repeated(paths, public_names(patterns))
    return paths


def _is_there(name: str) -> bool:
    return bool(name) and not is_remote(name) and os.path.lexists(os.path.expanduser(name))


def _expand_one(pattern: str, wanted: Wanted) -> list[str]:
    if pattern.startswith((EMBEDDED, TFDS)):
        return [pattern]
    if is_remote(pattern):
        return _expand_remote(pattern, wanted)
    pattern = at_home(pattern.removeprefix("file://"))
    if os.path.isdir(pattern):
        return wanted.folder(pattern)
    if os.path.exists(pattern):  # also a name that contains [ or ?
        return [pattern]
    if os.path.islink(pattern):
        raise InputError(f"{pattern}: is a link to {os.readlink(pattern)}, which is not there")
    matches = sorted(each for each in glob.glob(pattern, recursive=True) if not _is_left_out(each, pattern))
    found = [each for each in matches if os.path.isfile(each)]
    if not found:  # of hive's folders, perhaps: day=*
        found = [file for each in matches if os.path.isdir(each) for file in wanted.folder(each)]
    if not found:
        problem = "no file matches" if glob.has_magic(pattern) else "no such file"
        raise InputError(f"{pattern}: {problem}{_did_you_mean_preset(pattern, wanted.presets)}")
    return found


def _is_left_out(path: str, pattern: str) -> bool:
    """Whether a glob met one of the notes beside data: a name that begins with _ where the pattern has magic."""
    parts, wanted = path.split("/"), pattern.split("/")
    plain = next(place for place, part in enumerate([*wanted, "*"]) if glob.has_magic(part))
    return not wanted[-1].startswith("_") and any(part.startswith("_") for part in parts[plain:])


def _expand_remote(pattern: str, wanted: Wanted) -> list[str]:
    check_reachable(pattern)
    try:
        file_system, path = file_system_of(pattern)
        if "*" not in pattern:  # `?` and `[` are ordinary in a URL
            if wanted.remote_folders and not wanted.fits(pattern):
                return wanted.folder(pattern)
            # Of a web page nobody can tell whether it is a directory; one that ends in / is meant as one.
            may_be_folder = pattern.endswith("/") or not pattern.startswith(("http://", "https://"))
            if wanted.fits(pattern) or not may_be_folder or not file_system.isdir(path):
                return [pattern]
            return remote_files_below(pattern, file_system, path)
        found = sorted(cast(list[str], file_system.glob(path)))
        found = [file_system.unstrip_protocol(path) for path in found]
    except InputError:
        raise
    except Exception as error:  # each file system raises its own types
        raise InputError(f"{pattern}: cannot be listed: {describe(error)}") from error
    found = [each for each in found if wanted.fits(each) or not file_name(each).startswith("_")]
    if not found:
        raise InputError(f"{pattern}: no file matches")
    return found


def _refuse_repeated(paths: Sequence[str], patterns: str) -> None:
    """InputError where a file is there twice, be it under two names: links, ./, hard links."""
    first: dict[object, str] = {}
    for path in paths:
        key: object = path
        if not is_remote(path) and not path.startswith((EMBEDDED, TFDS)):
            with contextlib.suppress(OSError):
                status = os.stat(path)
                key = status.st_dev, status.st_ino
        if key in first:
            other = "" if first[key] == path else f": it is the same file as {first[key]}"
            raise InputError(f"{path}: named more than once in --input={patterns!r}{other}")
        first[key] = path


def _advice(path: str) -> str:
    name = file_name(path).lower()
    if name.endswith((".bin", ".npy")):
        return " of text (data_prep.convert takes token ids)"
    if name.endswith((".csv", ".tsv", ".xml", ".arrow", ".feather", ".orc", ".avro", ".html")):
        return " (write its text as parquet or JSON lines first)"
    if name.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")):
        return " (unpack it, and name what is inside)"
    return ""


def _did_you_mean_preset(pattern: str, presets: str) -> str:
    return "" if re.search(r"[./*]", pattern) else f". The presets are {presets}"
