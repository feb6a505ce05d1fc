"""Whether the value of a setting can be: each function returns it as the code wants it, or raises a ValueError of one
line that names the setting, says what was found and what is expected.
"""

import hashlib
import math
import os
from collections.abc import Collection
from numbers import Integral, Real

from data_prep.store.buckets import is_bucket

MOST_ROWS = 2**31 - 1  # what JAX counts without 64-bit integers: rows, columns, steps
MOST_TOKENS = 2**62  # what NumPy counts, with room for sums


def whole_number(name: str, value: object, *, least: int, most: int = MOST_TOKENS) -> int:
    """An integer, also where it is written as 1e10.

    >>> whole_number("train.num_tokens", 1e10, least=1)
    10000000000
    """
    is_whole = _is_number(value) and math.isfinite(value) and value == int(value)  # pyright: ignore
    if not is_whole or not least <= int(value) <= most:  # pyright: ignore
        limits = f"at least {least}" if is_whole and int(value) < least else f"from {least} to {most}"  # pyright: ignore
        raise ValueError(f"{name}: found {value!r}, expected a whole number, {limits}")
    return int(value)  # pyright: ignore


def number(name: str, value: object, *, least: float, most: float) -> float:
    """A number in [least, most]."""
    if not _is_number(value) or not least <= value <= most:  # pyright: ignore
        raise ValueError(f"{name}: found {value!r}, expected a number from {least:g} to {most:g}")
    return float(value)  # pyright: ignore


def fraction(name: str, value: object, *, with_zero: bool = True, with_one: bool = True) -> float:
    """A number between 0 and 1, each of them included or not."""
    is_good = _is_number(value) and 0 <= value <= 1  # pyright: ignore
    if not is_good or (value == 0 and not with_zero) or (value == 1 and not with_one):
        interval = f"{'[' if with_zero else '('}0, 1{']' if with_one else ')'}"
        raise ValueError(f"{name}: found {value!r}, expected a number in {interval}")
    return float(value)  # pyright: ignore


def seed(name: str, value: object) -> int:
    """Any integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: found {value!r}, expected an integer (any, also negative)")
    return int(value)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: found {value!r}, expected True or False")
    return value


def choice(name: str, value: object, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, known))}")
    return value


def text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: found {value!r}, expected a text")
    return value


def path(name: str, value: object) -> str:
    """A path of this machine, with `~` expanded."""
    if not isinstance(value, str | os.PathLike) or not (given := os.fspath(value)) or isinstance(given, bytes):
        raise ValueError(f"{name}: found {value!r}, expected a path")
    if "://" in given:
        raise ValueError(
            f"{name}: {given} is a URL; expected a directory or file of this machine (mount the bucket, use a shared "
            "disk, or copy it here)"
        )
    if "\0" in given:
        raise ValueError(f"{name}: found {value!r}, expected a path, which holds no NUL")
    return os.path.expanduser(given)


def place(name: str, value: object) -> str:
    """A path of this machine, or the URL of something in a bucket."""
    if isinstance(value, str) and is_bucket(value):
        return value.rstrip("/")
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"{name}: {value} is a URL; expected a directory of this machine, or gs://BUCKET/NAME or s3://BUCKET/NAME"
        )
    return path(name, value)


def output_directory(name: str, value: object) -> str:
    """A path where a directory is or can be made, or the URL of one in a bucket."""
    directory = place(name, value)
    return directory if is_bucket(directory) else local_directory(name, directory)


def local_directory(name: str, value: object) -> str:
    """A path of this machine where a directory is or can be made."""
    directory = path(name, value)
    above = os.path.abspath(directory)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise ValueError(f"{name}: {directory} cannot be a directory, as {above} is a file. Choose another path.")
    return directory


def key_seed(any_seed: int) -> int:
    """Any integer -> the seed of a JAX key, which has 32 bits: itself where it fits, else a hash of it.

    >>> key_seed(7), key_seed(-1) == key_seed(2**32 - 1)
    (7, False)
    """
    if 0 <= any_seed < 2**32:
        return any_seed
    return int.from_bytes(hashlib.blake2b(str(any_seed).encode(), digest_size=4).digest(), "little")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
