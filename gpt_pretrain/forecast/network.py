"""How fast devices can send one another what a program makes them send."""

from collections import Counter
from collections.abc import Sequence

from gpt_pretrain.forecast.collectives import Collective
from gpt_pretrain.parallel.devices import Chip, Device


class Network:
    """The links between devices.

    Args:
      devices: in the program's order.
      chip: their datasheet.
    """

    def __init__(self, devices: Sequence[Device], chip: Chip):
        self._devices, self._chip = devices, chip
        self._lengths = [len(each) for each in _axes(devices)]

    def secs(self, collective: Collective) -> float | None:
        """Of all its times in a step, if nothing else is sent meanwhile. None where the links are not known."""
        rates = [self._rate(group)[0] for group in collective.groups]
        if not rates or None in rates:
            return None
        return collective.times * collective.sent_bytes / min(rate for rate in rates if rate is not None)

    def link(self, collective: Collective) -> str:
        """Which network it uses, in words."""
        return self._rate(collective.groups[0])[1] if collective.groups else ""

    def _rate(self, group: Sequence[int]) -> tuple[float | None, str]:
        """(bytes/s that each device of a group can send to the next one, over which network)."""
        devices, chip = [self._devices[index] for index in group], self._chip
        if chip.link_rate is None:
            return None, ""
        if devices[0].platform == "tpu":
            return self._torus_rate(devices, chip.link_rate), "ICI"
        on_a_host = Counter(device.process_index for device in devices)
        if len(on_a_host) == 1:
            return chip.link_rate, "NVLink"
        if chip.host_rate is None:
            return None, "between hosts"
        # What goes from host to host is spread over the adapters of all its devices that take part.
        return min(chip.link_rate, max(on_a_host.values()) * chip.host_rate), "between hosts"

    def _torus_rate(self, devices: Sequence[Device], link_rate: float) -> float:
        """Along each axis that the group extends over, a ring in both directions where the axis is closed and
        wholly the group's, else a line; on all axes at once. Cores that share a chip share its links."""
        links = 0
        for extent, length in zip(map(len, _axes(devices)), self._lengths, strict=True):
            ring = self._chip.closes_rings_of
            is_closed = ring is not None and extent == length and length % ring == 0
            links += 0 if extent == 1 else 2 if is_closed else 1
        cores = len(devices) / len({tuple(device.coords) for device in devices})
        return max(1, links) * link_rate * cores / self._chip.cores


def _axes(devices: Sequence[Device]) -> list[set[int]]:
    """The coordinates that occur on each axis of the slice; none for devices that are not on one."""
    coords = [getattr(device, "coords", None) or () for device in devices]
    return [set(axis) for axis in zip(*coords, strict=True)]
