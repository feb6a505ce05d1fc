"""The ledger of a run: a 64-bit digest of every batch it was trained on.

    save_dir/ledger.bin    8 bytes of magic, then 8 bytes a step (little-endian), the digest of step 0 first

The same bytes lie in every checkpoint, so that the ledger of a run is as long as its newest checkpoint says and
goes wherever the checkpoint goes. What a digest is made of, `batches.digest_of_rows` says.
"""

import base64
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.store.files import read_bytes, whole_file

FILE_NAME = "ledger.bin"
MAGIC = b"GPTLEDG1"
DIGEST = np.dtype("<u8")
MAX_BYTES = 1 << 30  # 134 million steps


class Ledger:
    """Digests of steps 0, 1, 2, ...; those of a process with a part of the rows are partial sums.

    Attributes:
      digests: uint64 (steps,).
    """

    def __init__(self, digests: Iterable[int] = ()):
        self.digests = np.array(list(digests), DIGEST)
        self._new: list[int] = []

    def __len__(self) -> int:
        """Steps recorded, the new ones included."""
        return len(self.digests) + len(self._new)

    def add(self, digest: int) -> None:
        """Records the next step's digest, as far as this process knows it."""
        self._new.append(digest)

    def take_new(self) -> np.ndarray:
        """The digests added since the last `extend`: uint64 (n,)."""
        return np.array(self._new, DIGEST)

    def extend(self, digests: np.ndarray) -> None:
        """Puts whole batches' digests in the place of the new ones."""
        assert len(digests) == len(self._new)
        self.digests = np.concatenate([self.digests, digests.astype(DIGEST)])
        self._new = []

    def to_text(self) -> str:
        """For a checkpoint's metadata."""
        return base64.b64encode(self.digests.tobytes()).decode()

    @classmethod
    def from_text(cls, text: str) -> "Ledger":
        """The inverse of `to_text`."""
        return cls(np.frombuffer(base64.b64decode(text), DIGEST).tolist())

    def write(self, save_dir: str | os.PathLike) -> None:
        """Replaces the run's file."""
        with whole_file(Path(save_dir, FILE_NAME)) as partial:
            partial.write_bytes(MAGIC + self.digests.tobytes())

    @classmethod
    def read(cls, save_dir: str | os.PathLike) -> "Ledger":
        """The run's file. ValueError if it is missing or is no ledger."""
        path = Path(save_dir, FILE_NAME)
        try:
            content = read_bytes(path, MAX_BYTES)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; expected the save_dir of a run of gpt_pretrain.main") from None
        if content[:8] != MAGIC or len(content) % 8:
            raise ValueError(
                f"{path}: {len(content)} bytes that begin with {content[:8]!r}, expected {MAGIC!r} and 8 bytes a step. "
                "Every checkpoint holds a copy: start the run again, and it is written anew."
            )
        return cls(np.frombuffer(content[8:], DIGEST).tolist())

    def first_difference(self, other: "Ledger") -> int | None:
        """The first step at which two ledgers differ, as far as both go; None if they agree."""
        both = min(len(self.digests), len(other.digests))
        unequal = np.flatnonzero(self.digests[:both] != other.digests[:both])
        return int(unequal[0]) if len(unequal) else None
