"""A run whose `save_dir` is in a bucket: what it writes lies in a directory of this machine, and is brought there.

    <save_dir>/.lease                         one run at a time (see data_prep.store.leases)
    <save_dir>/checkpoints/<step>/...         as on a disk; `digests.json` comes last: without it there is no checkpoint
    <save_dir>/data.json, ledger.bin, ...     as on a disk

At the start the bucket is the truth: the directory is made equal to it, as far as resuming needs it. Only where nobody
has touched the bucket since this very directory was brought there may the directory be ahead of it: what could not be
uploaded is uploaded then. While the run goes on, a thread uploads what is new, and nothing in the loop waits for it.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from blake3 import blake3
from jax.experimental import multihost_utils

from data_prep.pages.numbers import duration, size_text
from data_prep.store import buckets, leases
from data_prep.store.bucket_settings import patience_secs
from data_prep.store.buckets import BucketError
from gpt_pretrain.data import ledger as ledger_lib
from gpt_pretrain.data import run as run_lib
from gpt_pretrain.mirrors import Mirror, Objects
from gpt_pretrain.train import changes, provenance, seals, time_file
from gpt_pretrain.train.actions import evaluation
from gpt_pretrain.train.checkpoints import saved_steps
from gpt_pretrain.train.closing import closing
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.exclusive import HeldDirectory
from gpt_pretrain.train.record import CONFIG_FILE_NAME
from gpt_pretrain.train.results import RunFailed
from gpt_pretrain.train.seals import problem_of
from gpt_pretrain.train.start import recorded_run_id
from gpt_pretrain.train.time_ledger import Category, TimeLedger
from gpt_pretrain.train.writers import wandb_rows

log = logging.getLogger(__name__)

_FILES = (
    run_lib.FILE_NAME,
    ledger_lib.FILE_NAME,
    CONFIG_FILE_NAME,
    provenance.FILE_NAME,
    changes.FILE_NAME,
    time_file.FILE_NAME,
    evaluation.FILE_NAME,
    wandb_rows.FILE_NAME,
    wandb_rows.ID_FILE_NAME,
)
_FOLDERS = ("tensorboard/", "wandb/offline-run-")  # of an online run, W&B's server has all
_CHECKPOINT = re.compile(r"checkpoints/([1-9]\d{0,17})/.+")
_UPLOADING = ".uploading"

FILES_SECS = 60.0  # between uploads of curves and the like, at least
FILES_SHARE = 0.05  # of the time, at most, in which they are uploaded
POLL_SECS = 0.5
LAST_ATTEMPTS = 3  # to upload what the end of the run left, each with the patience of a request
ERROR_PATIENCE_SECS = 15.0  # with an upload that does not get on, after an error of the run


def check_bucket(config: TrainConfig) -> None:
    """BucketError where `config.save_dir` is in a bucket that cannot be written to: before any work."""
    if config.is_in_bucket and jax.process_index() == 0:
        buckets.check_writable(config.save_dir)


class HeldBucket(HeldDirectory):
    """A directory in a bucket that this run holds, with the directory of this machine that stands for it."""

    def __init__(self, held: HeldDirectory, uploads: "Uploads"):
        self._held, self._uploads = held, uploads

    def check(self) -> None:
        self._held.check()
        self._uploads.check()

    def finish(self) -> None:
        self._uploads.finish()


@contextlib.contextmanager
def in_bucket(config: TrainConfig, held: HeldDirectory, times: TimeLedger) -> Iterator[HeldDirectory]:
    """For the block, keeps all others out of `config.save_dir`, and brings there what lies in `config.directory`.

    Raises:
      ValueError: another run holds it, the bucket cannot be used, its checkpoints are all damaged, or the processes of
        the run do not share the directory.
      RunFailed: at the end: what belongs there is not there.
    """
    token = _shared_token(config)
    if jax.process_index() != 0:
        _wait_for_first_process(f"{token}/fetched")
        yield held
        _wait_for_first_process(f"{token}/uploaded")
        return
    with leases.hold(config.save_dir, say=log.warning) as lease:
        mirror = Mirror(config.save_dir, config.directory)
        with times.spent(Category.RESTORE):
            committed, junk = take_up(mirror)
        _say_to_others(f"{token}/fetched")
        uploads = Uploads(mirror, held, lease, config.num_checkpoints_kept, committed, junk)
        with times.spent(Category.CHECKPOINT):
            try:
                closing_uploads = closing(uploads, patience_secs=ERROR_PATIENCE_SECS, progress=uploads.progress)
                with closing_uploads, times.spent(Category.START):
                    yield HeldBucket(held, uploads)
            finally:
                uploads.abandon()
    _say_to_others(f"{token}/uploaded")


# ---- at the start ----


def take_up(mirror: Mirror) -> tuple[set[int], set[int]]:
    """Makes the mirror what the bucket holds: files, and the newest checkpoint that verifies.

    Returns steps: (of checkpoints in the bucket, of remains of such).
    """
    listed = {name: each for name, each in mirror.listing().items() if _belongs(name)}
    there = {name for name in _files_in(mirror.directory) if _belongs(name)}
    if mirror.is_new and there:
        raise ValueError(
            f"{mirror.directory}: holds {min(there)}, which is not of {mirror.url}. Choose another train.work_dir, or "
            "remove it."
        )
    is_ahead = not mirror.is_new and mirror.is_as_left(listed)
    mirror.save_index()
    shutil.rmtree(mirror.directory / _UPLOADING, ignore_errors=True)
    if not is_ahead:
        for name in there - listed.keys():
            mirror.path(name).unlink()
            mirror.forget(name)
        for folder in mirror.directory.glob("checkpoints/*"):
            if folder.is_dir() and not any(each.is_file() for each in folder.rglob("*")):
                shutil.rmtree(folder)
    files = {name: each for name, each in listed.items() if not _CHECKPOINT.fullmatch(name)}
    mirror.fetch({name: each for name, each in files.items() if not (is_ahead and name in there)}, say=log.info)
    checkpoints = _by_step(listed)
    committed = {step for step, objects in checkpoints.items() if _seal_of(step) in objects}
    bad = _choose(mirror, checkpoints, committed, is_ahead=is_ahead)
    mirror.save_index()
    return committed - bad, (checkpoints.keys() - committed) | bad


def _choose(mirror: Mirror, checkpoints: Mapping[int, Objects], committed: set[int], *, is_ahead: bool) -> set[int]:
    """Gets the newest checkpoint that verifies; those of the bucket that do not are none any more there."""
    run_id = recorded_run_id(mirror.directory)
    newest = max(committed, default=0)
    if is_ahead and any(
        step > newest and problem_of(_folder(mirror, step), run_id=run_id) is None
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
        shutil.rmtree(_folder(mirror, step))
        seal = mirror.url_of(_seal_of(step))
        buckets.write(f"{seal}.damaged", buckets.read(seal))
        mirror.remove(_seal_of(step))
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
        for name in _files_in(mirror.directory, f"checkpoints/{step}") - objects.keys():
            mirror.path(name).unlink()
        mirror.fetch(objects, say=log.info)
        problem = problem_of(_folder(mirror, step), run_id=run_id)
        if problem is None:
            return None
        for name in objects:
            mirror.forget(name)
    return problem


def _folder(mirror: Mirror, step: int) -> Path:
    return mirror.path(f"checkpoints/{step}")


def _seal_of(step: int) -> str:
    return f"checkpoints/{step}/{seals.FILE_NAME}"


def _belongs(name: str) -> bool:
    """Whether a file is brought to the bucket, and from there."""
    return name in _FILES or name.startswith(_FOLDERS) or bool(_CHECKPOINT.fullmatch(name))


def _by_step(listed: Objects) -> dict[int, dict[str, buckets.Object]]:
    found: dict[int, dict[str, buckets.Object]] = {}
    for name, each in listed.items():
        if match := _CHECKPOINT.fullmatch(name):
            found.setdefault(int(match[1]), {})[name] = each
    return found


def _files_in(directory: Path, below: str = "") -> set[str]:
    """Names of regular files; what Orbax has not finished is none of ours."""
    found = set()
    for folder, folders, names in os.walk(directory / below):
        folders[:] = [each for each in folders if ".orbax-checkpoint-tmp" not in each]
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path) and not name.endswith(".partial"):
                found.add(os.path.relpath(path, directory))
    return found


# ---- while it runs ----


class Uploads:
    """The thread that brings a run to its bucket, and what it has done.

    Order makes the bucket resumable whenever a run is killed: what was written up to a checkpoint (curves, the ledger)
    comes before the checkpoint, its `digests.json` after all else of it, and old checkpoints go after that.
    """

    def __init__(
        self,
        mirror: Mirror,
        held: HeldDirectory,
        lease: leases.Lease,
        num_kept: int,
        committed: set[int],
        junk: set[int],
    ):
        self._mirror, self._held, self._lease, self._num_kept = mirror, held, lease, num_kept
        self._committed, self._junk = committed, junk
        self._is_abandoned = self._has_given_up = False
        self._failures = 0
        self._try_at = self._files_at = 0.0  # by time.monotonic(): not before
        self._there: tuple[int, str] | None = self._mark_there()
        self._ends, self._is_idle = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="uploads")
        self._thread.start()

    def check(self) -> None:
        """RunFailed where the bucket's directory is another one's, as far as it is known: never waits."""
        try:
            self._lease.check_known()
        except leases.LeaseLost as error:
            raise RunFailed(str(error)) from None

    def progress(self) -> int:
        return self._mirror.num_bytes_moved

    def abandon(self) -> None:
        """Nothing is written after this but what is on its way."""
        self._is_abandoned = True
        self._ends.set()

    def finish(self) -> None:
        """Blocks until all that is finished here is in the bucket.

        Raises RunFailed: it cannot be brought there.
        """
        self.check()
        self._try_at = float("inf")  # from here on it is tried here
        for attempt in range(LAST_ATTEMPTS):
            try:
                with self._saying_what_is_left():
                    self._sync()
                return self._succeeded()
            except leases.LeaseLost as error:
                raise RunFailed(str(error)) from None
            except (BucketError, OSError) as error:
                self._failures += 1
                log.error("UPLOADING to %s FAILED: %s.", self._mirror.url, str(error).rstrip("."))
                if attempt + 1 < LAST_ATTEMPTS:
                    self._ends.wait(patience_secs() / 6)
        self._has_given_up = True
        local = next(iter(saved_steps(self._mirror.directory)), None)
        raise RunFailed(
            f"What the run has written is not all in {self._mirror.url}: the newest checkpoint there is "
            f"{self._newest()}, here in {self._mirror.directory} it is "
            f"{'none' if local is None else f'that of step {local}'}. Mend the bucket, and the same command on this "
            "machine uploads it and goes on; on another machine it resumes from what is there."
        )

    def close(self) -> None:
        """The same once more, for what was written since; then the thread ends."""
        self._ends.set()
        self._thread.join()
        if not self._has_given_up:
            self.finish()

    @contextlib.contextmanager
    def _saying_what_is_left(self) -> Iterator[None]:
        ended, url = threading.Event(), self._mirror.url

        def say() -> None:
            before = self.progress()
            while not ended.wait(10.0):
                log.info("Uploading to %s: %s so far", url, size_text(self.progress() - before))

        threading.Thread(target=say, daemon=True, name="upload-progress").start()
        try:
            yield
        finally:
            ended.set()

    def _keep(self) -> None:
        while not self._ends.wait(POLL_SECS):
            if time.monotonic() < self._try_at or not self._is_due():
                continue
            try:
                self._sync()
            except leases.LeaseLost:
                return  # the run finds out by `check`
            except RunFailed:
                return  # it knows
            except (BucketError, OSError) as error:
                self._failed(error)
            else:
                self._succeeded()

    def _is_due(self) -> bool:
        is_changed = self._mirror.path(run_lib.FILE_NAME).exists() and self._mirror.is_changed(run_lib.FILE_NAME)
        return is_changed or time.monotonic() >= self._files_at or self._next_step() is not None

    def _succeeded(self) -> None:
        if self._failures:
            log.warning("UPLOADING to %s works again.", self._mirror.url)
        self._failures = 0

    def _failed(self, error: Exception) -> None:
        pause_secs = patience_secs() * min(2.0**self._failures / 6, 5.0)
        self._failures += 1
        self._try_at = time.monotonic() + pause_secs
        log.error(
            "UPLOADING to %s FAILED: %s. Training goes on; it is tried again in %s. Until then the newest checkpoint "
            "there is %s.",
            self._mirror.url,
            str(error).rstrip("."),
            duration(pause_secs),
            self._newest(),
        )

    def _newest(self) -> str:
        return f"that of step {max(self._committed)}" if self._committed else "none"

    def _next_step(self) -> int | None:
        """Of the newest checkpoint that is to be uploaded."""
        for step in saved_steps(self._mirror.directory)[: self._num_kept]:
            if step not in self._committed:
                return step
        return None

    def _check(self) -> None:
        if self._is_abandoned:
            raise RunFailed("the run has ended")
        self._held.check()
        self._lease.check()

    def _sync(self) -> None:
        """Uploads all that is new here.

        Raises LeaseLost, RunFailed; BucketError, OSError: the rest is as new as it was.
        """
        with self._is_idle:  # one at a time
            try:
                while True:
                    self._check()
                    step = self._next_step()  # before the files: they hold what was written up to it
                    self._upload_files()
                    if step is None:
                        return
                    self._upload_checkpoint(step)
            finally:
                with contextlib.suppress(OSError):
                    self._mirror.save_index()

    def _upload_files(self) -> None:
        began = time.monotonic()
        for name in sorted(_files_in(self._mirror.directory)):
            together = (run_lib.FILE_NAME, ledger_lib.FILE_NAME)
            if not _belongs(name) or _CHECKPOINT.fullmatch(name) or name in together:
                continue
            if self._mirror.is_changed(name):
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    self._mirror.upload(name)
        self._upload_ledger()
        took = time.monotonic() - began
        self._files_at = time.monotonic() + max(FILES_SECS, took / FILES_SHARE)

    def _upload_ledger(self) -> None:
        """The ledger and data.json, which says how far the ledger goes: at no moment further than it does."""
        data, ledger = self._mirror.path(run_lib.FILE_NAME), self._mirror.path(ledger_lib.FILE_NAME)
        if not data.exists() or not ledger.exists():
            return
        names = [each for each in (run_lib.FILE_NAME, ledger_lib.FILE_NAME) if self._mirror.is_changed(each)]
        if not names:
            return
        snapshots = {name: self._mirror.snapshot(name) for name in (run_lib.FILE_NAME, ledger_lib.FILE_NAME)}
        mark, content = _mark_in(snapshots[run_lib.FILE_NAME].content), snapshots[ledger_lib.FILE_NAME].content
        if mark is not None and not _fits(mark, content):
            return  # they are being written: next time
        if self._there is None or _fits(self._there, content):
            names.reverse()
        for name in names:
            self._mirror.write(name, snapshots[name])
        self._there = mark

    def _mark_there(self) -> tuple[int, str] | None:
        """What the bucket's data.json says of its ledger."""
        try:
            return _mark_in(buckets.read(self._mirror.url_of(run_lib.FILE_NAME)))
        except BucketError:
            return None

    def _upload_checkpoint(self, step: int) -> None:
        began, before = time.monotonic(), self.progress()
        folder = f"checkpoints/{step}"
        if step in self._junk:
            self._mirror.remove_all(folder)
            self._junk.discard(step)
        still = self._mirror.directory / _UPLOADING
        shutil.rmtree(still, ignore_errors=True)
        try:
            source = self._kept(folder, still)
            names = sorted(_files_in(source, folder))
            if _seal_of(step) not in names:  # removed meanwhile, for a newer one
                return
            names.remove(_seal_of(step))
            self._mirror.upload_all(names, source=source)
            self._check()
            self._mirror.upload_all([_seal_of(step)], source=source)
        finally:
            shutil.rmtree(still, ignore_errors=True)
        self._committed.add(step)
        size, secs = size_text(self.progress() - before), duration(time.monotonic() - began)
        log.info("Uploaded %s (%s in %s)", self._mirror.url_of(folder), size, secs)
        self._remove_old()

    def _kept(self, folder: str, still: Path) -> Path:
        """A directory from which nobody removes the folder while it is uploaded: of links, which cost nothing."""
        try:
            shutil.copytree(self._mirror.directory / folder, still / folder, copy_function=os.link)
            return still
        except FileNotFoundError:
            raise
        except OSError as error:  # a file system without links
            log.debug("%s: %s", still, error)
            return self._mirror.directory

    def _remove_old(self) -> None:
        for step in sorted(self._committed, reverse=True)[self._num_kept :]:
            self._mirror.remove(_seal_of(step))  # first: without it, it is no checkpoint
            self._committed.discard(step)
            self._junk.add(step)
        for step in sorted(self._junk):
            self._mirror.remove_all(f"checkpoints/{step}")
            self._junk.discard(step)


def _mark_in(content: bytes) -> tuple[int, str] | None:
    """(steps, digest) of the ledger, as data.json says them."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        mark = json.loads(content)["ledger"]
        return int(mark["num_steps"]), str(mark["digest"])
    return None


def _fits(mark: tuple[int, str], content: bytes) -> bool:
    begin, end = len(ledger_lib.MAGIC), len(ledger_lib.MAGIC) + ledger_lib.DIGEST.itemsize * mark[0]
    return len(content) >= end and blake3(content[begin:end]).hexdigest() == mark[1]


# ---- several processes ----


def _shared_token(config: TrainConfig) -> str:
    """A text that is the same in all processes. ValueError unless all of them see `config.directory`."""
    if jax.process_count() == 1:
        return ""
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(8), np.uint8))
    text = np.asarray(token).tobytes().hex()
    probe = Path(config.directory, f".shared-{text}")
    if jax.process_index() == 0:
        probe.touch()
    is_there = _is_seen(probe, secs=0.0 if jax.process_index() == 0 else 5.0, after=f"{text}/probe")
    everywhere = np.asarray(multihost_utils.process_allgather(np.bool_(is_there))).reshape(-1)
    if jax.process_index() == 0:
        probe.unlink(missing_ok=True)
    if not everywhere.all():
        blind, directory = ", ".join(map(str, np.flatnonzero(~everywhere))), config.directory
        raise ValueError(
            f"{config.save_dir}: the processes of a run in a bucket share a directory, and {directory} is not "
            f"the same one for process {blind} as for process 0. Set train.work_dir to a directory on a disk that "
            "all of them see."
        )
    return text


def _is_seen(probe: Path, *, secs: float, after: str) -> bool:
    if jax.process_index() == 0:
        _say_to_others(after)
        return True
    _wait_for_first_process(after)
    deadline = time.monotonic() + secs
    while not (found := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _say_to_others(what: str) -> None:
    if jax.process_count() > 1:
        _store_of_keys().key_value_set(f"gpt_pretrain/{what}", "yes")


def _wait_for_first_process(what: str) -> None:
    """However long it takes: a computation would be given up after minutes."""
    while True:
        try:
            _store_of_keys().blocking_key_value_get(f"gpt_pretrain/{what}", 10_000)
            return
        except RuntimeError as error:  # JAX's own
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _store_of_keys():
    from jax._src import distributed  # it is not public

    client = distributed.global_state.client
    assert client is not None
    return client
