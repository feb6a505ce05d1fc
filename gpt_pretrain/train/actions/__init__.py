"""What happens around the steps of a run. To add one: a file here, and a line in `actions_of`."""

import logging

import jax

from gpt_pretrain.data.fetching import FetchAhead
from gpt_pretrain.train.actions.action import Action
from gpt_pretrain.train.actions.checkpointing import SaveCheckpoints
from gpt_pretrain.train.actions.evaluation import Evaluate
from gpt_pretrain.train.actions.log_metrics import LogMetrics
from gpt_pretrain.train.actions.network import CompareNetwork
from gpt_pretrain.train.actions.profile import Profile
from gpt_pretrain.train.actions.samples import WriteSamples
from gpt_pretrain.train.actions.statistics import WriteStatistics
from gpt_pretrain.train.actions.tasks import AskTasks
from gpt_pretrain.train.actions.verification import VerifyShards
from gpt_pretrain.train.build import Built
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.exclusive import HeldDirectory
from gpt_pretrain.train.start import Start
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.time_ledger import TimeLedger
from gpt_pretrain.train.writers import MetricWriter

log = logging.getLogger(__name__)


def actions_of(
    built: Built,
    start: Start,
    *,
    writer: MetricWriter,
    checkpoints: Checkpoints,
    held: HeldDirectory,
    times: TimeLedger,
    stop: StopSignal,
    fetching: FetchAhead | None = None,
) -> list[Action]:
    """The actions that the configuration asks for, in the order in which they are called."""
    config, data = built.config, built.data
    actions: list[Action] = [LogMetrics(built, start, writer, times)]
    if config.statistics_interval:
        actions.append(WriteStatistics(built, writer))
    if config.profile_step:
        actions.append(Profile(config.profile_step, config.directory))
    if any(each.unverified for each in data.datasets.values()):
        actions.append(VerifyShards(built, start, checkpoints))
    if fetching and fetching.sources and jax.process_index() == 0:
        actions.append(CompareNetwork(start, fetching, times))
    if data.prompts:
        # Before the checkpoint of the same step, which waits for the writers: a run that is resumed from it has them.
        actions.append(WriteSamples(built, writer))
    # Saved before it is evaluated: an evaluation that fails costs no checkpoint.
    actions.append(SaveCheckpoints(built, start, checkpoints, writer, held, times))
    validation = data.sources("val")
    if not validation:
        log.warning("%s has no validation split: no validation loss will be computed.", data.first.directory)
    if validation or data.validation:
        actions.append(Evaluate(built, validation, writer, stop, named=data.validation))
    if data.suite is not None:
        actions.append(AskTasks(built, data.suite, writer, stop))
    return actions
