"""Many arms at once: a table of what leaving documents out does to the losses of others.

All arms share one compiled step and one control run: that is trained from a checkpoint, and where an arm's first batch
differs, the arm is trained from a copy of its state to the end. So an arm costs the steps from its first difference on,
and nothing is trained twice.

    OUT/arms/<n>.json      an arm that is done: started again, it is not trained again
    OUT/effects.parquet    arm, document, is_without, loss, control_loss, effect
    OUT/members.parquet    arm, document: what each arm is without
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jax.experimental import multihost_utils

from data_prep.pages.numbers import duration, plural
from data_prep.store.files import read_json, whole_file, write_json
from data_prep.store.places import join, make_directory
from gpt_pretrain.counterfactual.probes import name_of
from gpt_pretrain.counterfactual.question import (
    Asked,
    claim,
    edited_plan,
    is_target,
    newest_before,
)
from gpt_pretrain.counterfactual.runner import Arm, Runner
from gpt_pretrain.data.asked_edits import Edits, TokenSpan
from gpt_pretrain.history.memorization import Choice, Passage, named_documents
from gpt_pretrain.history.occurrences import occurrences_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.spans import Span, find_spans
from gpt_pretrain.text_files import read_text
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.stopping import StopSignal

_DEFAULT_TARGETS = 50
EFFECTS = pa.schema(
    [
        ("arm", pa.int32()),
        ("document", pa.string()),
        ("is_without", pa.bool_()),  # the arm is without this document
        ("loss", pa.float32()),  # of its front, at the end of the arm, in nats
        ("control_loss", pa.float32()),  # at the same step of the run as it was
        ("effect", pa.float32()),  # the first less the second
    ]
)


def answer(
    run: OpenedRun, until: int, configure: Callable[..., TrainConfig], args: argparse.Namespace, command: str
) -> int:
    """Trains all arms and writes the tables; returns the exit status."""
    seq_len = run.plan.stage_at(until - 1).seq_len
    sets = _sets_of_file(run, args.each) if args.each is not None else _random_sets(run, until, args)
    arms = _arms(run, sets, until, is_masked=args.mask)
    targets = _targets(run, arms, args, seq_len)
    how = {"each": [[name_of(span) for span in spans] for spans in sets] if args.each is not None else None}
    how |= {name: getattr(args, name) for name in ("subsets", "fraction", "seed", "targets")}
    is_first = jax.process_index() == 0
    if is_first:
        claim(args.save_dir, run, Asked(is_masked=args.mask, until=until), how)
        make_directory(join(args.save_dir, "arms"))
    done = _done(args.save_dir, len(arms))
    todo = sorted((each for each in arms if not done[each.number]), key=lambda each: each.steps[0])
    begin = newest_before(run, min((each.steps[0] for each in arms), default=1))
    if is_first:
        start = f"the checkpoint of step {begin}" if begin else "the beginning"
        steps = sum(until - each.steps[0] + 1 for each in todo) + until - begin
        words = f"{plural(len(arms), 'arm')}, {len(arms) - len(todo)} of them done: {steps:,} steps from {start}"
        print(f"{words}, and {plural(len(targets), 'document')} whose losses are measured", flush=True)
    config = configure(
        join(args.save_dir, "none"), ["train.sample_prompt = None", "train.sample_interval = 0"], command
    )
    with StopSignal() as stop:
        runner = Runner(run, config, begin, until, targets, stop)
        for number, arm in enumerate(todo):
            began = time.monotonic()
            runner.advance(arm.steps[0] - 1)
            at_fork = time.monotonic()
            record = runner.train(arm)
            if record is None:
                return 128 + int(stop.received or 15)
            record["seconds"] |= {"control": at_fork - began, "all": time.monotonic() - began}
            if is_first:
                write_json(_path(args.save_dir, arm), record)
                left = (time.monotonic() - runner.began) / (number + 1) * (len(todo) - number - 1)
                print(
                    f"arm {arm.number}: without {plural(len(arm.spans), 'document')}, from step {arm.steps[0]} on, "
                    f"{len(arm.steps)} of its batches differ, as they should; {record['seconds']['all']:.1f} s; "
                    f"{len(todo) - number - 1} left, about {duration(left)}",
                    flush=True,
                )
        control = _control_losses(args.save_dir, runner, until)
    if control is None:
        return 128 + int(stop.received or 15)
    if is_first:
        _write_tables(args.save_dir, arms, targets, control)
    return 0


def _sets_of_file(run: OpenedRun, path: str) -> list[list[Span]]:
    """An arm for each line that is not empty: the documents that it names."""
    if not os.path.isfile(path):
        raise ValueError(f"--each {path}: no such file; expected a text file, the ids of an arm's documents on a line")
    sets = []
    for line in read_text(path).split("\n"):
        ids = line.split()
        if ids:
            spans = [span for each in ids for span in find_spans(run, document=each) if span.split == "train"]
            if not spans:
                raise ValueError(f"--each {path}: {ids[0]} is in the validation split: the run is not trained on it")
            sets.append(spans)
    if not sets:
        raise ValueError(f"--each {path}: is empty; expected the ids of an arm's documents on each line")
    return sets


def _random_sets(run: OpenedRun, until: int, args: argparse.Namespace) -> list[list[Span]]:
    """Sets of a fraction of the documents that the run has seen something of."""
    choice = Choice(run, seq_len=1, least_tokens=1, seed=args.seed, num_steps=until)
    documents = choice.any_seen()
    size = round(args.fraction * len(documents.starts))
    if not size:
        raise ValueError(f"--fraction {args.fraction}: of {len(documents.starts)} documents seen, that is none")
    random = np.random.default_rng(args.seed)
    chosen = [np.sort(random.choice(len(documents.starts), size, replace=False)) for _ in range(args.subsets)]
    return [[choice.span(documents, index) for index in each.tolist()] for each in chosen]


def _arms(run: OpenedRun, sets: Sequence[Sequence[Span]], until: int, *, is_masked: bool) -> list[Arm]:
    """ValueError for a set that is in no batch, or whose windows have no substitutes."""
    steps_of: dict[tuple[str, int], list[int]] = {}
    arms = []
    for number, spans in enumerate(sets):
        steps: set[int] = set()
        for span in spans:
            key = span.stream.fingerprint, span.start
            if key not in steps_of:
                places = [each for each in occurrences_of(run, span) if not is_masked or is_target(each)]
                steps_of[key] = [each.place.step_index + 1 for each in places]
            steps.update(step for step in steps_of[key] if step <= until)
        if not steps:
            raise ValueError(
                f"arm {number} ({name_of(spans[0])}): in none of the first {until} steps of {run.save_dir}"
            )
        places = tuple(TokenSpan(each.stream.fingerprint, each.start, each.stop) for each in spans)
        edits = Edits(mask=places) if is_masked else Edits(substitute=places)
        plan = edited_plan(run, edits, min(steps) - 1)
        arms.append(Arm(number, tuple(spans), tuple(sorted(steps)), plan))
    return arms


def _targets(run: OpenedRun, arms: Sequence[Arm], args: argparse.Namespace, seq_len: int) -> list[Passage]:
    """The documents whose losses are measured."""
    choice = Choice(run, seq_len=seq_len, least_tokens=2, seed=args.seed)
    if args.targets is not None and not args.targets.isdigit():
        if not os.path.isfile(args.targets):
            raise ValueError(f"--targets {args.targets}: expected a number, or a text file of document ids")
        ids = [each.strip() for each in read_text(args.targets).split("\n") if each.strip()]
        return named_documents(run, [{"document": each} for each in ids], seq_len)
    if args.targets is None and args.each is not None:
        spans = {(each.stream.fingerprint, each.start): each for arm in arms for each in arm.spans}
        seen = named_documents(run, [{"span": each} for each in spans.values()], seq_len)
    else:
        seen = choice.seen(int(args.targets or _DEFAULT_TARGETS))
    return seen + choice.held_out(seen)


def _path(directory: str, arm: Arm) -> str:
    return join(directory, f"arms/{arm.number}.json")


def _done(directory: str, count: int) -> np.ndarray:
    """Which arms are done, as the first process sees it: bool (count,)."""
    found = np.zeros(count, bool)
    if jax.process_index() == 0:
        found[:] = [read_json(join(directory, f"arms/{number}.json")) is not None for number in range(count)]
    if jax.process_count() > 1:
        found = np.asarray(multihost_utils.broadcast_one_to_all(found))
    return found


def _control_losses(directory: str, runner: Runner, until: int) -> list[float] | None:
    """Of the run as it was: measured once."""
    path = join(directory, "arms/control.json")
    losses = runner.control_losses()
    if losses is not None and jax.process_index() == 0:
        write_json(path, {"version": 1, "step": until, "losses": losses})
    return losses


def _write_tables(directory: str, arms: Sequence[Arm], targets: Sequence[Passage], control: Sequence[float]) -> None:
    names = [each.name for each in targets]
    before = np.array(control, np.float32)
    effects = []
    for arm in arms:
        losses = np.array(read_json(_path(directory, arm))["losses"], np.float32)
        without = {(span.stream.fingerprint, span.start) for span in arm.spans}
        is_without = [
            (each.span.stream.fingerprint, each.span.start) in without and each.span.split == "train"
            for each in targets
        ]
        columns = [np.full(len(names), arm.number, np.int32), names, is_without, losses, before, losses - before]
        effects.append(pa.table(columns, schema=EFFECTS))
    members = pa.table(
        {
            "arm": pa.array([arm.number for arm in arms for _ in arm.spans], pa.int32()),
            "document": pa.array([name for arm in arms for name in arm.names], pa.string()),
        }
    )
    table = pa.concat_tables(effects)
    for name, each in (("effects.parquet", table), ("members.parquet", members)):
        with whole_file(join(directory, name)) as partial:
            pq.write_table(each, partial)
    own = table.filter(table["is_without"])["effect"].to_numpy()
    other = table.filter(pc.field("is_without") == pa.scalar(False))["effect"].to_numpy()
    for label, values in (("documents that the arm is without", own), ("other documents", other)):
        if len(values):
            print(f"  mean effect on {label}: {values.mean():+.4f} nats ({len(values):,} pairs)")
    print(f"  effects: {join(directory, 'effects.parquet')}: {table.num_rows:,} rows, {len(arms)} arms x {len(names)}")
    print(f"  members: {join(directory, 'members.parquet')}: {members.num_rows:,} rows", flush=True)
