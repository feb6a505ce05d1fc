"""A few documents of a dataset, as text again: the same ones each time, spread over the split."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.card.words import shown_path
from data_prep.pages.blocks import Sample
from data_prep.store.files import require_whole
from data_prep.store.manifest import DOCUMENTS, Manifest
from data_prep.store.places import join
from data_prep.store.scratch import local_copy
from data_prep.store.streams import read_tokens
from data_prep.store.tokenizers import Tokenizer, dataset_tokenizer

_EXCERPTS_OF_SPLIT, _EXCERPTS_OF_OTHERS = {"train": 4}, 2
_EXCERPT_CHARS = 400
# No character has more than 4 bytes and no token less than one: these are more than _EXCERPT_CHARS.
_MAX_TOKENS = 4 * (_EXCERPT_CHARS + 1)
_LAST_WORD_CHARS = 40  # at most so many are left out so as not to cut a word in two
_MAX_URL_CHARS = 200


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document."""

    split: str
    row: dict[str, Any]  # of the documents table
    text: str
    is_whole: bool  # no text is left out


def read_excerpts(directory: str, manifest: Manifest, tokenizer_name: str | None = None) -> Iterator[Excerpt]:
    """From each split the documents in the middle of equal parts; fewer where it has fewer.

    Args:
      tokenizer_name: as the user typed it, where the dataset was made by one that is not ours.
    """
    tokenizer = dataset_tokenizer(manifest.spec, directory, tokenizer_name)
    for split in sorted(manifest.splits):
        num_documents = manifest.splits[split].num_documents
        num_parts = min(num_documents, _EXCERPTS_OF_SPLIT.get(split, _EXCERPTS_OF_OTHERS))
        for part in range(num_parts):
            place = (2 * part + 1) * num_documents // (2 * num_parts)
            row = _read_row(directory, manifest, split, place)
            yield _read_excerpt(directory, manifest, tokenizer, split, row)


def sample_of(excerpt: Excerpt) -> Sample:
    """The excerpt as a page shows it."""
    row = excerpt.row
    facts = {
        "place": f"{excerpt.split} from token {row['start']:,} on",
        "length": f"{row['length']:,} tokens",
        "id": row["id"],
        "url": row["url"] and row["url"][:_MAX_URL_CHARS],
        "dump": row["dump"],
        "language": row["language"],
        "source": f"{shown_path(row['source_file'] or '')}, row {row['row']}",
    }
    known = tuple((name, fact) for name, fact in facts.items() if fact not in (None, ""))
    return Sample(excerpt.text, excerpt.is_whole, known)


def _read_excerpt(directory: str, manifest: Manifest, tokenizer: Tokenizer, split: str, row: dict[str, Any]) -> Excerpt:
    start, stop = row["start"] + 1, row["start"] + row["length"]  # without end-of-text
    read_stop = min(stop, start + _MAX_TOKENS)
    text = tokenizer.decode(read_tokens(directory, manifest, split, start, read_stop))
    if read_stop == stop and len(text) <= _EXCERPT_CHARS:
        return Excerpt(split, row, text, is_whole=True)
    text = text[:_EXCERPT_CHARS]
    words = re.sub(r"\s+\S*\Z", "", text)
    if len(words) < _EXCERPT_CHARS - _LAST_WORD_CHARS:  # no blank near the end
        words = text
    return Excerpt(split, row, words, is_whole=False)


def _read_row(directory: str, manifest: Manifest, split: str, place: int) -> dict[str, Any]:
    """Row `place` of a split's documents tables, taken together."""
    for shard in manifest.shards_of(split, DOCUMENTS):
        if place >= shard.num_rows:
            place -= shard.num_rows
            continue
        path = join(directory, shard.name)
        require_whole(path, shard.num_bytes, shard.digest)
        try:
            with local_copy(path, shard.digest) as copy, pq.ParquetFile(copy) as file:
                group = 0
                while place >= file.metadata.row_group(group).num_rows:
                    place -= file.metadata.row_group(group).num_rows
                    group += 1
                return file.read_row_group(group).slice(place, 1).to_pylist()[0]
        except pa.ArrowException as error:
            raise ValueError(
                f"{path}: cannot be read as parquet ({str(error).strip()}). Run "
                f"`python -m data_prep.check {shlex.quote(directory)}`."
            ) from error
    raise AssertionError("the tables hold as many documents as the split")
