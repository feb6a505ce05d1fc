"""What is measured while an arm trains: losses of chosen tokens, always the same ones."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_prep.store.files import read_json, write_json
from data_prep.store.places import join
from gpt_pretrain.counterfactual.question import Question
from gpt_pretrain.data.stages import Stage
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


class InsertedTokens(NamedTuple):
    """A document of another dataset, from its end-of-text token on."""

    name: str
    tokens: np.ndarray


def probes_of(run: OpenedRun, question: Question, inserted: Sequence[InsertedTokens]) -> Probes:
    """The tokens of the documents, those beside them in the same windows, and the front of the validation split.

    Raises ValueError where there is none of these.
    """
    stage = run.plan.stage_at(question.first - 1)
    is_one = len(question.spans) + len(inserted) == 1
    rows = [
        *_windows_of(run, question.spans, stage, with_each=not is_one),
        *_rows_of(inserted, stage.seq_len, with_each=not is_one),
        *_validation_of(run, stage),
    ]
    if not rows:
        raise ValueError(f"{run.save_dir}: no document is asked about and no validation split is there to measure on")
    names = dict.fromkeys(name for _, masks in rows for name in masks)
    nothing = np.zeros(stage.seq_len, bool)
    groups = {name: np.stack([masks.get(name, nothing) for _, masks in rows]) for name in names}
    return Probes(
        np.stack([tokens for tokens, _ in rows]),
        {name: each for name, each in groups.items() if each.any()},
        run.tokenizer(stage.streams[0]).end_of_text,
    )


# Tokens of a window, and which of its targets belong to which groups.
_Row = tuple[np.ndarray, dict[str, np.ndarray]]


def _windows_of(run: OpenedRun, spans: Sequence[Span], stage: Stage, *, with_each: bool) -> Iterator[_Row]:
    """Windows of the streams that hold documents."""
    for stream in {each.stream.fingerprint: each.stream for each in spans}.values():
        here = [each for each in spans if each.stream.fingerprint == stream.fingerprint]
        windows = sorted({window for each in here for window in windows_of(each, stage)})[:_MOST_WINDOWS]
        for start in np.array(windows, np.int64) * stage.seq_len:
            places = start + 1 + np.arange(stage.seq_len)
            each_own = {name_of(each): (places >= each.start) & (places < each.stop) for each in here}
            own = np.any(list(each_own.values()), axis=0)
            tokens = run.dataset(stream).splits["train"].read(np.array([start]), stage.seq_len + 1)[0]
            yield tokens, {DOCUMENTS: own, NEIGHBOURS: ~own, **(each_own if with_each else {})}


def _rows_of(inserted: Sequence[InsertedTokens], seq_len: int, *, with_each: bool) -> Iterator[_Row]:
    """Inserted documents, in parts."""
    for name, tokens in inserted:
        for first in range(0, len(tokens) - 1, seq_len):
            part = tokens[first : first + seq_len + 1]
            own = np.arange(seq_len) < len(part) - 1
            yield np.pad(part, (0, seq_len + 1 - len(part))), {DOCUMENTS: own, **({name: own} if with_each else {})}


def _validation_of(run: OpenedRun, stage: Stage) -> Iterator[_Row]:
    """The first windows of each validation split."""
    most = max(1, _VALIDATION_TOKENS // stage.seq_len // len(stage.streams))
    for stream in stage.streams:
        source = run.dataset(stream).splits.get("val")
        if source is not None:
            count = min(most, (source.num_tokens - 1) // stage.seq_len)
            for tokens in source.read(np.arange(count) * stage.seq_len, stage.seq_len + 1):
                yield tokens, {VALIDATION: np.ones(stage.seq_len, bool)}


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
        """Adds a record and writes all. For the first process."""
        self.records.append(record)
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
        params = whole(now.state.params)  # of all processes together; one alone measures
        if jax.process_index() == 0:
            self._notes.add({"step": now.step, "loss": self._probes.losses(params, self._spec)})


def probe_steps(begin: int, until: int, first: int, count: int) -> set[int]:
    """About `count` steps spread over an arm, the two around the first that differs, and the last.

    >>> sorted(probe_steps(300, 900, 412, 4))
    [411, 412, 450, 600, 750, 900]
    """
    spread = {begin + round((until - begin) * number / count) for number in range(1, count + 1)}
    return {step for step in {*spread, first - 1, first, until} if begin < step <= until}
