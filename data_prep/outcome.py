"""What a preparation or conversion ended with."""

import shlex
from dataclasses import dataclass

from data_prep.pages.numbers import duration
from data_prep.store.manifest import Manifest


class PreparationError(ValueError):
    """The work stopped for a reason that the user can remove; what is done is kept."""


@dataclass(frozen=True)
class Outcome:
    manifest: Manifest
    was_complete: bool = False  # nothing was done
    num_empty: int = 0  # texts of no tokens, which are not in the stream
    num_null: int = 0  # rows without a text, likewise


def summary(outcome: Outcome, source: str, output_dir: str, seconds: float) -> str:
    """The one line that a command ends with."""
    config = "quickstart" if source == "sample" else "gpt2_124m"
    command = f"python -m gpt_pretrain.main --gin_file=configs/{config}.gin --data_dir={shlex.quote(output_dir)}"
    splits = outcome.manifest.splits
    sizes = ", ".join(f"{split} {splits[split].num_tokens:,}" for split in splits)
    if outcome.was_complete:
        return f"{output_dir}: already complete ({sizes} tokens); nothing to do. Next: {command}"
    skipped = [f"{outcome.num_null:,} null texts"] if outcome.num_null else []
    skipped += [f"{outcome.num_empty:,} empty texts"] if outcome.num_empty else []
    documents = sum(split.num_documents for split in splits.values())
    return (
        f"{output_dir}: {documents:,} documents, {sizes} tokens in {duration(seconds)}"
        + (f"; skipped {' and '.join(skipped)}" if skipped else "")
        + f". Next: {command}"
    )
