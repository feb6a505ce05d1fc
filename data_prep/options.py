"""What was asked for on the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.store.secrets import public_names
from data_prep.store.spec import FORMATS, Spec
from data_prep.store.token_bin import HEADER_BYTES, MAX_TOKENS
from data_prep.store.token_records import COMPRESSION
from data_prep.store.tokenizers import Tokenizer

MAX_RECORD_TOKENS = 2**28  # a record is read whole, and a protobuf message ends at 2 GiB


@dataclass(frozen=True)
class Options:
    """The choices of one preparation. How many workers do it is not one of them.

    Raises ValueError for a value that cannot be.
    """

    source: str  # a preset, or comma-separated paths, globs and URLs
    val_tokens: int
    max_tokens: int | None = None
    formats: tuple[str, ...] = FORMATS
    bin_header: str = "short"
    tokenizer: str = "gpt2"
    shard_tokens: int = 100_000_000
    record_tokens: int = 2048
    record_compression: str = "none"
    text_column: str = "text"

    def __post_init__(self):
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(f"--formats={','.join(self.formats)}: expected one or more of {', '.join(FORMATS)}")
        # Order and repetition mean nothing, so they must not make another spec.
        object.__setattr__(self, "formats", tuple(f for f in FORMATS if f in self.formats))
        if self.bin_header not in HEADER_BYTES:
            raise ValueError(f"--bin_header={self.bin_header}: expected one of {', '.join(HEADER_BYTES)}")
        if self.record_compression not in COMPRESSION:
            raise ValueError(
                f"--record_compression={self.record_compression}: expected one of " + ", ".join(COMPRESSION)
            )
        for name, least in [("shard_tokens", 1), ("record_tokens", 1), ("val_tokens", 0)]:
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"--{name}={value}: expected at least {least}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"--max_tokens={self.max_tokens}: expected at least 1")
        if self.record_tokens > MAX_RECORD_TOKENS:
            raise ValueError(f"--record_tokens={self.record_tokens}: expected at most {MAX_RECORD_TOKENS}")
        for name in ("source", "tokenizer", "text_column"):
            if not getattr(self, name).strip():
                raise ValueError(f"--{'input' if name == 'source' else name}={getattr(self, name)!r}: it is empty")
        if self.shard_tokens > MAX_TOKENS:
            raise ValueError(f"--shard_tokens={self.shard_tokens}: the .bin header counts to {MAX_TOKENS}")

    def spec(self, tokenizer: Tokenizer, inputs: Sequence[Mapping[str, Any]]) -> Spec:
        """The spec of the dataset that text becomes with these options.

        Args:
          inputs: what is known of each file.
        """
        return Spec(
            source=public_names(self.source),
            inputs=tuple(inputs),
            tokenizer=self.tokenizer,
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            text_column=self.text_column,
            formats=self.formats,
            bin_header=self.bin_header,
            shard_tokens=self.shard_tokens,
            record_tokens=self.record_tokens,
            record_compression=self.record_compression,
            val_tokens=self.val_tokens,
            max_tokens=self.max_tokens,
        )
