"""What a preparation or conversion ended with."""

import os
import shlex
import sys
from dataclasses import dataclass

from data_prep.pages.numbers import duration
from data_prep.pages.terminal import python_as_typed
from data_prep.store.locations import is_bucket
from data_prep.store.manifest import Manifest


class PreparationError(ValueError):
    """The work stopped for a reason that the user can remove; what is done is kept."""


@dataclass(frozen=True)
class Outcome:
    manifest: Manifest
    was_complete: bool = False  # nothing was done
    num_empty: int = 0  # texts of no tokens, which are not in the stream
    num_null: int = 0  # rows without a text, likewise


@dataclass(frozen=True)
class ShareOutcome:
    """What one task of several ended with."""

    unit_range: str
    num_units: int
    num_reused: int  # of these, which an earlier run had tokenized
    num_tokens: int


QUICKSTART_SEQ_LEN = 128
LARGE_TOKENS = 10**9  # from here on a GPT-2 of 124M is worth its time


def training_flags(manifest: Manifest) -> list[str]:
    """Flags for gpt_pretrain.main that fit a dataset: a configuration, and what of it the dataset needs otherwise."""
    spec, num_tokens = manifest.spec, manifest.splits["train"].num_tokens
    if spec.source == "sample" and spec.tokenizer == "gpt2" and spec.max_tokens is None:
        return ["--gin_file=configs/quickstart.gin"]
    is_large = num_tokens >= LARGE_TOKENS
    flags = [f"--gin_file=configs/{'gpt2_124m' if is_large else 'quickstart'}.gin"]
    if spec.tokenizer != "gpt2":
        flags.append(f"--model.vocab_size={-(-spec.vocab_size // 64) * 64}")  # accelerators like multiples
    seq_len = QUICKSTART_SEQ_LEN
    shortest = min(split.num_tokens for split in manifest.splits.values())
    while seq_len > 1 and seq_len >= shortest:  # a window is one token more
        seq_len //= 2
    if seq_len < QUICKSTART_SEQ_LEN:
        flags.append(f"--seq_len={seq_len}")
    return flags


def training_command(manifest: Manifest, output_dir: str) -> str:
    """What to type to train on the dataset, from the directory of this project."""
    flags = [*training_flags(manifest), f"--data_dir={shlex.quote(output_dir)}"]
    if manifest.spec.source != "sample":  # beside the runs on other data, which a run is never resumed with
        directory = output_dir if is_bucket(output_dir) else os.path.realpath(output_dir)
        name = os.path.basename(directory.rstrip("/")) or "mine"
        flags.append(f"--save_dir={shlex.quote(f'runs/{name}')}")
    return " ".join([python_as_typed(), "-m gpt_pretrain.main", *flags])


def summary(outcome: Outcome, source: str, output_dir: str, seconds: float) -> str:
    """The one line that a command ends with."""
    command = training_command(outcome.manifest, output_dir)
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


def share_summary(outcome: ShareOutcome, output_dir: str, seconds: float) -> str:
    """The one line that a task ends with."""
    there = f" ({outcome.num_reused:,} were there)" if outcome.num_reused else ""
    units = "1 unit" if outcome.num_units == 1 else f"{outcome.num_units:,} units"
    return (
        f"{output_dir}: --unit_range={outcome.unit_range}: {units}{there}, {outcome.num_tokens:,} tokens in "
        f"{duration(seconds)}. Next, when all tasks are done: the same command without --unit_range"
    )


def warn(outcome: Outcome, output_dir: str) -> None:
    """Says what is odd about a dataset, a line each, to standard error."""
    splits, spec = outcome.manifest.splits, outcome.manifest.spec
    if "val" not in splits or splits["val"].num_tokens <= splits["train"].num_tokens:
        return
    val, train = splits["val"], splits["train"]
    if not spec.is_from_text:
        advice = "look at which files have `val` in their names"
    elif val.num_documents == 1:
        advice = "the first document alone is that long; cut it into several, or use --val_tokens=0 for none"
    else:
        advice = f"use a smaller --val_tokens, such as {max(1, (val.num_tokens + train.num_tokens) // 10)}"
    print(
        f"warning: {output_dir}: the validation split ({val.num_tokens:,} tokens) is larger than the training split "
        f"({train.num_tokens:,}): {advice}",
        file=sys.stderr,
    )
