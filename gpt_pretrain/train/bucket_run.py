"""A run whose `save_dir` is in a bucket: what it writes lies in a directory of this machine, and is brought there.

    <save_dir>/.lease                         one run at a time (see data_prep.store.leases)
    <save_dir>/checkpoints/<step>/...         as on a disk; `digests.json` comes last: without it there is no checkpoint
    <save_dir>/data.json, ledger.bin, ...     as on a disk

At the start the bucket is the truth: the directory is made equal to it, as far as resuming needs it. Only where nobody
has touched the bucket since this very directory was brought there may the directory be ahead of it: what could not be
uploaded is uploaded then. While the run goes on, a thread uploads what is new, and nothing in the loop waits for it.
"""

import contextlib
import logging
from collections.abc import Iterator

import jax

from data_prep.store import buckets, leases
from gpt_pretrain.mirrors import Mirror
from gpt_pretrain.train.closing import closing
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.exclusive import HeldDirectory
from gpt_pretrain.train.shared_directory import say_to_others, shared_token, wait_for_first_process
from gpt_pretrain.train.taking_up import take_up
from gpt_pretrain.train.time_ledger import Category, TimeLedger
from gpt_pretrain.train.uploads import Uploads

log = logging.getLogger(__name__)

ERROR_PATIENCE_SECS = 15.0  # with an upload that does not get on, after an error of the run


def check_bucket(config: TrainConfig) -> None:
    """BucketError where `config.save_dir` is in a bucket that cannot be written to: before any work."""
    if config.is_in_bucket and jax.process_index() == 0:
        buckets.check_writable(config.save_dir)


class HeldBucket(HeldDirectory):
    """A directory in a bucket that this run holds, with the directory of this machine that stands for it."""

    def __init__(self, held: HeldDirectory, uploads: Uploads):
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
    token = shared_token(config)
    if jax.process_index() != 0:
        wait_for_first_process(f"{token}/fetched")
        yield held
        wait_for_first_process(f"{token}/uploaded")
        return
    with leases.hold(config.save_dir, say=log.warning) as lease:
        mirror = Mirror(config.save_dir, config.directory)
        with times.spent(Category.RESTORE):
            committed, junk = take_up(mirror)
        say_to_others(f"{token}/fetched")
        uploads = Uploads(mirror, held, lease, config.num_checkpoints_kept, committed, junk)
        with times.spent(Category.CHECKPOINT):
            try:
                closing_uploads = closing(uploads, patience_secs=ERROR_PATIENCE_SECS, progress=uploads.progress)
                with closing_uploads, times.spent(Category.START):
                    yield HeldBucket(held, uploads)
            finally:
                uploads.abandon()
    say_to_others(f"{token}/uploaded")
