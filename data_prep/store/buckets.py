"""Objects in gs:// and s3:// buckets.

What is promised of both stores:

- An object appears whole or not at all, also a large one, which goes in parts: they show when the last is confirmed.
- The server compares what arrived with the MD5 of what was sent before the object appears (S3: of each part).
- `if_version` is decided by the server, in one step with the put: of several writers that expect the same version, or
  "absent", one succeeds and the others get `Changed`. Versions are GCS generations, which never come twice, and S3
  ETags, which equal content has again: what must not be mistaken for its predecessor has to differ from it.
- A put whose answer got lost is known as ours by a mark in the object's metadata.
- `read` of a whole object and `download` give all bytes of one version. `download` compares their number, `read` also
  the digest that the store has; the caller knows a better one and compares that.
- Errors that may pass (429, 5xx, no connection, silence, cut-off answers) are retried with growing pauses for
  GPT_PRETRAIN_BUCKET_PATIENCE_SECS (60); all others, and the last of these, are a `BucketError` of one line.

Any thread and any process may call this, also one that was forked.
"""

import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_prep.store import bucket_transfers
from data_prep.store.bucket_errors import BucketError, Changed, Failure, in_words
from data_prep.store.bucket_places import Place, is_bucket, join, place_of
from data_prep.store.bucket_retries import retried
from data_prep.store.bucket_settings import patience_secs
from data_prep.store.bucket_store import Entry, IfVersion
from data_prep.store.bucket_transfers import in_order, now, put_content, put_file
from data_prep.store.local_files import whole_file
from data_prep.store.secrets import whole_url

__all__ = [
    "BucketError",
    "Changed",
    "Object",
    "asked_before_puts",
    "check_readable",
    "check_writable",
    "download",
    "is_bucket",
    "join",
    "list_objects",
    "read",
    "read_in_pieces",
    "remove",
    "remove_all",
    "stat",
    "upload",
    "write",
]

PIECES_AT_ONCE = 4
REMOVALS_AT_ONCE = 16
LISTED_AT_ONCE = 1000
NO_BOUND = 1 << 50  # of bytes: a server is given up when it is silent, not when it has much to say


_before_puts: ContextVar[Callable[[], None] | None] = ContextVar("before_puts", default=None)


@contextmanager
def asked_before_puts(ask: Callable[[], None]) -> Iterator[None]:
    """Has this thread, in the block, call `ask` before each put, which does not begin where that raises."""
    token = _before_puts.set(ask)
    try:
        yield
    finally:
        _before_puts.reset(token)


def _ask_before_put() -> None:
    if ask := _before_puts.get():
        ask()


@dataclass(frozen=True)
class Object:
    url: str
    num_bytes: int
    version: str  # GCS generation, S3 ETag


def check_writable(url: str) -> None:
    """BucketError, before work starts, where nothing could be written below `url`. Writes nothing that shows."""
    place = place_of(url)
    with _saying(url, "written"):
        now(lambda: place.store.check_writable(place.bucket, place.below + "write-check"))


def check_readable(url: str) -> None:
    """BucketError, before work starts, where what is at `url` or below could not be read. It may be nothing."""
    place = place_of(url)
    with _saying(url, "read"):
        now(lambda: place.store.page(place.bucket, place.key, recursive=True, most=1))


def stat(url: str) -> Object | None:
    """None: there is no such object."""
    place = place_of(url, of_object=True)
    with _saying(url, "read"):
        entry = now(lambda: place.store.head(place.bucket, place.key))
    return entry and _object(url, entry)


def list_objects(url: str, *, recursive: bool = True) -> Iterator[Object]:
    """What is below the "directory" `url` now, sorted by name; not recursive: without what lies deeper.

    The empty objects that stand for directories, as web consoles make them, are left out.
    """
    place = place_of(url)
    for entry in _entries(url, place, recursive=recursive):
        if not entry.key.endswith("/"):
            yield _object(place.url_of(entry.key), entry)


def read(url: str, start: int = 0, num_bytes: int | None = None) -> bytes:
    """The bytes from `start`, `num_bytes` of them or to the end. Fewer only where the object ends before."""
    if start < 0 or (num_bytes or 0) < 0:
        raise ValueError(f"start={start}, num_bytes={num_bytes}: expected 0 or more")
    place = place_of(url, of_object=True)
    with _saying(url, "read"):
        return now(
            lambda: place.store.get(place.bucket, place.key, start, num_bytes),
            NO_BOUND if num_bytes is None else num_bytes,
        )


def read_in_pieces(there: Object) -> bytes:
    """All bytes of a large object, as it was found: several requests at once, into memory that is asked for once."""
    place, content, size = place_of(there.url, of_object=True), bytearray(there.num_bytes), bucket_transfers.PIECE_BYTES
    starts = range(0, there.num_bytes, size)
    with _saying(there.url, "read"):
        pieces = (_piece(place, start, min(size, there.num_bytes - start), there.version) for start in starts)
        for start, piece in zip(starts, in_order(pieces, PIECES_AT_ONCE), strict=True):
            content[start : start + size] = piece
        if len(content) != there.num_bytes:
            raise Failure("refused", f"{len(content)} bytes arrived, expected {there.num_bytes}")
    return bytes(content)


def download(url: str, target: str | os.PathLike, *, received: Callable[[int], None] | None = None) -> None:
    """Copies an object to a file, which appears whole, or BucketError. `received`: how many more bytes are there."""
    place = place_of(url, of_object=True)
    with _saying(url, "downloaded"), whole_file(target, durable=False) as partial, open(partial, "wb") as file:
        found = now(lambda: place.store.head(place.bucket, place.key))
        if found is None:
            raise Failure("absent", "")

        size = bucket_transfers.PIECE_BYTES

        def pieces() -> Iterator[Coroutine[Any, Any, bytes]]:
            for start in range(0, found.num_bytes, size):
                yield _piece(place, start, size, found.version)

        for content in in_order(pieces(), PIECES_AT_ONCE):
            file.write(content)
            if received:
                received(len(content))
        if file.tell() != found.num_bytes:
            raise Failure("refused", f"{file.tell()} bytes arrived, expected {found.num_bytes}")


def upload(source: str | os.PathLike, url: str, *, if_version: IfVersion = None) -> Object:
    """Puts a file's content as an object, whole or not at all.

    Raises Changed: `if_version` is not the version there, or it is "absent" and something is there.
    """
    place = place_of(url, of_object=True)
    _ask_before_put()
    with open(source, "rb") as file, _saying(url, "written"):
        return _object(url, put_file(place.store, place.bucket, place.key, file, if_version))


def write(url: str, content: bytes, *, if_version: IfVersion = None) -> Object:
    """Puts an object, whole or not at all. Raises Changed, as `upload` does."""
    place = place_of(url, of_object=True)
    _ask_before_put()
    with _saying(url, "written"):
        return _object(url, put_content(place.store, place.bucket, place.key, content, if_version))


def remove(url: str, *, if_version: str | None = None) -> None:
    """Removes an object; one that is absent is no error. Raises Changed: it has another version."""
    place = place_of(url, of_object=True)
    with _saying(url, "removed"):
        try:
            now(lambda: place.store.remove(place.bucket, place.key, if_version))
        except Failure as failure:
            # Absent is not the version that was expected, either; so it is after an attempt whose answer was lost.
            if failure.kind != "changed" or now(lambda: place.store.head(place.bucket, place.key)):
                raise


def remove_all(url: str) -> None:
    """Removes everything below the "directory" `url`, which must not be a whole bucket."""
    place = place_of(url, of_object=True)

    def removals() -> Iterator[Coroutine[Any, Any, None]]:
        for entry in _entries(url, place, recursive=True):
            yield _removal(place, entry.key)

    with _saying(url, "removed"):
        for _ in in_order(removals(), REMOVALS_AT_ONCE):
            pass


async def _piece(place: Place, start: int, num_bytes: int, version: str) -> bytes:
    return await retried(lambda: place.store.get(place.bucket, place.key, start, num_bytes, version), num_bytes)


async def _removal(place: Place, key: str) -> None:
    await retried(lambda: place.store.remove(place.bucket, key, None))


@contextmanager
def _saying(url: str, doing: str) -> Iterator[None]:
    try:
        yield
    except Failure as failure:
        raise in_words(whole_url(url), doing, failure, patience_secs()) from None


def _entries(url: str, place: Place, *, recursive: bool) -> Iterator[Entry]:
    ask = partial(place.store.page, place.bucket, place.below, recursive=recursive, most=LISTED_AT_ONCE)
    after = ""
    while True:
        with _saying(url, "listed"):
            page = now(partial(ask, after=after))
        yield from page.entries
        if not (after := page.next):
            return


def _object(url: str, entry: Entry) -> Object:
    return Object(str(url), entry.num_bytes, entry.version)
