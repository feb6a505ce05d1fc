"""The one room where gin meets code.

    train      the run: batch, length, intervals, writers     gpt_pretrain.train.config.TrainConfig
    model      the shape of the GPT                            gpt_pretrain.model.spec.GPTConfig
    data       which tokens, in which order                    gpt_pretrain.data.config.DataConfig
    optimizer  AdamW and its schedules                         gpt_pretrain.optim.adamw.adamw
    mesh       devices                                         gpt_pretrain.parallel.mesh.make_mesh
    windows    some windows, in data.substitute or data.mask  gpt_pretrain.data.asked_edits.Windows
    steps      some steps, in data.substitute                 gpt_pretrain.data.asked_edits.Steps
    intervention  something done at a hook site                gpt_pretrain.model.interventions.Intervention

Defaults are those of the Python signatures. To put something of your own in a place, register it with
`@gin.register` in a module that the .gin file imports, and bind it: `train.optimizer = @my_module.lion`.
"""

import contextlib
import io
import logging
import os
import re
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import gin
from gin import config as gin_config
from gin import config_parser

from gpt_pretrain import checks
from gpt_pretrain.data.asked_edits import Steps, Windows
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.spec import GPTConfig
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.mesh import make_mesh
from gpt_pretrain.text_files import read_text
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.train import train

_WIRING = """
train.model = @model()
train.data = @data()
train.optimizer = @optimizer
train.mesh = @mesh
"""

_NOT_SETTINGS = ["describe_config", "bound_config", "parse_config", "command"]
_train_config = gin.external_configurable(TrainConfig, "train", denylist=_NOT_SETTINGS)
for _name, _configurable in (
    ("model", GPTConfig),
    ("data", DataConfig),
    ("windows", Windows),
    ("steps", Steps),
    ("optimizer", adamw),
    ("mesh", make_mesh),
    ("intervention", Intervention),
):
    gin.external_configurable(_configurable, _name)


def parse(gin_files: Sequence[str], bindings: Sequence[str]) -> None:
    """Reads .gin files, then bindings ("model.n_layer = 6"); later ones win.

    Raises:
      ValueError: a file that is not there, a syntax error, an unknown name or parameter. Nothing was run.
    """
    files = [checks.path("--gin_file", each) for each in gin_files]
    gin.clear_config()
    try:
        gin.parse_config(_WIRING)
        with _our_reader([os.path.dirname(os.path.abspath(each)) for each in files]):
            gin.parse_config_files_and_bindings(files, list(bindings))
    except tokenize.TokenError as error:
        where = ", ".join([*files, *(["the flags"] if bindings else [])])
        raise ValueError(f"gin: {error.args[0]} ({where}): is a bracket or a text not closed?") from error
    except (OSError, SyntaxError, ValueError, AttributeError, ImportError, TypeError, RuntimeError) as error:
        raise ValueError(f"gin: {_in_one_line(message_of(error))}") from error


def train_config(command: str = "python -m gpt_pretrain.main") -> TrainConfig:
    """What was parsed, as a run's configuration. ValueError for settings that cannot be."""
    texts = {"describe_config": gin.operative_config_str, "bound_config": gin.config_str, "parse_config": values_of}
    with gin.unlock_config():  # a module that is imported only now may register something of its own
        return _train_config(**texts, command=command)  # pyright: ignore


def run(command: str, *, process_began: float | None = None) -> int:
    """Trains as configured; returns the exit status. See `train` for `process_began`."""
    with gin.unlock_config():
        return train(train_config(command), process_began=process_began)


def values_of(config_text: str) -> dict[str, Any]:
    """Gin's text of a configuration -> its values by name, with macros replaced by what they stand for.

    >>> values_of("rate = 1e-3\\noptimizer.lr = %rate\\ntrain.optimizer = @optimizer\\nnoise/intervention.layers = [3]")
    {'optimizer.lr': 0.001, 'train.optimizer': '@optimizer', 'noise/intervention.layers': [3]}

    Raises ValueError for what gin cannot read.
    """
    macros, values = {}, {}
    try:
        for statement in config_parser.ConfigParser(config_text, _AsText()):
            if isinstance(statement, config_parser.BindingStatement):
                owner = f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector
                if statement.arg_name:
                    values[f"{owner}.{statement.arg_name}"] = statement.value
                else:
                    macros[owner] = statement.value
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a recorded configuration cannot be read: {message_of(error)}") from None
    return {name: _without_macros(value, macros) for name, value in values.items()}


class _Macro(str):
    """The name of a macro in the place of its value."""


class _AsText(config_parser.ParserDelegate):
    """References to configurables as they are written."""

    def configurable_reference(self, scoped_configurable_name, evaluate) -> Any:
        return f"@{scoped_configurable_name}{'()' * evaluate}"

    def macro(self, macro_name) -> Any:
        return _Macro(macro_name)


def _without_macros(value: Any, macros: dict[str, Any], seen: tuple[str, ...] = ()) -> Any:
    if isinstance(value, _Macro):
        if value not in macros or value in seen:
            return f"%{value}"
        return _without_macros(macros[value], macros, (*seen, value))
    if isinstance(value, list | tuple):
        return type(value)(_without_macros(each, macros, seen) for each in value)
    if isinstance(value, dict):
        return {key: _without_macros(each, macros, seen) for key, each in value.items()}
    return value


@contextlib.contextmanager
def _our_reader(directories: Sequence[str]) -> Iterator[None]:
    """In the block, gin reads files by `read_text`, as it takes a byte-order mark for a syntax error.

    It looks for them in the working directory, then in `directories`, so that `include "other.gin"` finds a file's
    neighbours from anywhere. And its reader of files in packages is silent: it logs "Path not found" for each file on a
    later search path.
    """

    def open_text(path: str) -> io.StringIO:
        file = io.StringIO(read_text(path))
        file.name = path  # pyright: ignore[reportAttributeAccessIssue]  # for gin's errors
        return file

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.module != "resource_reader"

    root, readers = logging.getLogger(), [(open_text, os.path.isfile), *gin_config._FILE_READERS[1:]]
    root.addFilter(is_of_others)
    try:
        with mock.patch.multiple(gin_config, _FILE_READERS=readers, _LOCATION_PREFIXES=["", *directories]):
            yield
    finally:
        root.removeFilter(is_of_others)


def _in_one_line(message: str) -> str:
    """gin's message, and Python's words for what is no literal in plainer ones."""
    message = re.sub(
        r"malformed node or string[^<]*<[^>]*>",
        "expected a number, a 'text', True, False, None, a list or dictionary of them, or @name:",
        message,
    )
    return " ".join(message.split())


def message_of(error: BaseException) -> str:
    """The error's own words, without gin's notes on which configurable was being called."""
    return str(error).split("\n  In call to configurable")[0].strip() or type(error).__name__
