import dataclasses
import json

import numpy as np
import pytest

from gpt_pretrain.data.mixture import counts_of
from gpt_pretrain.data.plan import Plan, PlanError
from gpt_pretrain.data.stages import Stage, Stream

# Streams by name: (fingerprint, tokens); with seq_len 4 they hold 60, 37 and 23 windows.
DATA = {"": ("fff", 241), "web": ("fff", 241), "code": ("ccc", 150), "books": ("bbb", 95)}


def stage(streams=("",), *, weights=None, batch_size=((0, 8),), excluded=None, **fields) -> Stage:
    """What a configuration asks for."""
    counts = counts_of(weights or [1] * len(streams), 10) if len(streams) > 1 else (1,)
    made = tuple(
        Stream(name, *DATA[name], count, excluded=tuple((excluded or {}).get(name, ())))
        for name, count in zip(streams, counts, strict=True)
    )
    return Stage(**{"seed": 0, "seq_len": 4, "batch_sizes": batch_size, "streams": made} | fields)


def examples(plan: Plan, num_steps: int) -> list[tuple[int, int, int, str, int]]:
    """(step, row, position, fingerprint, window) of every example, step by step."""
    met, position = [], 0
    for step in range(num_steps):
        batch = plan.batch(step)
        assert (batch.step_index, batch.position) == (step, position)
        assert len(batch.windows) == len(batch.streams) == plan.batch_size(step)
        streams = plan.stage_at(step).streams
        for row, (stream, window) in enumerate(zip(batch.streams, batch.windows, strict=True)):
            met.append((step, row, position, streams[stream].fingerprint, int(window)))
            position += 1
    return met


def windows_of(plan: Plan, num_steps: int, fingerprint: str = "fff", first_index: int = 0) -> list[int]:
    return [each[4] for each in examples(plan, num_steps) if each[3] == fingerprint and each[0] >= first_index]


def occurrences_of(plan: Plan, fingerprint: str, windows_of, num_steps: int):
    """(stage, occurrence) of each time that some windows of a stream are seen."""
    return plan.occurrences(fingerprint, windows_of, num_steps)


def assert_once_an_epoch(windows: list[int], num_windows: int, num_epochs: int = 1):
    """Each run of `num_windows` windows has every window."""
    assert len(windows) >= num_epochs * num_windows
    for epoch in range(num_epochs):
        part = windows[epoch * num_windows : (epoch + 1) * num_windows]
        assert sorted(part) == list(range(num_windows))


THREE = ("web", "code", "books")
LONG_RUN = 40  # steps; every change below happens before
CHANGES = {
    "batch size": [(3, {"batch_size": ((0, 3),)}), (9, {"batch_size": ((0, 5), (12, 7))})],
    "weights": [(2, {"streams": THREE, "weights": [2, 1, 1]}), (7, {"streams": THREE, "weights": [1, 1, 5]})],
    "one alone becomes one of two": [(3, {"streams": ("web", "code")})],
    "and is alone again": [(3, {"streams": ("code", "web")}), (5, {"streams": ("web",)}), (7, {"streams": ("",)})],
    "order of streams": [(2, {"streams": ("books", "web")}), (4, {"streams": ("web", "books"), "weights": [7, 3]})],
    "out for a while": [(2, {"streams": ("web", "code")}), (4, {"streams": ("code",)}), (6, {"streams": THREE})],
    "settings of a shuffle that is not used": [(3, {"block_windows": 3, "group_blocks": 2, "batch_size": ((0, 4),)})],
}


def changed(changes, start=None) -> Plan:
    plan = Plan((stage(**(start or {})),))
    for step, wanted in changes:
        plan = plan.continued(stage(**wanted), step)
    assert [each.from_step for each in plan.stages] == [0, *(step for step, _ in changes)]
    return plan


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
@pytest.mark.parametrize("name", CHANGES)
def test_no_window_comes_again_before_its_stream_is_exhausted_whatever_changes(name, shuffle):
    fixed = {"shuffle": shuffle} | ({"block_windows": 5, "group_blocks": 3} if shuffle == "block" else {})
    changes = [(step, wanted | fixed) for step, wanted in CHANGES[name]]
    plan = changed(changes, fixed)
    for fingerprint, num_windows in (("fff", 60), ("ccc", 37), ("bbb", 23)):
        windows = windows_of(plan, LONG_RUN, fingerprint)
        if windows:
            assert_once_an_epoch(windows, num_windows, num_epochs=len(windows) // num_windows)
            rest = windows[len(windows) // num_windows * num_windows :]
            assert len(set(rest)) == len(rest)
    assert len(windows_of(plan, LONG_RUN)) > 60


def test_a_change_of_batch_size_cuts_the_same_sequence_otherwise():
    plain = windows_of(Plan((stage(),)), LONG_RUN)
    other = windows_of(changed(CHANGES["batch size"]), LONG_RUN)
    assert other == plain[: len(other)]


def test_another_name_or_companion_does_not_change_the_order_of_a_stream():
    plain = windows_of(Plan((stage(),)), 2 * LONG_RUN)
    for name in ("one alone becomes one of two", "and is alone again", "order of streams", "out for a while"):
        other = windows_of(changed(CHANGES[name]), LONG_RUN)
        assert other == plain[: len(other)]


def test_windows_excluded_in_the_middle_of_an_epoch_are_never_met_again_and_the_rest_keeps_its_order():
    plain = Plan((stage(),))
    sequence = windows_of(plain, 50)
    excluded = sorted({*sequence[:3], *sequence[24:27], sequence[40], sequence[59]})  # met already, next, later, last
    plan = plain.continued(stage(excluded={"": excluded}), 3)
    found = windows_of(plan, 40)
    assert found[:24] == sequence[:24]
    left = [window for window in sequence[24:] if window not in excluded]
    assert found[24:] == left[: len(found) - 24] and len(found) > 180
    # Later epochs have each of the others once.
    num_first = len([window for window in sequence[:60] if window not in excluded]) + 3
    others = sorted(set(range(60)) - set(excluded))
    for epoch in range(2):
        assert sorted(found[num_first + epoch * 52 :][:52]) == others


def test_exclusions_are_added_to_and_taken_back():
    first, second = [5, 6, 30], [5, 7, 8, 9, 31, 59]
    plan = Plan((stage(excluded={"": first}),))
    plan = plan.continued(stage(excluded={"": second}), 5).continued(stage(), 9)
    assert not {*first} & {*windows_of(plan, 5)}
    assert not {*second} & {*windows_of(plan, 9, first_index=5)}
    sequence = windows_of(Plan((stage(),)), 60)
    kept = [w for w in windows_of(plan, 40)]
    places = iter(sequence)
    assert all(window in places for window in kept)  # a subsequence: nothing changes its place
    assert plan.epochs(40)[""] == pytest.approx((sequence.index(kept[-1], len(kept) - 1) + 1) / 60)


def test_excluding_everything_but_one_window_leaves_that_one():
    plan = Plan((stage(excluded={"": [*range(17), *range(18, 60)]}),))
    assert set(windows_of(plan, 3)) == {17}


def test_what_leaves_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="code: all of its 37 windows are excluded"):
        stage(("web", "code"), excluded={"code": range(37)})
    with pytest.raises(ValueError, match=r"the dataset: found excluded windows from 3 to 60, expected \[0, 60\)"):
        stage(excluded={"": [3, 60]})
    with pytest.raises(ValueError, match=r"data\.seq_len=300 needs 301 tokens for one window; the stream holds 241"):
        stage(seq_len=300)
    with pytest.raises(ValueError, match="web and the dataset are one dataset"):
        stage(("", "web"))
    (stream,) = stage().streams
    with pytest.raises(ValueError, match="streams: expected at least one, with counts of at least 1"):
        dataclasses.replace(stage(), streams=(dataclasses.replace(stream, count=0),))


@pytest.mark.parametrize("batch_size", [((1, 8),), ((0, 8), (0, 4)), ((0, 8), (5, 2), (4, 2)), ((0, 0),)])
def test_batch_sizes_that_are_no_schedule_are_an_error(batch_size):
    with pytest.raises(ValueError, match=r"train\.batch_size: found"):
        stage(batch_size=batch_size)


MANY_CHANGES = [
    (3, {"batch_size": ((0, 2), (5, 9), (6, 4))}),
    (8, {"streams": THREE, "weights": [5, 3, 2]}),
    (12, {"streams": THREE, "weights": [5, 3, 2], "excluded": {"web": range(10, 20), "books": [0, 22]}}),
    (15, {"streams": ("web", "books"), "seq_len": 3}),
    (20, {"streams": ("books", "web"), "seq_len": 3, "shuffle": "block", "block_windows": 4, "group_blocks": 3}),
    (26, {"excluded": {"": [1, 2]}}),
    (30, {"shuffle": "none", "batch_size": ((0, 70),)}),
]


@pytest.mark.parametrize("name", ["", "web", "code", "books"])
def test_occurrences_are_the_exact_inverse_of_batches_over_all_stages(name):
    plan = changed(MANY_CHANGES)
    for num_steps in (0, 2, 10, 26, 33):
        expected = [
            (step, row, position, window)
            for step, row, position, fingerprint, window in examples(plan, num_steps)
            if fingerprint == DATA[name][0]
        ]

        def all_windows(stage):
            index = [stream.fingerprint for stream in stage.streams].index(DATA[name][0])
            return np.arange(stage.num_windows(index))

        found = occurrences_of(plan, DATA[name][0], all_windows, num_steps)
        assert [(s.step_index, s.row, s.position, s.window) for _, s in found] == expected
        assert all(stage is plan.stage_at(each.step_index) for stage, each in found)


def test_occurrences_of_some_windows_say_which_epoch():
    plan = changed(MANY_CHANGES[:3])
    whole = [s for _, s in occurrences_of(plan, DATA["web"][0], lambda _: np.arange(60), 60)]
    some = [s for _, s in occurrences_of(plan, DATA["web"][0], lambda _: [44, 7, 44, 15], 60)]
    assert some == [s for s in whole if s.window in (7, 15, 44)]
    for window in (7, 44):
        assert [s.epoch for s in some if s.window == window] == list(
            range(len([s for s in some if s.window == window]))
        )
    assert occurrences_of(plan, DATA["web"][0], lambda _: [], 60) == []


def test_occurrences_leave_out_what_was_other_data_under_the_same_name():
    old = Plan((stage(),))
    other = dataclasses.replace(stage(), streams=(Stream("", "other data", 101),))
    plan = old.continued(other, 5, fork=True)
    assert {s.step_index for _, s in occurrences_of(plan, "other data", lambda _: np.arange(25), 12)} == set(
        range(5, 12)
    )
    assert {s.step_index for _, s in occurrences_of(plan, DATA[""][0], lambda _: np.arange(25), 12)} == set(range(5))


def test_positions_steps_and_tokens_of_a_ramp_follow_by_counting():
    plan = changed([(4, {"batch_size": ((0, 1), (2, 3), (6, 5), (7, 2))}), (9, {"seq_len": 7})])
    sizes = [8] * 4 + [3, 3, 5, 2, 2] + [8] * 11
    lengths = [4] * 9 + [7] * 11
    assert [plan.batch_size(step) for step in range(20)] == sizes
    for step in range(21):
        assert plan.position(step) == sum(sizes[:step])
        assert plan.tokens_before(step) == int(np.dot(sizes[:step], lengths[:step]))
    for each, (first, last) in zip(plan.stages, [(0, 4), (4, 9), (9, 20)], strict=True):
        positions = np.arange(each.position(first), each.position(last))
        assert each.steps_at(positions).tolist() == np.repeat(range(first, last), sizes[first:last]).tolist()
    # Without a later stretch of the schedule the last size goes on for ever.
    assert plan.batch_size(10**12) == 8


@pytest.mark.parametrize("batch_size", [((0, 8),), ((0, 1), (2, 3), (6, 5), (7, 2)), ((0, 5), (1, 1))])
def test_num_steps_is_the_most_whole_steps_within_the_tokens(batch_size):
    plan = Plan((stage(batch_size=batch_size),)).continued(stage(batch_size=batch_size, seq_len=5), 3)
    for num_tokens in range(plan.tokens_before(3), 400):
        num_steps = plan.num_steps(num_tokens)
        assert plan.tokens_before(num_steps) <= num_tokens < plan.tokens_before(num_steps + 1)
    assert plan.num_steps(1) == 3  # made already


def test_another_seq_len_seed_or_shuffle_begins_an_epoch_that_nobody_has_seen_anything_of():
    plan = Plan((stage(("web", "code")),))
    for fields in ({"seq_len": 5}, {"shuffle": "block"}, {"seed": 1}):
        wanted = stage(("web", "code"), **fields)
        new = plan.continued(wanted, 10, fork=True).stages[-1]
        starts = [divmod(stream.start, new.num_windows(i)) for i, stream in enumerate(new.streams)]
        assert starts == [(1, 0), (2, 0)]  # 40 of 60 were met of one, 40 of 37 of the other
        back = plan.continued(wanted, 10, fork=True).continued(stage(("web", "code")), 12, fork=True).stages[-1]
        assert [stream.start for stream in back.streams] == [2 * 60, 3 * 37]
    # At the end of an epoch the next one is the next one.
    whole = Plan((stage(batch_size=((0, 60),)),)).continued(stage(seq_len=2), 1)
    assert whole.stages[-1].streams[0].start == 1 * whole.stages[-1].num_windows(0)


def test_a_plan_survives_json():
    plan = changed(MANY_CHANGES)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert examples(again, 33) == examples(plan, 33)
    with pytest.raises(ValueError, match="data plan of version 2, expected 1"):
        Plan.from_json(plan.to_json() | {"version": 2})


def test_continuing_leaves_the_past_as_it_was():
    plan, past = Plan((stage(),)), []
    for step, wanted in MANY_CHANGES:
        past = examples(plan, step)
        longer = plan.continued(stage(**wanted), step)
        assert longer.stages[:-1] == plan.stages
        assert examples(longer, step) == past
        plan = longer


@pytest.mark.parametrize("step", [0, 3, 30])
def test_the_same_configuration_appends_nothing(step):
    plan = changed(MANY_CHANGES)
    assert plan.continued(stage(**MANY_CHANGES[-1][1]), 30) is plan
    assert plan.continued(stage(**MANY_CHANGES[-1][1]), 1000) is plan
    alone = Plan((stage(),))
    assert alone.continued(stage(), step) is alone
    # Nor does one that differs only in what has no effect: streams listed otherwise, the share of one alone.
    mixed = Plan((stage(THREE, weights=[5, 3, 2]),))
    assert mixed.continued(stage(THREE[::-1], weights=[2, 3, 5]), step) is mixed
    assert alone.continued(stage(block_windows=7), step) is alone
    alone_of_ten = dataclasses.replace(stage(), streams=(Stream("", *DATA[""], count=10),))
    assert alone.continued(alone_of_ten, step) is alone


def test_editing_only_the_past_of_a_ramp_appends_nothing_and_its_future_does():
    plan = Plan((stage(batch_size=((0, 2), (4, 6), (10, 8))),))
    assert plan.continued(stage(batch_size=((0, 3), (2, 6), (10, 8))), 5) is plan
    assert plan.continued(stage(batch_size=((0, 6), (10, 8))), 4) is plan
    assert plan.continued(stage(batch_size=((0, 8),)), 12) is plan
    assert plan.continued(stage(batch_size=((0, 6), (11, 8))), 5).stages[-1].change == (
        "train.batch_size: 6, 8 from step 11 until now, 6, 8 from step 12 from here on"
    )


def test_what_did_not_begin_yet_leaves_no_trace():
    plan = Plan((stage(),)).continued(stage(("web", "code")), 5)
    assert plan.continued(stage(), 5) == Plan((stage(),))  # taken back
    assert plan.continued(stage(("web", "books")), 5) == Plan((stage(),)).continued(stage(("web", "books")), 5)
    assert Plan((stage(),)).continued(stage(seq_len=5), 0) == Plan(
        (stage(seq_len=5, change="data.seq_len: 4 until now, 5 from here on"),)
    )
    forked = Plan((stage(),)).continued(stage(seed=1), 5, fork=True)
    assert forked.continued(stage(seed=1), 5) is forked
    with pytest.raises(PlanError, match="seed: 0 until now, 2 from here on"):
        forked.continued(stage(seed=2), 5)


OTHER_DATA = dataclasses.replace(stage(), streams=(Stream("", "0123456789abcdefXYZ", 300),))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (stage(seed=1), "data.seed: 0 until now, 1 from here on"),
        (OTHER_DATA, "the dataset: fingerprint fff until now, 0123456789abcdef now"),
    ],
)
def test_another_seed_or_other_data_is_refused_and_recorded_by_a_fork(wanted, message):
    plan = Plan((stage(),))
    with pytest.raises(PlanError, match=message):
        plan.continued(wanted, 5)
    forked = plan.continued(wanted, 5, fork=True)
    assert forked.stages[-1].change == f"fork: {message}"
    assert examples(forked, 5) == examples(plan, 5)
    assert forked.continued(wanted, 8) is forked


def test_only_what_needs_a_fork_is_named_when_it_is_refused():
    wanted = stage(seed=1, batch_size=((0, 5),))
    with pytest.raises(PlanError) as refused:
        Plan((stage(),)).continued(wanted, 5)
    assert "seed" in str(refused.value) and "batch_size" not in str(refused.value)
    assert "batch_size: 8 until now" in Plan((stage(),)).continued(wanted, 5, fork=True).stages[-1].change


def test_a_step_before_the_last_change_cannot_be_continued_from():
    plan = changed(CHANGES["batch size"])
    with pytest.raises(PlanError, match="step 9 lies before the plan's last change, at step 10"):
        plan.continued(stage(), 8)


def test_changes_are_told_in_words():
    plan = changed(MANY_CHANGES)
    assert [each.change for each in plan.stages] == [
        "start",
        "train.batch_size: 8 until now, 2, 9 from step 6, 4 from step 7 from here on",
        "train.batch_size: 4 until now, 8 from here on; web: was the dataset until now; "
        "web: 1 of 1 examples until now, 5 of 10 from here on; code: added to the mixture; books: added to the mixture",
        "web: 0 windows excluded until now, 10 from here on; books: 0 windows excluded until now, 2 from here on",
        "data.seq_len: 4 until now, 3 from here on; web: 10 windows excluded until now, 0 from here on; "
        "books: 2 windows excluded until now, 0 from here on; "
        "books: 2 of 10 examples until now, 5 of 10 from here on; code: taken out of the mixture",
        "data.shuffle: global until now, block from here on; data.block_windows: 1024 until now, 4 from here on; "
        "data.group_blocks: 32 until now, 3 from here on",
        "data.seq_len: 3 until now, 4 from here on; data.shuffle: block until now, global from here on; "
        "the dataset: was web until now; the dataset: 0 windows excluded until now, 2 from here on; "
        "the dataset: 5 of 10 examples until now, 1 of 1 from here on; books: taken out of the mixture",
        "data.shuffle: global until now, none from here on; train.batch_size: 8 until now, 70 from here on; "
        "the dataset: 2 windows excluded until now, 0 from here on",
    ]


def test_epochs_count_how_often_each_stream_was_met():
    plan = Plan((stage(),)).continued(stage(("web", "code"), weights=[3, 2], batch_size=((0, 10),)), 3)
    assert plan.epochs(0) == {"": 0}
    assert plan.epochs(3) == {"": 24 / 60}
    assert plan.epochs(5) == pytest.approx({"web": (24 + 12) / 60, "code": 8 / 37})
    assert plan.epochs(103) == pytest.approx({"web": (24 + 600) / 60, "code": 400 / 37})
    # An epoch without its excluded windows is one, too.
    few = Plan((stage(excluded={"": range(30)}, batch_size=((0, 30),)),))
    assert 3 <= few.epochs(3)[""] < 4 and few.epochs(2)[""] < 3


def test_far_out_in_a_run_costs_no_more():
    plan = changed(MANY_CHANGES)
    step = 10**9
    batch = plan.batch(step)
    assert batch.position == plan.position(30) + 70 * (step - 30)
    assert batch.windows.shape == (70,)


def test_an_epoch_with_windows_left_out_at_its_end_is_one_epoch():
    for seed in range(20):
        stream = Stream("", "f", 41, excluded=(1, 3))
        plan = Plan((Stage(seed=seed, seq_len=4, batch_sizes=((0, 1),), streams=(stream,)),))
        assert 0.8 <= plan.epochs(8)[""] <= 1 < plan.epochs(9)[""]
