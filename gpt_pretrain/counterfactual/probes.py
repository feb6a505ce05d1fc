"""What is measured while an arm trains: losses of chosen tokens, always the same ones."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_prep.store.files import read_json, write_json
from data_prep.store.places import join
from gpt_pretrain.counterfactual.question import Inserted, Question
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span, windows_of
from gpt_pretrain.history.token_losses import nll_of
from gpt_pretrain.train.actions.action import Action, Now
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.time_ledger import Category

_MOST_WINDOWS = 256  # of documents
_VALIDATION_TOKENS = 8192
DOCUMENTS, NEIGHBOURS, VALIDATION = "documents", "neighbours", "validation"


@dataclasses.dataclass(frozen=True)
class Probes:
    """Windows, and groups of their targets.

    Attributes:
      tokens_NT: (windows, seq_len + 1).
      groups: by name, whether each target belongs to it: bool (windows, seq_len).
    """

    tokens_NT: np.ndarray
    groups: dict[str, np.ndarray]
    end_of_text: int

    def losses(self, params: dict, spec) -> dict[str, float]:
        """Mean loss of each group in nats, by whole parameters."""
        nll = nll_of(params, spec.plain(), self.tokens_NT, end_of_text=self.end_of_text)
        return {name: float(nll[chosen].mean(dtype=np.float64)) for name, chosen in self.groups.items()}


def probes_of(run: OpenedRun, question: Question, inserted: Sequence[tuple[Inserted, Span, Any]]) -> Probes:
    """The tokens of the documents, those beside them in the same windows, and the front of the validation split.

    Args:
      inserted: each inserted document, where it is in its dataset, and that dataset's training stream.
    """
    stage = run.plan.stage_at(question.first - 1)
    length = stage.seq_len + 1
    rows, owners = [], []  # windows, and for each of them which documents' spans its tokens are: (start, spans)
    names: list[str] = []
    for stream in {each.stream.fingerprint: each.stream for each in question.spans}.values():
        spans = [each for each in question.spans if each.stream.fingerprint == stream.fingerprint]
        windows = sorted({window for each in spans for window in windows_of(each, stage)})[:_MOST_WINDOWS]
        starts = np.array(windows, np.int64) * stage.seq_len
        if len(starts):
            rows += list(run.dataset(stream).splits["train"].read(starts, length))
            owners += [(int(start), spans) for start in starts]
    masks: dict[str, list[np.ndarray]] = {DOCUMENTS: [], NEIGHBOURS: [], VALIDATION: []}

    def add(name_of_masks: dict[str, np.ndarray]) -> None:
        for name in {*masks, *name_of_masks}:
            before = masks.setdefault(name, [np.zeros(stage.seq_len, bool)] * len(names))
            before.append(name_of_masks.get(name, np.zeros(stage.seq_len, bool)))
        names.append("")

    for start, spans in owners:
        places = start + 1 + np.arange(stage.seq_len)
        of = {name_of(each): (places >= each.start) & (places < each.stop) for each in spans}
        own = np.any(list(of.values()), axis=0)
        singles = {name: each for name, each in of.items() if len(question.spans) > 1}
        add({DOCUMENTS: own, NEIGHBOURS: ~own} | singles)
    for each, span, source in inserted:
        for first in range(span.start, span.stop - 1, stage.seq_len):
            count = min(length, span.stop - first)
            row = np.zeros(length, rows[0].dtype if rows else source.dtype)
            row[:count] = source.read(np.array([first]), count)[0]
            rows.append(row)
            own = np.arange(stage.seq_len) < count - 1
            add({DOCUMENTS: own, each.document: own} if len(inserted) + len(question.spans) > 1 else {DOCUMENTS: own})
    for stream in stage.streams:
        source = run.dataset(stream).splits.get("val")
        most = max(1, _VALIDATION_TOKENS // stage.seq_len // len(stage.streams))
        count = 0 if source is None else min(most, (source.num_tokens - 1) // stage.seq_len)
        if source is not None and count:
            rows += list(source.read(np.arange(count) * stage.seq_len, length))
            for _ in range(count):
                add({VALIDATION: np.ones(stage.seq_len, bool)})
    groups = {name: np.stack(each) for name, each in masks.items() if np.any(each)}
    return Probes(np.stack(rows), groups, run.tokenizer(stage.streams[0]).end_of_text)


def name_of(span: Span) -> str:
    """The document's id, or where it is."""
    return (span.document and span.document.id) or f"at token {span.start}"


def whole(params: dict) -> dict:
    """Parameters that may be split over devices and processes, whole on one device of this process."""
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return jax.device_put(params, jax.local_devices()[0])


class Notes:
    """What an arm measured, a record a step: kept as one small file that is replaced as a whole."""

    def __init__(self, directory: str, name: str, *, begin: int):
        self._path = join(directory, name)
        found = notes_at(self._path)
        self.records = [each for each in found if each["step"] <= begin]

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record and writes all; in the first process."""
        self.records.append(record)
        if jax.process_index() == 0:
            write_json(self._path, {"version": 1, "records": self.records})


def notes_at(path: str) -> list[dict[str, Any]]:
    """The records of a file; none where there is no file, or it is no such file: they are measured again."""
    try:
        return list((read_json(path) or {"records": []})["records"])
    except (ValueError, KeyError, TypeError):
        return []


class MeasureLosses(Action):
    """Writes the probes' losses after chosen steps to `losses.json` in the arm's directory."""

    counts_as = Category.EVALUATION
    FILE_NAME = "losses.json"

    def __init__(self, probes: Probes, built: Built, steps: Collection[int], *, begin: int):
        self._probes, self._spec, self._steps = probes, built.spec, frozenset(steps)
        self._notes = Notes(built.config.save_dir, self.FILE_NAME, begin=begin)

    def due(self, step: int) -> bool:
        return step in self._steps

    def run(self, now: Now) -> None:
        losses = self._probes.losses(whole(now.state.params), self._spec)
        self._notes.add({"step": now.step, "loss": losses})


def probe_steps(begin: int, until: int, first: int, count: int) -> set[int]:
    """About `count` steps spread over an arm, the two around the first that differs, and the last.

    >>> sorted(probe_steps(300, 900, 412, 4))
    [411, 412, 450, 600, 750, 900]
    """
    spread = {begin + round((until - begin) * number / count) for number in range(1, count + 1)}
    return {step for step in {*spread, first - 1, first, until} if begin < step <= until}
