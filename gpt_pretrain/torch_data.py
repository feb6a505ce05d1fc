"""The order of the data as datasets of PyTorch; the only module that imports it. See `gpt_pretrain.order_api`.

    batches = OrderedBatches(open_order("data/fineweb-10BT", seq_len=1024, batch_size=480, num_steps=600_000))
    for batch in batches:
        tokens = batch.tokens.to(device).long()   # two bytes a token travel, as they are stored
        ...
        checkpoint["data"] = batches.state_dict()

What comes are `Batch` and `Example` of `order_api` with tensors for arrays.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.distributed as dist  # pyright: ignore[reportMissingImports]
from torch.utils.data import (  # pyright: ignore[reportMissingImports]
    Dataset,
    IterableDataset,
    default_convert,
    get_worker_info,
)

from gpt_pretrain import checks
from gpt_pretrain.order_api import Batch, Example, Order, Record


class OrderedBatches(IterableDataset):
    """A rank's rows of the batches of an order, from a step on to the end. Reads ahead by itself: iterate over it
    directly, or with `DataLoader(batches, batch_size=None)`.

    Args:
      step: how many updates were made before.
      rank, world_size: of this process; those of `torch.distributed` where it was initialized, else 0 and 1.

    Attributes:
      step: of how many updates the batches were given.

    Raises ValueError where a batch cannot be split, or the run has no such step.
    """

    def __init__(self, order: Order, step: int = 0, *, rank: int | None = None, world_size: int | None = None):
        together = dist.is_available() and dist.is_initialized()
        self._order = order
        self._rank = rank if rank is not None else dist.get_rank() if together else 0
        self._world_size = world_size if world_size is not None else dist.get_world_size() if together else 1
        self.load_state_dict({"step": step})

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise ValueError(
                "OrderedBatches in a worker of a DataLoader: expected num_workers=0, it reads ahead itself. Or: "
                "DataLoader(RandomAccess(order.batches(rank, world_size)), batch_size=None, num_workers=N, "
                "sampler=range(step, order.num_steps))."
            )
        for batch in self._order.read(self.step, rank=self._rank, world_size=self._world_size):
            self.step = batch.step_index + 1
            yield _as_tensors(batch)

    def state_dict(self) -> dict[str, int]:
        """All that a checkpoint needs of the data."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration goes on there. ValueError where the run has no such step."""
        found = state.get("step")
        self.step = checks.whole_number("step (updates made)", found, least=0, most=self._order.num_steps)

    def record(self, save_dir: str | os.PathLike) -> Record:
        """Of this rank, from `step` on; see `Order.record`."""
        return self._order.record(
            save_dir,
            self.step,
            rank=self._rank,
            world_size=self._world_size,
            add_up=add_up_digests if self._world_size > 1 else None,
        )


class RandomAccess(Dataset):
    """`order.batches(...)` or `order.examples(...)` as a dataset for samplers and workers.

    Element `i` follows from `i`, so it has no state; `sampler=range(step, order.num_steps)` goes on after `step`
    updates.
    """

    def __init__(self, elements: Sequence[Any]):
        self._elements = elements

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):  # Grain would begin again
            raise IndexError(f"element {index} of {len(self)}")
        return _as_tensors(self._elements[int(index)])


def _as_tensors(element: Any) -> Any:
    """Tensors that share the arrays' memory."""
    if not isinstance(element, Batch | Example):  # what `.map` made of them
        return default_convert(element)
    # Field by field: `default_convert` looks at each number, a tenth of the time that a batch takes.
    return type(element)._make(torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in element)


def add_up_digests(partial: np.ndarray) -> np.ndarray:
    """For `Record`: digests of this rank's rows -> those of whole batches, uint64 (n,), the same on every rank."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.from_numpy(partial.view(np.int64).copy()).to(device)  # as signed ones: sums modulo 2**64 are the same
    dist.all_reduce(total)
    return total.cpu().numpy().view(np.uint64)
