"""Compiles the step of a run, for devices that are here or not, and looks for the largest batch that fits them."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gpt_pretrain.forecast.memory import Needed, There, bytes_a_device, needed, needed_by_message
from gpt_pretrain.parallel.devices import Device
from gpt_pretrain.parallel.partition import batch_sharding
from gpt_pretrain.parallel.placement import BatchLayout, batch_layout
from gpt_pretrain.train.build import Built, build
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.opened_data import OpenedData
from gpt_pretrain.train.start import Start

Say = Callable[[str], None]
_MOST_COMPILATIONS = 8
_SEARCH_SECS = 300.0
_FAR_TOO_MUCH = 1.4  # times what there is, by an estimate


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step that was compiled, or refused for the memory that it needs.

    Attributes:
      layout: of its batch: of a schedule of sizes, the one that needs most.
      memory: that it needs, as far as that is known.
      text: of the compiled program; None where it was refused.
    """

    built: Built
    layout: BatchLayout
    memory: Needed
    text: str | None
    lower_secs: float
    compile_secs: float

    def fits(self, there: There | None) -> bool:
        """Where nothing is known of the device, the compiler's word counts."""
        return self.text is not None and (there is None or self.memory.peak <= there.usable)


@dataclasses.dataclass(frozen=True)
class Largest:
    """The result of a search.

    Attributes:
      step: with the largest batch that was seen to fit; None where none does.
      is_final: no larger one fits; else the search ended before that was known.
      next_size, next_bytes: the next larger one and what it needs, where that was estimated and not compiled.
    """

    step: Step | None
    is_final: bool
    next_size: int | None = None
    next_bytes: int | None = None

    @property
    def per_device_batch_size(self) -> int | None:
        return None if self.step is None else self.step.layout.per_device


def compile_step(config: TrainConfig, data: OpenedData, devices: Sequence[Device] | None) -> Step:
    """Compiles the step that the trainer would run.

    Raises ValueError for a configuration that cannot be run on these devices.
    """
    built = build(config, data, Start.anew(data), devices)
    layout = max(built.layouts, key=lambda each: (each.per_device, each.batch_size))
    dtype = np.result_type(*(source.dtype for source in data.sources("train").values()))
    shape = (layout.num_microbatches, layout.microbatch, config.data.seq_len + 1)
    batch = jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(built.mesh))
    state_bytes = bytes_a_device(built.abstract_state)
    started = time.perf_counter()
    lowered = built.train_step.lower(built.abstract_state, batch, *built.doses(1))
    lowered_at = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error)[:2000].lower():
            raise
        peak = max(needed_by_message(str(error)) or 0, state_bytes)
        memory, text = Needed(state_bytes, None, None, peak), None
    else:
        memory = needed(compiled, state_bytes, built.mesh.devices.flat[0].platform)
        text = compiled.as_text() or ""
    return Step(built, layout, memory, text, lowered_at - started, time.perf_counter() - lowered_at)


def candidates(batch_sizes: Sequence[int], num_devices: int) -> list[int]:
    """Sizes of `train.per_device_batch_size` by which batches of all these sizes can be cut, ascending.

    >>> candidates([48], 4)
    [1, 2, 3, 4, 6, 12]
    """
    found = []
    for size in range(1, max(batch_sizes) // num_devices + 1):
        try:
            layouts = [batch_layout(batch_size, size, num_devices) for batch_size in batch_sizes]
        except ValueError:
            continue
        if max(layout.per_device for layout in layouts) == size:
            found.append(size)
    return found


def largest_that_fits(
    asked: Step, there: There, data: OpenedData, devices: Sequence[Device] | None, say: Say
) -> Largest:
    """Searches by compiling, beginning with `asked`, which is compiled already.

    What to try next is estimated from the memory that the last ones needed. It ends after eight compilations or five
    minutes with what is known by then, and does not compile what would need far too much by a line through two others.
    """
    config = asked.built.config
    sizes = candidates([layout.batch_size for layout in asked.built.layouts], asked.built.mesh.size)
    steps = {asked.layout.per_device: asked}
    started = time.perf_counter()
    while True:
        fitting = [size for size, step in steps.items() if step.fits(there)]
        too_large = [size for size, step in steps.items() if not step.fits(there)]
        lowest, highest = max(fitting, default=0), min(too_large, default=max(sizes) + 1)
        open_sizes = [size for size in sizes if lowest < size < highest]
        if not open_sizes:
            return Largest(steps.get(lowest), is_final=True)
        estimate = _estimate(steps, open_sizes[0])
        if len(fitting) > 1 and estimate > _FAR_TOO_MUCH * there.usable:
            return Largest(steps[lowest], True, open_sizes[0], int(estimate))
        if len(steps) >= _MOST_COMPILATIONS or time.perf_counter() - started > _SEARCH_SECS:
            return Largest(steps.get(lowest), is_final=False)
        promising = [size for size in open_sizes if _estimate(steps, size) <= there.usable]
        size = max(promising, default=open_sizes[0])
        say(f"trying train.per_device_batch_size={size} ...")
        step = steps[size] = compile_step(dataclasses.replace(config, per_device_batch_size=size), data, devices)
        word = "fits" if step.fits(there) else "does not fit"
        say(f"  needs {step.memory.peak / 2**30:.2f} GiB: {word} ({step.lower_secs + step.compile_secs:.0f} s)")


def _estimate(steps: dict[int, Step], size: int) -> float:
    """Bytes at the peak, on a line through the two nearest known points; with one alone, through it and the state.

    Beyond all that are known, on the steepest line between neighbours: near its limit a compiler for TPUs computes
    things again instead of keeping them, and more memory seems to be needed no longer.
    """
    points = {known: float(step.memory.peak) for known, step in steps.items()}
    if len(points) == 1:
        points[0] = float(next(iter(steps.values())).memory.state)
    known = sorted(points)
    slopes = {pair: (points[pair[1]] - points[pair[0]]) / (pair[1] - pair[0]) for pair in itertools.pairwise(known)}
    if size > known[-1]:
        return points[known[-1]] + max(slopes.values()) * (size - known[-1])
    first, second = sorted(sorted(points, key=lambda each: abs(each - size))[:2])
    return points[first] + (points[second] - points[first]) / (second - first) * (size - first)
