"""JSON lines and plain text -> documents. Compression and byte-order marks are seen to here."""

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from data_prep.inputs.columns import no_column
from data_prep.inputs.contents import HEAD_BYTES, encoding_of, misnamed, not_utf8
from data_prep.inputs.unpacking import unpacked
from data_prep.store.documents import PROVENANCE
from data_prep.store.locations import InputError

_MARK = b"\xef\xbb\xbf"  # of UTF-8: where files were joined, also amid one


class Line(NamedTuple):
    """A document of JSON lines."""

    row: int  # from 0
    text: str | None
    provenance: list[str | None]  # in the order of PROVENANCE
    size: int  # of the line as it was read


def looks_empty(path: str, file: BinaryIO) -> bool:
    """Whether nothing is in the file, as far as its beginning says. Leaves it at its beginning.

    Raises InputError: the beginning is of something else than the name says.
    """
    file.seek(0)
    packed = file.read(HEAD_BYTES)
    try:
        file.seek(0)
        head = unpacked(file).read(HEAD_BYTES)
    except Exception:  # damaged: reading it says so
        head = b"?"
    if problem := misnamed(path, packed, head):
        raise InputError(problem)
    file.seek(0)
    return not head


def read_text(path: str, file: BinaryIO) -> str:
    """All of a text file."""
    content = unpacked(file).read()
    try:
        return content.decode(encoding_of(content[:4]))
    except UnicodeDecodeError as error:
        raise InputError(not_utf8(path, "", content, error)) from None


def read_lines(path: str, file: BinaryIO, text_column: str) -> Iterator[Line]:
    """The objects of a file of JSON lines; blank lines count as rows."""
    lines: Any = unpacked(file)
    if not isinstance(lines, io.BufferedReader):  # bz2 and lzma read a line at a time in Python
        lines = io.BufferedReader(lines, 1 << 20)
    encoding = encoding_of(lines.peek(4)[:4])
    if encoding in ("utf-16", "utf-32"):
        lines = io.TextIOWrapper(lines, encoding, newline="\n")
    keys = text_column.split(".")
    for row, line in enumerate(lines):
        if line.strip():
            yield Line(row, *_parse(f"{path}: line {row + 1}", line, text_column, keys), len(line))


def _parse(where: str, line: bytes | str, name: str, keys: list[str]) -> tuple[str | None, list[str | None]]:
    try:
        if isinstance(line, bytes):
            line = line.removeprefix(_MARK).decode("utf-8", "surrogatepass")
        fields = json.loads(line)
    except UnicodeDecodeError as error:
        path, _, place = where.rpartition(": ")
        assert isinstance(line, bytes)
        raise InputError(not_utf8(path, place, line, error)) from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: JSON that is nested too deeply") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object, found {type(fields).__name__}")
    text = fields[name] if name in fields else _inside(where, fields, name, keys)
    if text is not None and not isinstance(text, str):
        advice = f". Name a field of it: {name}.{next(iter(text))}" if text and isinstance(text, dict) else ""
        raise InputError(f"{where}: {name!r} holds {type(text).__name__}, not text{advice}")
    values = (fields.get(each) if each != name else None for each in PROVENANCE)
    return text, [None if value is None else _encodable(str(value)) for value in values]


def _inside(where: str, fields: dict[str, Any], name: str, keys: list[str]) -> Any:
    """meta.body of {"meta": {"body": "x"}} -> x; None where meta is null."""
    value: Any = fields
    for key in keys:
        if value is None:
            return None
        if not isinstance(value, dict) or key not in value:
            raise no_column(where, name, list(fields))
        value = value[key]
    return value


def _encodable(text: str) -> str:
    """JSON can spell lone surrogates, which a parquet table cannot hold."""
    return text.encode("utf-8", "replace").decode()
