"""The magic-number .bin format: `[magic, version, num_tokens]` as uint32, then uint16 ids.

Everything is little-endian. Two headers are in use in the world: exactly those three words
("short", 12 bytes), and the same three words at the front of 256 ("llmc", 1024 bytes: llm.c,
modded-nanogpt, the public fineweb100B-gpt2 shards). The size of the file tells them apart.
"""

import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_prep.files import whole_file

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = {"short": 12, "llmc": 1024}
TOKEN_BYTES = 2
MAX_TOKENS = 2**32 - 1  # the count is one uint32


class Header(NamedTuple):
    num_tokens: int
    num_bytes: int  # of the header itself: 12 or 1024


def read_header(path: str | os.PathLike) -> Header:
    """The header of a .bin file, checked against the file's size.

    Raises:
      ValueError: wrong magic or version, or a size that fits neither header. Names the file.
      FileNotFoundError: no such file.
    """
    with open(path, "rb") as file:
        words = file.read(HEADER_BYTES["short"])
        found_bytes = os.fstat(file.fileno()).st_size
    if len(words) < HEADER_BYTES["short"]:
        raise ValueError(
            f"{path}: holds {found_bytes} bytes, too short for the 12-byte header of a .bin token "
            "file. It was cut short or is something else."
        )
    magic, version, num_tokens = struct.unpack("<3I", words)
    if magic != MAGIC:
        raise ValueError(
            f"{path}: starts with {magic}, expected the magic number {MAGIC} of a .bin token file. "
            "Token files without a header (nanoGPT's train.bin) must be written anew."
        )
    if version != VERSION:
        raise ValueError(f"{path}: format version {version}, this reader knows {VERSION} only.")
    expected = {name: head + TOKEN_BYTES * num_tokens for name, head in HEADER_BYTES.items()}
    for name, num_bytes in HEADER_BYTES.items():
        if found_bytes == expected[name]:
            return Header(num_tokens, num_bytes)
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
    header: str = "short",
) -> None:
    """Writes `chunks` of uint16 ids, `num_tokens` in all, so that the file appears whole or not.

    >>> write_tokens("a.bin", [np.array([50256, 5, 6], np.uint16)], 3)
    """
    if header not in HEADER_BYTES:
        raise ValueError(f"bin header {header!r}: expected one of {', '.join(HEADER_BYTES)}")
    if not 0 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"{path}: {num_tokens} tokens do not fit the header's 32-bit count")
    words = np.zeros(HEADER_BYTES[header] // 4, "<u4")
    words[:3] = MAGIC, VERSION, num_tokens
    num_written = 0
    with whole_file(path) as partial:
        with open(partial, "wb") as file:
            file.write(words.data)
            for chunk in chunks:
                assert chunk.dtype == np.uint16, chunk.dtype
                file.write(np.ascontiguousarray(chunk, "<u2").data)
                num_written += len(chunk)
        assert num_written == num_tokens, (num_written, num_tokens)


def open_tokens(path: str | os.PathLike) -> np.memmap:
    """The ids of a .bin file as a read-only uint16 array (num_tokens,), mapped, not loaded.

    Raises ValueError like `read_header`.
    """
    header = read_header(path)
    return np.memmap(path, "<u2", "r", offset=header.num_bytes, shape=(header.num_tokens,))
