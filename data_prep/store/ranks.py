"""The ranks of a byte-pair encoding, as a .tiktoken file has them: "base64 rank" a line."""

import base64
import hashlib
import itertools
from pathlib import Path


def read_ranks(path: Path, sha256: str | None = None) -> bytes:
    """Content of a .tiktoken file, after checking its digest if that is given."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        advice = "missing from the installation. Install it again." if sha256 else "no such file"
        raise ValueError(f"{path}: {advice}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(
            f"{path}: sha256 is {found}, expected {sha256}; the GPT-2 ranks are damaged. "
            "Restore the file (git checkout) or install the package again."
        )
    return content


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """The byte pairs of a .tiktoken file. ValueError where it is none.

    >>> parse_ranks(b"YQ== 0\\nYWI= 1\\n")
    {b'a': 0, b'ab': 1}
    """
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The inverse of `parse_ranks`, in the order of the ranks."""
    pairs = sorted(ranks.items(), key=lambda pair: pair[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in pairs)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each token of several bytes is made of, in the order of the ranks.

    >>> merges_of({b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"abc": 4})
    [(b'b', b'c'), (b'a', b'bc')]

    Raises ValueError for a token that the tokens before it do not lead to: there is no such pair.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda each: each[1]):
        if len(token) > 1:
            parts = _merged(token, ranks, rank)
            if len(parts) != 2:
                raise ValueError(f"token {rank}, {token!r:.80}, is not made of two tokens of lower ranks")
            pairs.append((parts[0], parts[1]))
    return pairs


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """What merging makes of a token's bytes with the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        candidates = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        if not candidates or (lowest := min(candidates)) >= below:
            return parts
        at = candidates.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
