"""Actions around the steps of a run: one defined here, and those that come with the trainer."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from support.runs import build_anew, run_config

from gpt_pretrain.train import actions as actions_lib
from gpt_pretrain.train import train as train_lib
from gpt_pretrain.train.actions.action import Action, Schedule
from gpt_pretrain.train.actions.checkpointing import SaveCheckpoints
from gpt_pretrain.train.actions.evaluation import Evaluate
from gpt_pretrain.train.actions.log_metrics import LogMetrics
from gpt_pretrain.train.actions.profile import Profile
from gpt_pretrain.train.actions.samples import WriteSamples
from gpt_pretrain.train.actions.statistics import WriteStatistics
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.exclusive import HeldDirectory
from gpt_pretrain.train.feed import feed
from gpt_pretrain.train.loop import Loop
from gpt_pretrain.train.stopping import StopSignal
from gpt_pretrain.train.time_ledger import Category, TimeLedger
from gpt_pretrain.train.writers.base import RunWriter


class Recorder(Action):
    """Writes down every call; nothing else in the project knows of it."""

    def __init__(self, *, due_at=(), before=False, counts_as=Category.EVALUATION, calls=None, name=""):
        self.calls = [] if calls is None else calls
        self.is_before_step, self.counts_as = before, counts_as
        self._due_at, self._name = due_at, name

    def due(self, step):
        self.calls.append((self._name + "due", step))
        return step in self._due_at

    def run(self, now):
        what = (now.step, int(now.state.step), now.is_last, None if now.tokens_MBT is None else now.tokens_MBT.shape)
        self.calls.append((self._name + "run", *what))

    def on_result(self, result):
        self.calls.append((self._name + "result", result.step))

    def at_end(self, now):
        self.calls.append((self._name + "end", now.step, now.is_last))


class ScalarWriter(RunWriter):
    """Keeps what is written."""

    def __init__(self):
        self.written = []

    def write_scalars(self, step, scalars):
        self.written.append((step, dict(scalars)))

    write_texts = write_histograms = write_hparams = flush = close = lambda self, *args, **kwargs: None

    def steps_of(self, name):
        return [step for step, scalars in self.written if any(each.startswith(name) for each in scalars)]


def run_loop(config, actions, *, stop=None):
    """Trains with these actions alone; the loop afterwards."""
    built, start = build_anew(config)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        loop = Loop(built, start, built.fresh_state(), actions, TimeLedger())
        loop.run(feed(built, start), stop)
    return loop


def only(calls, *kinds):
    return [call for call in calls if call[0] in kinds]


BATCH = (2, 4, 9)


def test_an_action_is_called_around_the_steps_that_it_says(tiny_dataset):
    after, before = Recorder(due_at=(2, 4)), Recorder(due_at=(2,), before=True)
    run_loop(run_config(tiny_dataset, num_steps=4), [after, before])
    for each in (after, before):
        assert only(each.calls, "due") == [("due", step) for step in (1, 2, 3, 4)]
        assert only(each.calls, "result") == [("result", step) for step in (1, 2, 3, 4)]
        assert each.calls[-1] == ("end", 4, True) and len(only(each.calls, "end")) == 1
    # (updates made, the state's own count, whether it is the last step, the step's batch)
    assert only(after.calls, "run") == [("run", 2, 2, False, BATCH), ("run", 4, 4, True, BATCH)]
    assert only(before.calls, "run") == [("run", 1, 1, False, BATCH)]  # before step 2


def test_results_come_late_but_before_an_action_that_is_not_part_of_the_step(tiny_dataset):
    pausing, running = Recorder(due_at=(3,)), Recorder(due_at=(3,), counts_as=Category.STEP)
    run_loop(run_config(tiny_dataset, num_steps=4), [pausing])
    run_loop(run_config(tiny_dataset, num_steps=4), [running])
    assert pausing.calls.index(("result", 3)) < pausing.calls.index(("run", 3, 3, False, BATCH))
    assert running.calls.index(("result", 3)) > running.calls.index(("run", 3, 3, False, BATCH))


def test_actions_are_called_in_the_order_of_the_list(tiny_dataset):
    calls = []
    run_loop(
        run_config(tiny_dataset, num_steps=1),
        [Recorder(due_at=(1,), calls=calls, name=name) for name in ("first ", "second ")],
    )
    kinds = [call[0] for call in calls]
    assert [kind for kind in kinds if kind.endswith("run")] == ["first run", "second run"]
    assert kinds[-2:] == ["first end", "second end"]


def test_an_action_is_added_by_its_own_file_and_a_line_in_the_list(tiny_dataset, tmp_path, monkeypatch):
    recorder = Recorder(due_at=(2,))

    def actions_with_one_more(*args, **kwargs):
        return [*actions_lib.actions_of(*args, **kwargs), recorder]

    monkeypatch.setattr(train_lib, "actions_of", actions_with_one_more)
    assert train_lib.train(run_config(tiny_dataset, tmp_path / "run", num_steps=3)) == 0
    assert only(recorder.calls, "run", "end") == [("run", 2, 2, False, BATCH), ("end", 3, True)]
    assert only(recorder.calls, "result") == [("result", step) for step in (1, 2, 3)]


def test_a_signal_ends_the_run_after_the_step_and_the_actions_see_where(tiny_dataset):
    stop = StopSignal()

    class Stopping(Recorder):
        def run(self, now):
            super().run(now)
            stop.received = 15

    action = Stopping(due_at=(2,))
    loop = run_loop(run_config(tiny_dataset, num_steps=5), [action], stop=stop)
    assert loop.step == 2 and action.calls[-1] == ("end", 2, False)
    assert only(action.calls, "result") == [("result", 1), ("result", 2)]


class SlowDevice:
    """Time as it passes for the host where a step takes a second on the device, told from its results alone."""

    def __init__(self):
        self.now = self.busy_until = 100.0

    def slowed(self, built):
        def train_step(state, batch):
            state, metrics = built.train_step(state, batch)
            self.busy_until = done_at = max(self.now, self.busy_until) + 1.0
            return state, {name: _Pending(self, done_at, value) for name, value in metrics.items()}

        return dataclasses.replace(built, train_step=train_step)

    def wait(self, until=None):
        self.now = max(self.now, self.busy_until if until is None else until)


class _Pending:
    """A number that is there when the step is done."""

    def __init__(self, device, done_at, value):
        self._device, self._done_at, self._value = device, done_at, value

    def __array__(self, dtype=None, copy=None):
        self._device.wait(self._done_at)
        return np.asarray(self._value, dtype)


class Pausing(Action):
    """Uses the device for 100 seconds, when it is done with the steps that it was sent."""

    def __init__(self, device, *, before, counts_as=Category.EVALUATION):
        self.is_before_step, self.counts_as = before, counts_as
        self._device = device

    def due(self, step):
        return step % 3 != 1  # two steps of three

    def run(self, now):
        self._device.wait()
        self._device.now += 100


def logged_rates(config, make_actions):
    device, writer = SlowDevice(), ScalarWriter()
    times = TimeLedger(clock=lambda: device.now)
    built, start = build_anew(config)
    built = device.slowed(built)
    actions = [LogMetrics(built, start, writer, times), *make_actions(device)]
    with StopSignal() as stop:
        Loop(built, start, built.fresh_state(), actions, times).run(feed(built, start), stop)
    assert writer.steps_of("train/loss") == list(range(1, 9))
    return [scalars["train/tokens_per_sec"] for _, scalars in writer.written if "train/tokens_per_sec" in scalars]


@pytest.mark.parametrize("before", [None, False, True])
def test_the_clock_stands_still_for_actions_that_say_so_and_every_step_is_timed(tiny_dataset, before):
    """A step that was not read before the clock stopped would count as one that took no time."""
    config = run_config(tiny_dataset, num_steps=8)
    make_actions = (lambda device: []) if before is None else (lambda device: [Pausing(device, before=before)])
    rates = logged_rates(config, make_actions)
    assert len(rates) >= 7 and rates == pytest.approx([64.0] * len(rates))


def test_an_action_that_is_part_of_the_step_costs_training_time(tiny_dataset):
    config = run_config(tiny_dataset, num_steps=8)
    rates = logged_rates(config, lambda device: [Pausing(device, before=False, counts_as=Category.STEP)])
    assert min(rates) < 1


def test_each_action_says_what_its_time_is_spent_on_and_none_that_reads_the_whole_state_is_part_of_the_step():
    assert WriteStatistics.counts_as is Category.STATISTICS and WriteStatistics.is_before_step
    assert SaveCheckpoints.counts_as is Category.CHECKPOINT
    assert Evaluate.counts_as is WriteSamples.counts_as is Category.EVALUATION
    assert Profile.counts_as is Category.STEP


class NoCheckpoints:
    """In place of Checkpoints: saves nothing."""

    latest_step = None
    is_saving = False

    def save(self, state, metadata):
        del state, metadata

    def wait(self):
        pass


def test_a_schedule_is_an_interval_and_single_steps():
    every_third = Schedule(3, also=(7,))
    assert [step for step in range(1, 11) if every_third(step)] == [3, 6, 7, 9]
    never = Schedule(0, also=(4,))
    assert [step for step in range(1, 11) if never(step)] == [4]


def test_evaluation_bounds_what_is_in_flight_and_finishes_on_four_devices(tiny_dataset):
    config = run_config(tiny_dataset, mesh=(2, 2), per_device_batch_size=1, eval_tokens=8 * 4 * 50)
    built, _ = build_anew(config)
    state, most = built.fresh_state(), [0]
    waiting = set()

    class Waiting:
        """A result that nobody has asked for yet."""

        def __init__(self, values):
            self.values = values
            waiting.add(id(self))
            most[0] = max(most[0], len(waiting))

        def __array__(self, dtype=None, copy=None):
            waiting.discard(id(self))
            return np.asarray(jax.device_get(self.values), dtype)

    eval_step = built.eval_step
    num_batches = []

    def counted(*args):
        num_batches.append(int(args[3]))
        return Waiting(eval_step(*args))

    counting = dataclasses.replace(built, eval_step=counted)
    with StopSignal() as stop:
        sources = built.data.sources("val")
        plain = Evaluate(built, sources, ScalarWriter(), stop).means(state.params)
        found = Evaluate(counting, sources, ScalarWriter(), stop).means(state.params)
    assert len(num_batches) == 50 > 40 and num_batches == list(range(50))
    assert most[0] <= 32 and not waiting  # more can deadlock
    assert found == plain and 5 < found["loss"] < 6


def test_evaluation_is_left_half_way_by_a_signal_and_writes_nothing_then(tiny_dataset):
    built, _ = build_anew(run_config(tiny_dataset))
    stop, writer = StopSignal(), ScalarWriter()
    stop.received = 15
    evaluate = Evaluate(built, built.data.sources("val"), writer, stop)
    assert evaluate.means(built.fresh_state().params) is None


def test_the_checkpoint_is_saved_before_the_evaluation_at_the_same_step(tiny_dataset, tmp_path, monkeypatch):
    order = []
    save, means = Checkpoints.save, Evaluate.means
    monkeypatch.setattr(Checkpoints, "save", lambda self, s, m: (order.append(("save", m.step)), save(self, s, m))[1])
    monkeypatch.setattr(Evaluate, "means", lambda self, params: (order.append("evaluate"), means(self, params))[1])
    config = run_config(tiny_dataset, tmp_path / "run", num_steps=4, save_interval=2, eval_interval=2)
    assert train_lib.train(config) == 0
    assert order == [("save", 2), "evaluate", ("save", 4), "evaluate"]


def test_an_evaluation_that_fails_costs_no_checkpoint(tiny_dataset, tmp_path, monkeypatch):
    def failing(self, params):
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(Evaluate, "means", failing)
    config = run_config(tiny_dataset, tmp_path / "run", num_steps=4, save_interval=2, eval_interval=2)
    with pytest.raises(RuntimeError, match="no memory"):
        train_lib.train(config)
    assert (tmp_path / "run" / "checkpoints" / "2" / "digests.json").exists()


def test_what_is_off_is_not_among_the_actions(tiny_dataset):
    def names(**changes):
        built, start = build_anew(run_config(tiny_dataset, **changes))
        made = actions_lib.actions_of(
            built,
            start,
            writer=ScalarWriter(),
            checkpoints=NoCheckpoints(),
            held=HeldDirectory(tiny_dataset, None),
            times=TimeLedger(),
            stop=StopSignal(),
        )
        return [type(each).__name__ for each in made]

    assert names(statistics_interval=0) == ["LogMetrics", "SaveCheckpoints", "Evaluate"]
    assert names() == ["LogMetrics", "WriteStatistics", "SaveCheckpoints", "Evaluate"]
    everything = names(statistics_interval=1, profile_step=2, sample_prompt="a")
    assert everything == ["LogMetrics", "WriteStatistics", "Profile", "WriteSamples", "SaveCheckpoints", "Evaluate"]
