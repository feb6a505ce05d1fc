"""Compiles the step of a run, for devices that are here or not, and looks for the largest batch that fits them."""

import dataclasses
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
      per_device_batch_size: the largest that was seen to fit; None for none.
      is_final: the next larger one does not fit, or there is none.
      peak_bytes: with it.
    """

    per_device_batch_size: int | None
    is_final: bool
    peak_bytes: int | None


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
    lowered = built.train_step.lower(built.abstract_state, batch)
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
    minutes with what is known by then.
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
        used_secs = time.perf_counter() - started
        is_over = len(steps) >= _MOST_COMPILATIONS or used_secs > _SEARCH_SECS
        if not open_sizes or is_over:
            peak = steps[lowest].memory.peak if lowest else None
            return Largest(lowest or None, not open_sizes, peak)
        size = _next(open_sizes, steps, there.usable)
        say(f"trying train.per_device_batch_size={size} ...")
        step = compile_step(dataclasses.replace(config, per_device_batch_size=size), data, devices)
        word = "fits" if step.fits(there) else "does not fit"
        say(f"  needs {step.memory.peak / 2**30:.2f} GiB: {word} ({step.lower_secs + step.compile_secs:.0f} s)")
        steps[size] = dataclasses.replace(step, text="" if step.text is not None else None)  # texts are large


def _next(open_sizes: list[int], steps: dict[int, Step], usable: int) -> int:
    """The largest open size that should fit by a line through two known points, or through one and the state."""
    points = sorted((size, step.memory.peak) for size, step in steps.items())
    if len(points) == 1:
        points.insert(0, (0, next(iter(steps.values())).memory.state))
    (first, low), (second, high) = points[-2:] if open_sizes[-1] > points[-1][0] else points[:2]
    slope = max(1.0, (high - low) / (second - first))
    expected = first + (usable - low) / slope
    fitting = [size for size in open_sizes if size <= expected]
    return fitting[-1] if fitting else open_sizes[0]
