"""Shards that are numbered by their names: which of them are not there."""

import re
from collections.abc import Sequence

from data_prep.store.locations import file_name

MAX_NAMED = 3


def missing_shards(paths: Sequence[str]) -> list[str]:
    """Names of shards that are not there, while some with lower and with higher numbers are.

    >>> missing_shards(["x_val_000000.bin", "x_train_000001.bin", "x_train_000003.bin"])
    ['x_train_000002.bin']
    """
    numbers: dict[tuple[str, str, int], set[int]] = {}  # by what stands around the number, and its width
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)(\D*)", file_name(path)):
            before, number, after = match.groups()
            width = len(number) if len(number) > 1 and number.startswith("0") else 0
            numbers.setdefault((before, after, width), set()).add(int(number))
    _join_widths(numbers)
    return [
        f"{before}{number:0{width}d}{after}"
        for (before, after, width), there in numbers.items()
        for number in _between(there)
    ]


def _join_widths(numbers: dict[tuple[str, str, int], set[int]]) -> None:
    """000009 and 000010 have a width that 100000 does not show."""
    for before, after, width in list(numbers):
        if not width and (wide := [key for key in numbers if key[:2] == (before, after) and key[2]]):
            numbers[wide[0]] |= numbers.pop((before, after, 0))


def _between(there: set[int]) -> list[int]:
    first, last = min(there), max(there)
    if len(there) < 2 or last - first + 1 > 100 * len(there):  # dates and other numbers that do not count
        return []
    return [number for number in range(first, last) if number not in there]


def gap_warning(where: str, paths: Sequence[str]) -> str:
    """A line about missing shards, or "" where none is."""
    missing = missing_shards(paths)
    if not missing:
        return ""
    names = ", ".join(missing[:MAX_NAMED]) + (
        f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    )
    return f"{where}: {names} {'are' if len(missing) > 1 else 'is'} missing between the shards that are there"
