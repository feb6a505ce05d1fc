"""Stage 1: one unit of input -> one segment of tokens. Pure and idempotent.

A segment is three files in the work directory: raw token ids, a table of its documents, and
a JSON note that is written last. The note says what the segment was made from and the digests of
the other two; a segment counts only with a note that matches, whatever a killed run left there.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from blake3 import blake3

from data_prep.encoders import Encoder, Verifier, open_encoder
from data_prep.engines.local import Report
from data_prep.inputs.units import PROVENANCE, Batch, Unit, read_unit, text_bytes
from data_prep.store.files import digest_of, is_intact, read_json, whole_file, write_json
from data_prep.store.token_bin import token_dtype
from data_prep.store.tokenizers import Tokenizer, get_tokenizer

DOCUMENT_COLUMNS = pa.schema(
    [
        ("start", pa.int64()),  # position of the document's end-of-text token
        ("length", pa.int64()),  # in tokens, with the end-of-text token
        ("text_bytes", pa.int64()),  # of the text in UTF-8
        *((name, pa.string()) for name in PROVENANCE),
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
    engine: str = "tiktoken"  # see encoders.py, as for the next one; neither changes a byte
    verify: str = "sample"

    def source(self) -> dict[str, Any]:
        """All that the segment's bytes depend on."""
        fields = asdict(self) | {"identity": list(self.identity)}
        del fields["directory"], fields["engine"], fields["verify"]
        return fields


@dataclass(frozen=True)
class Segment:
    name: str
    num_tokens: int
    num_documents: int
    num_empty: int  # texts of no tokens: not in the stream
    num_null: int  # rows without a text: not in the stream
    num_text_bytes: int
    digest: str  # of the tokens
    documents_bytes: int
    documents_digest: str
    reused: bool = False  # an earlier run made it


def tokens_path(directory: str | Path, name: str) -> Path:
    """Raw little-endian ids of a segment."""
    return Path(directory, f"{name}.tokens")


def documents_path(directory: str | Path, name: str) -> Path:
    """Table of a segment's documents; `start` counts from the segment's first token."""
    return Path(directory, f"{name}.arrow")


def read_documents(directory: str | Path, name: str, columns: list[str]) -> pa.Table:
    """Those columns of that table, mapped, not loaded."""
    with pa.memory_map(str(documents_path(directory, name))) as file:
        return pa.ipc.open_file(file).read_all().select(columns)


def tokenize_unit(job: SegmentJob, report: Report) -> Segment:
    """Makes the job's segment, unless a whole one from the same source is there already.

    Raises:
      InputError: the input cannot be read.
      OSError: the output cannot be written.
      TokenizerMismatch: the fast engine gave other ids than the tokenizer.
    """
    note_path = Path(job.directory, f"{job.unit.name}.json")
    found = _find_segment(job, note_path)
    if found:
        return found
    tokenizer, encoder = _tokenizer(job.tokenizer), _encoder(job.tokenizer, job.engine)
    verify = "none" if job.engine == "tiktoken" else job.verify
    verifier = Verifier(tokenizer, verify)
    num_documents = num_empty = num_null = num_tokens = num_text_bytes = 0
    digest = blake3()
    tokens_file = tokens_path(job.directory, job.unit.name)
    documents_file = documents_path(job.directory, job.unit.name)
    # Not durable: a segment counts only after its digests were compared.
    with (
        whole_file(tokens_file, durable=False) as partial,
        open(partial, "wb") as tokens_out,
        whole_file(documents_file, durable=False) as partial_documents,
        pa.ipc.new_file(str(partial_documents), DOCUMENT_COLUMNS) as table_out,
    ):
        for batch in read_unit(job.unit, job.text_column):
            texts = batch.texts.fill_null("") if batch.texts.null_count else batch.texts
            ids, lengths = encoder.encode_batch(texts)
            ids_of_documents = batch.provenance["id"]
            verifier.check(texts, ids, lengths, batch.rows, job.unit.path, ids_of_documents)
            stream, table = _batch_stream(tokenizer, job.unit, batch, texts, ids, lengths, num_tokens)
            tokens_out.write(stream.data)
            digest.update(stream.data.cast("B"))
            table_out.write_table(table)
            batch_bytes = int(table["text_bytes"].to_numpy().sum())
            num_tokens += len(stream)
            num_documents += table.num_rows
            num_null += batch.texts.null_count
            num_empty += len(texts) - table.num_rows - batch.texts.null_count
            num_text_bytes += batch_bytes
            report(table.num_rows, len(stream), batch_bytes, batch.num_bytes)
    segment = Segment(
        name=job.unit.name,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_empty=num_empty,
        num_null=num_null,
        num_text_bytes=num_text_bytes,
        digest=digest.hexdigest(),
        documents_bytes=documents_file.stat().st_size,
        documents_digest=digest_of(documents_file),
    )
    note = {"source": job.source(), "segment": asdict(segment)}
    write_json(note_path, note, durable=False)
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
    token_bytes = token_dtype(_tokenizer(job.tokenizer).vocab_size).itemsize
    if not is_intact(tokens, token_bytes * segment.num_tokens, segment.digest):
        return None
    if not is_intact(documents, segment.documents_bytes, segment.documents_digest):
        return None
    return segment


@lru_cache(maxsize=1)
def _tokenizer(name: str) -> Tokenizer:
    return get_tokenizer(name)


@lru_cache(maxsize=1)
def _encoder(name: str, engine: str) -> Encoder:
    return open_encoder(_tokenizer(name), engine)


def _batch_stream(
    tokenizer: Tokenizer,
    unit: Unit,
    batch: Batch,
    texts: pa.LargeStringArray,
    ids: np.ndarray,
    lengths: np.ndarray,
    start: int,
) -> tuple[np.ndarray, pa.Table]:
    """What the batch adds to the segment from token `start` on, and its documents' rows."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"tokenizer {tokenizer.name} gave the id {wrong}, but has vocab_size "
            f"{tokenizer.vocab_size}: it does not fit"
        )
    filled = lengths > 0
    lengths_D = lengths[filled]
    starts_D = np.cumsum(lengths_D) - lengths_D  # in ids; the stream has one more a document
    dtype = token_dtype(tokenizer.vocab_size)
    stream = np.insert(ids.astype(dtype), starts_D, dtype.type(tokenizer.end_of_text))
    mask = pa.array(filled)
    columns = [
        start + starts_D + np.arange(len(starts_D)),
        lengths_D + 1,
        text_bytes(texts)[filled],
        *(batch.provenance[name].cast(pa.string()).filter(mask) for name in PROVENANCE),
        pa.repeat(pa.scalar(unit.path, pa.string()), len(starts_D)),
        batch.rows[filled],
    ]
    return stream, pa.table(columns, schema=DOCUMENT_COLUMNS)
