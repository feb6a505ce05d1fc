"""The thread that brings a run to its bucket while it goes on."""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from data_prep.pages.numbers import duration, size_text
from data_prep.store import buckets, leases
from data_prep.store.bucket_settings import patience_secs
from data_prep.store.buckets import BucketError
from gpt_pretrain.data import ledger as ledger_lib
from gpt_pretrain.data import run as run_lib
from gpt_pretrain.mirrors import Mirror
from gpt_pretrain.train.checkpoints import saved_steps
from gpt_pretrain.train.exclusive import HeldDirectory
from gpt_pretrain.train.results import RunFailed
from gpt_pretrain.train.run_files import (
    CHECKPOINT,
    UPLOADING,
    belongs,
    files_in,
    seal_of,
)

log = logging.getLogger(__name__)


FILES_SECS = 60.0  # between uploads of curves and the like, at least
FILES_SHARE = 0.05  # of the time, at most, in which they are uploaded
POLL_SECS = 0.5
LAST_ATTEMPTS = 3  # to upload what the end of the run left, each with the patience of a request


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
        for name in sorted(files_in(self._mirror.directory)):
            together = (run_lib.FILE_NAME, ledger_lib.FILE_NAME)
            if not belongs(name) or CHECKPOINT.fullmatch(name) or name in together:
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
        still = self._mirror.directory / UPLOADING
        shutil.rmtree(still, ignore_errors=True)
        try:
            source = self._kept(folder, still)
            names = sorted(files_in(source, folder))
            if seal_of(step) not in names:  # removed meanwhile, for a newer one
                return
            names.remove(seal_of(step))
            self._mirror.upload_all(names, source=source)
            self._check()
            self._mirror.upload_all([seal_of(step)], source=source)
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
            self._mirror.remove(seal_of(step))  # first: without it, it is no checkpoint
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
