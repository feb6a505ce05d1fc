"""Data and checkpoints as trackers know them: where they are and what they are, never their bytes."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reference:
    """Something that a run reads or makes.

    Attributes:
      name: of all its versions.
      kind: "dataset" or "model".
      entry: its own name.
      url: file://..., gs://..., s3://...
      digest: of its content; another one makes another version.
      metadata: JSON values.
      aliases: of this version.
    """

    name: str
    kind: str
    entry: str
    url: str
    digest: str
    metadata: Mapping[str, Any]
    aliases: tuple[str, ...] = ()

    @property
    def name_and_digest(self) -> tuple[str, str]:
        """What tells it from all others."""
        return self.name, self.digest
