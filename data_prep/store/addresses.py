"""Files laid end to end: a place in the whole -> which file, and where in it.

The one place where a stream's tokens, its records and its documents tables are counted over many files.
"""

import abc
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """What one file holds of a range of the whole: [start, stop), counted in the file."""

    file: int
    start: int
    stop: int


class _Pieces(abc.ABC):
    """What can be asked of pieces laid end to end, whatever their lengths."""

    total: int

    @abc.abstractmethod
    def find(self, place: int) -> tuple[int, int]:
        """(file, place in it). IndexError outside [0, total)."""

    @abc.abstractmethod
    def edges(self, file: int) -> tuple[int, int]:
        """Where a file begins and ends in the whole."""

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """What to read of which files for [start, stop) of the whole; empty stretches are left out."""
        assert 0 <= start <= stop <= self.total, (start, stop, self.total)
        while start < stop:
            file, place = self.find(start)
            end = min(stop, self.edges(file)[1])
            yield Stretch(file, place, place + end - start)
            start = end


class Addresses(_Pieces):
    """Where a place of the whole is.

    >>> addresses = Addresses([10, 0, 5])
    >>> addresses.total
    15
    >>> addresses.find(12)
    (2, 2)
    >>> [tuple(stretch) for stretch in addresses.stretches(8, 12)]
    [(0, 8, 10), (2, 0, 2)]

    Args:
      lengths: of the files, in order; empty ones are skipped over.
    """

    def __init__(self, lengths: Iterable[int]):
        self.starts = np.cumsum([0, *lengths], dtype=np.int64)  # of each file in the whole, and the end of the last
        self._starts = self.starts.tolist()  # one look-up in a list takes a tenth of the time of one in an array
        self.total: int = self._starts[-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def files_of(self, places: np.ndarray) -> np.ndarray:
        """The file that holds each place: int64, of the same shape; places are in [0, total)."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def starts_of(self, files: np.ndarray) -> np.ndarray:
        """Where each file begins in the whole: int64, of the same shape."""
        return self.starts[files]

    def find(self, place: int) -> tuple[int, int]:
        if not 0 <= place < self.total:
            raise IndexError(f"{place} is not in [0, {self.total})")
        file = bisect_right(self._starts, place) - 1
        return file, place - self._starts[file]

    def edges(self, file: int) -> tuple[int, int]:
        return self._starts[file], self._starts[file + 1]


class EqualPieces(_Pieces):
    """`Addresses` of pieces of one size, of which only the last may be shorter: nothing is stored.

    >>> pieces = EqualPieces(15, 10)
    >>> len(pieces), pieces.find(12), pieces.edges(1)
    (2, (1, 2), (10, 15))
    """

    def __init__(self, total: int, size: int):
        self.total, self._size = total, size

    def __len__(self) -> int:
        return -(-self.total // self._size)

    def files_of(self, places: np.ndarray) -> np.ndarray:
        return places // self._size

    def starts_of(self, files: np.ndarray) -> np.ndarray:
        return files * self._size

    def find(self, place: int) -> tuple[int, int]:
        if not 0 <= place < self.total:
            raise IndexError(f"{place} is not in [0, {self.total})")
        return divmod(place, self._size)

    def edges(self, file: int) -> tuple[int, int]:
        first = file * self._size
        return first, min(first + self._size, self.total)
