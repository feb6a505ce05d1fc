"""Stage 1: one unit of input -> one segment of tokens. Pure and idempotent.

A segment is three files in the work directory: raw uint16 tokens, a table of its documents, and
a JSON note that is written last. The note says what the segment was made from and the digests of
the other two; a segment counts only with a note that matches, whatever a killed run left there.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.documents import Batch, Unit, read_unit
from data_prep.engines import Report
from data_prep.files import is_intact, read_json, sha256_of, whole_file, write_json
from data_prep.tokenizers import Tokenizer, get_tokenizer

GROUP_ROWS = 16384  # documents in one row group of a table
DOCUMENT_COLUMNS = pa.schema(
    [
        ("start", pa.int64()),  # position of the document's end-of-text token
        ("length", pa.int64()),  # in tokens, with the end-of-text token
        ("id", pa.string()),
        ("url", pa.string()),
        ("dump", pa.string()),
        ("source_file", pa.string()),
        ("row", pa.int64()),  # row or line in the source file, from 0
    ]
)


@dataclass(frozen=True)
class SegmentJob:
    unit: Unit
    identity: tuple[str, ...]  # of the unit's file: size and digest, in words
    tokenizer: str
    tokenizer_digest: str
    text_column: str
    directory: str

    def source(self) -> dict[str, Any]:
        """All that the segment's bytes depend on."""
        fields = asdict(self) | {"identity": list(self.identity)}
        del fields["directory"]
        return fields


@dataclass(frozen=True)
class Segment:
    name: str
    num_tokens: int
    num_documents: int
    num_empty: int  # texts of no tokens: not in the stream
    num_null: int  # rows without a text: not in the stream
    num_text_bytes: int
    sha256: str  # of the tokens
    documents_bytes: int
    documents_sha256: str
    reused: bool = False  # an earlier run made it


def tokens_path(directory: str | Path, name: str) -> Path:
    """Raw little-endian uint16 ids of a segment."""
    return Path(directory, f"{name}.tokens")


def documents_path(directory: str | Path, name: str) -> Path:
    """Table of a segment's documents; `start` counts from the segment's first token."""
    return Path(directory, f"{name}.parquet")


def tokenize_unit(job: SegmentJob, report: Report) -> Segment:
    """Makes the job's segment, unless a whole one from the same source is there already.

    Raises InputError where the input cannot be read; OSError where the output cannot be written.
    """
    note_path = Path(job.directory, f"{job.unit.name}.json")
    found = _find_segment(job, note_path)
    if found:
        return found
    tokenizer = _tokenizer(job.tokenizer)
    num_documents = num_empty = num_null = num_tokens = num_text_bytes = 0
    digest = hashlib.sha256()
    tokens_file = tokens_path(job.directory, job.unit.name)
    documents_file = documents_path(job.directory, job.unit.name)
    with (
        whole_file(tokens_file) as partial,
        open(partial, "wb") as tokens_out,
        whole_file(documents_file) as partial_documents,
        pq.ParquetWriter(partial_documents, DOCUMENT_COLUMNS, compression="zstd") as table_out,
    ):
        waiting: list[dict[str, Any]] = []
        for batch in read_unit(job.unit, job.text_column):
            ids, lengths, batch_bytes = _encode_batch(tokenizer, batch)
            tokens_out.write(ids.data)
            digest.update(ids.data)
            for place, length in enumerate(lengths):
                if length:
                    waiting.append(_document(job.unit, batch, place, num_tokens, length))
                    num_tokens += length
            if len(waiting) >= GROUP_ROWS:
                table_out.write_table(pa.Table.from_pylist(waiting, DOCUMENT_COLUMNS))
                waiting = []
            num_new = sum(length > 0 for length in lengths)
            num_null_new = sum(text is None for text in batch.texts)
            num_documents += num_new
            num_null += num_null_new
            num_empty += len(lengths) - num_new - num_null_new
            num_text_bytes += batch_bytes
            report(num_new, len(ids), batch_bytes, batch.num_bytes)
        table_out.write_table(pa.Table.from_pylist(waiting, DOCUMENT_COLUMNS))
    segment = Segment(
        name=job.unit.name,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_empty=num_empty,
        num_null=num_null,
        num_text_bytes=num_text_bytes,
        sha256=digest.hexdigest(),
        documents_bytes=documents_file.stat().st_size,
        documents_sha256=sha256_of(documents_file),
    )
    write_json(note_path, {"source": job.source(), "segment": asdict(segment)})
    return segment


def _find_segment(job: SegmentJob, note_path: Path) -> Segment | None:
    try:
        note = read_json(note_path)
    except ValueError:
        return None  # damaged: the segment is made again
    if not note or note["source"] != job.source():
        return None
    segment = Segment(**note["segment"] | {"reused": True})
    tokens = tokens_path(job.directory, segment.name)
    documents = documents_path(job.directory, segment.name)
    if not is_intact(tokens, 2 * segment.num_tokens, segment.sha256):
        return None
    if not is_intact(documents, segment.documents_bytes, segment.documents_sha256):
        return None
    return segment


@lru_cache(maxsize=1)
def _tokenizer(name: str) -> Tokenizer:
    return get_tokenizer(name)


def _encode_batch(tokenizer: Tokenizer, batch: Batch) -> tuple[np.ndarray, list[int], int]:
    """A batch -> ids of its documents one after the other, tokens of each (0: none), bytes."""
    end_of_text = np.array([tokenizer.end_of_text], "<u2")
    pieces: list[np.ndarray] = [np.empty(0, "<u2")]
    lengths: list[int] = []
    num_bytes = 0
    for text in batch.texts:
        text = text or ""
        ids = np.asarray(tokenizer.encode(text))
        if not len(ids):
            lengths.append(0)
            continue
        if ids.max() >= tokenizer.vocab_size:  # at most 65,536: so this also keeps it in uint16
            raise ValueError(
                f"tokenizer {tokenizer.name} gave the id {ids.max()}, but has vocab_size "
                f"{tokenizer.vocab_size}: it does not fit"
            )
        pieces += [end_of_text, ids]
        lengths.append(1 + len(ids))
        num_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    return np.concatenate(pieces, dtype="<u2", casting="unsafe"), lengths, num_bytes


def _document(unit: Unit, batch: Batch, place: int, start: int, length: int) -> dict[str, Any]:
    return {
        "start": start,
        "length": length,
        "id": batch.ids[place],
        "url": batch.urls[place],
        "dump": batch.dumps[place],
        "source_file": unit.path,
        "row": batch.rows[place],
    }
