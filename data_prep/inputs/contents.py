"""What a file really is, by its first bytes, where that is not what its name says; and what to do about it."""

import re
import shlex

from data_prep.inputs.kinds import JSON_LINES, PARQUET, TEXT, kind_of
from data_prep.inputs.unpacking import packing_of
from data_prep.store.locations import file_name, is_remote

HEAD_BYTES = 4096  # enough to tell
_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = re.compile(rb"\S*/annex/objects/\S+\s*")
_PAGE = re.compile(rb"\s*(?:<!doctype html|<html|<head|<body|<\?xml|<error>)", re.IGNORECASE)
_MAGIC = (
    (b"PAR1", "a parquet file"),
    (b"PARE", "an encrypted parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"FEA1", "a Feather file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF-", "a PDF"),
    (b"SQLite format 3", "an SQLite database"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"ORC", "an ORC file"),
    (b"Obj\x01", "an Avro file"),
    (b"\x88\x52\x35\x01", "a file of token ids (.bin)"),  # 20240520
    (b"\x81\xd5\x34\x01", "a file of token ids (.bin)"),  # 20240801
)
_JQ_ITEMS = "jq -c '.[]'"  # the items of a JSON array, one a line
_MARKS = (  # of the order of bytes; the longer ones first, as one begins with another
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def encoding_of(head: bytes) -> str:
    """utf-8, or what a byte-order mark at the beginning says: utf-8-sig, utf-16 or utf-32."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def misnamed(path: str, packed: bytes, head: bytes) -> str:
    """Why a file cannot be what its name says, and what to do; "" where it can.

    Args:
      packed: how the file begins.
      head: how its content begins, unpacked; the same bytes where it is not compressed.
    """
    kind = kind_of(path)
    if packed.startswith(_LFS):
        return (
            f"{path}: is a pointer of Git LFS, not the file itself. Run `git lfs pull` where it was cloned, or "
            "download the file anew"
        )
    if _ANNEX.fullmatch(packed):
        return f"{path}: is a pointer of git-annex, not the file itself. Run `git annex get` where it was cloned"
    if _PAGE.match(head) and kind != TEXT:
        return (
            f"{path}: is a page of HTML or XML, perhaps an error or login page that was saved instead of the file. "
            "Download it anew, and look whether the address needs a login"
        )
    what = next((what for magic, what in _MAGIC if head.startswith(magic)), "")
    if head[257:262] == b"ustar":
        what = "a tar archive"
    if kind == PARQUET:
        return _not_parquet(path, packed, head, what)
    if what:
        return f"{path}: is {what}, not {kind}. {_advice(path, what)}"
    encoding, start = encoding_of(head), head.lstrip()
    if encoding == "utf-8" and head[:HEAD_BYTES].count(0) > len(head[:HEAD_BYTES]) // 4:
        order = "LE" if head[1:2] == b"\0" else "BE"
        return (
            f"{path}: looks like UTF-16 without a byte-order mark, or is not text; expected UTF-8. "
            f"{_conversion(path, f'iconv -f UTF-16{order} -t UTF-8')}"
        )
    if kind == JSON_LINES and encoding in ("utf-8", "utf-8-sig"):
        start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        first_line = start.partition(b"\n")[0].strip()
        if start.startswith(b"[") and re.match(rb"\[\s*(\{|\]|$)", start):
            return f"{path}: is one JSON array, expected an object a line. {_conversion(path, _JQ_ITEMS)}"
        if first_line == b"{":
            return f"{path}: holds JSON objects of several lines, expected one a line. {_conversion(path, 'jq -c .')}"
    return ""


def not_utf8(path: str, where: str, content: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not UTF-8, and what to do.

    Args:
      where: the line or row, if it is known; otherwise it is counted in `content`.
    """
    line = content.count(b"\n", 0, error.start) + 1
    place = where or f"line {line}"
    return (
        f"{path}: {place}: not UTF-8: {error.reason} 0x{content[error.start]:02x} at byte {error.start}"
        f"{'' if where else ' of the file'}. If it is Latin-1: {_conversion(path, 'iconv -f WINDOWS-1252 -t UTF-8')}"
    )


def _not_parquet(path: str, packed: bytes, head: bytes, what: str) -> str:
    if what == "a parquet file":
        return ""
    if packing := packing_of(packed):
        name = re.sub(r"\.\w+$", "", file_name(path))
        what = f"compressed by {packing}, as parquet files as a whole never are"
        advice = f"If parquet is inside: `{packing} -dc {_quoted(path)} > {shlex.quote(name)}.unpacked.parquet`"
        return f"{path}: not parquet: is {what}. {advice}"
    if what:
        return f"{path}: not parquet: is {what}. {_advice(path, what)}"
    if re.match(rb"\s*[{\[]", head):
        return f"{path}: not parquet: looks like JSON. Rename it to end in .jsonl if it holds one object a line"
    return ""


def _advice(path: str, what: str) -> str:
    if what == "a parquet file":
        return "Rename it to end in .parquet"
    if "archive" in what:
        return "Unpack it, and name the files that are inside"
    if what.startswith(("a NumPy", "a file of token")):
        return "Files of token ids are converted by data_prep.convert, under names that end in .npy or .bin"
    return "Write its text as JSON lines or parquet first"


def _conversion(path: str, program: str) -> str:
    """A command that writes the file anew beside itself, unpacked."""
    name = file_name(path)
    stem, dot, ending = re.sub(r"\.(gz|gzip|zst|zstd|bz2|xz)$", "", name, flags=re.IGNORECASE).rpartition(".")
    ending = "jsonl" if program.startswith("jq") else ending
    folder = "" if is_remote(path) else path.removesuffix(name)
    target = shlex.quote(f"{folder}{stem if dot else name}.utf8.{ending}".replace(".utf8.jsonl", ".lines.jsonl"))
    source = _quoted(path)
    packing = _packing_by_name(name)
    read = f"{packing} -dc {source} | {program}" if packing else f"{program} {source}"
    return f"`{read} > {target}` writes a copy that can be read"


def _packing_by_name(name: str) -> str:
    ending = name.rpartition(".")[2].lower()
    names = {"gz": "gzip", "gzip": "gzip", "zst": "zstd", "zstd": "zstd", "bz2": "bzip2", "xz": "xz"}
    return names.get(ending, "")


def _quoted(path: str) -> str:
    return shlex.quote(file_name(path) if is_remote(path) else path)
