"""What is asked of a run: which documents it should not have seen, or should, and which of its steps that concerns."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.store.files import read_json, write_json
from data_prep.store.places import join, make_directory
from gpt_pretrain.data.asked_edits import Edits
from gpt_pretrain.data.edits import edited
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.history.occurrences import DocumentOccurrence, occurrences_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span, find_spans
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.train.checkpoint_copies import checkpoint_at, checkpoints_at

FILE_NAME = "question.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Inserted:
    """A document of another prepared dataset and the rows of the run that it overwrites.

    Attributes:
      places: (step, row), steps from 1.
    """

    directory: str
    document: str
    places: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a user asks; steps count from 1.

    Attributes:
      without: ids of documents whose rows get other windows, or with `is_masked`, whose tokens are not learned.
      until: the last step of the arms.
      interventions: what is done to activations in the edited arm, with the run's own interventions, if any.
    """

    without: tuple[str, ...] = ()
    is_masked: bool = False
    inserted: tuple[Inserted, ...] = ()
    interventions: tuple[Intervention, ...] = ()
    until: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "without": list(self.without),
            "is_masked": self.is_masked,
            "insert": [
                [each.directory, each.document, [list(place) for place in each.places]] for each in self.inserted
            ],
            "interventions": [each.to_json() for each in self.interventions],
            "until": self.until,
        }

    def bindings(self, own: Sequence[str] = ()) -> list[str]:
        """The settings that ask the same of a run.

        Args:
          own: the run's interventions, as its configuration names them: "@noise/intervention()".
        """
        setting = "data.mask" if self.is_masked else "data.substitute"
        named = [f"{setting} = {list(self.without)!r}"] if self.without else []
        inserted = [(each.directory, each.document, list(each.places)) for each in self.inserted]
        return named + ([f"data.insert = {inserted!r}"] if inserted else []) + self._intervening(own)

    def _intervening(self, own: Sequence[str]) -> list[str]:
        lines = []
        for number, each in enumerate(self.interventions):
            fields = {name: value for name, value in each.to_json().items() if name != "version"}
            lines += [f"asked{number}/intervention.{name} = {value!r}" for name, value in fields.items()]
        names = [*own, *(f"@asked{number}/intervention()" for number in range(len(self.interventions)))]
        return [*lines, f"model.interventions = [{', '.join(names)}]"] if lines else []

    @property
    def first_intervention(self) -> int | None:
        """The first step with one."""
        return min((each.first_step or 1 for each in self.interventions), default=None)


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, as this run has it.

    Attributes:
      spans: the documents that are left out, in the streams of the run.
      first: the first step that differs.
      steps: those of the original that hold one of them, or are to hold an inserted one: from 1, ascending.
      num_rows: rows of these steps that do.
      begin: the step after which the arms begin: 0, or that of a kept checkpoint before the first of `steps`.
    """

    asked: Asked
    spans: tuple[Span, ...]
    first: int
    steps: tuple[int, ...]
    num_rows: int
    begin: int


def question_of(run: OpenedRun, asked: Asked) -> Question:
    """Finds the first step concerned, by the inverse of the order, and the newest good checkpoint before it.

    Raises ValueError, in a line: a document that is not there, or is in none of the steps.
    """
    spans, rows = [], set()
    for each in asked.without:
        found = [span for span in find_spans(run, document=each) if span.split == "train"]
        if not found:
            raise ValueError(f"{each}: is in the validation split: the run is not trained on it")
        spans += found
        rows |= {
            (place.place.step_index + 1, place.place.row)
            for span in found
            for place in occurrences_of(run, span)
            if not asked.is_masked or is_target(place)
        }
    rows |= {place for each in asked.inserted for place in each.places}
    inside = {(step, row) for step, row in rows if step <= asked.until}
    if asked.without and not inside:
        when = f"; the first would be in step {min(rows)[0]}" if rows else ""
        raise ValueError(
            f"{', '.join(asked.without[:3])}: in none of the first {asked.until} steps of {run.save_dir}{when}. Both "
            "arms would be the run itself"
        )
    steps = tuple(sorted({step for step, _ in inside}))
    first = min(filter(None, [*steps[:1], asked.first_intervention]))
    if first > asked.until:
        raise ValueError(f"the first difference is in step {first}, after the arms' last one, {asked.until}")
    return Question(asked, tuple(spans), first, steps, len(inside), newest_before(run, first))


def is_target(place: DocumentOccurrence) -> bool:
    """Whether a row learns a token of the document: its first token is an input only."""
    return place.window_span[1] > max(1, place.window_span[0])


def newest_before(run: OpenedRun, step: int) -> int:
    """Of the kept checkpoints that can be trusted the newest that was made before a step; 0 if there is none."""
    for each in reversed(checkpoints_at(run.save_dir)):
        if each < step:
            try:
                checkpoint_at(checkpoint_name(run.save_dir, each))
            except ValueError:
                continue
            return each
    return 0


def checkpoint_name(save_dir: str, step: int) -> str:
    """What the checkpoint of a step is called."""
    return join(save_dir.rstrip("/"), f"checkpoints/{step}")


def edited_plan(run: OpenedRun, edits: Edits, begin: int) -> Plan:
    """The run's plan with these edits from step `begin` + 1 on, on top of those that it has."""
    return edited(run.plan, begin, edits, num_steps=run.data.num_steps, on_top=True)


def claim(directory: str, run: OpenedRun, asked: Asked, more: dict[str, Any] | None = None) -> None:
    """Notes in a directory what is asked. ValueError where it holds the answer to another question."""
    path = join(directory, FILE_NAME)
    fields = {"version": VERSION, "run": run.save_dir, "run_id": run.data.run_id, **asked.to_json(), **(more or {})}
    there = read_json(path)
    if there is None:
        make_directory(directory)
        write_json(path, fields)
        return
    if there != fields:
        changed = [name for name in fields if not isinstance(there, dict) or there.get(name) != fields[name]]
        raise ValueError(
            f"{directory}: holds the answer to another question ({', '.join(changed)} differ, see {FILE_NAME}). Choose "
            "another --save_dir."
        )


def steps_that_differ(ours: np.ndarray, theirs: np.ndarray) -> list[int]:
    """Of two ledgers' digests, as far as both go: steps from 1."""
    both = min(len(ours), len(theirs))
    return (np.flatnonzero(ours[:both] != theirs[:both]) + 1).tolist()
