"""What a user asks to be edited in a plan, in the terms of its streams: spans of tokens, windows, steps, documents."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.store.datasets import TokenDataset
from gpt_pretrain import checks
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, windows_overlapping


@dataclasses.dataclass(frozen=True)
class TokenSpan:
    """Tokens [start, stop) of the training stream with a fingerprint: a document, say."""

    fingerprint: str
    start: int
    stop: int

    def windows(self, plan: Plan, stage: Stage, index: int) -> Sequence[int]:
        """Those of stream `index` of a stage that hold one of the tokens, be it as the last target only."""
        del plan
        return windows_overlapping(self.start, self.stop - self.start, stage.seq_len, stage.num_windows(index))


@dataclasses.dataclass(frozen=True)
class WindowList:
    """Windows of the stream with a fingerprint, of the run's `seq_len`."""

    fingerprint: str
    numbers: tuple[int, ...]

    def windows(self, plan: Plan, stage: Stage, index: int) -> Sequence[int]:
        """Those that the stream has."""
        del plan
        return [each for each in self.numbers if each < stage.num_windows(index)]

    def as_targets(self, seq_len: int) -> list[TokenSpan]:
        """The targets of these windows."""
        return [TokenSpan(self.fingerprint, w * seq_len + 1, (w + 1) * seq_len + 1) for w in self.numbers]


@dataclasses.dataclass(frozen=True)
class StepRange:
    """All rows of steps [first, stop), by index, of every stream."""

    first: int
    stop: int
    fingerprint = None  # of any

    def windows(self, plan: Plan, stage: Stage, index: int) -> Sequence[int]:
        """What the rows are that the plan has there, with all that is replaced in them already."""
        steps = range(max(self.first, stage.from_step), min(self.stop, plan.stops()[plan.stages.index(stage)]))
        if not steps:
            return ()
        streams, windows = stage.planned_at(np.arange(stage.position(steps[0]), stage.position(steps[-1] + 1)))
        return np.unique(windows[streams == index]).tolist()


Target = TokenSpan | WindowList | StepRange


@dataclasses.dataclass(frozen=True)
class Windows:
    """As a user says it: windows of a stream of the mixture, or of the dataset.

    Raises ValueError for numbers that are none.
    """

    numbers: Sequence[int]
    stream: str = ""

    def __post_init__(self):
        if isinstance(self.numbers, str) or not isinstance(self.numbers, Sequence):
            raise ValueError(f"windows.numbers: found {self.numbers!r}, expected a list of windows")
        numbers = tuple(checks.whole_number("windows.numbers", each, least=0) for each in self.numbers)
        object.__setattr__(self, "numbers", numbers)


@dataclasses.dataclass(frozen=True)
class Steps:
    """As a user says it: all rows of steps `first` to `last`, counted from 1."""

    first: int
    last: int

    def __post_init__(self):
        first = checks.whole_number("steps.first", self.first, least=1, most=checks.MOST_ROWS)
        last = checks.whole_number("steps.last", self.last, least=first, most=checks.MOST_ROWS)
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "last", last)


@dataclasses.dataclass(frozen=True)
class InsertedDocument:
    """A document of a prepared dataset and the rows that it overwrites.

    Attributes: as of `Insertion`, but
      places: (index of a step, row). A document of several parts takes several, one part after the other.
    """

    name: str
    fingerprint: str
    num_tokens: int
    start: int
    length: int
    end_of_text: int
    places: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Edits:
    """What is edited, whatever the plan."""

    substitute: tuple[Target, ...] = ()
    mask: tuple[TokenSpan, ...] = ()
    insert: tuple[InsertedDocument, ...] = ()


def documents_of(
    ids: Sequence[str], datasets: Mapping[str, TokenDataset], setting: str, where: str = "the training data"
) -> list[tuple[str, Any]]:
    """(stream's name, document) of every document with one of these ids in the training data.

    Raises ValueError, which begins with the setting's name, for an id that no document has, or data without a table.
    """
    if not ids:
        return []
    from data_prep.store.documents import DocumentTables  # only who names documents waits for pyarrow

    for dataset in datasets.values():
        if dataset.tokenizer_digest is None:
            raise ValueError(
                f"{setting}: {dataset.directory} holds bare .bin shards, and nobody recorded which document is "
                f"where. `python -m data_prep.convert {dataset.directory} OUT` makes a prepared dataset of them."
            )
    tables = {name: DocumentTables(dataset.directory, cache=dataset.cache) for name, dataset in datasets.items()}
    found = []
    for document_id in ids:
        here = [(name, document) for name, table in tables.items() for document in table.find("id", document_id)]
        if not here:
            raise ValueError(f"{setting}: no document with the id {document_id} in {where}")
        found += here
    return found


def spans_of(ids: Sequence[str], datasets: Mapping[str, TokenDataset], setting: str) -> tuple[TokenSpan, ...]:
    """The same as spans of the streams."""
    return tuple(
        TokenSpan(datasets[name].fingerprint, each.start, each.start + each.length)
        for name, each in documents_of(ids, datasets, setting)
    )


def inserted_document(
    dataset: TokenDataset, document_id: str, places: Sequence[tuple[int, int]], setting: str = "data.insert"
) -> InsertedDocument:
    """A document of a dataset's training split, to be inserted at (index of a step, row).

    Raises ValueError where it is not there, or several have that id.
    """
    where = f"the training split of {dataset.directory}"
    found = documents_of([document_id], {"": dataset}, setting, where)
    if len(found) > 1:
        raise ValueError(f"{setting}: {len(found)} documents of {dataset.directory} have the id {document_id}")
    ((_, document),) = found
    return InsertedDocument(
        name=inserted_name(dataset.directory),
        fingerprint=dataset.fingerprint,
        num_tokens=dataset.splits["train"].num_tokens,
        start=document.start,
        length=document.length,
        end_of_text=dataset.end_of_text,
        places=tuple(places),
    )


def inserted_name(directory: str) -> str:
    """What a dataset is called that documents are inserted from.

    >>> inserted_name("data/canaries/")
    'inserted/canaries'
    """
    return "inserted/" + directory.rstrip("/").rpartition("/")[2]
