"""Of a dataset card: how long the documents are."""

from collections.abc import Mapping, Sequence

from data_prep.card.length_bins import EXACT_BELOW
from data_prep.card.summary import Bin, Summary
from data_prep.pages.blocks import Bar, Block, Charts, Histogram, Paragraph, Table
from data_prep.pages.numbers import percent, range_label

_BINS_PER_OCTAVE = 3
_WINDOW_TOKENS = 1024  # of GPT-2


def length_blocks(summaries: Mapping[str, Summary], total: Summary) -> tuple[Block, ...]:
    """Histograms and quantiles of all splits together and of each."""
    if not total.num_documents:
        return (Paragraph(("No documents.",)),)
    named = dict(summaries) | ({"all": total} if len(summaries) > 1 else {})
    quantiles = {name: [one.quantile(p) for p in (50, 90, 99)] for name, one in named.items()}
    rows = tuple(
        (
            name,
            *quantiles[name],
            one.max_tokens,
            f"{one.num_tokens / max(1, one.num_documents):,.1f}",
        )
        for name, one in named.items()
    )
    short_documents = int(total.documents_B[: _WINDOW_TOKENS + 1].sum())
    short_tokens = int(total.tokens_B[: _WINDOW_TOKENS + 1].sum())
    what = (
        "In tokens, end-of-text included. "
        f"{percent(short_documents, total.num_documents)} of the documents, with "
        f"{percent(short_tokens, total.num_tokens)} of the tokens, are no longer than "
        f"GPT-2's window of {_WINDOW_TOKENS:,} tokens."
    )
    largest = max(total.token_quantile(50), *(max(values) for values in quantiles.values()))
    note = f"Quantiles from {EXACT_BELOW:,} tokens on are rounded down, by less than 0.1 %."
    return (
        Paragraph((what,)),
        _charts(total),
        Table("Quantiles", ("Split", "Median", "90 %", "99 %", "Longest", "Mean"), rows),
        *((Paragraph((note,)),) if largest >= EXACT_BELOW else ()),
    )


def _charts(total: Summary) -> Charts:
    bins = total.histogram(_BINS_PER_OCTAVE)
    documents = Histogram(
        title="Documents by length",
        key="docs",
        things="documents",
        size="length of document",
        size_unit="tokens",
        axis="tokens in the document",
        bars=_bars_of_documents(bins),
        median=total.quantile(50),
    )
    tokens = Histogram(
        title="Tokens by length of their document",
        key="toks",
        things="tokens",
        size="length of document",
        size_unit="tokens",
        axis="tokens in the document",
        bars=tuple(Bar(one.start, one.stop, one.num_tokens) for one in bins),
        median=total.token_quantile(50),
    )
    rows = tuple(
        (range_label(one.start, one.stop), one.num_documents, one.num_tokens) for one in bins if one.num_documents
    )
    table = Table("Documents by length in tokens", ("Length", "Documents", "Tokens"), rows)
    return Charts((documents, tokens), table, coarse=_bars_of_documents(total.histogram(1)))


def _bars_of_documents(bins: Sequence[Bin]) -> tuple[Bar, ...]:
    return tuple(Bar(one.start, one.stop, one.num_documents) for one in bins)
