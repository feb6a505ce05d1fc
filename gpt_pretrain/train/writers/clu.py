"""CLU, without TensorFlow where that is not installed.

CLU imports TensorFlow for a single class. To have CLU without it, take its modules from here:

    from gpt_pretrain.train.writers.clu import metric_writers, periodic_actions
"""

import importlib.util
import sys
import types
from collections.abc import Callable

_STAND_IN = "clu.metric_writers.summary_writer"


def _make_summary_writer(logdir: str):
    return sys.modules[_STAND_IN].__dict__["make"](logdir)


if importlib.util.find_spec("tensorflow") is None:
    # Stands in for the one CLU module that needs TensorFlow; must come before CLU's first import.
    sys.modules.setdefault(_STAND_IN, types.ModuleType(_STAND_IN))
    sys.modules[_STAND_IN].__dict__["SummaryWriter"] = _make_summary_writer

from clu import metric_writers, periodic_actions  # noqa: E402

MetricWriter = metric_writers.MetricWriter
__all__ = ["MetricWriter", "metric_writers", "periodic_actions"]


def provide_summary_writer(make: Callable[[str], MetricWriter]) -> None:
    """What CLU's own functions get where they ask for a SummaryWriter and there is no TensorFlow."""
    sys.modules[_STAND_IN].__dict__["make"] = make
