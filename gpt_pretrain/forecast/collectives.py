"""What the devices of a compiled program send one another."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from gpt_pretrain.forecast.hlo import Computation, Instruction, Program, Run

Groups = tuple[tuple[int, ...], ...]
"""Devices that take part together, by their index in the program's order."""

_OPS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Arrays of one type that groups of devices exchange.

    Attributes:
      op: XLA's name: "all-reduce", "all-gather", "reduce-scatter", ...
      num_bytes: of the whole arrays: what an all-reduce adds up, an all-gather makes, a reduce-scatter begins with.
      times: in a step.
      groups: each exchanges on its own.
    """

    op: str
    dtype: str
    num_bytes: int
    times: int
    groups: Groups

    @property
    def sent_bytes(self) -> float:
        """By each device each time, where they pass pieces around in a ring: the least that is possible."""
        num_devices = max(map(len, self.groups), default=1)
        if self.op in ("collective-permute", "collective-broadcast"):
            return float(self.num_bytes)
        rounds = 2 if self.op == "all-reduce" else 1
        return rounds * self.num_bytes * (num_devices - 1) / num_devices


def collectives_of(program: Program, num_devices: int) -> list[Collective]:
    """All of a program's, in its order, those of one device left out. One that XLA runs in pieces is one."""
    found, seen = [], set()
    for run in program.runs():
        inner = list(program.within(run)) if run.instruction.op == "fusion" else []
        for each in (run, *inner):
            op = each.instruction.op.removesuffix("-start")
            if op not in _OPS:
                continue
            piece = _chain(each.instruction)
            if piece and (op, piece) in seen:
                continue
            seen.add((op, piece))
            if op == "all-reduce" and _is_scattered(each, run):
                op = "reduce-scatter"
            found += _read(op, each, num_devices)
    return found


def _read(op: str, run: Run, num_devices: int) -> Iterator[Collective]:
    groups = _groups(run.instruction, num_devices)
    if len(max(groups, key=len, default=())) < 2:
        return
    factor = len(groups[0]) if op == "all-gather" else 1
    sizes: dict[str, int] = {}
    for operand in _sent(op, run.instruction, run.computation):
        for array in operand.arrays:
            sizes[array.dtype] = sizes.get(array.dtype, 0) + factor * array.num_bytes
    for dtype, size in sizes.items():
        yield Collective(op, dtype, size, run.times, groups)


def _sent(op: str, instruction: Instruction, computation: Computation) -> list[Instruction]:
    operands = computation.operands(instruction)
    return operands[:1] if op == "collective-permute" else operands  # others say where it is put


def _chain(instruction: Instruction) -> str | None:
    """Names a collective that TPUs spread over several fusions, to run beside what these compute."""
    return instruction.attribute(r'\bchain_id="([^"]*)"')


def _is_scattered(inner: Run, outer: Run) -> bool:
    """Whether each device keeps its own part of the sum alone: how TPUs spell a reduce-scatter."""
    return (
        inner is not outer
        and inner.computation.root.op == "dynamic-slice"
        and inner.instruction.name in inner.computation.root.operand_names
    )


def _groups(instruction: Instruction, num_devices: int) -> Groups:
    """The devices that exchange; of a permutation the pairs."""
    if pairs := instruction.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        found = (tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs))
        return tuple(pair for pair in found if pair[0] != pair[1])
    text = instruction.attributes
    if listed := re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _rows(_iota(iota[2]).reshape(_dims(iota[1])))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", text):
        return _mesh_groups(*mesh.groups())
    return (tuple(range(num_devices)),)


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> Groups:
    """`'a'=4,'b'=2`, then perhaps the order of devices, then the axes along which they exchange: `'b'`, `'a':(1)2`.

    A part of an axis, `:(1)2`, is 2 long and has 1 part before it.
    """
    names, sizes = zip(*((name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)), strict=True)
    devices = np.arange(math.prod(sizes)) if device_ids is None else _iota(device_ids)
    shape, along = [], []
    wanted = {name: part for name, *part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in zip(names, sizes, strict=True):
        before, length = (int(each) if each else 0 for each in wanted.get(name, ("", "")))
        pieces = [before, length, size // (before * length)] if length else [size]
        if name in wanted:
            along.append(len(shape) + (1 if length else 0))
        shape += pieces
    array = devices.reshape(shape)
    rest = [axis for axis in range(array.ndim) if axis not in along]
    return _rows(array.transpose(*rest, *along).reshape(-1, math.prod(shape[axis] for axis in along)))


def _iota(text: str) -> np.ndarray:
    """XLA's short form of a permutation: `[2,4]T(1,0)` counts from 0 in a (2, 4) array and transposes it."""
    shape = re.search(r"\[([\d,]+)\]", text)
    order = re.search(r"T\(([\d,]+)\)", text)
    assert shape, text
    counted = np.arange(math.prod(_dims(shape[1]))).reshape(_dims(shape[1]))
    return (counted.transpose(_dims(order[1])) if order else counted).reshape(-1)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _rows(array: np.ndarray) -> Groups:
    return tuple(map(tuple, array.tolist()))
