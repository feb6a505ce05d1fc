"""All that is said of a run before it: put together from its compiled step and the datasheet of its devices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax

from gpt_pretrain.forecast.collectives import Collective, collectives_of
from gpt_pretrain.forecast.compilation import Largest, Step
from gpt_pretrain.forecast.hlo import Program
from gpt_pretrain.forecast.kernels import kernels_of
from gpt_pretrain.forecast.memory import There
from gpt_pretrain.forecast.network import Network
from gpt_pretrain.forecast.roofline import Roofline, roofline_of
from gpt_pretrain.parallel.devices import Chip, chip_of


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind together.

    Attributes:
      collective: as if they were one.
      count: how many they are.
      link: the network that they use.
      secs: in a step; None where the network is not known.
    """

    collective: Collective
    count: int
    link: str
    secs: float | None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one run on one kind of devices.

    Attributes:
      step: as the configuration has it; memory is what this one needs.
      largest: None where it was not looked for.
      timed: the step that all the rest is of: where `step` does not fit, the largest one that does.
      roofline: None where no program was compiled; then there is no traffic either.
      needed_tokens_per_sec: by one process's loader at the predicted speed.
      offered_tokens_per_sec: by this machine's loader; None where the data is not here.
    """

    step: Step
    there: There | None
    largest: Largest | None
    timed: Step
    chip: Chip | None
    roofline: Roofline | None
    traffic: tuple[Traffic, ...]
    offered_tokens_per_sec: float | None = None

    @property
    def num_devices(self) -> int:
        return self.step.built.mesh.size

    @property
    def num_processes(self) -> int:
        return len({device.process_index for device in self.step.built.mesh.devices.flat})

    @property
    def fits(self) -> bool:
        return self.step.fits(self.there)

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.step.built.abstract_state.params))

    @property
    def peak_flops(self) -> float | None:
        """Of one device."""
        peak = self.step.built.peak_flops
        return None if peak is None else peak / self.num_devices

    @property
    def tokens_a_step(self) -> int:
        return self.step.layout.batch_size * self.step.built.config.data.seq_len

    @functools.cached_property
    def model_flops(self) -> float:
        """Of one device and step, by the convention."""
        return self.step.built.flops_per_token * self.tokens_a_step / self.num_devices

    @property
    def network_secs(self) -> float | None:
        """Of a step; None where nothing is known of the links."""
        secs = [each.secs for each in self.traffic]
        return None if None in secs or self.roofline is None else sum(each for each in secs if each is not None)

    @property
    def step_secs(self) -> tuple[float, float] | None:
        """(if all that is sent is sent while something is computed, if none of it is); None without a datasheet."""
        if self.roofline is None or self.roofline.kernel_secs is None or self.network_secs is None:
            return None
        kernels, network = self.roofline.kernel_secs, self.network_secs
        return max(kernels, network), kernels + network

    @property
    def tokens_per_sec(self) -> float | None:
        """Of all devices, the network's time hidden."""
        return None if self.step_secs is None else self.tokens_a_step / self.step_secs[0]

    @property
    def mfu(self) -> float | None:
        if self.step_secs is None or self.peak_flops is None:
            return None
        return self.model_flops / self.step_secs[0] / self.peak_flops

    @property
    def needed_tokens_per_sec(self) -> float | None:
        return None if self.tokens_per_sec is None else self.tokens_per_sec / self.num_processes

    @property
    def whole_fraction(self) -> float:
        """The part of the parameters that every device holds."""
        leaves = jax.tree.leaves(self.step.built.abstract_state.params)
        return sum(leaf.size for leaf in leaves if leaf.sharding.is_fully_replicated) / self.num_params


def predict(step: Step, there: There | None, largest: Largest | None, offered: float | None) -> Prediction:
    """Reads the compiled text."""
    timed = step
    if not step.fits(there) and largest is not None and largest.step is not None:
        timed = largest.step
    devices = list(timed.built.mesh.devices.flat)
    chip = chip_of(devices[0])
    prediction = Prediction(step, there, largest, timed, chip, None, (), offered)
    if not timed.text:
        return prediction
    program = Program(timed.text)
    return dataclasses.replace(
        prediction,
        roofline=roofline_of(list(kernels_of(program)), chip, prediction.peak_flops),
        traffic=_traffic(collectives_of(program, len(devices)), Network(devices, chip) if chip else None),
    )


def _traffic(collectives: Sequence[Collective], network: Network | None) -> tuple[Traffic, ...]:
    """Those of the same kind, arrays and devices together, the most bytes a step first."""
    kinds: dict[tuple, list[Collective]] = {}
    for each in collectives:
        size = max(map(len, each.groups))
        groups = size if each.op == "collective-permute" else each.groups
        kinds.setdefault((each.op, each.dtype, each.times, groups), []).append(each)
    found = []
    for same in kinds.values():
        together = dataclasses.replace(same[0], num_bytes=sum(each.num_bytes for each in same))
        secs = None
        if network is not None:
            each_secs = [network.secs(each) for each in same]
            secs = None if None in each_secs else sum(each for each in each_secs if each is not None)
        found.append(Traffic(together, len(same), network.link(same[0]) if network else "", secs))
    return tuple(sorted(found, key=lambda each: -each.collective.num_bytes * each.collective.times))
