"""What one kernel of a compiled program costs: bytes of the device's main memory, FLOPs of its products."""

import dataclasses
import math
import re
from collections.abc import Iterator

from gpt_pretrain.forecast.hlo import Array, Computation, Instruction, Program, Run

# These move nothing: they name arrays, run others, wait, or belong to the network.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"),
    *("while", "call", "conditional", "partition-id", "replica-id", "add-dependency"),
}
_OF_THE_NETWORK = re.compile(r"all-|reduce-scatter|collective-|ragged-all|send|recv|async-")
_FREE_TARGETS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "SPMDFullToShardShape"}
_ONLY_RENAME = {"bitcast", "reshape"}  # inside a fusion
_READS_PARTS = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One run of an instruction; `times` of them in a step.

    Attributes:
      num_bytes: read from and written to main memory, each array once.
      flops: of matrix products, a multiplication and an addition counting as two; nothing else is counted.
      is_copy: it only moves data while others run.
      is_opaque: a kernel from outside XLA whose FLOPs are not known here.
    """

    name: str
    num_bytes: int
    flops: float
    times: int
    is_copy: bool = False
    is_opaque: bool = False


def kernels_of(program: Program) -> Iterator[Kernel]:
    """All that compute or copy. Collectives are left out: their bytes are the network's."""
    for run in program.runs():
        instruction = run.instruction
        if instruction.op in _FREE or instruction.op.endswith("-done") or _OF_THE_NETWORK.match(instruction.op):
            continue
        if instruction.target in _FREE_TARGETS:
            continue
        flops = _flops(program, run)
        yield Kernel(
            name=instruction.attribute(r'op_name="([^"]*)"') or instruction.name,
            num_bytes=_bytes(program, run),
            flops=flops or 0.0,
            times=run.times,
            is_copy=instruction.op.endswith("-start"),
            is_opaque=flops is None,
        )


# ---- bytes ----


def _bytes(program: Program, run: Run) -> int:
    instruction, computation = run.instruction, run.computation
    operands = computation.operands(instruction)
    written = _stored(instruction)
    match instruction.op:
        case "fusion":
            (called, *_) = program.called(instruction)
            reads = (
                _read_bytes(program, called, called.parameters[index], operand)
                for index, operand in enumerate(operands)
                if index in called.parameters
            )
            return sum(reads) + _written_bytes(program, called, instruction)
        case "copy-start" | "slice-start":  # (destination and source, context); ((source), destination, context)
            arrays = [array for array in instruction.arrays if array.shape or array.space == 0][:2]
            moved = min((array.num_bytes for array in arrays), default=0)
            return moved * sum(array.space == 0 for array in arrays)
        case "dynamic-slice" | "slice" | "gather":
            return 2 * written
        case "dynamic-update-slice":
            return 2 * _stored(operands[1])
        case "scatter":
            return 3 * sum(map(_stored, operands[2:3]))
    return sum(map(_stored, operands)) + written


def _stored(instruction: Instruction) -> int:
    return sum(array.stored_bytes for array in instruction.arrays)


def _read_bytes(program: Program, computation: Computation, value: Instruction, operand: Instruction) -> int:
    """That a fusion reads of one operand: all, or the parts that it takes. `value` stands for it inside."""
    whole, total = _stored(operand), 0
    if not whole:
        return 0
    for user in computation.users[value.name]:
        position = user.operand_names.index(value.name)
        if user.op in _ONLY_RENAME:
            total += _read_bytes(program, computation, user, operand)
        elif user.op == "tuple" or _OF_THE_NETWORK.match(user.op):
            continue  # it is passed on
        elif user.op in _READS_PARTS and position == 0:
            total += sum(array.num_bytes for array in user.arrays)
        elif user.op in ("dynamic-update-slice", "scatter") and position == 0:
            total += _size(computation, user, 2) if user.op == "scatter" else 0  # the rest stays as it is
        elif user.op == "fusion":
            (called, *_) = program.called(user)
            total += _read_bytes(program, called, called.parameters[position], operand)
        else:
            return whole
    return min(whole, total)


def _written_bytes(program: Program, computation: Computation, fusion: Instruction) -> int:
    """That a fusion writes: its results, or the parts of them that it changes."""
    root = computation.root
    results = computation.operands(root) if root.op == "tuple" else [root]
    if len(results) != len(fusion.arrays):
        return _stored(fusion)
    pairs = zip(results, fusion.arrays, strict=True)
    return sum(_written_of(program, computation, result, array) for result, array in pairs)


def _written_of(program: Program, computation: Computation, result: Instruction, array: Array) -> int:
    if not array.stored_bytes:
        return 0
    while result.op in _ONLY_RENAME:
        (result, *_) = computation.operands(result)
    if result.op == "parameter":
        return 0  # it is passed on
    if result.op == "dynamic-update-slice":
        return min(array.stored_bytes, _size(computation, result, 1))
    if result.op == "scatter":
        return min(array.stored_bytes, _size(computation, result, 2))
    if result.op == "fusion" and len(result.arrays) == 1:
        (called, *_) = program.called(result)
        return _written_of(program, called, called.root, array)
    return array.stored_bytes


def _size(computation: Computation, instruction: Instruction, position: int) -> int:
    operands = computation.operands(instruction)
    return sum(array.num_bytes for array in operands[position].arrays) if position < len(operands) else 0


# ---- FLOPs ----


def _flops(program: Program, run: Run) -> float | None:
    """None for a kernel from outside XLA that is not known here."""
    instruction = run.instruction
    if instruction.op == "custom-call":
        return _custom_flops(run)
    if instruction.op != "fusion":
        return _product_flops(run)
    total = 0.0
    for inner in program.within(run):
        # TPUs put kernels from outside into fusions too.
        flops = _custom_flops(inner) if inner.instruction.op == "custom-call" else _product_flops(inner)
        if flops is None:
            return None
        total += flops
    return total


def _product_flops(run: Run) -> float:
    match run.instruction.op:
        case "dot":
            return _dot_flops(run)
        case "convolution":
            return _convolution_flops(run)
    return 0.0


def _dot_flops(run: Run) -> float:
    contracting = run.instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    (left, *_) = run.computation.operands(run.instruction)
    depth = math.prod(left.arrays[0].shape[int(axis)] for axis in contracting.split(",") if axis)
    return 2.0 * math.prod(run.instruction.arrays[0].shape) * depth


def _convolution_flops(run: Run) -> float:
    """TPUs write products as convolutions: `dim_labels=0bf_io0->0bf` names the axes of both inputs and the result."""
    labels = run.instruction.attribute(r"dim_labels=([^,\s]+)") or ""
    inputs, _, out_labels = labels.partition("->")
    _, _, kernel_labels = inputs.partition("_")
    left_labels = inputs.partition("_")[0]
    left, right = (operand.arrays[0].shape for operand in run.computation.operands(run.instruction)[:2])
    out = run.instruction.arrays[0].shape
    window = _window(run.instruction)
    total = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * right[kernel_labels.index("i")]
    for axis, label in enumerate(sorted(label for label in out_labels if label.isdigit())):
        spec = {name: values[axis] for name, values in window.items() if axis < len(values)}
        total *= _num_overlaps(
            left[left_labels.index(label)], right[kernel_labels.index(label)], out[out_labels.index(label)], spec
        )
    return total


def _window(instruction: Instruction) -> dict[str, list[str]]:
    """`window={size=4x12 stride=3x11 pad=0_0x1_1 lhs_dilate=4x12}` -> values of each axis by name."""
    text = instruction.attribute(r"window=\{([^}]*)\}") or ""
    return {name: values.split("x") for name, values in re.findall(r"(\w+)=(\S+)", text)}


def _num_overlaps(left: int, kernel: int, out: int, spec: dict[str, str]) -> int:
    """Pairs of an output and an element of the kernel at which there is an input and not padding or a hole."""
    stride, dilation = int(spec.get("stride", "1")), int(spec.get("rhs_dilate", "1"))
    holes, low = int(spec.get("lhs_dilate", "1")), int(spec.get("pad", "0_0").split("_")[0])
    if kernel == 1 and stride == holes == 1 and low == 0:
        return min(out, left)
    count, end = 0, (left - 1) * holes
    for index in range(kernel):
        for place in range(out):
            position = place * stride + index * dilation - low
            count += 0 <= position <= end and position % holes == 0
    return count


def _custom_flops(run: Run) -> float | None:
    instruction, operands = run.instruction, run.computation.operands(run.instruction)
    target = instruction.target
    if "fmha" in target:
        return _cudnn_attention_flops(instruction, operands)
    if target.startswith("__cublas"):
        axes = re.findall(r'"(\d+)"', instruction.attribute(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]') or "")
        depth = math.prod(operands[0].arrays[0].shape[int(axis)] for axis in axes)
        return 2.0 * math.prod(instruction.arrays[0].shape) * depth
    if target in ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call"):
        return _written_by_hand_flops(instruction, operands)
    return 0.0  # XLA's own: sorting, bits, random numbers


def _cudnn_attention_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """Of queries, keys and values; backward has five products of the same size where forward has two."""
    scores = instruction.attribute(r'"intermediate_tensor_shape":\s*\{[^\[]*"dimensions":\s*\[([^\]]*)\]') or ""
    batch, heads, num_queries, num_keys = (int(each) for each in re.findall(r'"(\d+)"', scores))
    head_dim = math.prod(operands[0].arrays[0].shape) / (batch * heads * num_queries)
    num_products = 5 if "Backward" in instruction.target else 2
    is_causal = "CAUSAL" in (instruction.attribute(r'"mask_type":\s*"(\w+)"') or "")
    return num_products * 2.0 * batch * heads * num_queries * num_keys * head_dim * (0.5 if is_causal else 1.0)


def _written_by_hand_flops(instruction: Instruction, operands: list[Instruction]) -> float | None:
    """By the estimate that came with the kernel; else of attention, which is known by its name, by its operands.

    Its kernels take queries, keys and values as (..., heads, time, head dimension), and skip the causal half.
    """
    if estimate := instruction.attribute(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?([\d.e+]+)'):
        return float(estimate)
    name = instruction.name + (instruction.attribute(r'op_name="([^"]*)"') or "")
    if not re.search(r"splash|flash|mha|attention", name):
        return None
    products = 3 if "dq" in instruction.name else 2
    if "dkv" in instruction.name:
        products = 5 if re.search(r"use_fused_bwd_kernel\W+true", instruction.attributes) else 4
    arrays = [
        array for operand in operands for array in operand.arrays if len(array.shape) >= 3 and array.dtype[0] != "s"
    ]
    if len(arrays) < 2:
        return None
    queries, keys = arrays[0].shape, arrays[1].shape
    return products * 2.0 * math.prod(queries) * keys[-2] / 2
