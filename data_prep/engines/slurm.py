"""Array jobs of Slurm, or another queue, on a shared disk or into a bucket: each task tokenizes a share of the units.

Within a task the jobs are done by `local.Workers`. Tasks don't talk to each other; what they leave in the work
directory is what the finishing command, which is a command like any other, finds there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

MAX_TASKS = 100_000


@dataclass(frozen=True)
class UnitRange:
    """Share `index` of `num_tasks`, counted from 1: a stretch of the units with about 1/num_tasks of their bytes."""

    index: int
    num_tasks: int

    @classmethod
    def parse(cls, text: str) -> "UnitRange":
        """`3/8`. ValueError for what is no share."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]) <= MAX_TASKS:
            raise ValueError(
                f"--unit_range={text}: expected i/n, from 1/n to n/n with n at most {MAX_TASKS:,} (an array of 8: "
                "sbatch --array=1-8, and --unit_range=$SLURM_ARRAY_TASK_ID/8)"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.num_tasks}"

    def of(self, num_bytes: Sequence[int]) -> range:
        """Which units these are, from the sizes of all of them: those that begin in this share of the bytes.

        >>> [UnitRange(i, 3).of([5, 5, 5, 5, 10]) for i in (1, 2, 3)]
        [range(0, 2), range(2, 4), range(4, 5)]
        """
        total = max(1, sum(num_bytes))
        starts = list(accumulate(num_bytes, initial=0))[:-1]
        # Units of no bytes at the very end are the last task's.
        shares = [min(start * self.num_tasks // total, self.num_tasks - 1) for start in starts]
        own = [place for place, share in enumerate(shares) if share == self.index - 1]
        return range(own[0], own[-1] + 1) if own else range(0)
