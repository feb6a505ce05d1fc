"""What was asked for: everything that the bytes of a prepared dataset depend on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.store.manifest import FORMATS
from data_prep.store.token_bin import HEADER_BYTES, MAX_TOKENS
from data_prep.store.token_records import COMPRESSION
from data_prep.store.tokenizers import Tokenizer


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
        if self.shard_tokens > MAX_TOKENS:
            raise ValueError(f"--shard_tokens={self.shard_tokens}: the .bin header counts to {MAX_TOKENS}")


def make_spec(options: Options, tokenizer: Tokenizer, inputs: Sequence[Any]) -> dict[str, Any]:
    """The spec as it stands in the manifest: JSON values only."""
    return {
        "source": options.source,
        "inputs": list(inputs),
        "tokenizer": options.tokenizer,
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "text_column": options.text_column,
        "formats": list(options.formats),
        "bin_header": options.bin_header,
        "shard_tokens": options.shard_tokens,
        "record_tokens": options.record_tokens,
        "record_compression": options.record_compression,
        "val_tokens": options.val_tokens,
        "max_tokens": options.max_tokens,
    }


def differences(there: dict[str, Any], asked: dict[str, Any], *, but_inputs: Sequence[str] | None = ()) -> list[str]:
    """One line for each field that differs; empty where the two are the same.

    Args:
      but_inputs: paths of inputs that may differ; None leaves all the inputs out.
    """
    lines = [
        f"{name}: {there.get(name)!r} there, {asked.get(name)!r} asked for"
        for name in sorted(there.keys() | asked.keys())
        if name != "inputs" and there.get(name) != asked.get(name)
    ]
    if but_inputs is None:
        return lines
    old = {entry["path"]: entry for entry in there.get("inputs", ())}
    new = {entry["path"]: entry for entry in asked.get("inputs", ())}
    if list(old) != list(new):
        if missing := [path for path in old if path not in new]:
            lines.append(f"inputs: there but not asked for: {_few(missing)}")
        if added := [path for path in new if path not in old]:
            lines.append(f"inputs: asked for but not there: {_few(added)}")
        if set(old) == set(new):
            lines.append("inputs: the same files in another order")
    for path in old.keys() & new.keys() - set(but_inputs):
        lines += [
            f"inputs: {path}: {key} {old[path].get(key)!r} there, {value!r} asked for"
            for key, value in new[path].items()
            if value != old[path].get(key)
        ]
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
