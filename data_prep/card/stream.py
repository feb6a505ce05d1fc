"""Of a dataset card: what the stream of tokens is."""

from collections.abc import Mapping

from data_prep.card.summary import Summary
from data_prep.card.words import bytes_per_token, shown_path, text_size
from data_prep.pages.blocks import Block, Cell, Name, Paragraph, Table
from data_prep.store.manifest import Manifest


def stream_blocks(manifest: Manifest, summaries: Mapping[str, Summary]) -> tuple[Block, ...]:
    """The splits in numbers, and what identifies the dataset."""
    spec = manifest.spec
    rows = tuple(
        (
            name,
            split.num_documents,
            split.num_tokens,
            text_size(summaries[name]),
            bytes_per_token(summaries[name]),
            f"{split.unigram_entropy:.3f}",
        )
        for name, split in manifest.splits.items()
    )
    header = ("Split", "Documents", "Tokens", "Text", "Bytes per token", "Unigram entropy")
    cut = (("cut at", f"{spec.max_tokens:,} tokens"),) if spec.max_tokens else ()
    identity: tuple[tuple[Cell, ...], ...] = (
        ("fingerprint", Name(manifest.fingerprint)),
        ("tokenizer", Name(shown_path(spec.tokenizer))),
        ("tokenizer's digest", Name(spec.tokenizer_digest)),
        *cut,
    )
    what = (
        "One stream of tokens a split: for each document, in the order of the input, the "
        f"end-of-text token ({spec.end_of_text:,}) and then the tokens of its text."
    )
    units = (
        "Bytes per token are UTF-8 bytes of text over all tokens of the stream, end-of-text "
        "included. The entropy, in nats a token, is the loss of a model that knows only how "
        "often each token occurs."
    )
    return (
        Paragraph((what,)),
        Table("Splits", header, rows),
        Paragraph((units,)),
        Table("Identity", ("", ""), identity, num_text_columns=2),
    )
