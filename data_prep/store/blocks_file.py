"""`blocks-<split>.b3`: the digests of all blocks of a split's stream, 32 bytes each, one after the other.

With it any block can be verified by itself, wherever it comes from. It needs no place in the manifest: the BLAKE3
digest of the file is the split's fingerprint (see `fingerprints.py`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.store.files import FileProblem, file_problem, whole_file
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.manifest import Split
from data_prep.store.names import blocks_name
from data_prep.store.places import join

DIGEST_BYTES = 32


def num_blocks(num_tokens: int) -> int:
    """Of a stream; the last one may be short.

    >>> num_blocks(2**20), num_blocks(2**20 + 1)
    (1, 2)
    """
    return -(-num_tokens // BLOCK_TOKENS)


def file_bytes(split: Split) -> int:
    """The size of a split's file."""
    return DIGEST_BYTES * num_blocks(split.num_tokens)


def write_blocks(directory: str | os.PathLike, name: str, digests: Sequence[bytes]) -> None:
    """Writes the file of the split `name`; equal streams give equal bytes."""
    with whole_file(join(directory, blocks_name(name))) as partial:
        partial.write_bytes(b"".join(digests))


def blocks_problem(directory: str | os.PathLike, name: str, split: Split) -> FileProblem | None:
    """What is wrong with the file of the split `name`; None if nothing is."""
    return file_problem(join(directory, blocks_name(name)), file_bytes(split), split.fingerprint)


def read_blocks(path: str | os.PathLike) -> list[bytes]:
    """The digests in a file that was found whole."""
    content = Path(path).read_bytes()
    return [content[first : first + DIGEST_BYTES] for first in range(0, len(content), DIGEST_BYTES)]
