"""Edits of a plan in place: all other rows stay as they are, byte for byte."""

import dataclasses
import json

import numpy as np
import pytest
from support.streams import ArraySource

from gpt_pretrain.data.asked_edits import Edits, InsertedDocument, StepRange, TokenSpan, WindowList
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.edits import check_edits, edited
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream

SEQ_LEN = 4
TOKENS = {"": 2001, "web": 2001, "code": 801, "inserted/canaries": 57}
SOURCES = {name: ArraySource(np.random.default_rng(TOKENS[name]).integers(0, 5000, TOKENS[name])) for name in TOKENS}
END_OF_TEXT = 7


def fingerprint(name: str) -> str:
    return f"print of {TOKENS[name]}"


def plan_of(names=("web", "code"), *, batch_sizes=((0, 4), (6, 8), (15, 6)), shuffle="global") -> Plan:
    counts = (7, 3) if len(names) > 1 else (1,)
    streams = tuple(Stream(n, fingerprint(n), TOKENS[n], c) for n, c in zip(names, counts, strict=True))
    settings = {"seed": 5, "seq_len": SEQ_LEN, "batch_sizes": batch_sizes, "streams": streams}
    return Plan((Stage(**settings, shuffle=shuffle, block_windows=8, group_blocks=3),))


NUM_STEPS = 55
PLANS = {
    "mixture, a ramp": {},
    "one alone": {"names": ("web",), "batch_sizes": ((0, 8),)},
    "mixture, block": {"shuffle": "block"},
    "block": {"names": ("web",), "shuffle": "block"},
}
DOCUMENTS = {"web": (300, 360), "code": (100, 121)}  # tokens [a, b)


def span(name="web", tokens=None) -> TokenSpan:
    return TokenSpan(fingerprint(name), *(tokens or DOCUMENTS[name]))


def canary(places, *, start=20, length=3) -> InsertedDocument:
    name = "inserted/canaries"
    return InsertedDocument(name, fingerprint(name), TOKENS[name], start, length, END_OF_TEXT, tuple(places))


def batches_of(plan: Plan, num_steps=NUM_STEPS, **changes) -> list:
    batches = Batches(SOURCES, plan, vocab_size=5000, num_steps=num_steps, **changes)
    return [batches[i] for i in range(len(batches))]


def rows_of(plan: Plan, num_steps=NUM_STEPS) -> list[tuple[int, int, str, int, tuple, tuple]]:
    """(step, row, stream, window, tokens, which targets count) of every row, step by step."""
    found = []
    for each in batches_of(plan, num_steps):
        names = [stream.name for stream in plan.stage_at(each.step_index).streams]
        keep = np.ones((*each.windows.shape, each.tokens.shape[-1] - 1), bool) if each.keep is None else each.keep
        for row, window in enumerate(each.windows[0].tolist()):
            stream = names[each.streams[0, row]]
            found.append((each.step_index, row, stream, window, (*each.tokens[0, row].tolist(),), (*keep[0, row],)))
    return found


def holds(row, spans: dict[str, tuple[int, int]]) -> bool:
    a, b = spans.get(row[2], (0, 0))
    first = row[3] * SEQ_LEN
    return a < first + SEQ_LEN + 1 and first < b


def assert_differ_at(plan: Plan, other: Plan, places: set[tuple[int, int]]) -> None:
    """Rows, and digests of steps, are others just there."""
    pairs = [*zip(rows_of(plan), rows_of(other), strict=True)]
    assert {a[:2] for a, b in pairs if a != b} == places
    digests = [*zip(batches_of(plan), batches_of(other), strict=True)]
    assert {a.step_index for a, b in digests if a.digest != b.digest} == {step for step, _ in places}


def reread(plan: Plan) -> Plan:
    return Plan.from_json(json.loads(json.dumps(plan.to_json())))


@pytest.mark.parametrize("step", [0, 3, 9, 20])
@pytest.mark.parametrize("name", PLANS)
def test_substituted_documents_are_replaced_in_place_by_windows_that_the_run_does_not_reach(name, step):
    plan = plan_of(**PLANS[name])
    names = [stream.name for stream in plan.stages[0].streams]
    spans = {each: DOCUMENTS[each] for each in names}
    other = edited(plan, step, Edits(substitute=tuple(map(span, spans))), num_steps=NUM_STEPS)
    assert reread(other) == other
    before, after = rows_of(plan), rows_of(other)
    concerned = {row[:2] for row in before if holds(row, spans) and row[0] >= step}
    assert len(concerned) > 3
    assert_differ_at(plan, other, concerned)
    assert not any(holds(row, spans) for row in after if row[0] >= step)
    # Nothing is seen twice, and what takes their place is what would come after the run.
    for each in names:
        windows = [row[3] for row in after if row[2] == each]
        assert len(set(windows)) == len(windows)
        endless = [row[3] for row in rows_of(plan, 4 * NUM_STEPS) if row[2] == each]
        later = endless[len(windows) : (TOKENS[each] - 1) // SEQ_LEN]
        new = [b[3] for a, b in zip(before, after, strict=True) if a != b and a[2] == each]
        assert new == [window for window in later if not holds((0, 0, each, window), spans)][: len(new)]


def assert_occurrences_are_the_inverse(plan: Plan) -> None:
    for name in ("web", "code"):
        found = {
            (place.step_index, place.row, place.window)
            for _, place in plan.occurrences(
                fingerprint(name),
                lambda stage, n=name: range(stage.num_windows([s.name for s in stage.streams].index(n))),
                NUM_STEPS,
            )
        }
        assert found == {(step, row, window) for step, row, stream, window, *_ in rows_of(plan) if stream == name}


@pytest.mark.parametrize("name", ["mixture, a ramp", "mixture, block"])
def test_occurrences_are_the_inverse_of_edited_batches_and_say_what_was_replaced(name):
    plan = plan_of(**PLANS[name])
    once = edited(plan, 5, Edits(substitute=(span("web"),)), num_steps=NUM_STEPS)
    twice = edited(once, 21, Edits(substitute=(span("code"), span("web", (0, 90)))), num_steps=NUM_STEPS)
    assert len(twice.stages) == 3
    planned = rows_of(plan)
    for other in (once, twice):
        assert_occurrences_are_the_inverse(other)
        after = rows_of(other)
        expected = {(a[:4], b[3]) for a, b in zip(planned, after, strict=True) if a != b}
        found = {
            ((place.step_index, place.row, each, place.window), spare)
            for each in ("web", "code")
            for _, place, spare in other.replaced(
                fingerprint(each),
                lambda stage, n=each: range(stage.num_windows([s.name for s in stage.streams].index(n))),
                NUM_STEPS,
            )
        }
        assert found == expected and found
        for each in ("web", "code"):
            windows = [row[3] for row in after if row[2] == each]
            assert len(set(windows)) == len(windows)


def test_masked_targets_are_those_of_the_document_and_nothing_else_changes():
    plan = plan_of()
    for step in (0, 7, 20):
        other = edited(
            plan, step, Edits(mask=(span("web"), span("code"), span("web", (355, 370)))), num_steps=NUM_STEPS
        )
        masked = {"web": range(300, 370), "code": range(*DOCUMENTS["code"])}
        before, after = rows_of(plan), rows_of(other)
        for a, b in zip(before, after, strict=True):
            assert a[:5] == b[:5] and all(a[5])
            tokens = [a[3] * SEQ_LEN + 1 + t for t in range(SEQ_LEN)]
            assert b[5] == tuple(a[0] < step or token not in masked[a[2]] for token in tokens)
        assert_differ_at(plan, other, {b[:2] for b in after if not all(b[5])})
        for each in batches_of(other):
            assert (each.keep is None) == all(all(row[5]) for row in after if row[0] == each.step_index)


@pytest.mark.parametrize(
    ("length", "places"),
    [
        (3, [(9, 2), (9, 0), (30, 5)]),
        (4, [(9, 1)]),
        (5, [(8, 1), (8, 3)]),
        (10, [(3, 1), (4, 0), (5, 3), (50, 0), (50, 5), (51, 2)]),
    ],
)
def test_an_inserted_document_overwrites_the_front_of_its_rows(length, places):
    plan = plan_of()
    other = edited(plan, 3, Edits(insert=(canary(places, length=length),)), num_steps=NUM_STEPS)
    document = [*SOURCES["inserted/canaries"].tokens[20 : 20 + length].tolist(), END_OF_TEXT]
    num_parts = -(-length // SEQ_LEN)
    targets: list = []
    after = {row[:2]: row for row in rows_of(other)}
    for number, place in enumerate(places):
        part = document[number % num_parts * SEQ_LEN :][: SEQ_LEN + 1]
        planned = next(row for row in rows_of(plan) if row[:2] == place)
        assert after[place][4] == (*part, *planned[4][len(part) :]) and all(after[place][5])
        targets += part[1:]
    assert targets == document[1:] * (len(places) // num_parts)  # each token once, as a target
    assert_differ_at(plan, other, {*places})


def test_processes_agree_on_the_digest_and_on_which_step_is_masked():
    edits = Edits((span("web", (0, 90)),), (span("web"), span("code")), (canary([(9, 2), (30, 5)]),))
    plan = edited(plan_of(), 4, edits, num_steps=NUM_STEPS)
    whole, num_alone = batches_of(plan), 0
    parts = [
        batches_of(plan, rows_of=lambda size, p=process: np.split(np.arange(size)[None], 2, axis=1)[p])
        for process in (0, 1)
    ]
    for each, *halves in zip(whole, *parts, strict=True):
        assert sum(half.digest for half in halves) % 2**64 == each.digest
        assert {half.keep is None for half in halves} == {each.keep is None}
        if each.keep is not None:
            joined = np.concatenate([half.keep for half in halves], axis=1).reshape(each.keep.shape)
            assert np.array_equal(joined, each.keep)
            num_alone += any(half.keep.all() for half in halves)
        assert np.array_equal(
            np.concatenate([half.tokens for half in halves], 1).reshape(each.tokens.shape), each.tokens
        )
    assert num_alone


def test_a_plan_that_has_the_edits_stays_as_it_is_and_other_edits_begin_a_stage():
    plan = plan_of()
    edits = Edits((span(),), (span("code"),), (canary([(20, 1), (30, 1)]),))
    first = edited(plan, 5, edits, num_steps=NUM_STEPS)
    assert len(first.stages) == 2 and first.stages[-1].change
    for step in (6, 20, 25, NUM_STEPS):
        assert edited(first, step, edits, num_steps=NUM_STEPS) is not None
        assert edited(first, step, edits, num_steps=NUM_STEPS) == first
        assert edited(first, step, Edits(), num_steps=NUM_STEPS, on_top=True) == first
    # What did not begin yet leaves no trace.
    assert edited(first, 5, Edits(), num_steps=NUM_STEPS) == plan
    assert edited(first, 5, edits, num_steps=NUM_STEPS) == first
    # Taken back on the way: what is past stays.
    back = edited(first, 22, Edits(), num_steps=NUM_STEPS)
    assert rows_of(back)[:138] == rows_of(first)[:138]
    late = [(a, b) for a, b in zip(rows_of(back), rows_of(plan), strict=True) if a[0] >= 22]
    assert all(a == b for a, b in late)
    more = edited(first, 22, Edits(mask=(span("web", (100, 130)),)), num_steps=NUM_STEPS, on_top=True)
    alone = edited(plan, 22, Edits(mask=(span("web", (100, 130)),)), num_steps=NUM_STEPS)
    for a, b, c in zip(rows_of(first), rows_of(more), rows_of(alone), strict=True):
        assert a[:5] == b[:5] and tuple(np.logical_and(a[5], c[5])) == b[5]


def test_a_run_that_is_prolonged_sees_no_substitute_twice():
    plan = plan_of()
    edits = Edits(substitute=(span(), span("code")))
    short = edited(plan, 5, edits, num_steps=20)
    check_edits(short, 20)
    with pytest.raises(ValueError, match=r"would be seen again .* Resume the run with more"):
        check_edits(short, NUM_STEPS)
    long = edited(short, 20, edits, num_steps=NUM_STEPS)
    assert len(long.stages) == 3
    check_edits(long, NUM_STEPS)
    for each in ("web", "code"):
        windows = [row[3] for row in rows_of(long) if row[2] == each]
        assert len(set(windows)) == len(windows)
    assert not any(holds(row, DOCUMENTS) for row in rows_of(long) if row[0] >= 5)
    check_edits(plan, 10**6)
    assert edited(long, 40, edits, num_steps=NUM_STEPS) == long == edited(long, 40, edits, num_steps=45)


def test_edits_of_a_step_before_later_changes_hold_in_these_too():
    plan = plan_of()
    wanted = dataclasses.replace(plan_of(("web",)).stages[0], batch_sizes=((0, 8),))
    plan = plan.continued(wanted, 20)
    edits = Edits((span(),), (span("code"), span("web", (0, 90))), (canary([(30, 5)]),))
    other = edited(plan, 6, edits, num_steps=NUM_STEPS)
    assert [stage.from_step for stage in other.stages] == [0, 6, 20]
    before, after = rows_of(plan), rows_of(other)
    assert {a[:2] for a, b in zip(before, after, strict=True) if a[4] != b[4]} == {
        a[:2] for a in before if a[0] >= 6 and holds(a, {"web": DOCUMENTS["web"]})
    } | {(30, 5)}
    assert min(row[0] for row in before if holds(row, {"web": DOCUMENTS["web"]}) and row[0] > 20) > 20
    assert len({row[3] for row in after if row[2] == "web"}) == len([1 for row in after if row[2] == "web"])
    assert other.stages[-1].change.startswith(plan.stages[-1].change)


def test_windows_and_steps_can_be_substituted():
    plan = plan_of()
    planned = rows_of(plan)
    windows = tuple(sorted(row[3] for row in planned[50:60] if row[2] == "web"))
    other = edited(plan, 0, Edits(substitute=(WindowList(fingerprint("web"), windows),)), num_steps=NUM_STEPS)
    assert_differ_at(plan, other, {row[:2] for row in planned if row[2] == "web" and row[3] in windows})
    other = edited(plan, 4, Edits(substitute=(StepRange(10, 12),)), num_steps=NUM_STEPS)
    assert_differ_at(plan, other, {row[:2] for row in planned if row[0] in (10, 11)})
    assert edited(other, 6, Edits(substitute=(StepRange(10, 12),)), num_steps=NUM_STEPS) == other


def test_what_cannot_be_edited_is_refused_with_the_arithmetic():
    plan = plan_of(("code",), batch_sizes=((0, 8),))
    with pytest.raises(ValueError, match=r"no window of it is left .* sees its 200 windows 2.00 times .*data\.mask"):
        edited(plan, 3, Edits(substitute=(span("code"),)), num_steps=50)
    with pytest.raises(
        ValueError,
        match=r"6 rows from step 4 on .* of its 200, the run sees 192 in 24 steps, \d more .* 5 are left|too few",
    ):
        edited(plan, 3, Edits(substitute=(span("code", (0, 700)),)), num_steps=24)
    with pytest.raises(ValueError, match="takes 3 rows of 4; 2 places are given, expected a multiple of 3"):
        edited(plan, 3, Edits(insert=(canary([(5, 1), (6, 1)], length=10),)), num_steps=24)
    with pytest.raises(ValueError, match="is inserted at step 3, which is past: 3 steps were made without it"):
        edited(plan, 3, Edits(insert=(canary([(2, 1)]),)), num_steps=24)
    with pytest.raises(ValueError, match="is inserted at step 101, the run has 24"):
        edited(plan, 3, Edits(insert=(canary([(100, 1)]),)), num_steps=24)
    with pytest.raises(ValueError, match="is inserted at step 6, row 8; the batch has the rows 0 to 7"):
        edited(plan, 3, Edits(insert=(canary([(5, 8)]),)), num_steps=24)
    with pytest.raises(ValueError, match="step 6, row 1: two documents are inserted there"):
        edited(plan, 3, Edits(insert=(canary([(5, 1)]), canary([(5, 1)], start=30))), num_steps=24)


def test_many_targets_cost_no_more_a_batch():
    import time

    stream = Stream("", "f", 10**10)
    plan = Plan((Stage(seed=0, seq_len=1024, batch_sizes=((0, 512),), streams=(stream,)),))
    spans = tuple(TokenSpan("f", 10**5 * i, 10**5 * i + 700) for i in range(50_000))
    other = edited(
        plan, 10, Edits(spans, tuple(TokenSpan("f", s.start + 5000, s.stop + 5000) for s in spans)), num_steps=10_000
    )
    assert len(other.stages[-1].streams[0].substitution.windows) > 80_000
    other.batch(50)
    start = time.process_time()
    for step in range(100, 200):
        other.batch(step)
    edited_secs = time.process_time() - start
    start = time.process_time()
    for step in range(100, 200):
        plan.batch(step)
    assert edited_secs < 3 * (time.process_time() - start) + 0.05
