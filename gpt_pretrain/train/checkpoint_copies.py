"""A checkpoint, as a user names it -> a directory of this machine to read it from, in which every digest is right."""

import os
import re
import shutil
import time
from pathlib import Path

from data_prep.store import buckets
from data_prep.store.buckets import BucketError
from gpt_pretrain.mirrors import Mirror, Objects, Place
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.run_copies import copy_of
from gpt_pretrain.train.seals import FILE_NAME as SEAL
from gpt_pretrain.train.seals import problem_of

_STEP = re.compile(r"[1-9]\d{0,17}")
_UNUSED_SECS = 24 * 3600.0  # after which a copy of a checkpoint that is gone is removed
_ATTEMPTS = 3  # a run that is under way may remove a checkpoint while it is copied


def checkpoint_at(place: str) -> Place:
    """A checkpoint to read weights from: of a run, its newest good one, or the one that is named.

    Raises ValueError: there is none that can be trusted, or the bucket cannot be read.
    """
    if not buckets.is_bucket(place):
        found = str(checkpoints.locate(place))
        return Place(found, found)
    url = place.rstrip("/")
    above, _, folder = url.rpartition("/")
    if _STEP.fullmatch(folder) and buckets.stat(buckets.join(url, SEAL)):
        if above.endswith("/checkpoints"):  # it may be here already as one of the run
            above, folder = above.removesuffix("/checkpoints"), f"checkpoints/{folder}"
        with copy_of(above) as mirror:
            return _fetched(mirror, folder, mirror.listing(folder), is_alone=True)
    with copy_of(url) as mirror:
        return _newest(mirror)


def checkpoints_at(place: str) -> dict[int, str]:
    """What the finished checkpoints of a run are called, good or not, by their steps, the oldest first: for
    `checkpoint_at`."""
    if buckets.is_bucket(place):
        place = place.rstrip("/")
        with copy_of(place) as mirror:
            found = {int(folder.rpartition("/")[2]): folder for folder in _checkpoints_in(mirror)}
        return {step: buckets.join(place, found[step]) for step in sorted(found)}
    steps = reversed(checkpoints.saved_steps(place))
    return {step: os.path.join(place, checkpoints.DIRECTORY, str(step)) for step in steps}


def _newest(mirror: Mirror) -> Place:
    problem = ""
    for _ in range(_ATTEMPTS):
        found = _checkpoints_in(mirror)
        _remove_unused(mirror, found)
        for folder in sorted(found, key=lambda each: int(each.rpartition("/")[2]), reverse=True):
            try:
                return _fetched(mirror, folder, found[folder], is_alone=False)
            except BucketError as error:
                problem = str(error)
                if buckets.stat(mirror.url_of(f"{folder}/{SEAL}")) is not None:
                    raise
                break  # removed meanwhile: there is a newer one
            except ValueError as error:
                problem = str(error)
                checkpoints.log.warning("%s Skipping this checkpoint.", problem)
        else:
            break
    raise ValueError(
        f"{mirror.url}: no good checkpoint found; expected the save_dir of a run of gpt_pretrain.main, or one "
        "checkpoint in its 'checkpoints' directory"
    )


def _checkpoints_in(mirror: Mirror) -> dict[str, Objects]:
    """The objects of each that is finished, by its folder: below a save_dir, or a directory of checkpoints."""
    for below in ("checkpoints", ""):
        by_folder: dict[str, dict[str, buckets.Object]] = {}
        pattern = re.compile(rf"({below + '/' if below else ''}{_STEP.pattern})/.+")
        for name, each in mirror.listing(below).items():
            if match := pattern.fullmatch(name):
                by_folder.setdefault(match[1], {})[name] = each
        if found := {folder: each for folder, each in by_folder.items() if f"{folder}/{SEAL}" in each}:
            return dict(found)
    return {}


def _fetched(mirror: Mirror, folder: str, objects: Objects, *, is_alone: bool) -> Place:
    """ValueError: it cannot be trusted."""
    place = Place(mirror.url_of(folder), str(mirror.path(folder)))
    problem = None
    for _ in range(2):  # it may have been damaged on its way, or here
        mirror.fetch(objects, say=checkpoints.log.info)
        if not (problem := problem_of(Path(place.directory))):
            os.utime(place.directory)
            return place
        shutil.rmtree(place.directory)
    advice = " The checkpoint cannot be trusted; use another one." if is_alone else ""
    raise ValueError(f"{place.name}: {problem}.{advice}")


def _remove_unused(mirror: Mirror, there: dict[str, Objects]) -> None:
    """Copies of checkpoints that the bucket has no more, and nobody has used for a day."""
    for path in mirror.directory.glob("checkpoints/*"):
        name = str(path.relative_to(mirror.directory))
        if name not in there and time.time() - path.stat().st_mtime > _UNUSED_SECS:
            shutil.rmtree(path, ignore_errors=True)
