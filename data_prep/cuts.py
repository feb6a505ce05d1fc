"""Which tokens go into which file: cuts the parts' stream into splits and shards."""

from collections.abc import Sequence

import numpy as np

from data_prep.parts import Part, part_range, read_documents
from data_prep.shards import FingerprintJob, ShardJob
from data_prep.store.addresses import Addresses
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.names import shard_name
from data_prep.store.spec import Spec
from data_prep.store.streams import StoredStream

FINGERPRINT_TOKENS = 32 * BLOCK_TOKENS  # in one job


def cut_splits(parts: Sequence[Part], directory: str, val_tokens: int, max_tokens: int | None) -> tuple[int, int]:
    """(tokens of the val split, tokens of both splits), both at ends of documents.

    The stream is the longest prefix of whole documents with at most max_tokens tokens; val is
    the shortest prefix of whole documents with at least val_tokens.

    Raises ValueError when nothing would be left to train on.
    """
    total = sum(part.num_tokens for part in parts)
    if total == 0:
        raise ValueError("the input holds no text: every document is empty or null")
    if max_tokens is not None and total > max_tokens:
        total = _document_end(parts, directory, max_tokens, at_least=False)
    num_val = 0
    if val_tokens:
        num_val = total
        if val_tokens < total:
            num_val = _document_end(parts, directory, val_tokens, at_least=True)
    if num_val >= total:
        raise ValueError(_nothing_left(parts, directory, val_tokens, max_tokens, total))
    return num_val, total


def _nothing_left(parts: Sequence[Part], directory: str, val_tokens: int, max_tokens: int | None, total: int) -> str:
    """Why no training split is left, and an option that would leave one."""
    limit = "" if max_tokens is None else f" (with --max_tokens={max_tokens})"
    what = (
        f"nothing is left to train on: --val_tokens={val_tokens} takes whole documents from "
        f"the front, and the stream has {total:,} tokens in all{limit}."
    )
    first = _document_end(parts, directory, 1, at_least=True)
    if total == 0:
        advice = f"The first document alone has {first:,} tokens: use a larger --max_tokens"
    elif first == total:
        advice = "It is a single document: use --val_tokens=0 for no validation split, or cut the text into documents"
    else:
        last = _document_end(parts, directory, total - 1, at_least=False)  # where the last document begins
        advice = f"Use a smaller --val_tokens, such as {max(1, min(total // 10, last))}"
    return f"{what} {advice}; the work done so far is kept."


def _document_end(parts: Sequence[Part], directory: str, limit: int, *, at_least: bool) -> int:
    """The end of a document next to `limit`, in [1, all tokens]: the first one >= it, or the last one <= it."""
    addresses = Addresses(part.num_tokens for part in parts)
    index, _ = addresses.find(limit - 1)
    first, part = int(addresses.starts[index]), parts[index]
    starts = read_documents(directory, part.name, ["start"])["start"].to_numpy()
    ends = first + np.append(starts, part.num_tokens)  # also the end of the one before
    place = np.searchsorted(ends, limit, side="left" if at_least else "right")
    return int(ends[place] if at_least else ends[place - 1])


def part_streams(parts: Sequence[Part], directory: str, spec: Spec) -> dict[str, StoredStream]:
    """The stream of each split that is not empty, as it lies in the parts."""
    assert spec.val_tokens is not None, spec
    num_val, total = cut_splits(parts, directory, spec.val_tokens, spec.max_tokens)
    whole = StoredStream(part_range(directory, part.name, part.num_tokens, part.digest) for part in parts)
    return split_streams(whole, num_val, total)


def split_streams(whole: StoredStream, num_val: int, total: int) -> dict[str, StoredStream]:
    """The splits of a stream that begins with val; only those that are not empty."""
    ranges = {"train": (num_val, total), "val": (0, num_val)}
    return {split: whole.cut(start, stop) for split, (start, stop) in ranges.items() if stop > start}


def shard_ranges(num_tokens: int, format: str, spec: Spec) -> list[tuple[int, int]]:
    """The (start, stop) of each shard; ArrayRecord shards end at a record's end."""
    step = spec.shard_tokens
    if format == "array_record":
        step = max(1, step // spec.record_tokens) * spec.record_tokens
    return [(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]


def shard_jobs(
    streams: dict[str, StoredStream],
    formats: Sequence[str],
    spec: Spec,
    output_dir: str,
    work_dir: str,
) -> list[ShardJob]:
    """A job for each file of the given formats."""
    jobs = []
    for split, stream in streams.items():
        for format in formats:
            ranges = shard_ranges(stream.num_tokens, format, spec)
            for index, (start, stop) in enumerate(ranges):
                jobs.append(
                    ShardJob(
                        name=shard_name(format, split, index, len(ranges)),
                        format=format,
                        split=split,
                        start=start,
                        stop=stop,
                        ranges=stream.ranges(start, stop),
                        bin_header=spec.bin_header,
                        record_tokens=spec.record_tokens,
                        record_compression=spec.record_compression,
                        end_of_text=spec.end_of_text,
                        vocab_size=spec.vocab_size,
                        output_dir=output_dir,
                        work_dir=work_dir,
                    )
                )
    return jobs


def fingerprint_jobs(streams: dict[str, StoredStream], spec: Spec) -> list[FingerprintJob]:
    """Jobs that together digest every block of every split, in order."""
    return [
        FingerprintJob(
            split=split,
            start=start,
            ranges=stream.ranges(start, min(start + FINGERPRINT_TOKENS, stream.num_tokens)),
            vocab_size=spec.vocab_size,
        )
        for split, stream in streams.items()
        for start in range(0, stream.num_tokens, FINGERPRINT_TOKENS)
    ]
