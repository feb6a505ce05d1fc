"""The start of a run in a bucket: the directory of this machine becomes what the bucket holds."""

import logging
import shutil
from collections.abc import Mapping

from data_prep.pages.numbers import size_text
from data_prep.store import buckets
from gpt_pretrain.mirrors import Mirror, Objects
from gpt_pretrain.train import events
from gpt_pretrain.train.checkpoints import saved_steps
from gpt_pretrain.train.run_files import CHECKPOINT, UPLOADING, belongs, by_step, files_in, folder_of, seal_of
from gpt_pretrain.train.seals import problem_of
from gpt_pretrain.train.start import recorded_run_id

log = logging.getLogger(__name__)


def take_up(mirror: Mirror) -> tuple[set[int], set[int]]:
    """Makes the mirror what the bucket holds: files, and the newest checkpoint that verifies.

    Returns steps: (of checkpoints in the bucket, of remains of such).
    """
    listed = {name: each for name, each in mirror.listing().items() if belongs(name)}
    there = {name for name in files_in(mirror.directory) if belongs(name)}
    if mirror.is_new and there:
        raise ValueError(
            f"{mirror.directory}: holds {min(there)}, which is not of {mirror.url}. Choose another train.work_dir, or "
            "remove it."
        )
    is_ahead = not mirror.is_new and mirror.is_as_left(listed)
    mirror.save_index()
    shutil.rmtree(mirror.directory / UPLOADING, ignore_errors=True)
    if not is_ahead:
        for name in there - listed.keys():
            mirror.path(name).unlink()
            mirror.forget(name)
        for folder in mirror.directory.glob("checkpoints/*"):
            if folder.is_dir() and not any(each.is_file() for each in folder.rglob("*")):
                shutil.rmtree(folder)
    files = {name: each for name, each in listed.items() if not CHECKPOINT.fullmatch(name)}
    mirror.fetch({name: each for name, each in files.items() if not (is_ahead and name in there)}, say=log.info)
    checkpoints = by_step(listed)
    committed = {step for step, objects in checkpoints.items() if seal_of(step) in objects}
    bad = _choose(mirror, checkpoints, committed, is_ahead=is_ahead)
    mirror.save_index()
    return committed - bad, (checkpoints.keys() - committed) | bad


def _choose(mirror: Mirror, checkpoints: Mapping[int, Objects], committed: set[int], *, is_ahead: bool) -> set[int]:
    """Gets the newest checkpoint that verifies; those of the bucket that do not are none any more there."""
    run_id = recorded_run_id(mirror.directory)
    newest = max(committed, default=0)
    if is_ahead and any(
        step > newest and problem_of(folder_of(mirror, step), run_id=run_id) is None
        for step in saved_steps(mirror.directory)
    ):
        return set()
    bad: dict[int, str] = {}
    for step in sorted(committed, reverse=True):
        problem = _problem_of_fetched(mirror, step, checkpoints[step], run_id)
        if problem is None:
            break
        bad[step] = problem
    if bad and len(bad) == len(committed):
        which = "the only checkpoint is" if len(bad) == 1 else f"all {len(bad)} checkpoints are"
        step, problem = next(iter(bad.items()))
        raise ValueError(
            f"{mirror.url}/checkpoints: {which} damaged, or not of this run (step {step}: {problem}). Restore one "
            "from a copy, or choose another save_dir to start anew."
        )
    for step, problem in bad.items():
        shutil.rmtree(folder_of(mirror, step))
        seal = mirror.url_of(seal_of(step))
        buckets.write(f"{seal}.damaged", buckets.read(seal))
        mirror.remove(seal_of(step))
        events.note(mirror.directory, step, events.Kind.DAMAGED, f"checkpoint passed over: {problem}")
        log.warning(
            "Checkpoint %s cannot be trusted: %s. Its digests.json is now called digests.json.damaged; resuming from "
            "the one before.",
            mirror.url_of(f"checkpoints/{step}"),
            problem,
        )
    return set(bad)


def _problem_of_fetched(mirror: Mirror, step: int, objects: Objects, run_id: str | None) -> str | None:
    problem = None
    for _ in range(2):  # it may have been damaged on its way, or here
        num_bytes = sum(each.num_bytes for name, each in objects.items() if not mirror.has(name, each))
        if num_bytes:
            log.info("Fetching %s (%s)", mirror.url_of(f"checkpoints/{step}"), size_text(num_bytes))
        for name in files_in(mirror.directory, f"checkpoints/{step}") - objects.keys():
            mirror.path(name).unlink()
        mirror.fetch(objects, say=log.info)
        problem = problem_of(folder_of(mirror, step), run_id=run_id)
        if problem is None:
            return None
        for name in objects:
            mirror.forget(name)
    return problem
