"""Directories of files, here or in a bucket: paths and URLs by the same few functions.

A bucket knows objects only: there a directory is there when something is in it.
"""

import contextlib
import os
import shutil
from pathlib import Path

from data_prep.store import buckets
from data_prep.store.locations import is_bucket


def join(directory: str | os.PathLike, *names: str) -> str:
    """The path or URL of something in a directory; of no names, the directory's in the one form that we use.

    >>> join("data/", "a.bin"), join("gs://bucket/data/", "a.bin"), join("gcs://bucket/data/")
    ('data/a.bin', 'gs://bucket/data/a.bin', 'gs://bucket/data')
    """
    directory = os.fspath(directory)
    if not is_bucket(directory):
        return str(Path(directory, *names))
    if directory.startswith("gcs://"):
        directory = directory.replace("gcs://", "gs://", 1)
    return buckets.join(directory, *names)


def same_place(one: str, other: str) -> bool:
    """Whether two names mean the same directory."""
    if is_bucket(one) or is_bucket(other):
        return join(one) == join(other)
    return os.path.realpath(one) == os.path.realpath(other)


def exists(path: str) -> bool:
    """Whether a file or directory is there. BucketError where that cannot be known."""
    if not is_bucket(path):
        return os.path.exists(path)
    return is_file(path) or next(buckets.list_objects(path), None) is not None


def is_file(path: str) -> bool:
    """Whether a file is there, and no link to one."""
    if not is_bucket(path):
        return os.path.isfile(path) and not os.path.islink(path)
    return buckets.stat(path) is not None


def names_in(directory: str) -> list[str]:
    """Names of what lies in a directory, sorted; of a bucket the objects only. Empty where there is none."""
    if is_bucket(directory):
        return sorted(os.path.basename(each.url) for each in buckets.list_objects(directory, recursive=False))
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.listdir(directory))
    return []


def make_directory(path: str) -> None:
    """Makes one directory, where it is needed and not there yet."""
    if not is_bucket(path):
        os.makedirs(path, exist_ok=True)


def remove_file(path: str) -> None:
    """Removes a file, if it is there."""
    if is_bucket(path):
        buckets.remove(path)
    else:
        Path(path).unlink(missing_ok=True)


def remove_tree(path: str) -> None:
    """Removes a directory with all that is in it."""
    if is_bucket(path):
        buckets.remove_all(path)
    else:
        shutil.rmtree(path)


def check_writable(directory: str) -> None:
    """BucketError, before work starts, where a bucket cannot be written to."""
    if is_bucket(directory):
        buckets.check_writable(directory)
