"""`blocks-<split>.b3`: the digests of all blocks of a split's stream, 32 bytes each, one after the other.

With it any block can be verified by itself, wherever it comes from. It needs no place in the manifest: the BLAKE3
digest of the file is the split's fingerprint (see `fingerprints.py`).
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import overload

import numpy as np

from data_prep.store.files import FileProblem, file_problem, whole_file
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.manifest import Split
from data_prep.store.names import blocks_name
from data_prep.store.places import join

DIGEST_BYTES = 32
_SEARCHED_AT_ONCE = 1 << 16  # blocks


def num_blocks(num_tokens: int) -> int:
    """Of a stream; the last one may be short.

    >>> num_blocks(2**20), num_blocks(2**20 + 1)
    (1, 2)
    """
    return -(-num_tokens // BLOCK_TOKENS)


def file_bytes(split: Split) -> int:
    """The size of a split's file."""
    return DIGEST_BYTES * num_blocks(split.num_tokens)


def write_blocks(directory: str | os.PathLike, name: str, digests: Sequence[bytes]) -> None:
    """Writes the file of the split `name`; equal streams give equal bytes."""
    with whole_file(join(directory, blocks_name(name))) as partial:
        partial.write_bytes(b"".join(digests))


def blocks_problem(directory: str | os.PathLike, name: str, split: Split) -> FileProblem | None:
    """What is wrong with the file of the split `name`; None if nothing is."""
    return file_problem(join(directory, blocks_name(name)), file_bytes(split), split.fingerprint)


def find_blocks(path: str | os.PathLike, digests: Sequence[str]) -> dict[str, int]:
    """Which blocks have these digests, in hex, of those that are in a file: 1 M blocks in 0.1 s. {} without a file."""
    wanted, found = set(digests), {}
    heads = np.sort(np.frombuffer(bytes.fromhex("".join(each[:16] for each in digests)), np.uint64))
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        first = 0
        while content := file.read(_SEARCHED_AT_ONCE * DIGEST_BYTES):
            here = np.frombuffer(content, np.uint64)[:: DIGEST_BYTES // 8]
            places = np.minimum(np.searchsorted(heads, here), len(heads) - 1)
            for block in np.flatnonzero(heads[places] == here).tolist():
                digest = content[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES].hex()
                if digest in wanted:
                    found[digest] = first + block
            first += len(here)
    return found


class Digests(Sequence[str]):
    """The digests of all blocks of a stream, in hex, of a file that is read in pages.

    There may be millions, of which few are needed at a time: the pages that were read last are kept.

    Args:
      count: of the blocks.
      read: (first byte, number of bytes) -> what the file holds there. Called by several threads at once.
      page_bytes, most_pages: of a page, and how many are kept.
      verified_as: the digest of the file, where it was found whole. Else what a page says may be wrong: see `changed`.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[int, int], bytes],
        page_bytes: int,
        most_pages: int,
        *,
        verified_as: str | None = None,
    ):
        self.verified_as = verified_as
        self._count, self._read, self._page_digests = count, read, page_bytes // DIGEST_BYTES
        self._most_pages = most_pages
        self._pages: dict[int, bytes] = {}  # the one that was read last comes last
        self._under_way: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()  # over both

    @property
    def is_read_again(self) -> bool:
        """It has several pages, so that one may be needed at any time."""
        return self._count > self._page_digests

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, block: int) -> str: ...

    @overload
    def __getitem__(self, block: slice) -> list[str]: ...

    def __getitem__(self, block):
        if isinstance(block, slice):
            return [self[each] for each in range(*block.indices(self._count))]
        if not 0 <= block < self._count:
            raise IndexError(f"block {block} of {self._count}")
        number, place = divmod(block, self._page_digests)
        page = self._pages.get(number)
        if page is None:
            page = self._page(number)
        return page[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES].hex()

    def changed(self, block: int) -> bool:
        """Whether a digest is another one when it is read anew: it may have been damaged on its way."""
        if self.verified_as:
            return False
        before = self[block]
        with self._lock:
            self._pages.pop(block // self._page_digests, None)
        return self[block] != before

    def read_ahead(self, blocks: Iterable[int], threads: Executor) -> None:
        """Reads the pages that these need, several at once where they come from far."""
        if not self.verified_as:
            list(threads.map(self._page, {block // self._page_digests for block in blocks} - self._pages.keys()))

    def _page(self, number: int) -> bytes:
        """A page, read by one thread if several need it."""
        with self._lock:
            if (page := self._pages.get(number)) is not None:
                return page
            if is_ours := (coming := self._under_way.get(number)) is None:
                coming = self._under_way[number] = Future()
        if is_ours:
            first = number * self._page_digests
            length = min(self._page_digests, self._count - first) * DIGEST_BYTES
            try:
                coming.set_result(self._read(first * DIGEST_BYTES, length))
            except BaseException as error:
                coming.set_exception(error)
            with self._lock:
                del self._under_way[number]
                if not coming.exception():
                    self._pages[number] = coming.result()
                    while len(self._pages) > self._most_pages:
                        del self._pages[next(iter(self._pages))]
        return coming.result()
