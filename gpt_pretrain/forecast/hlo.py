"""Reads the text of a compiled program (XLA's HLO after all optimisations): its instructions and how often each runs.

The text is XLA's own notation, which has no promise of stability; what is read here was found in jaxlib 0.10 and 0.12,
for CPU, TPU and NVIDIA GPUs. It describes what one device does.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = ", re.ASCII)
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array on a device.

    Attributes:
      minor_to_major: its axes, the one with neighbouring elements in front; empty where the text does not say.
      tile: a TPU stores arrays in tiles of this shape, padded to whole ones; empty for none.
      space: 0 is the device's main memory, others are inside its cores or on the host.
    """

    dtype: str
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.ceil(math.prod(self.shape) * _bits(self.dtype) / 8)

    @property
    def stored_bytes(self) -> int:
        """That it takes up in main memory, padding included."""
        if self.space:
            return 0
        if not self.tile or not self.minor_to_major:
            return self.num_bytes
        shape = list(self.shape)
        for axis, size in zip(self.minor_to_major, reversed(self.tile), strict=False):
            shape[axis] = -(-shape[axis] // size) * size
        return math.ceil(math.prod(shape) * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type op(operands), attributes`.

    Attributes:
      type: as text; `arrays` are those in it.
      arguments: what stands in the brackets: names of operands; of a constant its value, of a parameter its number.
      computation: it stands there; `computation.operands(it)` are its operands.
    """

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return arrays_in(self.type)

    @functools.cached_property
    def operand_names(self) -> tuple[str, ...]:
        if self.op in ("constant", "parameter"):
            return ()
        return tuple(each.split()[-1].lstrip("%") for each in _split(self.arguments))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, but for a loop's condition."""
        names = []
        for attribute, several, one in _CALLED.findall(self.attributes):
            if attribute != "condition":
                names += [name.strip().lstrip("%") for name in (several or one).split(",")]
        return tuple(name for name in names if name)

    @property
    def target(self) -> str:
        """Of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """The pattern's group in the attributes, or None."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


class Computation:
    """Instructions in the order in which they run."""

    def __init__(self, name: str):
        self.name = name
        self.instructions: list[Instruction] = []

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((each for each in self.instructions if each.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(each.arguments): each for each in self.instructions if each.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each of them."""
        found: dict[str, list[Instruction]] = {each.name: [] for each in self.instructions}
        for each in self.instructions:
            for name in dict.fromkeys(each.operand_names):
                found.setdefault(name, []).append(each)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Those that are known; in a text that is whole, all."""
        return [self.by_name[name] for name in instruction.operand_names if name in self.by_name]


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction of a program that is run: `times` in all."""

    instruction: Instruction
    computation: Computation
    times: int


class Program:
    """A compiled program.

    Raises ValueError for a text that has no entry.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        entry = None
        for name, is_entry, instructions in _computations(text):
            computation = self.computations[name] = Computation(name)
            computation.instructions += map(_instruction, instructions)
            entry = computation if is_entry else entry
        if entry is None:
            raise ValueError("a compiled program's text has no ENTRY: it is in a form that is not known here")
        self.entry = entry

    def runs(self) -> Iterator[Run]:
        """All that runs, fusions as one instruction each: what a fusion calls is not listed."""
        yield from self._runs(self.entry, 1)

    def _runs(self, computation: Computation, times: int) -> Iterator[Run]:
        for instruction in computation.instructions:
            yield Run(instruction, computation, times)
            if instruction.op in ("while", "call", "conditional") or instruction.op.startswith("async-start"):
                inner = times * self.trip_count(instruction, computation) if instruction.op == "while" else times
                for called in self.called(instruction):
                    yield from self._runs(called, inner)

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def within(self, run: Run) -> Iterator[Run]:
        """What a fusion does, also those that it calls itself."""
        for computation in self.called(run.instruction):
            for instruction in computation.instructions:
                inner = Run(instruction, computation, run.times)
                yield inner
                if instruction.op == "fusion":
                    yield from self.within(inner)

    def trip_count(self, loop: Instruction, computation: Computation) -> int:
        """How often a `while` runs its body: as XLA notes it, else by the bound in its condition; 1 without both.

        JAX's loops count from 0 by 1 up to a constant.
        """
        if noted := _TRIP_COUNT.search(loop.attributes):
            return int(noted[1])
        condition = self.computations.get(loop.attribute(r"\bcondition=%?([\w.\-]+)") or "")
        if condition is None:
            return 1
        bounds: list[int] = []
        to_read = [condition]
        while to_read:
            current = to_read.pop()
            for each in current.instructions:
                if each.op == "constant" and re.fullmatch(r"\d+", each.arguments):
                    bounds.append(int(each.arguments))
                to_read += self.called(each) if each.op in ("fusion", "call") else []
        return max(bounds or self._bounds_outside(condition, loop, computation), default=1)

    def _bounds_outside(self, condition: Computation, loop: Instruction, computation: Computation) -> Iterator[int]:
        """Constants among a loop's initial values that its condition looks at."""
        start = computation.by_name.get(loop.operand_names[0]) if loop.operand_names else None
        values = computation.operands(start) if start else []
        for each in condition.instructions:
            index = each.attribute(r"\bindex=(\d+)") if each.op == "get-tuple-element" else None
            value = values[int(index)] if index and int(index) < len(values) else None
            if value and value.op == "constant" and re.fullmatch(r"\d+", value.arguments):
                yield int(value.arguments)


def arrays_in(text: str) -> tuple[Array, ...]:
    """The arrays of a type, those of tuples one after the other.

    >>> arrays_in("(f32[], bf16[8,768]{1,0:T(8,128)(2,1)S(1)})")[1].shape
    (8, 768)
    """
    return tuple(_array(*match) for match in _ARRAY.findall(text))


@functools.lru_cache(maxsize=4096)
def _array(dtype: str, dims: str, layout: str) -> Array:
    shape = tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
    order, _, notes = layout.partition(":")
    tile = re.match(r"T\(([\d,]*)\)", notes)
    space = re.search(r"S\((\d+)\)", notes)
    return Array(dtype, shape, _numbers(order), _numbers(tile[1]) if tile else (), int(space[1]) if space else 0)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each.isdigit())


def _bits(dtype: str) -> int:
    """
    >>> _bits("bf16"), _bits("pred"), _bits("s4"), _bits("f8e4m3fn")
    (16, 8, 4, 8)
    """
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return _BITS.get(dtype, int(digits[1]) if digits else 32)


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, its instructions, each on one line)."""
    head, instructions = None, []
    for line in text.splitlines():
        if head is None:
            head = _COMPUTATION.match(line) if "->" in line else None
        elif line == "}":
            yield head[2], bool(head[1]), instructions
            head, instructions = None, []
        elif _INSTRUCTION.match(line):
            instructions.append(line)
        elif instructions:  # a kernel's metadata may hold ends of lines
            instructions[-1] += line


def _instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    assert head, line
    rest = _COMMENT.sub("", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing(rest, len(op))
    return Instruction(head[2], kind, op, rest[len(op) + 1 : close], rest[close + 1 :], bool(head[1]))


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _split(text: str) -> list[str]:
    """By the commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]
