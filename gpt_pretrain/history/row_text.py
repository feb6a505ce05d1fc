"""A row of a batch as plain text."""

from data_prep.pages.text import one_line
from gpt_pretrain.history.rows import DocumentSlice, Row

_EXCERPT_CHARS = 160  # of a document


def row_as_text(row: Row, *, mean_loss: float | None = None, full: bool = False) -> str:
    """The row in lines; `full` has all the text of its documents, else one line of the beginning of each."""
    stream = f"  stream {row.stream}" if row.stream else ""
    loss = "" if mean_loss is None else f"  mean loss {mean_loss:.3f}"
    head = (
        f"row {row.row}  position {row.position}{stream}  window {row.window}  tokens [{row.start}, {row.stop}){loss}"
    )
    lines = [head, *(f"  {each}" for each in row.edits)]
    for piece in row.slices:
        lines.append(f"  tokens [{piece.start}, {piece.stop})  " + "  ".join(_names(piece)))
        lines += ["    " + line for line in (piece.text.splitlines() if full else [_shortened(piece.text)])]
    return "\n".join(lines)


def _names(piece: DocumentSlice) -> list[str]:
    document = piece.document
    if document is None:
        return ["(no table of documents)"]
    names = [name for name in (document.id, document.url) if name]
    return [one_line(name) for name in (*names, f"{document.source_file} row {document.row}")]


def _shortened(text: str) -> str:
    """One line of the beginning."""
    line = " ".join(text[: 2 * _EXCERPT_CHARS].split())
    is_cut = len(" ".join(text.split())) > _EXCERPT_CHARS
    return line[:_EXCERPT_CHARS].rstrip() + " ..." if is_cut else line
