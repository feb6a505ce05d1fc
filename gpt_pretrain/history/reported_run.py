"""All that a run's directory says of it, without its checkpoints: what `gpt_pretrain.report` shows."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from data_prep.store.files import read_bytes, read_json
from data_prep.store.typed import Count, typed
from gpt_pretrain.data.ledger import FILE_NAME as LEDGER
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.run import RunData, open_run
from gpt_pretrain.history.curves import Curves, read_curves
from gpt_pretrain.mirrors import Place
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.train import changes, events, provenance, record, time_file
from gpt_pretrain.train.events import Event
from gpt_pretrain.train.provenance import Provenance
from gpt_pretrain.train.run_copies import whole_run_at
from gpt_pretrain.train.time_file import TimeRecord

EVALUATIONS = "evaluations"  # the folder of task results
_MOST = 1e300  # that a result may be; NaN is none
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class SettingsChange:
    """Settings that a resumed run has otherwise after a step: {name: {"before": ..., "after": ...}}."""

    step: int
    settings: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """One run.

    Attributes:
      name: its directory, as the user typed it.
      data: None where the directory does not say it: then there are no tokens, no stages and no batches to inspect.
      num_consumed: updates in the ledger.
      config_text: as gin has it; settings: the same by name.
      results: of tasks, {(task, metric): {step: value}}.
      notes: what is not there or cannot be read, a sentence each.
    """

    name: str
    curves: Curves
    data: RunData | None
    num_consumed: int
    provenance: Provenance | None
    config_text: str
    settings: Mapping[str, Any]
    times: TimeRecord | None
    changes: tuple[SettingsChange, ...]
    events: tuple[Event, ...]
    results: Mapping[tuple[str, str], Mapping[int, float]]
    notes: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """The newest step that anything is known of."""
        steps = [int(curve.steps[-1]) for curve in self.curves.scalars.values()]
        return max(self.num_consumed, *steps, 0)

    @property
    def num_steps(self) -> int:
        """Of the whole run; as many as there are where nobody says it."""
        return max(self.data.num_steps if self.data else 0, self.last_step)


def read_run(name: str, parse_config: Callable[[str], dict[str, Any]]) -> ReportedRun:
    """A run, wherever it is: under way, killed or finished.

    Args:
      name: its save_dir, also in a bucket.
      parse_config: text of gin -> values by name.

    Raises ValueError: nothing of a run is there.
    """
    place = whole_run_at(name)
    directory = Path(place.directory)
    if not directory.is_dir():
        raise ValueError(f"{name}: no such directory; expected the save_dir of a run of gpt_pretrain.main")
    reader = _Reader(place)
    curves = reader.get(lambda: read_curves(directory / "tensorboard"), Curves({}, {}, (), ()))
    data = reader.get(lambda: open_run(directory), None)
    if data is None and not curves.scalars and not curves.texts:
        raise ValueError(f"{reader.notes[0]} There are no curves in {name}/tensorboard either: nothing to report.")
    if not curves.scalars:
        reader.notes.append("There are no curves: train.writers had no tensorboard, or no step was logged yet.")
    ledger = reader.get(lambda: _ledger(directory, data), Ledger())
    config_text = reader.get(lambda: _text(directory / record.CONFIG_FILE_NAME), "")
    times = reader.get(lambda: TimeRecord.read(directory / time_file.FILE_NAME), None)
    if times and data and times.run_id != data.run_id:
        times = None
    has_provenance = (directory / provenance.FILE_NAME).exists()
    return ReportedRun(
        name=name,
        curves=curves,
        data=data,
        num_consumed=len(ledger),
        provenance=reader.get(lambda: Provenance.read(directory), None) if has_provenance else None,
        config_text=config_text,
        settings=reader.get(lambda: parse_config(config_text), {}),
        times=times,
        changes=tuple(reader.get(lambda: _changes(directory), [])),
        events=tuple(reader.get(lambda: events.read_events(directory), [])),
        results=_results(directory, curves, reader),
        notes=(*reader.notes, *(each.replace(place.directory, name) for each in curves.problems)),
    )


class _Reader:
    """Reads what it can, and notes what it cannot."""

    def __init__(self, place: Place):
        self._place = place
        self.notes: list[str] = []

    def get(self, read: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return read()
        except (ValueError, OSError) as error:
            words = " ".join(str(error).replace(self._place.directory, self._place.name).split())
            self.notes.append(words if words.endswith(".") else f"{words}.")
            return otherwise


def _ledger(directory: Path, data: RunData | None) -> Ledger:
    if not (directory / LEDGER).exists():
        return Ledger()
    ledger = Ledger.read(str(directory))
    if data:
        data.check_ledger(ledger)
    return ledger


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _changes(directory: Path) -> list[SettingsChange]:
    found = []
    for line in _text(directory / changes.FILE_NAME).splitlines():
        try:
            fields = json.loads(line)
            values = {str(name): dict(each) for name, each in fields["changes"].items()}
            if fields["version"] == changes.VERSION:
                found.append(SettingsChange(typed(Count, fields["step"], "step"), values))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # cut short by a kill
    return found


def _results(directory: Path, curves: Curves, reader: _Reader) -> dict[tuple[str, str], dict[int, float]]:
    """Of the loop (scalars evaluation/TASK/METRIC) and of all other evaluations (evaluations/*.json)."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for tag, curve in curves.scalars.items():
        first, *middle, metric = tag.split("/")
        if first == "evaluation" and middle:
            pairs = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
            found.setdefault(("/".join(middle), metric), {}).update(pairs)
    for path in sorted((directory / EVALUATIONS).glob("*.json")):
        for key, step, value in reader.get(lambda path=path: _results_in(path), []):
            found.setdefault(key, {})[step] = value
    return found


def _results_in(path: Path) -> list[tuple[tuple[str, str], int, float]]:
    fields = read_json(path)
    try:
        if fields["version"] != 1:
            raise ValueError(f"{path}: version {fields['version']!r:.40}, expected 1")
        step = typed(Count, fields["step"], f"{path}: step")
        done = [_described(each, path) for each in fields.get("interventions", [])]
        other = f", with {'; '.join(done)}" if done else ""  # another model than the run's: a line of its own
        return [
            ((f"{task}{other}", str(metric)), step, float(value))
            for task, metrics in fields["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is no evaluation ({type(error).__name__} {error})") from None


def _described(fields: Any, path: Path) -> str:
    try:
        return Intervention.from_json(fields).described()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
