"""A directory as input, here or elsewhere -> the files in it that hold data."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from data_prep.inputs.kinds import JSON_LINES, PARQUET, TEXT, is_note, kind_of
from data_prep.store.locations import InputError
from data_prep.store.manifest import MANIFEST_NAME, WORK_DIR


def files_below(directory: str) -> list[str]:
    """The parquet and JSON lines files below a directory, or if there are none its text files, sorted by path.

    Names that begin with . or _ are left out (_SUCCESS, _metadata, .crc), and so is what tools put beside data.

    Raises InputError: nothing is there, or it is a prepared dataset.
    """
    if any(os.path.exists(os.path.join(directory, name)) for name in (MANIFEST_NAME, WORK_DIR)):
        raise InputError(
            f"{directory}: is a prepared dataset, not text. data_prep.convert writes it anew in other formats or shards"
        )
    return choose(directory, sorted(_walk(directory)))


def remote_files_below(url: str, file_system: Any, path: str) -> list[str]:
    """The same of a directory elsewhere."""
    inside = sorted(file_system.find(path))
    start = path.rstrip("/") + "/"
    hidden = [each for each in inside if is_hidden(each.removeprefix(start))]
    return choose(url, [file_system.unstrip_protocol(each) for each in inside if each not in set(hidden)])


def choose(directory: str, paths: Iterable[str]) -> list[str]:
    """Those of the files that hold data."""
    by_kind: dict[str | None, list[str]] = {}
    paths = list(paths)
    for path in paths:
        by_kind.setdefault(None if is_note(path) else kind_of(path), []).append(path)
    wanted = {PARQUET, JSON_LINES} & by_kind.keys() or {TEXT}
    found = [path for path in paths if not is_note(path) and kind_of(path) in wanted]
    if not found:
        raise InputError(f"{directory}: no parquet, JSON lines or text files in this directory or below it")
    return found


def is_hidden(relative_path: str) -> bool:
    """Whether any part of the path begins with . or _, as of notes and unfinished files."""
    return any(part.startswith((".", "_")) for part in relative_path.split("/"))


def _walk(directory: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Files below, links to directories followed unless they lead back."""
    here = os.path.realpath(directory)
    if here in above:
        return
    try:
        entries = list(os.scandir(directory))
    except OSError as error:
        raise InputError(f"{directory}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if is_hidden(entry.name):
            continue
        path = os.path.join(directory, entry.name)
        if entry.is_dir():
            yield from _walk(path, (*above, here))
        elif entry.is_file():
            yield path
