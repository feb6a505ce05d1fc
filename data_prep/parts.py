"""Stage 1: one unit of input -> one part of the stream. Pure and idempotent.

A part is three files in the work directory: raw token ids, a table of its documents, and
a JSON note that is written last. The note says what the part was made from and the digests of
the other two; a part counts only with a note that matches, whatever a killed run left there.
"""

import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from blake3 import blake3

from data_prep.encoders import Encoder, Verifier, open_encoder
from data_prep.engines.engine import Report
from data_prep.inputs.units import Batch, Unit, read_unit, text_bytes
from data_prep.pages.progress import Done
from data_prep.store.documents import DOCUMENT_COLUMNS, PROVENANCE
from data_prep.store.files import digest_of, file_problem, read_note, whole_file, write_note
from data_prep.store.locations import is_bucket
from data_prep.store.places import join
from data_prep.store.scratch import local_copy
from data_prep.store.streams import RAW, FileRange
from data_prep.store.text import without_surrogates
from data_prep.store.token_bin import token_dtype
from data_prep.store.tokenizers import Tokenizer, user_tokenizer
from data_prep.store.typed import Count, typed

PARTS = "parts"  # their folder in the work directory


@dataclass(frozen=True)
class PartJob:
    unit: Unit
    identity: tuple[str, ...]  # of the unit's file: size and digest, in words
    tokenizer: str
    tokenizer_digest: str
    text_column: str
    directory: str
    tokenizer_engine: str = "tiktoken"  # see encoders.py, as for the next one; neither changes a byte
    verify: str = "sample"

    def source(self) -> dict[str, Any]:
        """All that the part's bytes depend on."""
        fields = asdict(self) | {"identity": list(self.identity)}
        del fields["directory"], fields["tokenizer_engine"], fields["verify"]
        return fields

    @property
    def note_path(self) -> str:
        return note_path(self.directory, self.unit.name)


@dataclass(frozen=True)
class Counts:
    """What a part holds, and what of its unit is not in the stream."""

    num_tokens: Count = 0
    num_documents: Count = 0
    num_empty: Count = 0  # texts of no tokens: not in the stream
    num_null: Count = 0  # rows without a text: not in the stream
    num_text_bytes: Count = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.num_tokens + other.num_tokens,
            self.num_documents + other.num_documents,
            self.num_empty + other.num_empty,
            self.num_null + other.num_null,
            self.num_text_bytes + other.num_text_bytes,
        )


@dataclass(frozen=True)
class Part:
    name: str
    counts: Counts
    digest: str  # of the tokens
    documents_bytes: Count
    documents_digest: str
    reused: bool = False  # an earlier run made it

    @property
    def num_tokens(self) -> int:
        return self.counts.num_tokens

    @classmethod
    def from_note(cls, values: dict[str, Any]) -> "Part":
        """As an earlier run noted it by `asdict`. ValueError where it did not."""
        return typed(cls, values | {"reused": True}, "part")


def note_path(directory: str, name: str) -> str:
    """What is known of a part, and what it was made from."""
    return join(directory, f"{name}.json")


def tokens_path(directory: str, name: str) -> str:
    """Raw little-endian ids of a part."""
    return join(directory, f"{name}.tokens")


def documents_path(directory: str, name: str) -> str:
    """Table of a part's documents; `start` counts from the part's first token."""
    return join(directory, f"{name}.arrow")


def part_range(directory: str, name: str, num_tokens: int, digest: str) -> FileRange:
    """All tokens of a part, as a stretch of the stream."""
    return FileRange(tokens_path(directory, name), RAW, digest, 0, num_tokens)


def name_of(tokens: FileRange) -> str:
    """The part that a `part_range`, or a cut of it, is of."""
    return os.path.splitext(os.path.basename(tokens.path))[0]


def read_documents(directory: str, name: str, columns: list[str]) -> pa.Table:
    """Those columns of the table of a part's documents, mapped, not loaded."""
    path = documents_path(directory, name)
    noted = noted_part(note_path(directory, name)) if is_bucket(path) else None
    with local_copy(path, noted[0].documents_digest if noted else "") as copy, pa.memory_map(copy) as file:
        return pa.ipc.open_file(file).read_all().select(columns)


def tokenize_unit(job: PartJob, report: Report) -> Part:
    """Makes the job's part, unless a whole one from the same source is there already.

    Raises:
      InputError: the input cannot be read.
      OSError: the output cannot be written.
      TokenizerMismatch: the fast engine gave other ids than the tokenizer.
    """
    part = _find_part(job) or _make_part(job, report)
    if not part.reused:
        write_note(job.note_path, {"source": job.source(), "part": asdict(part)}, durable=False)
    return part


@dataclass(frozen=True)
class Missing:
    """A unit of which there is no part."""

    unit: str
    path: str


def find_part(job: PartJob, report: Report) -> Part | Missing:
    """The job's part, where a whole one from the same source is there; makes none."""
    return _find_part(job) or Missing(job.unit.name, job.unit.path)


def noted_part(path: str) -> tuple[Part, dict[str, Any]] | None:
    """The part that a note speaks of, and its source; None where the note is absent or damaged."""
    note = read_note(path)
    if note is None:
        return None
    try:
        return Part.from_note(note["part"]), note["source"]
    except (KeyError, TypeError, ValueError):
        return None  # another version's


def _find_part(job: PartJob) -> Part | None:
    noted = noted_part(job.note_path)
    if noted is None or noted[1] != job.source():
        return None
    part = noted[0]
    if part.name != job.unit.name:
        return None
    token_bytes = token_dtype(_tokenizer(job.tokenizer).vocab_size).itemsize
    files = [
        (tokens_path(job.directory, part.name), token_bytes * part.num_tokens, part.digest),
        (documents_path(job.directory, part.name), part.documents_bytes, part.documents_digest),
    ]
    if any(file_problem(*file) for file in files):
        return None
    table = read_documents(job.directory, part.name, ["text_bytes"])
    found = table.num_rows, int(table["text_bytes"].to_numpy().sum())
    return part if found == (part.counts.num_documents, part.counts.num_text_bytes) else None


def _make_part(job: PartJob, report: Report) -> Part:
    tokenizer, encoder = _tokenizer(job.tokenizer), _encoder(job.tokenizer, job.tokenizer_engine)
    verifier = Verifier(tokenizer, "none" if job.tokenizer_engine == "tiktoken" else job.verify)
    counts, digest = Counts(), blake3()
    documents_file = documents_path(job.directory, job.unit.name)
    # Not durable: a part counts only after its digests were compared.
    with (
        whole_file(tokens_path(job.directory, job.unit.name), durable=False) as partial,
        open(partial, "wb") as tokens_out,
        whole_file(documents_file, durable=False) as partial_documents,
        pa.ipc.new_file(str(partial_documents), DOCUMENT_COLUMNS) as table_out,
    ):
        for batch in read_unit(job.unit, job.text_column):
            texts = batch.texts.fill_null("") if batch.texts.null_count else batch.texts
            ids, lengths = encoder.encode_batch(texts)
            verifier.check(texts, ids, lengths, batch.rows, job.unit.path, batch.provenance["id"])
            stream = _batch_stream(tokenizer, ids, lengths)
            table = _batch_documents(job.unit, batch, texts, lengths, counts.num_tokens)
            tokens_out.write(stream.data)
            digest.update(stream.data.cast("B"))
            table_out.write_table(table)
            new = Counts(
                num_tokens=len(stream),
                num_documents=table.num_rows,
                num_empty=len(texts) - table.num_rows - batch.texts.null_count,
                num_null=batch.texts.null_count,
                num_text_bytes=int(table["text_bytes"].to_numpy().sum()),
            )
            counts += new
            report(
                Done(
                    documents=new.num_documents,
                    tokens=new.num_tokens,
                    text_bytes=new.num_text_bytes,
                    work=batch.num_bytes,
                )
            )
    with local_copy(documents_file) as copy:
        return Part(
            name=job.unit.name,
            counts=counts,
            digest=digest.hexdigest(),
            documents_bytes=os.path.getsize(copy),
            documents_digest=digest_of(copy),
        )


@lru_cache(maxsize=1)
def _tokenizer(name: str) -> Tokenizer:
    return user_tokenizer(name)


@lru_cache(maxsize=1)
def _encoder(name: str, engine: str) -> Encoder:
    return open_encoder(_tokenizer(name), engine)


def _batch_stream(tokenizer: Tokenizer, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What a batch's ids add to the stream: end-of-text and its ids for each text that has any."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"tokenizer {tokenizer.name} gave the id {wrong}, but has vocab_size "
            f"{tokenizer.vocab_size}: it does not fit"
        )
    lengths_D = lengths[lengths > 0]
    dtype = token_dtype(tokenizer.vocab_size)
    return np.insert(ids.astype(dtype), np.cumsum(lengths_D) - lengths_D, dtype.type(tokenizer.end_of_text))


def _batch_documents(unit: Unit, batch: Batch, texts: pa.LargeStringArray, lengths: np.ndarray, start: int) -> pa.Table:
    """Rows of the batch's documents, of which the first begins at token `start` of the part."""
    filled = lengths > 0
    lengths_D = lengths[filled] + 1  # with end-of-text
    mask = pa.array(filled)
    columns = [
        start + np.cumsum(lengths_D) - lengths_D,
        lengths_D,
        text_bytes(texts)[filled],
        *(batch.provenance[name].cast(pa.string()).filter(mask) for name in PROVENANCE),
        pa.repeat(pa.scalar(without_surrogates(unit.path), pa.string()), len(lengths_D)),
        batch.rows[filled],
    ]
    return pa.table(columns, schema=DOCUMENT_COLUMNS)
