"""One question, answered: the arms trained, checked, and put on a page."""

import argparse
import shlex
from collections.abc import Callable

import jax

from data_prep.pages.numbers import plural
from data_prep.pages.text import printable
from data_prep.store.files import whole_file, write_json
from data_prep.store.places import join
from gpt_pretrain.counterfactual.arms import (
    CONTROL,
    EDITED,
    Arms,
    check,
    inserted_documents,
    lines_of,
    losses_of_checkpoints,
    result_of,
)
from gpt_pretrain.counterfactual.page import render
from gpt_pretrain.counterfactual.probes import probes_of
from gpt_pretrain.counterfactual.question import Asked, edited_plan, question_of
from gpt_pretrain.counterfactual.recorded import interventions_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.train.checkpoint_copies import checkpoints_at
from gpt_pretrain.train.config import TrainConfig

Configure = Callable[..., TrainConfig]
_FEWEST_KEPT = 6  # checkpoints of an arm, which the other one is compared with


def answer(run: OpenedRun, asked: Asked, configure: Configure, args: argparse.Namespace, command: str) -> int:
    """Trains the arms, prints what was checked, writes OUT/result.json and OUT/index.html; returns the exit status."""
    question = question_of(run, asked)
    arms_bindings = _bindings(run, asked.until, question.begin)
    own = interventions_of(run)
    edited_config = configure(join(args.save_dir, EDITED), [*arms_bindings, *asked.bindings(own)], command)
    datasets = edited_config.data.open()
    inserted = edited_config.data.open_inserted(datasets)
    plan = edited_plan(run, edited_config.data.edits(datasets, inserted), question.begin)
    probes = probes_of(run, question, inserted_documents(question, inserted))
    arms = Arms(run, question, args.save_dir, plan, probes, args.num_probes)
    has_end = asked.until in checkpoints_at(run.save_dir)
    is_first = jax.process_index() == 0
    if is_first:
        begin = f"the checkpoint of step {question.begin}" if question.begin else "the beginning"
        why = "" if args.control or has_end else f" ({run.save_dir} has no checkpoint of step {asked.until} to compare)"
        other = "control arm and " if args.control or not has_end else ""
        held = (
            f"{plural(len(question.steps), 'step')} held what is asked about" if question.steps else "No batch differs"
        )
        print(
            printable(
                f"{held}, the first step that differs is {question.first}: {other}edited arm from {begin} to step "
                f"{asked.until}{why}"
            ),
            flush=True,
        )
    checked, lines, good = {}, [], True
    for arm in [CONTROL, EDITED] if args.control or not has_end else [EDITED]:
        if is_first:
            print(f"\n=== {arm} arm: {arms.save_dir(arm)}", flush=True)
        if arm == CONTROL:
            status = arms.train(arm, configure(arms.save_dir(arm), arms_bindings, command), run.save_dir)
        else:
            # gin keeps what was parsed last: the configuration that an arm writes must be its own.
            config = configure(arms.save_dir(arm), [*arms_bindings, *asked.bindings(own)], command)
            status = arms.train(arm, config, arms.save_dir(CONTROL) if CONTROL in checked else run.save_dir)
        if status:
            return status
        checked[arm] = check(arms, arm)
        is_good, words = lines_of(arms, arm, checked[arm])
        good, lines = good and is_good, lines + words
    if is_first:
        _write(arms, checked, lines, command)
    return 0 if good else 1


def _write(arms: Arms, checked: dict, lines: list[str], command: str) -> None:
    baseline = arms.save_dir(CONTROL) if CONTROL in checked else arms.run.save_dir
    result = result_of(arms, baseline, checked, command)
    if CONTROL not in checked:
        result["losses"] = {CONTROL: losses_of_checkpoints(arms), **result["losses"]}
    path, page = join(arms.directory, "result.json"), join(arms.directory, "index.html")
    write_json(path, result | {"lines": lines})
    with whole_file(page) as partial:
        partial.write_text(render(result, lines), encoding="utf-8", newline="\n")
    print("\n" + printable("\n".join(lines)))
    for group, (before, after) in _last(result).items():
        print(
            f"  {group}: loss {before:.4f} in the run as it was, {after:.4f} in the edited arm ({after - before:+.4f})"
        )
    print(f"  page:   {shlex.quote(page)}\n  result: {shlex.quote(path)}", flush=True)


def _last(result: dict) -> dict[str, tuple[float, float]]:
    """Losses in both arms, at the last step that both have."""
    by_step = [{each["step"]: each["loss"] for each in result["losses"].get(arm, ())} for arm in (CONTROL, EDITED)]
    both = set(by_step[0]) & set(by_step[1])
    if not both:
        return {}
    before, after = (each[max(both)] for each in by_step)
    return {name: (before[name], after[name]) for name in before if name in after}


def _bindings(run: OpenedRun, until: int, begin: int) -> list[str]:
    """Of both arms: what is kept and where curves go. Nothing here changes a step."""
    interval = max(1, (until - begin) // _FEWEST_KEPT)
    kept = [step for step in checkpoints_at(run.save_dir) if begin < step <= until]
    # Where the run has checkpoints, the arms have them, too.
    if len(kept) > 1 and all(step % min(kept) == 0 for step in kept[:-1]):
        interval = min(kept)
    return [
        f"train.save_interval = {interval}",
        f"train.num_checkpoints_kept = {max(2, _FEWEST_KEPT, len(kept))}",
        'train.writers = ("console", "tensorboard")',
        "train.sample_prompt = None",
        "train.sample_interval = 0",
        "train.profile_step = 0",
    ]
