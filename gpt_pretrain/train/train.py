"""One run, as a story."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax

from gpt_pretrain import runtime
from gpt_pretrain.mirrors import Place
from gpt_pretrain.train import events, report
from gpt_pretrain.train.actions import actions_of
from gpt_pretrain.train.branch import Branch
from gpt_pretrain.train.bucket_run import check_bucket, in_bucket
from gpt_pretrain.train.build import Built, build
from gpt_pretrain.train.changes import announce, changes_of
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.closing import closing
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.events import Kind
from gpt_pretrain.train.exclusive import HeldDirectory, exclusive
from gpt_pretrain.train.feed import feed, fetch_ahead
from gpt_pretrain.train.loop import Loop
from gpt_pretrain.train.opened_data import open_data
from gpt_pretrain.train.pretrained import weights_of
from gpt_pretrain.train.provenance import Provenance
from gpt_pretrain.train.record import tracked_settings, write_record
from gpt_pretrain.train.references import references_of
from gpt_pretrain.train.results import Diverged, RunFailed
from gpt_pretrain.train.start import Start, resume_or_begin
from gpt_pretrain.train.state import TrainState
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.time_file import TimeFile
from gpt_pretrain.train.time_ledger import Category, TimeLedger
from gpt_pretrain.train.writers import MetricWriter, make_writer


def train(config: TrainConfig, *, process_began: float | None = None, branch: Branch | None = None) -> int:
    """Trains from the newest checkpoint in `config.save_dir`, or from the start, to the end of `config.num_tokens`.

    Args:
      process_began: when, by `time.monotonic()`, this process began, where it is there for this run alone: then the
        time before the call and after it is the run's, too.
      branch: begins at another run's checkpoint, with a plan of its own.

    Returns:
      0 when the run is complete, 128 + signal number when it was stopped by SIGTERM or SIGINT and saved.

    Raises:
      ValueError: for anything wrong with the settings, before work starts.
      Diverged: the loss became NaN or infinite; says where.
      RunFailed: the end could not be saved, or `config.save_dir` is not the run's any more.
    """
    times = TimeLedger(process_began)
    is_primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(times.noting_compilation())
        stop = stack.enter_context(StopSignal())
        check_bucket(config)
        data = open_data(config)
        held = stack.enter_context(exclusive(config.directory, config.save_dir if config.is_in_bucket else None))
        if config.is_in_bucket:
            held = stack.enter_context(in_bucket(config, held, times))
        with times.spent(Category.RESTORE), Place(config.save_dir, config.directory).named():
            if branch:
                branch.begin(config.directory)
            start = resume_or_begin(config, data, branch and branch.plan)
        if is_primary:
            time_file = stack.enter_context(TimeFile(config.directory, times, start, held.check))
            if process_began is not None:
                runtime.at_the_end(time_file.write_last)
        built = build(config, data, start)
        built = branch.shortened(built) if branch else built
        fetching = stack.enter_context(closing(fetch_ahead(built, start)))
        checkpoints = Checkpoints(
            config.directory,
            num_kept=config.num_checkpoints_kept,
            check_directory=held.check,
            called=config.save_dir if config.is_in_bucket else None,
        )
        stack.enter_context(closing(checkpoints, progress=checkpoints.num_bytes_unfinished))
        state = state_of(built, start, checkpoints, times)
        if is_primary:
            report.say_what_runs(built, start)
            announce(changes_of(config, start), start.step, config.directory)
            kind = Kind.RESUMED if start.is_resumed else Kind.STARTED
            events.note(config.directory, start.step, kind, report.devices_in_words(built))
        provenance = write_record(built, start) if is_primary else None
        writer = stack.enter_context(closing(writer_of(built, start, provenance, times)))
        actions = actions_of(
            built,
            start,
            writer=writer,
            checkpoints=checkpoints,
            held=held,
            times=times,
            stop=stop,
            fetching=fetching,
        )
        actions += branch.actions(built, start) if branch else ()
        loop = Loop(built, start, state, actions, times)
        del state  # the loop donates it
        with _end_noted(config, loop, held, stop), _last_good_checkpoint_named(config, checkpoints):
            loop.run(feed(built, start, fetching.at), stop)
        with times.spent(Category.CHECKPOINT):
            held.finish()
    if is_primary:
        report.say_where_things_are(built, start, loop.step, times.summary(), may_go_on=branch is None)
    return 0 if loop.is_complete else 128 + int(stop.received or 15)


def state_of(built: Built, start: Start, checkpoints: Checkpoints, times: TimeLedger) -> TrainState:
    """The state of the start: restored, or fresh, or fresh with the weights of another run."""
    if start.is_resumed:
        with times.spent(Category.RESTORE):
            return checkpoints.restore(start.step, built.abstract_state)
    source, digest = built.config.from_pretrained, built.data.first.tokenizer_digest
    # Before anything is compiled: it may not be there.
    params = weights_of(source, built.spec, built.abstract_state.params, digest) if source else None
    state = built.fresh_state()
    return state if params is None else state._replace(params=params)


def writer_of(built: Built, start: Start, provenance: Provenance | None, times: TimeLedger) -> MetricWriter:
    """The writers that the configuration names; without provenance, as on processes that are not primary, none."""
    config = built.config
    with times.spent(Category.WRITERS):
        writer = make_writer(
            tuple(config.writers),
            save_dir=config.directory,
            called=config.save_dir,
            total_steps=built.total_steps,
            start_step=start.step,
            config_text=config.describe_config(),
            settings=provenance and tracked_settings(config, provenance),
            wandb_project=config.wandb_project,
            run_name=os.path.basename(os.path.normpath(config.save_dir)),
            sample_prompts=config.sample_prompts,
            references=references_of(config, provenance, start.run_id) if provenance else tuple,
            is_primary=provenance is not None,
        )
    return times.counted(writer, MetricWriter.__abstractmethods__, Category.WRITERS)


@contextlib.contextmanager
def _last_good_checkpoint_named(config: TrainConfig, checkpoints: Checkpoints) -> Iterator[None]:
    """Adds to `Diverged` what the user can do."""
    try:
        yield
    except Diverged as error:
        with contextlib.suppress(Exception):  # a save that failed is not the last good one
            checkpoints.wait()
        last = checkpoints.latest_step
        raise Diverged(
            f"{error} (`python -m gpt_pretrain.inspect {config.save_dir} --step {error.step}` shows its documents). "
            "Stopped; nothing was saved after it. Last good checkpoint: "
            + ("none was saved yet" if last is None else checkpoints.name_of(last))
            + ". Lower optimizer.lr or raise optimizer.warmup_steps and start again; or begin a new run from that "
            "checkpoint: another --save_dir, --from_pretrained, another data.seed.",
            error.step,
        ) from None


@contextlib.contextmanager
def _end_noted(config: TrainConfig, loop: Loop, held: HeldDirectory, stop: StopSignal) -> Iterator[None]:
    """Notes why the run ends in the block, if it does before it is complete: a signal, or an error."""

    def note(step: int, kind: Kind, words: str) -> None:
        with contextlib.suppress(RunFailed):  # the directory is not the run's any more
            held.check()
            if jax.process_index() == 0:
                events.note(config.directory, step, kind, words)

    try:
        yield
    except RunFailed as error:
        note(error.step if isinstance(error, Diverged) else loop.step, Kind.FAILED, str(error))
        raise
    if stop.received is not None and not loop.is_complete:
        note(loop.step, Kind.STOPPED, f"by {signal.Signals(stop.received).name}, saved")
