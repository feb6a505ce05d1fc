"""What a dataset card says, as plain data: the page, its tiles and sections."""

import re
from collections.abc import Mapping, Sequence

from data_prep.card.commands import command_blocks
from data_prep.card.counts import count_blocks
from data_prep.card.files import file_blocks, source_blocks
from data_prep.card.lengths import length_blocks
from data_prep.card.samples import Excerpt, sample_of
from data_prep.card.stream import stream_blocks
from data_prep.card.summary import NOTHING, Summary
from data_prep.card.words import bytes_per_token, shown_path, text_size
from data_prep.pages.blocks import Name, Page, Paragraph, Section, Tile
from data_prep.pages.numbers import short
from data_prep.store.locations import file_name
from data_prep.store.manifest import Manifest

KIND = "Prepared dataset for language model pretraining"


def make_page(manifest: Manifest, summaries: Mapping[str, Summary], excerpts: Sequence[Excerpt]) -> Page:
    """All that a card says.

    Args:
      summaries: of each split's documents.
    """
    spec = manifest.spec
    total = sum(summaries.values(), NOTHING)
    tiles = (
        Tile("Tokens", short(total.num_tokens), f"{total.num_tokens:,}"),
        Tile("Documents", short(total.num_documents), f"{total.num_documents:,}"),
        Tile("Median document", f"{total.quantile(50):,}", f"tokens, of at most {total.max_tokens:,}"),
        Tile("Bytes per token", bytes_per_token(total), f"of text: {text_size(total)}"),
        Tile("Vocabulary", f"{spec.vocab_size:,}", f"ids of {shown_path(spec.tokenizer)}"),
    )
    samples = tuple(map(sample_of, excerpts))
    sections = (
        Section("Stream", stream_blocks(manifest, summaries)),
        Section("Samples", samples or (Paragraph(("No documents.",)),)),
        Section("Length of documents", length_blocks(summaries, total)),
        Section("Domains", count_blocks("domain", "url", total.domains, total)),
        Section("Dumps", count_blocks("dump", "dump", total.dumps, total)),
        Section("Languages", count_blocks("language", "language", total.languages, total)),
        Section("Sources", source_blocks(spec)),
        Section("Files", file_blocks(manifest)),
        Section("What to type next", command_blocks(manifest, excerpts)),
    )
    made_by = Name("python -m data_prep.card")
    footer = Paragraph(("Made from the manifest and the documents tables by ", made_by, "."))
    return Page(title_of(spec.source), KIND, tiles, sections, footer)


def title_of(source: str) -> str:
    """A name for the dataset: a preset's, or that of its only file.

    >>> title_of("texts/a.jsonl"), title_of("texts/*.jsonl")
    ('a.jsonl', 'Prepared text')
    """
    is_one = not re.search(r"[,*?\[]", source)
    return file_name(source) if is_one and file_name(source) else "Prepared text"
