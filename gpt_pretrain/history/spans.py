"""Documents as spans of a run's streams: found by id, url or token, and the windows that hold them."""

from dataclasses import dataclass

from data_prep.store.documents import Document
from gpt_pretrain.data.row_edits import INSERTED
from gpt_pretrain.data.stages import Stage, Stream, windows_overlapping
from gpt_pretrain.history.opened_run import OpenedRun


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a stream, and the document that they are, if it is known."""

    stream: Stream
    split: str
    start: int
    stop: int
    document: Document | None


def find_spans(
    run: OpenedRun,
    *,
    document: str | None = None,
    url: str | None = None,
    token: int | None = None,
    stream: str | None = None,
) -> list[Span]:
    """The documents with that id, with that url, or at that token of the training stream.

    Args:
      stream: look in this stream of the mixture only.

    Raises ValueError where there is none, or more than one stream that `token` may count in.
    """
    named = [each for each in run.streams() if stream is None or each.name == stream]
    # One that was renamed is one; of one that documents are inserted from, too, the stream counts.
    streams = list({each.fingerprint: each for each in sorted(named, key=is_inserted_from, reverse=True)}.values())
    if not streams:
        names = ", ".join(each.name for each in run.streams()) or "one, without a name"
        raise ValueError(f"--stream {stream}: no such stream in {run.save_dir}; it has {names}")
    if token is not None:
        streams = [each for each in streams if not is_inserted_from(each)] or streams
        if len(streams) > 1:
            names = ", ".join(sorted({each.name or f"the one of {run.directory(each)}" for each in streams}))
            raise ValueError(f"--token {token}: of which stream? --stream with one of {names}")
        return [_span_at(run, streams[0], token)]
    column, value = ("id", document) if document is not None else ("url", url)
    spans, searched, problems = [], [], []
    for each in streams:
        try:
            tables = [found for split in ("train", "val") if (found := run.documents(each, split))]
        except ValueError as error:
            problems.append(str(error))
            continue
        searched.append(run.directory(each) + ("" if tables else " (which has no table of documents)"))
        for table in tables:
            spans += [
                Span(each, table.split, found.start, found.start + found.length, found)
                for found in table.find(column, str(value))
            ]
    if not spans:
        places = ", ".join(searched)
        missing = f"no document has the {column} {value} in {places}" if places else ""
        raise ValueError("\n".join(filter(None, [missing, *problems])))
    return spans


def _span_at(run: OpenedRun, stream: Stream, token: int) -> Span:
    if not 0 <= token < stream.num_tokens:
        raise ValueError(f"--token {token}: the training stream has the tokens 0 to {stream.num_tokens - 1}")
    tables = run.documents(stream)
    if tables is None:
        return Span(stream, "train", token, token + 1, None)
    found = tables.at(token)
    return Span(stream, "train", found.start, found.start + found.length, found)


def windows_of(span: Span, stage: Stage) -> range:
    """Windows of a stage that hold a token of the span; those beyond the stream's last window are not there."""
    index = index_of(stage, span.stream)
    if index is None or span.split != "train":
        return range(0)
    return windows_overlapping(span.start, span.stop - span.start, stage.seq_len, stage.num_windows(index))


def is_inserted_from(stream: Stream) -> bool:
    """Whether it is no stream of a mixture, but a dataset that documents are inserted from."""
    return stream.name.startswith(INSERTED)


def index_of(stage: Stage, stream: Stream) -> int | None:
    """Index of a stream in a stage, under any name: a stream is known by its dataset."""
    fingerprints = [each.fingerprint for each in stage.streams]
    return fingerprints.index(stream.fingerprint) if stream.fingerprint in fingerprints else None
