"""The one room where gin meets code.

    train      the run: batch, length, intervals, writers     gpt_pretrain.train.config.TrainConfig
    model      the shape of the GPT                            gpt_pretrain.model.spec.GPTConfig
    data       which tokens, in which order                    gpt_pretrain.data.config.DataConfig
    optimizer  AdamW and its schedules                         gpt_pretrain.optim.adamw.adamw
    mesh       devices                                         gpt_pretrain.parallel.mesh.make_mesh
    perturb    something done at a hook site                   gpt_pretrain.model.perturbations.Perturbation

Defaults are those of the Python signatures. To put something of your own in a place, register it with
`@gin.register` in a module that the .gin file imports, and bind it: `train.optimizer = @my_module.lion`.
"""

import os
from collections.abc import Sequence

import gin

from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.model import perturbations
from gpt_pretrain.model.spec import GPTConfig
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.mesh import make_mesh
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.train import train

_WIRING = """
train.model = @model()
train.data = @data()
train.optimizer = @optimizer
train.mesh = @mesh
"""

_NOT_SETTINGS = ["describe_config", "command"]
_train_config = gin.external_configurable(TrainConfig, "train", denylist=_NOT_SETTINGS)
for _name, _configurable in (
    ("model", GPTConfig),
    ("data", DataConfig),
    ("optimizer", adamw),
    ("mesh", make_mesh),
    ("perturb", perturbations.Perturbation),
    ("gaussian_noise", perturbations.gaussian_noise),
    ("scaling", perturbations.scaling),
    ("zeroing", perturbations.zeroing),
    ("added_vector", perturbations.added_vector),
):
    gin.external_configurable(_configurable, _name)


def parse(gin_files: Sequence[str], bindings: Sequence[str]) -> None:
    """Reads .gin files, then bindings ("model.n_layer = 6"); later ones win.

    Raises:
      ValueError: a file that is not there, a syntax error, an unknown name or parameter. Nothing was run.
    """
    gin.clear_config()
    try:
        for gin_file in gin_files:  # `include "other.gin"` finds its neighbours from any working directory
            gin.add_config_file_search_path(os.path.dirname(os.path.abspath(gin_file)))
        gin.parse_config(_WIRING)
        gin.parse_config_files_and_bindings(list(gin_files), list(bindings))
    except (OSError, SyntaxError, ValueError, AttributeError, ImportError, TypeError, RuntimeError) as error:
        raise ValueError(f"gin: {message_of(error)}") from error


def train_config(command: str = "python -m gpt_pretrain.main") -> TrainConfig:
    """What was parsed, as a run's configuration. ValueError for settings that cannot be."""
    return _train_config(describe_config=gin.operative_config_str, command=command)  # pyright: ignore


def run(command: str) -> int:
    """Trains as configured; returns the exit status."""
    return train(train_config(command))


def message_of(error: BaseException) -> str:
    """The error's own words, without gin's notes on which configurable was being called."""
    return str(error).split("\n  In call to configurable")[0].strip() or type(error).__name__
