"""The magic-number .bin format: `[magic, version, num_tokens]` as uint32, then the ids.

Everything is little-endian. Ids are uint16 (magic 20240520, version 1) or, for vocabularies above
65,536, uint32 (magic 20240801, version 7); both are llm.c's. Two headers are in use in the world:
exactly those three words ("short", 12 bytes), and the same three words at the front of 256
("llmc", 1024 bytes: llm.c, modded-nanogpt, the public fineweb100B-gpt2 shards). The size of the
file tells them apart.
"""

import mmap
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_prep.store.files import whole_file

MAGIC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # version, ids
HEADER_BYTES = {"short": 12, "llmc": 1024}
MAX_TOKENS = 2**32 - 1  # the count is one uint32


def token_dtype(vocab_size: int) -> np.dtype:
    """How ids below `vocab_size` are stored: little-endian uint16 if they fit, else uint32.

    >>> token_dtype(50257).name, token_dtype(100_000).name
    ('uint16', 'uint32')
    """
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Header(NamedTuple):
    num_tokens: int
    num_bytes: int  # of the header itself: 12 or 1024
    dtype: np.dtype  # of the ids


def read_header(path: str | os.PathLike, *, called: str = "") -> Header:
    """The header of a .bin file, checked against the file's size.

    Args:
      called: its name in errors, where that is not `path`.

    Raises:
      ValueError: wrong magic or version, or a size that fits neither header. Names the file.
      FileNotFoundError: no such file.
    """
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
        raise ValueError(
            f"{path}: starts with {magic}, expected a magic number of .bin token files, "
            f"{' or '.join(map(str, MAGIC))}. Token files without a header (nanoGPT's train.bin) "
            "must be written anew."
        )
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


def open_tokens(path: str | os.PathLike) -> np.memmap:
    """The ids of a .bin file as a read-only array (num_tokens,), mapped, not loaded.

    uint16 or uint32, as the file says. Raises ValueError like `read_header`.
    """
    header = read_header(path)
    return np.memmap(path, header.dtype, "r", offset=header.num_bytes, shape=(header.num_tokens,))
