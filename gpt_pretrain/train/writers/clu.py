"""CLU, without TensorFlow where that is not installed.

CLU imports TensorFlow for a single class. To have CLU without it, take its modules from here:

    from gpt_pretrain.train.writers.clu import metric_writers, periodic_actions
"""

import importlib.util
import sys
import types


def _refuse(*args, **kwargs):
    raise ImportError("CLU's SummaryWriter needs TensorFlow; use gpt_pretrain.train.writers.make_writer")


if importlib.util.find_spec("tensorflow") is None:
    # Stands in for the one CLU module that needs TensorFlow; must come before CLU's first import.
    _stand_in = types.ModuleType("clu.metric_writers.summary_writer")
    _stand_in.__dict__["SummaryWriter"] = _refuse
    sys.modules.setdefault(_stand_in.__name__, _stand_in)

from clu import metric_writers, periodic_actions  # noqa: E402

MetricWriter = metric_writers.MetricWriter
__all__ = ["MetricWriter", "metric_writers", "periodic_actions"]
