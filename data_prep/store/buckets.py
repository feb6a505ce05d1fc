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

import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_prep.store.bucket_clients import gcs_client, s3_client, submit, wait_for
from data_prep.store.bucket_errors import BucketError, Changed, Failure, in_words, missing_extra
from data_prep.store.bucket_gcs import Gcs
from data_prep.store.bucket_retries import retried
from data_prep.store.bucket_s3 import S3
from data_prep.store.bucket_settings import patience_secs
from data_prep.store.bucket_store import Entry, IfVersion, Part, Put, Store
from data_prep.store.files import whole_file
from data_prep.store.secrets import public_name, whole_url

__all__ = [
    "BucketError",
    "Changed",
    "Object",
    "check_readable",
    "check_writable",
    "download",
    "is_bucket",
    "join",
    "list_objects",
    "read",
    "remove",
    "remove_all",
    "stat",
    "upload",
    "write",
]

T = TypeVar("T")

SCHEMES = ("gs://", "gcs://", "s3://")
PIECE_BYTES = 16 << 20  # of a request: a larger object goes and comes in pieces, each retried by itself
MAX_PARTS = 10_000  # S3's
PIECES_AT_ONCE = 4
REMOVALS_AT_ONCE = 16
MAX_BEGINNINGS = 3  # of an upload in parts that the store forgets
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._\-]{1,220}[a-z0-9]")


@dataclass(frozen=True)
class Object:
    url: str
    num_bytes: int
    version: str  # GCS generation, S3 ETag


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether it is the URL of something in a bucket.

    >>> is_bucket("gs://b/a"), is_bucket("s3://b"), is_bucket("b/a"), is_bucket("https://h/a")
    (True, True, False, False)
    """
    return os.fspath(path).startswith(SCHEMES)


def join(url: str, *names: str) -> str:
    """Names below a URL.

    >>> join("gs://b/runs/", "1", "data.json")
    'gs://b/runs/1/data.json'
    """
    return "/".join((url.rstrip("/"), *(name.strip("/") for name in names)))


def check_writable(url: str) -> None:
    """BucketError, before work starts, where nothing could be written below `url`. Writes nothing that shows."""
    place = _place(url)
    with _saying(url, "written"):
        _now(lambda: place.store.check_writable(place.bucket, place.below + "write-check"))


def check_readable(url: str) -> None:
    """BucketError, before work starts, where what is at `url` or below could not be read. It may be nothing."""
    place = _place(url)
    with _saying(url, "read"):
        _now(lambda: place.store.page(place.bucket, place.key, recursive=True, most=1))


def stat(url: str) -> Object | None:
    """None: there is no such object."""
    place = _place(url, of_object=True)
    with _saying(url, "read"):
        entry = _now(lambda: place.store.head(place.bucket, place.key))
    return entry and _object(url, entry)


def list_objects(url: str, *, recursive: bool = True) -> Iterator[Object]:
    """What is below the "directory" `url` now, sorted by name; not recursive: without what lies deeper.

    The empty objects that stand for directories, as web consoles make them, are left out.
    """
    place = _place(url)
    for entry in _entries(url, place, recursive=recursive):
        if not entry.key.endswith("/"):
            yield _object(place.url_of(entry.key), entry)


def read(url: str, start: int = 0, num_bytes: int | None = None) -> bytes:
    """The bytes from `start`, `num_bytes` of them or to the end. Fewer only where the object ends before."""
    if start < 0 or (num_bytes or 0) < 0:
        raise ValueError(f"start={start}, num_bytes={num_bytes}: expected 0 or more")
    place = _place(url, of_object=True)
    with _saying(url, "read"):
        return _now(lambda: place.store.get(place.bucket, place.key, start, num_bytes), num_bytes or PIECE_BYTES)


def download(url: str, target: str | os.PathLike, *, received: Callable[[int], None] | None = None) -> None:
    """Copies an object to a file, which appears whole, or BucketError. `received`: how many more bytes are there."""
    place = _place(url, of_object=True)
    with _saying(url, "downloaded"), whole_file(target, durable=False) as partial, open(partial, "wb") as file:
        found = _now(lambda: place.store.head(place.bucket, place.key))
        if found is None:
            raise Failure("absent", "")

        def piece(start: int) -> Callable[[], Awaitable[bytes]]:
            return lambda: place.store.get(place.bucket, place.key, start, PIECE_BYTES, found.version)

        starts = range(0, found.num_bytes, PIECE_BYTES)
        for content in _in_order((retried(piece(start), PIECE_BYTES) for start in starts), PIECES_AT_ONCE):
            file.write(content)
            if received:
                received(len(content))
        if file.tell() != found.num_bytes:
            raise Failure("refused", f"{file.tell()} bytes arrived, expected {found.num_bytes}")


def upload(source: str | os.PathLike, url: str, *, if_version: IfVersion = None) -> Object:
    """Puts a file's content as an object, whole or not at all.

    Raises Changed: `if_version` is not the version there, or it is "absent" and something is there.
    """
    place = _place(url, of_object=True)
    with open(source, "rb") as file, _saying(url, "written"):
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= PIECE_BYTES:
            return _put(url, place, _read_piece(file, 0, num_bytes), if_version)
        md5 = hashlib.file_digest(file, _md5).digest() if place.store.wants_md5 else b""
        for beginning in itertools.count(1):
            put = Put(place.bucket, place.key, num_bytes, md5, if_version)
            try:
                return _object(url, _put_parts(place.store, put, file))
            except Failure as failure:
                if failure.kind in ("lost", "changed") and (entry := _ours(place.store, put)):
                    return _object(url, entry)
                if failure.kind != "lost" or beginning == MAX_BEGINNINGS:
                    raise
    raise AssertionError


def write(url: str, content: bytes, *, if_version: IfVersion = None) -> Object:
    """Puts an object, whole or not at all. Raises Changed, as `upload` does."""
    place = _place(url, of_object=True)
    with _saying(url, "written"):
        return _put(url, place, content, if_version)


def remove(url: str, *, if_version: str | None = None) -> None:
    """Removes an object; one that is absent is no error. Raises Changed: it has another version."""
    place = _place(url, of_object=True)
    with _saying(url, "removed"):
        _now(lambda: place.store.remove(place.bucket, place.key, if_version))


def remove_all(url: str) -> None:
    """Removes everything below the "directory" `url`."""
    place = _place(url, of_object=True)  # never all of a bucket

    def removal(entry: Entry) -> Callable[[], Awaitable[None]]:
        return lambda: place.store.remove(place.bucket, entry.key, None)

    entries = _entries(url, place, recursive=True)
    with _saying(url, "removed"):
        for _ in _in_order((retried(removal(entry)) for entry in entries), REMOVALS_AT_ONCE):
            pass


class _Place(NamedTuple):
    store: Store
    scheme: str
    bucket: str
    key: str  # without a / at its end

    @property
    def below(self) -> str:
        return self.key + "/" if self.key else ""

    def url_of(self, key: str) -> str:
        return f"{self.scheme}://{self.bucket}/{key}"


def _place(url: str, *, of_object: bool = False) -> _Place:
    """BucketError: it is no URL of an object or directory, or the package for its kind is missing."""
    url = whole_url(url)
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    key = key.removesuffix("/")
    problem = ""
    if not is_bucket(url) or not _BUCKET.fullmatch(bucket):
        problem = "is no URL of a bucket; expected gs://BUCKET/NAME or s3://BUCKET/NAME"
    elif any(char in key for char in "?#\n\r"):
        problem = "has ? or # or a line break in it, which no name may have here"
    elif key and any(part in ("", ".", "..") for part in key.split("/")):
        problem = "has an empty part, or . or .. in its path; write it without"
    elif of_object and not key:
        problem = "is a whole bucket; name something in it"
    elif len(key.encode(errors="surrogatepass")) > 1000:
        problem = "is longer than an object's name may be"
    if problem:
        raise BucketError(f"{' '.join(public_name(url).split())}: {problem}")
    try:
        store = S3(s3_client()) if scheme == "s3" else Gcs(gcs_client())
    except ImportError as error:
        raise missing_extra(url, error) from None
    return _Place(store, scheme, bucket, key)


@contextmanager
def _saying(url: str, doing: str) -> Iterator[None]:
    try:
        yield
    except Failure as failure:
        raise in_words(whole_url(url), doing, failure, patience_secs()) from None


def _now(attempt: Callable[[], Awaitable[T]], num_bytes: int = 0) -> T:
    return wait_for(submit(retried(attempt, num_bytes)))


def _in_order(works: Iterable[Any], at_once: int) -> Iterator[Any]:
    """The results of coroutines, in their order, with a few of them under way."""
    under_way: deque[Future] = deque()
    try:
        for work in works:
            under_way.append(submit(work))
            if len(under_way) == at_once:
                yield wait_for(under_way.popleft())
        while under_way:
            yield wait_for(under_way.popleft())
    finally:
        for future in under_way:
            future.cancel()


def _entries(url: str, place: _Place, *, recursive: bool) -> Iterator[Entry]:
    after = ""
    while True:
        with _saying(url, "listed"):
            asked = after
            page = _now(lambda: place.store.page(place.bucket, place.below, recursive=recursive, after=asked))  # noqa: B023
        yield from page.entries
        if not (after := page.next):
            return


def _put(url: str, place: _Place, content: bytes, if_version: IfVersion) -> Object:
    put = Put(place.bucket, place.key, len(content), _md5(content).digest(), if_version)
    try:
        return _object(url, _now(lambda: place.store.put(put, content), len(content)))
    except Failure as failure:
        # An earlier attempt may have succeeded and its answer been lost; also inside the client, which sends again
        # over a new connection what an old one broke off.
        if failure.kind == "changed" and (entry := _ours(place.store, put)):
            return _object(url, entry)
        raise


def _ours(store: Store, put: Put) -> Entry | None:
    """The object, if this put wrote it."""
    entry = _now(lambda: store.head(put.bucket, put.key))
    return entry if entry and entry.writer == put.writer else None


def _put_parts(store: Store, put: Put, file: Any) -> Entry:
    size = max(PIECE_BYTES, -(-put.num_bytes // MAX_PARTS >> 20 << 20))
    upload = _now(lambda: store.begin(put))
    parts: list[Part] = []  # without their content

    def works() -> Iterator[Any]:
        for number, start in enumerate(range(0, put.num_bytes, size), 1):
            content = _read_piece(file, start, min(size, put.num_bytes - start))
            part = Part(number, start, content, _md5(content).digest())
            parts.append(replace(part, content=b""))
            yield _part_sent(store, put, upload, part)

    try:
        answers = list(_in_order(works(), store.parts_at_once))
        return _now(lambda: store.finish(put, upload, parts, answers))
    except BaseException:
        with suppress(Failure):  # what is left of it costs money, and a rule of the bucket may remove it
            _now(lambda: store.abort(put, upload))
        raise


async def _part_sent(store: Store, put: Put, upload: Any, part: Part) -> Any:
    attempts = itertools.count()
    return await retried(lambda: store.part(put, upload, part, again=next(attempts) > 0), len(part.content))


def _read_piece(file: Any, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise Failure("refused", f"{Path(file.name)} was cut short meanwhile; upload a file that nobody writes to")
    return content


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def _object(url: str, entry: Entry) -> Object:
    return Object(public_name(url), entry.num_bytes, entry.version)
