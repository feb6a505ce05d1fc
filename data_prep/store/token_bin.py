"""The magic-number .bin format: `[magic, version, num_tokens]` as uint32, then the ids.

Everything is little-endian. Ids are uint16 (magic 20240520, version 1) or, for vocabularies above
65,536, uint32 (magic 20240801, version 7); both are llm.c's. Two headers are in use in the world:
exactly those three words ("short", 12 bytes), and the same three words at the front of 256
("llmc", 1024 bytes: llm.c, modded-nanogpt, the public fineweb100B-gpt2 shards). The size of the
file tells them apart.
"""

import mmap
import os
import shlex
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_prep.store.files import whole_file

MAGIC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # version, ids
HEADER_BYTES = {"short": 12, "llmc": 1024}
LAYOUTS = ("bin", "npy", "uint16", "uint32")  # of files of ids: as above, NumPy's, or ids of that kind without a header
MAX_TOKENS = 2**32 - 1  # the count is one uint32


def token_dtype(vocab_size: int) -> np.dtype:
    """How ids below `vocab_size` are stored: little-endian uint16 if they fit, else uint32.

    >>> token_dtype(50257).name, token_dtype(100_000).name
    ('uint16', 'uint32')
    """
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Header(NamedTuple):
    num_tokens: int
    num_bytes: int  # of the header itself: 12 or 1024 of a .bin file
    dtype: np.dtype  # of the ids


def read_header(path: str | os.PathLike, layout: str = "bin", *, called: str = "") -> Header:
    """The header of a file of ids, checked against the file's size.

    Args:
      layout: one of LAYOUTS; all but "bin" are other people's.
      called: its name in errors, where that is not `path`.

    Raises:
      ValueError: wrong magic or version, or a size that does not fit the header. Names the file.
      FileNotFoundError: no such file.
    """
    assert layout in LAYOUTS, layout
    if layout == "npy":
        return _numpy_header(path, called or os.fspath(path))
    if layout != "bin":
        return _no_header(path, called or os.fspath(path), np.dtype(layout).newbyteorder("<"))
    with open(path, "rb") as file:
        words = file.read(HEADER_BYTES["short"])
        found_bytes = os.fstat(file.fileno()).st_size
    path = called or path
    if len(words) < HEADER_BYTES["short"]:
        raise ValueError(
            f"{path}: holds {found_bytes} bytes, too short for the 12-byte header of a .bin token "
            "file. It was cut short or is something else."
        )
    magic, version, num_tokens = struct.unpack("<3I", words)
    if magic not in MAGIC:
        raise ValueError(_another_file(path, words, magic))
    known, dtype = MAGIC[magic]
    if version != known:
        raise ValueError(f"{path}: format version {version}, expected {known} after the magic number {magic}.")
    expected = {name: head + dtype.itemsize * num_tokens for name, head in HEADER_BYTES.items()}
    for name, num_bytes in HEADER_BYTES.items():
        if found_bytes == expected[name]:
            return Header(num_tokens, num_bytes, dtype)
    problem = "was cut short" if found_bytes < expected["short"] else "has the wrong length"
    raise ValueError(
        f"{path}: header says {num_tokens} tokens, so the file should hold {expected['short']} "
        f"bytes (12-byte header) or {expected['llmc']} bytes (1024-byte header), but it holds "
        f"{found_bytes}; it {problem}. Copy it again, or write it anew with data_prep.fineweb."
    )


def _another_file(path: str | os.PathLike, words: bytes, magic: int) -> str:
    name = shlex.quote(os.fspath(path))
    if words.startswith(b"version http"):
        return (
            f"{path}: is a pointer of Git LFS, not the file itself. Run `git lfs pull` where it was cloned, or "
            "download the file anew."
        )
    if words.startswith(b"\x93NUMPY"):
        return (
            f"{path}: is a NumPy array, expected a .bin token file. Under a name that ends in .npy, "
            f"`python -m data_prep.convert {name} OUT` makes a prepared dataset of it."
        )
    if words.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path}: is a page of HTML or XML, perhaps an error page, not a .bin token file. Download it anew."
    return (
        f"{path}: starts with {magic}, expected a magic number of .bin token files, "
        f"{' or '.join(map(str, MAGIC))}. If it is ids without a header (nanoGPT's train.bin), "
        f"`python -m data_prep.convert {name} OUT --headerless=uint16` makes a prepared dataset of it."
    )


def _numpy_header(path: str | os.PathLike, called: str) -> Header:
    with open(path, "rb") as file:
        found_bytes = os.fstat(file.fileno()).st_size
        try:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{called}: not a NumPy array, or cut short ({' '.join(str(error).split())}). Copy it again."
            ) from None
        num_bytes = file.tell()
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(
            f"{called}: a NumPy array of {dtype} and shape {shape}, expected token ids: whole numbers, one dimension. "
            "Save them as such: numpy.save(path, ids.reshape(-1).astype(numpy.uint16))."
        )
    if found_bytes != num_bytes + dtype.itemsize * shape[0]:
        raise ValueError(
            f"{called}: header says {shape[0]} tokens, so the file should hold "
            f"{num_bytes + dtype.itemsize * shape[0]} bytes, but it holds {found_bytes}; it "
            f"{'was cut short' if found_bytes < num_bytes + dtype.itemsize * shape[0] else 'has the wrong length'}. "
            "Copy it again."
        )
    return Header(shape[0], num_bytes, dtype)


def _no_header(path: str | os.PathLike, called: str, dtype: np.dtype) -> Header:
    with open(path, "rb") as file:
        words = file.read(HEADER_BYTES["short"])
        found_bytes = os.fstat(file.fileno()).st_size
    if len(words) == HEADER_BYTES["short"]:
        magic, version, _ = struct.unpack("<3I", words)
        if MAGIC.get(magic, (0,))[0] == version:
            raise ValueError(f"{called}: has the header of a .bin token file. Leave out --headerless.")
        if words.startswith((b"\x93NUMPY", b"version http", b"<!DOCTYPE", b"<html")):
            raise ValueError(_another_file(called, words, magic))
    if found_bytes % dtype.itemsize:
        raise ValueError(
            f"{called}: holds {found_bytes} bytes, which is no whole number of {dtype.name} ids; it was cut short, or "
            "its ids are of another kind. Copy it again, or name the kind by --headerless."
        )
    return Header(found_bytes // dtype.itemsize, 0, dtype)


def write_tokens(
    path: str | os.PathLike,
    chunks: Iterable[np.ndarray],
    num_tokens: int,
    *,
    dtype: np.dtype | type = np.uint16,
    header: str = "short",
) -> None:
    """Writes `chunks` of ids of `dtype`, `num_tokens` in all; the file appears whole or not at all.

    For example `write_tokens("a.bin", [np.array([50256, 5, 6], np.uint16)], 3)`.
    """
    if header not in HEADER_BYTES:
        raise ValueError(f"bin header {header!r}: expected one of {', '.join(HEADER_BYTES)}")
    if not 0 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"{path}: {num_tokens} tokens do not fit the header's 32-bit count")
    (magic,) = (magic for magic, (_, stored) in MAGIC.items() if stored == dtype)
    words = np.zeros(HEADER_BYTES[header] // 4, "<u4")
    words[:3] = magic, MAGIC[magic][0], num_tokens
    num_written = 0
    with whole_file(path) as partial:
        with open(partial, "wb") as file:
            file.write(words.data)
            for chunk in chunks:
                assert chunk.dtype == dtype, chunk.dtype
                file.write(np.ascontiguousarray(chunk, MAGIC[magic][1]).data)
                num_written += len(chunk)
        assert num_written == num_tokens, (num_written, num_tokens)


class MappedTokens(NamedTuple):
    """A .bin file, mapped.

    Attributes:
      tokens: (num_tokens,), over the map: a plain array, as slicing a np.memmap costs ten times as much.
      offset: of the first token, in bytes.
    """

    tokens: np.ndarray
    map: mmap.mmap
    offset: int


def map_tokens(path: str | os.PathLike) -> MappedTokens:
    """A .bin file as a read-only array. It holds one file handle until nobody refers to it any more.

    Raises ValueError like `read_header`.
    """
    header = read_header(path)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return MappedTokens(
        np.frombuffer(mapped, header.dtype, header.num_tokens, header.num_bytes), mapped, header.num_bytes
    )


def open_tokens(path: str | os.PathLike, layout: str = "bin") -> np.memmap:
    """The ids of a file as a read-only array (num_tokens,), mapped, not loaded.

    uint16 or uint32, as the file says; of another layout as `read_header` does. Raises ValueError likewise.
    """
    header = read_header(path, layout)
    return np.memmap(path, header.dtype, "r", offset=header.num_bytes, shape=(header.num_tokens,))
