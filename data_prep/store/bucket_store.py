"""What a kind of bucket can do, one request at a time. Nothing here is tried twice: see bucket_retries.py."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from data_prep.store.bucket_errors import Failure

IfVersion = str | Literal["absent"] | None
WRITER = "writer"  # the name of the metadata that holds `Put.writer`


@dataclass(frozen=True)
class Entry:
    """An object as the store lists it."""

    key: str
    num_bytes: int
    version: str
    writer: str = ""


@dataclass(frozen=True)
class Page:
    entries: list[Entry]
    next: str  # what to ask the next page with; empty: this is the last


@dataclass(frozen=True)
class Put:
    """One object that is to appear.

    `writer` is written beside it: whoever loses the answer to a put recognises by it that the put succeeded.
    """

    bucket: str
    key: str
    num_bytes: int
    md5: bytes  # of all of it; empty where a store doesn't want it
    if_version: IfVersion
    writer: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class Part:
    """`content` lies at `start` of the object."""

    number: int  # from 1
    start: int
    content: bytes
    md5: bytes


def expected_in_words(if_version: IfVersion) -> str:
    if if_version == "absent":
        return "is there already, expected none"
    return f"is no longer version {if_version}: somebody wrote or removed it"


def check_length(content: bytes, expected: int) -> bytes:
    if len(content) != expected:
        raise Failure("transient", f"{len(content)} bytes arrived, expected {expected}")
    return content


class Store(Protocol):
    """Each raises Failure."""

    parts_at_once: int  # how many parts of one object may be under way
    wants_md5: bool  # of the whole object before its first part

    async def head(self, bucket: str, key: str) -> Entry | None: ...

    async def page(self, bucket: str, prefix: str, *, recursive: bool, after: str = "", most: int = 1000) -> Page: ...

    async def get(
        self, bucket: str, key: str, start: int = 0, num_bytes: int | None = None, version: str | None = None
    ) -> bytes: ...

    async def put(self, put: Put, content: bytes) -> Entry: ...

    async def begin(self, put: Put) -> Any:
        """An upload in parts, which shows nothing before its end."""

    async def part(self, put: Put, upload: Any, part: Part, *, again: bool) -> Any: ...

    async def finish(self, put: Put, upload: Any, parts: Sequence[Part], answers: Sequence[Any]) -> Entry: ...

    async def abort(self, put: Put, upload: Any) -> None: ...

    async def remove(self, bucket: str, key: str, version: str | None) -> None: ...

    async def check_writable(self, bucket: str, key: str) -> None: ...
