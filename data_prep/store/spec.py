"""Everything that the bytes of a prepared dataset depend on, as it stands in the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from data_prep.store.typed import Count, typed

FORMATS = ("bin", "array_record")
MAX_VOCAB_SIZE = 1 << 24  # every id has a counter; the largest vocabularies in use have a quarter of a million


@dataclass(frozen=True)
class Spec:
    """What a dataset was made from, and how. Raises ValueError for a value that cannot be.

    A stream that was not made from text but from .bin shards without a manifest has no `text_column` and no
    `val_tokens`: nobody knows what the texts were cut from, and the files' names say what val is.
    """

    source: str  # as the user named it: a preset, or comma-separated paths, globs and URLs
    inputs: tuple[Mapping[str, Any], ...]  # of each file its path, and what changes with its content
    tokenizer: str
    tokenizer_digest: str
    vocab_size: Count  # ids are below it
    end_of_text: Count  # the id that begins each document
    text_column: str | None
    formats: tuple[str, ...]  # that the stream is stored in, in the order of FORMATS
    bin_header: str  # "short" or "llmc"
    shard_tokens: Count  # in one output file
    record_tokens: Count  # in one ArrayRecord record
    record_compression: str  # "none" or "zstd"
    val_tokens: Count | None
    max_tokens: Count | None = None  # where the stream was stopped; None is nowhere
    num_shards: Count | None = None  # of shards without a manifest, how many were taken; None is all

    def __post_init__(self):
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "formats", tuple(self.formats))
        for field in ("vocab_size", "shard_tokens", "record_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size is {self.vocab_size}, expected at most {MAX_VOCAB_SIZE}")
        for field, known in (("bin_header", ("short", "llmc")), ("record_compression", ("none", "zstd"))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r:.80}, expected {' or '.join(known)}")
        if not 0 <= self.end_of_text < self.vocab_size:
            raise ValueError(f"end_of_text is {self.end_of_text}, expected an id below vocab_size {self.vocab_size}")
        if not self.formats or set(self.formats) - set(FORMATS):
            raise ValueError(f"formats is {list(self.formats)}, expected one or more of {list(FORMATS)}")
        for number, entry in enumerate(self.inputs):
            if not isinstance(entry.get("path"), str):
                raise ValueError(f"inputs has an entry without a path, number {number}")
            typed(Count | None, entry.get("size"), f"inputs[{number}].size")
        if (self.text_column is None) != (self.val_tokens is None) or (self.is_from_text and self.num_shards):
            raise ValueError(
                f"text_column {self.text_column!r}, val_tokens {self.val_tokens} and num_shards {self.num_shards} "
                "contradict one another: a stream comes either from text or from shards"
            )

    @property
    def is_from_text(self) -> bool:
        """Whether the stream was made from text, not from shards without a manifest."""
        return self.text_column is not None

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it: JSON values only."""
        values = asdict(self) | {"inputs": [dict(entry) for entry in self.inputs], "formats": list(self.formats)}
        if self.is_from_text:
            del values["num_shards"]
        return values

    @classmethod
    def from_json(cls, values: Any) -> "Spec":
        """The inverse of `to_json`. ValueError for a missing or an unknown field, naming it, or an impossible value.

        >>> Spec.from_json({"source": "sample"})
        Traceback (most recent call last):
        ...
        ValueError: the spec has no field inputs, tokenizer, tokenizer_digest and 10 more
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"the spec is {type(values).__name__}, expected an object")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            shown = unknown[0] if unknown[0].isprintable() else repr(unknown[0])
            raise ValueError(
                f"the spec has the unknown field {shown}; known are {', '.join(known)}. "
                "Another version of data_prep wrote it."
            )
        needed = [name for name in known if name != "num_shards" or values.get("text_column", "") is None]
        if missing := [name for name in needed if name not in values]:
            raise ValueError(f"the spec has no field {few(missing)}")
        return typed(cls, values, "spec")


def few(names: Sequence[str]) -> str:
    """The first three of many names.

    >>> few(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
