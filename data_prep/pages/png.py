"""Pixels as a PNG file, in a few lines: https://www.w3.org/TR/png-3/."""

import struct
import zlib

import numpy as np


def png_of(pixels_HWC: np.ndarray) -> bytes:
    """uint8 (height, width, 3 for RGB or 4 for RGBA) -> the bytes of a file. Lossless."""
    height, width, num_channels = pixels_HWC.shape
    assert pixels_HWC.dtype == np.uint8 and num_channels in (3, 4), (pixels_HWC.dtype, pixels_HWC.shape)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if num_channels == 3 else 6, 0, 0, 0)
    # Each row begins with the number of its filter: 0, none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HWC.reshape(height, -1)], axis=1)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + _END


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


_END = _chunk(b"IEND", b"")
