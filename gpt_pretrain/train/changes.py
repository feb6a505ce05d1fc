"""Settings that a resumed run has otherwise than before: said once, and kept in `save_dir/changes.jsonl`."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.start import Start

log = logging.getLogger(__name__)

FILE_NAME = "changes.jsonl"
VERSION = 1
_NOT_SET = object()
_SAID_OTHERWISE = ("train.fork",)  # what a fork changes is


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting, with its values; `_NOT_SET` where it has none."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {_text(self.before)} until now, {_text(self.after)} from here on"

    def to_json(self) -> dict[str, Any]:
        """ "before" and "after", where they are set."""
        values = {"before": self.before, "after": self.after}
        return {which: value for which, value in values.items() if value is not _NOT_SET}


def changes_of(config: TrainConfig, start: Start) -> tuple[Change, ...]:
    """How the configuration differs from the one of the checkpoint; call it when the run is built.

    What only a computation uses (the strength of a noise, say) counts as used when that is compiled. So a setting that
    was recorded and is not used yet is compared with what the user set, and left out where nothing is.
    """
    if not start.config:
        return ()
    try:
        before = config.parse_config(start.config)
    except ValueError as error:
        log.warning("Step %d: %s; its settings were not compared with today's.", start.step, error)
        return ()
    used, bound = config.parse_config(config.describe_config()), config.parse_config(config.bound_config())
    after = {name: bound[name] for name in before if name in bound} | used
    owners = {_owner(name) for name in used}
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name in _SAID_OTHERWISE or (name not in after and _owner(name) not in owners):
            continue
        change = Change(name, before.get(name, _NOT_SET), after.get(name, _NOT_SET))
        if _comparable(change.before) != _comparable(change.after):
            found.append(change)
    return tuple(found)


def announce(changes: tuple[Change, ...], step: int, save_dir: str) -> None:
    """Logs the changes and keeps them: a line of JSON a resumption, with the step after which they hold."""
    if not changes:
        return
    log.warning("Settings that change after step %d:", step)
    for change in changes:
        log.warning("  %s", change)
    path = Path(save_dir, FILE_NAME)
    differences = {change.name: change.to_json() for change in changes}
    line = json.dumps({"version": VERSION, "step": step, "changes": differences}, ensure_ascii=False, default=str)
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    if line in kept.splitlines()[-1:]:  # resumed from the same checkpoint again
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * bool(kept and not kept.endswith("\n")) + line + "\n")


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _text(value: Any) -> str:
    if value is _NOT_SET:
        return "not set"
    return value if isinstance(value, str) and value.startswith("@") else repr(value)


def _comparable(value: Any) -> Any:
    """Gin writes a list where a tuple was given, and the other way round."""
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return {key: _comparable(each) for key, each in value.items()}
    return value
