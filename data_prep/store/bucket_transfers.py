"""Requests made from the caller's thread: one, several under way, and an object in parts."""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from io import BufferedReader
from typing import Any, TypeVar

from data_prep.store.bucket_clients import submit, wait_for
from data_prep.store.bucket_errors import Failure
from data_prep.store.bucket_retries import retried
from data_prep.store.bucket_store import Entry, IfVersion, Part, Put, Store

T = TypeVar("T")

MIB = 1 << 20
PIECE_BYTES = 16 * MIB  # of a request: a larger object goes and comes in pieces, each retried by itself
MAX_PARTS = 10_000  # S3's
MAX_BEGINNINGS = 3  # of an upload in parts that the store forgets


def now(attempt: Callable[[], Awaitable[T]], num_bytes: int = 0) -> T:
    """The result of one request, retried; `num_bytes`: what it carries."""
    return wait_for(submit(retried(attempt, num_bytes)))


def in_order(works: Iterable[Coroutine[Any, Any, T]], at_once: int) -> Iterator[T]:
    """The results of several, in their order, with a few of them under way."""
    under_way: deque[Future[T]] = deque()
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


def put_content(store: Store, bucket: str, key: str, content: bytes, if_version: IfVersion) -> Entry:
    put = Put(bucket, key, len(content), md5_of(content).digest(), if_version)
    try:
        return now(lambda: store.put(put, content), len(content))
    except Failure as failure:
        # An earlier attempt may have succeeded and its answer been lost; also inside the client, which sends again
        # over a new connection what an old one broke off.
        if failure.kind == "changed" and (entry := _ours(store, put)):
            return entry
        raise


def put_file(store: Store, bucket: str, key: str, file: BufferedReader, if_version: IfVersion) -> Entry:
    """Puts an open file's content, in parts if there is much of it."""
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes <= PIECE_BYTES:
        return put_content(store, bucket, key, _read_piece(file, 0, num_bytes), if_version)
    md5 = hashlib.file_digest(file, md5_of).digest() if store.wants_md5 else b""
    for beginning in itertools.count(1):
        put = Put(bucket, key, num_bytes, md5, if_version)
        try:
            return _put_parts(store, put, file)
        except Failure as failure:
            if failure.kind in ("lost", "changed") and (entry := _ours(store, put)):
                return entry
            if failure.kind != "lost" or beginning == MAX_BEGINNINGS:
                raise
    raise AssertionError


def md5_of(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def _ours(store: Store, put: Put) -> Entry | None:
    """The object, if this put wrote it."""
    entry = now(lambda: store.head(put.bucket, put.key))
    return entry if entry and entry.writer == put.writer else None


def _put_parts(store: Store, put: Put, file: BufferedReader) -> Entry:
    size = max(PIECE_BYTES, -(-put.num_bytes // MAX_PARTS // MIB) * MIB)
    upload = now(lambda: store.begin(put))
    parts: list[Part] = []  # without their content

    def works() -> Iterator[Coroutine[Any, Any, Any]]:
        for number, start in enumerate(range(0, put.num_bytes, size), 1):
            content = _read_piece(file, start, min(size, put.num_bytes - start))
            part = Part(number, start, content, md5_of(content).digest())
            parts.append(replace(part, content=b""))
            yield _part_sent(store, put, upload, part)

    try:
        answers = list(in_order(works(), store.parts_at_once))
        return now(lambda: store.finish(put, upload, parts, answers))
    except BaseException:
        # What is left of it shows nowhere but costs money. Where this fails, too, a rule of the bucket may remove it.
        with suppress(Failure):
            wait_for(submit(store.abort(put, upload)))
        raise


async def _part_sent(store: Store, put: Put, upload: Any, part: Part) -> Any:
    attempts = itertools.count()
    return await retried(lambda: store.part(put, upload, part, again=next(attempts) > 0), len(part.content))


def _read_piece(file: BufferedReader, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise Failure("refused", f"{file.name} was cut short meanwhile; upload a file that nobody writes to")
    return content
