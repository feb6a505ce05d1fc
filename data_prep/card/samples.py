"""A few documents of a dataset, as text again: the same ones each time, spread over the split."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.store.manifest import DOCUMENTS, Manifest
from data_prep.store.streams import read_tokens
from data_prep.store.tokenizers import Tokenizer, open_tokenizer

EXCERPTS_OF_SPLIT, EXCERPTS_OF_OTHERS = {"train": 4}, 2
EXCERPT_CHARS = 400
# No character has more than 4 bytes and no token less than one: these are more than EXCERPT_CHARS.
MAX_TOKENS = 4 * (EXCERPT_CHARS + 1)
LAST_WORD_CHARS = 40  # at most so many are left out so as not to cut a word in two


class Excerpt(NamedTuple):
    """The beginning of a document."""

    split: str
    row: dict[str, Any]  # of the documents table
    text: str
    is_whole: bool  # no text is left out


def read_excerpts(directory: Path, manifest: Manifest) -> Iterator[Excerpt]:
    """From each split the documents in the middle of equal parts; fewer where it has fewer."""
    tokenizer = open_tokenizer(manifest.spec)
    for split in sorted(manifest.splits):
        num_documents = manifest.splits[split].num_documents
        num_parts = min(num_documents, EXCERPTS_OF_SPLIT.get(split, EXCERPTS_OF_OTHERS))
        for part in range(num_parts):
            place = (2 * part + 1) * num_documents // (2 * num_parts)
            row = _read_row(directory, manifest, split, place)
            yield _read_excerpt(directory, manifest, tokenizer, split, row)


def _read_excerpt(
    directory: Path, manifest: Manifest, tokenizer: Tokenizer, split: str, row: dict[str, Any]
) -> Excerpt:
    start, stop = row["start"] + 1, row["start"] + row["length"]  # without end-of-text
    read_stop = min(stop, start + MAX_TOKENS)
    text = tokenizer.decode(read_tokens(directory, manifest, split, start, read_stop))
    if read_stop == stop and len(text) <= EXCERPT_CHARS:
        return Excerpt(split, row, text, is_whole=True)
    text = text[:EXCERPT_CHARS]
    words = re.sub(r"\s+\S*\Z", "", text)
    if len(words) < EXCERPT_CHARS - LAST_WORD_CHARS:  # no blank near the end
        words = text
    return Excerpt(split, row, words, is_whole=False)


def _read_row(directory: Path, manifest: Manifest, split: str, place: int) -> dict[str, Any]:
    """Row `place` of a split's documents tables, taken together."""
    for shard in manifest.shards_of(split, DOCUMENTS):
        if place >= shard.num_rows:
            place -= shard.num_rows
            continue
        try:
            with pq.ParquetFile(directory / shard.name) as file:
                group = 0
                while place >= file.metadata.row_group(group).num_rows:
                    place -= file.metadata.row_group(group).num_rows
                    group += 1
                return file.read_row_group(group).slice(place, 1).to_pylist()[0]
        except pa.ArrowException as error:
            raise ValueError(
                f"{directory / shard.name}: cannot be read as parquet ({str(error).strip()}). Run "
                f"`python -m data_prep.check {directory}`."
            ) from error
    raise AssertionError("the tables hold as many documents as the split")
