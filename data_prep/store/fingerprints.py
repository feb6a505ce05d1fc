"""A digest of a token stream that does not depend on how the stream is stored or was made.

BLAKE3 over the BLAKE3 digests of consecutive blocks of 2**20 tokens (little-endian, in the stream's
own width): so blocks can be digested in parallel, and the files' boundaries leave no trace.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from blake3 import blake3

BLOCK_TOKENS = 1 << 20


def block_digests(chunks: Iterable[np.ndarray]) -> Iterator[bytes]:
    """Digest of each block of a stream that starts at a block boundary; the last may be short."""
    digest, num_tokens = blake3(), 0
    for chunk in chunks:
        chunk = np.ascontiguousarray(chunk)
        while len(chunk):
            piece, chunk = np.split(chunk, [min(len(chunk), BLOCK_TOKENS - num_tokens)])
            digest.update(piece.data.cast("B"))
            num_tokens += len(piece)
            if num_tokens == BLOCK_TOKENS:
                yield digest.digest()
                digest, num_tokens = blake3(), 0
    if num_tokens:
        yield digest.digest()


def fingerprint(digests: Sequence[bytes]) -> str:
    """The fingerprint of a stream from the digests of all its blocks, in order."""
    return blake3(b"".join(digests)).hexdigest()
