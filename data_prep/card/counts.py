"""Of a dataset card: which values a column of the documents tables has, and how often."""

from data_prep.card.summary import BATCH_ROWS, MAX_VALUES, Count, Counts, Summary
from data_prep.pages.blocks import Block, Cell, Name, Paragraph, Table
from data_prep.pages.numbers import percent, plural

_MAX_VALUE_ROWS = 15  # of the table


def count_blocks(kind: str, column: str, counts: Counts, total: Summary) -> tuple[Block, ...]:
    """The most frequent values of a column, and what is left.

    Args:
      kind: what a value is, "domain".
      column: of the documents tables.
    """
    if not counts.of_value:
        return (Paragraph((f"The documents tables name no {column}.",)),)
    top = counts.top(_MAX_VALUE_ROWS)
    rest = Count(
        total.num_documents - counts.of_none.num_documents - sum(count.num_documents for _, count in top),
        total.num_tokens - counts.of_none.num_tokens - sum(count.num_tokens for _, count in top),
    )
    rows = [_row(Name(value), count, total) for value, count in top]
    bars = [count.num_documents / top[0][1].num_documents for _, count in top]
    for name, count in ((f"all other {kind}s", rest), (f"no {column}", counts.of_none)):
        if count.num_documents:
            rows.append(_row(name, count, total))
            bars.append(0.0)
    header = (kind.capitalize(), "Documents", "Share", "Tokens", "Share")
    if counts.slack:
        note = (
            f"Counted are the {MAX_VALUES:,} most frequent {kind}s of each documents table (of "
            f"each {BATCH_ROWS:,} rows of a larger one): a {kind} may have up to "
            f"{counts.slack:,} documents more than shown here."
        )
        caption = f"The {len(top)} most frequent {kind}s"
        return Table(caption, header, tuple(rows), bars=tuple(bars)), Paragraph((note,))
    caption = plural(len(counts.of_value), kind)
    if rest.num_documents:
        caption = f"The {len(top)} most frequent of {caption}"
    return (Table(caption, header, tuple(rows), bars=tuple(bars)),)


def _row(name: str | Name, count: Count, total: Summary) -> tuple[Cell, ...]:
    return (
        name,
        count.num_documents,
        percent(count.num_documents, total.num_documents),
        count.num_tokens,
        percent(count.num_tokens, total.num_tokens),
    )
