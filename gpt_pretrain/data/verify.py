"""Whether the data is still what a run has consumed."""

from collections.abc import Mapping

import jax
import numpy as np

from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.damage import explain
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.loader import add_up_digests
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.token_sources import TokenDataset


def check_last_steps(ledger: Ledger, plan: Plan, datasets: Mapping[str, TokenDataset], *, num_steps: int) -> int:
    """Reads the last steps of the ledger again; returns how many were compared.

    Each process reads its part, whatever the devices. Steps of streams that are not open any more, or of
    another dataset of that name, are left out.

    Raises ValueError, saying what is wrong, where a digest is not what the ledger says.
    """
    fingerprints = {name: dataset.fingerprint for name, dataset in datasets.items()}

    def can_be_read(step: int) -> bool:
        return all(fingerprints.get(each.name) == each.fingerprint for each in plan.segment_at(step).streams)

    steps = [step for step in range(max(0, len(ledger) - num_steps), len(ledger)) if can_be_read(step)]
    if not steps:
        return 0
    process, num_processes = jax.process_index(), jax.process_count()
    batches = Batches(
        {name: dataset.splits["train"] for name, dataset in datasets.items()},
        plan,
        vocab_size=1 << 32,  # a bad id is a wrong digest like any other
        num_steps=len(ledger),
        rows_of=lambda batch_size: np.arange(process, batch_size, num_processes)[None],
    )
    found = add_up_digests(np.array([batches[step]["digest"] for step in steps], np.uint64))
    unequal = np.flatnonzero(found != ledger.digests[steps])
    if len(unequal):
        step = steps[int(unequal[0])]
        raise ValueError(
            f"the data is not what this run was trained on: the batch of update {step + 1} now has the digest "
            f"{int(found[unequal[0]]):016x}, the ledger says {int(ledger.digests[step]):016x}.\n"
            + explain(plan, datasets, step)
        )
    return len(steps)
