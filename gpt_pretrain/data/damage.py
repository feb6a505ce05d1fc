"""What is wrong with the data of a batch whose digest is not what the ledger says."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.store import manifest as manifest_lib
from data_prep.store.addresses import Addresses
from data_prep.store.block_source import BlockSource
from data_prep.store.datasets import TokenDataset
from data_prep.store.files import file_problem
from gpt_pretrain.data.plan import Plan


def explain(plan: Plan, datasets: Mapping[str, TokenDataset], step_index: int) -> str:
    """Why a batch may have another digest: the damaged files among those that it is read from, or what is left."""
    damaged = [problem for problem in damaged_files(plan, datasets, step_index) if problem]
    if damaged:
        return "\n".join(damaged)
    return (
        "What it is read from has the digests of its manifests (of bare .bin shards nothing can be said), "
        "so the order or the digest is computed otherwise: was this run begun with another version of gpt_pretrain?"
    )


def damaged_files(plan: Plan, datasets: Mapping[str, TokenDataset], step_index: int) -> list[str]:
    """A sentence for each file that a batch is read from and that is not what its manifest says."""
    stage, batch = plan.stage_at(step_index), plan.batch(step_index)
    problems = []
    starts_of = {
        stream.name: batch.windows[batch.streams == index] * stage.seq_len for index, stream in enumerate(stage.streams)
    }
    for _, each, part in stage.insertions_at(batch.position + np.arange(len(batch.windows))):
        first = min(each.start + each.span(part, stage.seq_len)[0], each.num_tokens - stage.seq_len - 1)
        starts_of[each.name] = np.append(starts_of.get(each.name, np.empty(0, np.int64)), max(0, first))
    for name, starts in starts_of.items():
        dataset = datasets.get(name)
        source = dataset and dataset.splits["train"]
        if isinstance(source, BlockSource):
            problems += source.damage(starts, stage.seq_len + 1)
            continue
        if dataset is None or not Path(dataset.directory, manifest_lib.MANIFEST_NAME).exists():
            continue
        shards = manifest_lib.load(dataset.directory).shards_of("train", dataset.format)
        addresses = Addresses(shard.num_tokens for shard in shards)
        # The token after a window may lie in the next file.
        edges = np.concatenate([starts, np.minimum(starts + stage.seq_len, addresses.total - 1)])
        for number in np.unique(addresses.files_of(edges)).tolist():
            shard, path = shards[number], Path(dataset.directory, shards[number].name)
            if problem := file_problem(path, shard.num_bytes, shard.digest):
                problems.append(
                    f"{path}: is not what its manifest says ({problem.reason}). "
                    f"`python -m data_prep.check {shlex.quote(dataset.directory)} --repair` makes it again."
                )
    return problems
