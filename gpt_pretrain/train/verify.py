"""Whether the data is still what a run has consumed."""

from collections.abc import Mapping

import jax
import numpy as np

from data_prep.store.datasets import TokenDataset
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.damage import explain
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.train.digests import add_up_digests


def check_last_steps(ledger: Ledger, plan: Plan, datasets: Mapping[str, TokenDataset], *, num_steps: int) -> int:
    """Reads the last steps of the ledger again; returns how many were compared.

    Each process reads its part, whatever the devices. Steps that took from a dataset which is not among
    `datasets` any more are left out.

    Raises ValueError, saying what is wrong, where a digest is not what the ledger says.
    """
    known = {dataset.fingerprint: dataset for dataset in datasets.values()}
    first = max(0, len(ledger) - num_steps)
    steps = [
        step_index
        for step_index in range(first, len(ledger))
        if all(each.fingerprint in known for each in plan.stage_at(step_index).read_from)
    ]
    found = add_up_digests(np.array([_partial_digest(plan, known, step_index) for step_index in steps], np.uint64))
    unequal = np.flatnonzero(found != ledger.digests[steps])
    if len(unequal):
        step_index = steps[int(unequal[0])]
        raise ValueError(
            f"the data is not what this run was trained on: the batch of step {step_index + 1} now has the digest "
            f"{int(found[unequal[0]]):016x}, the ledger says {int(ledger.digests[step_index]):016x}.\n"
            + explain(
                plan,
                {stream.name: known[stream.fingerprint] for stream in plan.stage_at(step_index).read_from},
                step_index,
            )
        )
    return len(steps)


def _partial_digest(plan: Plan, known: Mapping[str, TokenDataset], step_index: int) -> int:
    """Of this process's share of the rows: every `process_count`-th."""
    sources = {each.name: known[each.fingerprint].splits["train"] for each in plan.stage_at(step_index).read_from}
    batches = Batches(
        sources,
        plan,
        vocab_size=1 << 32,  # a bad id is a wrong digest like any other
        first_index=step_index,
        num_steps=1,
        rows_of=lambda batch_size: np.arange(jax.process_index(), batch_size, jax.process_count())[None],
    )
    return batches[0].digest
