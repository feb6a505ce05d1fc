"""Text files as people's editors leave them."""

import codecs
import os
from pathlib import Path

_MARKS = (  # longest first: UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | os.PathLike) -> str:
    """A file's text: UTF-8, or what its byte-order mark says, which is left out. ValueError for anything else."""
    data = Path(path).read_bytes()
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{os.fspath(path)}: found a byte at {error.start} that is no {encoding.upper().removesuffix('-SIG')}, "
            "expected a text file. Save it as UTF-8."
        ) from None
