"""Which tokens go into which file: cuts the segments' stream into splits and shards."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.parts import Segment, read_documents, tokens_path
from data_prep.shards import FingerprintJob, Piece, ShardJob, shard_name, shard_ranges
from data_prep.store.fingerprints import BLOCK_TOKENS
from data_prep.store.manifest import DOCUMENTS, Manifest

FINGERPRINT_TOKENS = 32 * BLOCK_TOKENS  # in one job


class StoredStream:
    """A stream that lies in several files, one after the other."""

    def __init__(self, pieces: Iterable[Piece]):
        self._pieces = [piece for piece in pieces if piece.stop > piece.start]
        self._ends = list(accumulate(piece.stop - piece.start for piece in self._pieces))
        self.num_tokens = self._ends[-1] if self._ends else 0

    def pieces(self, start: int, stop: int) -> tuple[Piece, ...]:
        """Where tokens [start, stop) of the stream are."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        out = []
        index = bisect_right(self._ends, start)
        while start < stop:
            piece, end = self._pieces[index], self._ends[index]
            shift = piece.stop - end  # place in the stream -> place in the file
            out.append(replace(piece, start=start + shift, stop=min(stop, end) + shift))
            start, index = end, index + 1
        return tuple(out)


def dataset_stream(directory: str | Path, manifest: Manifest, split: str, format: str) -> StoredStream:
    """The stream of one split of a prepared dataset, as it lies in the files of one format.

    Of "documents": as its tables of documents list it, which count from the split's first token.
    """
    record_tokens = manifest.spec["record_tokens"] if format == "array_record" else None
    pieces, first = [], 0
    for shard in manifest.shards_of(split, format):
        path, start = str(Path(directory, shard.name)), first if format == DOCUMENTS else 0
        stop = start + shard.num_tokens
        pieces.append(Piece(path, format, shard.digest, start, stop, record_tokens))
        first += shard.num_tokens
    return StoredStream(pieces)


def cut_splits(segments: Sequence[Segment], directory: str | Path, options: dict[str, Any]) -> tuple[int, int]:
    """(tokens of the val split, tokens of both splits), both at ends of documents.

    The stream is the longest prefix of whole documents with at most max_tokens tokens; val is
    the shortest prefix of whole documents with at least val_tokens.

    Raises ValueError when nothing would be left to train on.
    """
    val_tokens, max_tokens = options["val_tokens"], options["max_tokens"]
    total = sum(segment.num_tokens for segment in segments)
    if total == 0:
        raise ValueError("the input holds no text: every document is empty or null")
    if max_tokens is not None and total > max_tokens:
        total = _document_end(segments, directory, max_tokens, at_least=False)
    num_val = 0
    if val_tokens:
        num_val = total
        if val_tokens < total:
            num_val = _document_end(segments, directory, val_tokens, at_least=True)
    if num_val >= total:
        limit = "" if max_tokens is None else f" (with --max_tokens={max_tokens})"
        raise ValueError(
            f"nothing is left to train on: --val_tokens={val_tokens} takes whole documents from "
            f"the front, and the stream has {total:,} tokens in all{limit}. Use a smaller "
            "--val_tokens; the work done so far is kept."
        )
    return num_val, total


def _document_end(segments: Sequence[Segment], directory: str | Path, limit: int, *, at_least: bool) -> int:
    """The end of a document next to `limit`: the first one >= it, or the last one <= it."""
    offset = 0
    for segment in segments:
        if offset + segment.num_tokens >= limit:
            starts = read_documents(directory, segment.name, ["start"])["start"].to_numpy()
            ends = offset + np.append(starts, segment.num_tokens)  # also the end of the one before
            index = np.searchsorted(ends, limit, side="left" if at_least else "right")
            return int(ends[index] if at_least else ends[index - 1])
        offset += segment.num_tokens
    raise AssertionError(f"{limit} is beyond the stream's {offset} tokens")


def segment_streams(
    segments: Sequence[Segment], directory: str | Path, options: dict[str, Any]
) -> dict[str, StoredStream]:
    """The stream of each split that is not empty, as stretches of the segments."""
    num_val, total = cut_splits(segments, directory, options)
    whole = StoredStream(
        Piece(str(tokens_path(directory, s.name)), "segment", s.digest, 0, s.num_tokens) for s in segments
    )
    ranges = {"train": (num_val, total), "val": (0, num_val)}
    return {split: StoredStream(whole.pieces(start, stop)) for split, (start, stop) in ranges.items() if stop > start}


def shard_jobs(
    streams: dict[str, StoredStream],
    formats: Sequence[str],
    spec: dict[str, Any],
    output_dir: str | Path,
    work_dir: str | Path,
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
                        pieces=stream.pieces(start, stop),
                        bin_header=spec["bin_header"],
                        record_tokens=spec["record_tokens"],
                        record_compression=spec["record_compression"],
                        end_of_text=spec["end_of_text"],
                        vocab_size=spec["vocab_size"],
                        output_dir=str(output_dir),
                        work_dir=str(work_dir),
                    )
                )
    return jobs


def fingerprint_jobs(streams: dict[str, StoredStream], spec: dict[str, Any]) -> list[FingerprintJob]:
    """Jobs that together digest every block of every split, in order."""
    return [
        FingerprintJob(
            split,
            start,
            stream.pieces(start, min(start + FINGERPRINT_TOKENS, stream.num_tokens)),
            spec["record_tokens"],
            spec["vocab_size"],
        )
        for split, stream in streams.items()
        for start in range(0, stream.num_tokens, FINGERPRINT_TOKENS)
    ]
