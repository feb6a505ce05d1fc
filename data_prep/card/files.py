"""Of a dataset card: which files it was made from, and which it consists of."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.card.words import shown_path
from data_prep.pages.blocks import Block, Cell, Name, Paragraph, Table
from data_prep.pages.numbers import plural, size_text
from data_prep.store.manifest import DOCUMENTS, INDEX, MANIFEST_NAME, Manifest
from data_prep.store.spec import Spec

_KIND_OF_FILE = {"bin": ".bin", "array_record": "ArrayRecord", DOCUMENTS: "table", INDEX: "index"}
_MAX_INPUTS = 8  # rows of the table


def source_blocks(spec: Spec) -> tuple[Block, ...]:
    """The input files."""
    inputs = spec.inputs
    shown, others = inputs[:_MAX_INPUTS], inputs[_MAX_INPUTS:]
    rows = [(Name(shown_path(entry["path"])), _total_size([entry])) for entry in shown]
    if others:
        rows += [(f"{len(others):,} more", _total_size(others)), ("all", _total_size(inputs))]
    pieces = [shown_path(piece.strip()) for piece in spec.source.split(",")]
    more = f" and {len(pieces) - _MAX_INPUTS:,} more" if len(pieces) > _MAX_INPUTS else ""
    column = spec.text_column  # None where the stream was not made from text
    what = (", texts in the column ", Name(column)) if column else (" of tokens",)
    asked_for = Paragraph(
        (
            "Asked for as ",
            Name(", ".join(pieces[:_MAX_INPUTS])),
            f"{more}: {plural(len(inputs), 'input file')}",
            *what,
            ". This card claims no licence: the terms of the sources apply.",
        )
    )
    first = f", the first {len(shown)}" if others else ""
    return asked_for, Table(f"Input files{first}", ("File", "Size"), tuple(rows))


def _total_size(inputs: Sequence[Mapping[str, Any]]) -> str:
    sizes = [entry["size"] for entry in inputs]
    return "unknown" if None in sizes else size_text(sum(sizes))


def file_blocks(manifest: Manifest) -> tuple[Block, ...]:
    """The dataset's own files."""
    rows: list[tuple[Cell, ...]] = []
    for split in manifest.splits:
        for format in (*manifest.spec.formats, DOCUMENTS, INDEX):
            shards = manifest.shards_of(split, format)
            if shards:
                size = size_text(sum(shard.num_bytes for shard in shards))
                name = shards[0].name + (" …" if len(shards) > 1 else "")
                rows.append((Name(name), _KIND_OF_FILE[format], split, len(shards), size))
    total = size_text(sum(shard.num_bytes for shard in manifest.shards))
    rows.append(("all", "", "", len(manifest.shards), total))
    same = "Both formats hold the same stream. " if len(manifest.spec.formats) > 1 else ""
    header = ("Name", "Format", "Split", "Files", "Size")
    return (
        Table("Number and size by split and format", header, tuple(rows), num_text_columns=3),
        Paragraph(
            (
                Name(MANIFEST_NAME),
                f" has the size and the digest of each of them. {same}The tables ",
                Name(f"{DOCUMENTS}_*.parquet"),
                " say where in the stream each document starts and where it came from.",
            )
        ),
    )
