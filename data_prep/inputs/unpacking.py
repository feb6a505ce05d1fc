"""Compressed files -> what is in them, by the first bytes and not by the name.

Each reader joins members or frames that follow one another, and refuses a file that was cut short.
"""

import bz2
import gzip
import io
import lzma
from typing import Any, BinaryIO, cast

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
}
_SKIPPABLE = (b"\x2a\x4d\x18", 0x50)  # zstd's skippable frames begin with 0x5? and these; pzstd writes them
MAX_WINDOW_BYTES = 1 << 31  # `zstd --long=31`, the longest there is
_READ_BYTES = 1 << 20


def packing_of(head: bytes) -> str:
    """gzip, zstd, bzip2, xz, or "" for a file that is not compressed; `head` is how it begins.

    These are the names of the programs, too, which unpack to their output with -dc.
    """
    if head[1:4] == _SKIPPABLE[0] and head[0] & 0xF0 == _SKIPPABLE[1]:
        return "zstd"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def unpacked(file: BinaryIO) -> BinaryIO:
    """The content of a file at its beginning: itself where it is not compressed."""
    packing = packing_of(file.read(8))
    file.seek(0)
    if packing == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if packing == "zstd":
        return cast(BinaryIO, io.BufferedReader(_Zstd(file), _READ_BYTES))
    if packing == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if packing == "xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    return file


class _Zstd(io.RawIOBase):
    """Frames of any window, one after the other. (Arrow's reader stops at windows of 128 MiB, and zstandard's own
    stream takes a file that was cut short for a whole one.)"""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._file = file
        self._open = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj
        self._frame: Any = None
        self._packed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._content:
            self._packed = self._packed or self._file.read(_READ_BYTES // 16)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed file ended before its last frame did")
                return 0
            self._frame = self._frame or self._open()
            self._content = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size
