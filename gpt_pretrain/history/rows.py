"""What a batch holds, row by row: windows, the documents in them, and their text."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from data_prep.store.documents import Document, DocumentTables
from data_prep.store.tokenizers import Tokenizer
from gpt_pretrain.data.batches import read_rows as read_rows_of
from gpt_pretrain.data.row_edits import INSERTED, Insertion
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.history.opened_run import OpenedRun


@dataclasses.dataclass(frozen=True)
class DocumentSlice:
    """A document, as far as it lies within a window.

    Attributes:
      document: None where the dataset has no table of documents.
      start, stop: tokens [start, stop) of the window, the last target included.
      text: of these tokens, without the document's end-of-text token.
      inserted_from: of an inserted document, its token at `start`; None of one that the row's window holds.
    """

    document: Document | None
    start: int
    stop: int
    text: str
    inserted_from: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One example of a batch.

    Attributes:
      row: of the global batch, from 0.
      position: of the global order.
      stream: its name in a mixture; "" for one alone.
      start, stop: tokens [start, stop) of the stream: the window's inputs and its last target.
      tokens: (stop - start,), as they are stored.
      edits: what is edited in place, in words.
    """

    row: int
    position: int
    stream: str
    window: int
    start: int
    stop: int
    tokens: np.ndarray
    slices: tuple[DocumentSlice, ...]
    tokenizer: Tokenizer
    edits: tuple[str, ...] = ()

    def is_whole(self, piece: DocumentSlice) -> bool:
        """Whether all of a document lies in this window."""
        if piece.document is None:
            return False
        closing = piece.inserted_from is not None  # the end-of-text token after it
        return piece.stop - piece.start == piece.document.length + closing

    def to_json(self, step_index: int) -> dict[str, Any]:
        """JSON values only; `step_index` is the plan's, the update that is printed counts from 1."""
        documents = []
        for piece in self.slices:
            known = {} if piece.document is None else dataclasses.asdict(piece.document)
            if known:
                known["tokens"] = [known["start"], known.pop("start") + known.pop("length")]
            documents.append(known | {"tokens_of_window": [piece.start, piece.stop], "text": piece.text})
        return {
            "update": step_index + 1,
            "row": self.row,
            "position": self.position,
            "stream": self.stream,
            "window": self.window,
            "tokens": [self.start, self.stop],
            "documents": documents,
            **({"edits": list(self.edits)} if self.edits else {}),
        }


def read_rows(run: OpenedRun, step_index: int, chosen: slice = slice(None)) -> list[Row]:
    """The chosen rows of a batch, in order.

    Raises ValueError where a dataset is not there or is another one.
    """
    stage, batch = run.plan.stage_at(step_index), run.plan.batch(step_index)
    numbers = np.arange(len(batch.windows))[chosen]
    streams, windows = batch.streams[numbers], batch.windows[numbers]
    positions = batch.position + numbers
    tokens, keep, _ = read_rows_of(run.sources(stage), stage, positions, streams, windows)
    _, planned = stage.planned_at(positions)
    inserted = {i: (insertion, part) for i, insertion, part in stage.insertions_at(positions)}
    rows: dict[int, Row] = {}
    # In the order of the streams, so that neighbours find their part of the table in memory.
    for i in np.lexsort([windows, streams]).tolist():
        stream = stage.streams[int(streams[i])]
        start = int(windows[i]) * stage.seq_len
        tokenizer, tables = run.tokenizer(stream), run.documents(stream)
        front = _front(run, stage, tokens[i], tokenizer, *inserted[i]) if i in inserted else ()
        rows[i] = Row(
            row=int(numbers[i]),
            position=batch.position + int(numbers[i]),
            stream=stream.name,
            window=int(windows[i]),
            start=start,
            stop=start + stage.seq_len + 1,
            tokens=tokens[i],
            slices=(*front, *_slices(tokens[i], start, tokenizer, tables, front[-1].stop if front else 0)),
            tokenizer=tokenizer,
            edits=(
                *([f"substituted for window {planned[i]}"] if planned[i] != windows[i] else []),
                *([f"inserted from {inserted[i][0].name.removeprefix(INSERTED)}"] if i in inserted else []),
                *([f"masked targets {_spans_of(~keep[i])}"] if keep is not None and not keep[i].all() else []),
            ),
        )
    return [rows[i] for i in range(len(numbers))]


def _front(
    run: OpenedRun, stage: Stage, tokens: np.ndarray, tokenizer: Tokenizer, insertion: Insertion, part: int
) -> tuple[DocumentSlice, ...]:
    """The inserted document that a row begins with, the end-of-text token after it included."""
    tables = run.documents(Stream(*insertion.source))
    document = None if tables is None else tables.at(insertion.start)
    stop = insertion.num_overwritten(part, stage.seq_len)
    begin = insertion.span(part, stage.seq_len)[0]
    return (
        DocumentSlice(document, 0, stop, text_of(tokenizer, tokens[: stop - (stop > insertion.length - begin)]), begin),
    )


def _spans_of(masked_T: np.ndarray) -> str:
    """Which tokens of a row: the target after input `t` is token `t + 1`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], masked_T.astype(np.int8), [0]]))) + 1
    return ", ".join(f"[{a}, {b})" for a, b in edges.reshape(-1, 2).tolist())


def _slices(
    tokens: np.ndarray, first: int, tokenizer: Tokenizer, tables: DocumentTables | None, after: int = 0
) -> tuple[DocumentSlice, ...]:
    """The documents of a window that begins at token `first` of the stream, from token `after` of the window on."""
    if tables is None:  # documents begin at end-of-text
        begins = [0, *(int(i) for i in np.flatnonzero(tokens == tokenizer.end_of_text) if i), len(tokens)]
        spans: list[tuple[Document | None, int, int]] = [(None, a, b) for a, b in itertools.pairwise(begins)]
    else:
        spans = [
            (each, max(0, each.start - first), min(len(tokens), each.start + each.length - first))
            for each in tables.between(first, first + len(tokens))
        ]
    spans = [(each, max(a, after), b) for each, a, b in spans if b > after]
    return tuple(DocumentSlice(each, a, b, text_of(tokenizer, tokens[a:b])) for each, a, b in spans)


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Text of a piece of a document, without the end-of-text token that it may begin with."""
    return tokenizer.decode(ids[1:] if len(ids) and ids[0] == tokenizer.end_of_text else ids)


def slice_of_rows(text: str | None, batch_size: int) -> slice:
    """What `--rows` says: "0:4" -> slice(0, 4); "7" -> slice(7, 8). ValueError for rows that a batch has not."""
    if text is None:
        return slice(None)
    first, colon, stop = text.partition(":")
    try:
        start = int(first) if first else 0
        end = start + 1 if not colon else int(stop) if stop else batch_size
    except ValueError:
        raise ValueError(f"--rows {text}: expected two numbers, as 0:4, or one") from None
    if not 0 <= start < end <= batch_size:
        raise ValueError(f"--rows {text}: the batch has the rows 0 to {batch_size - 1}")
    return slice(start, end)
