"""The step as it is compiled for TPUs that are not here: its attention, its memory, what crosses the network and when.

In default tests, steps are compiled for CPUs, whose compiler leaves other choices.
"""

import re

import pytest
from support.absent_chips import Foretold, foretell, foretold_in, inside_loops
from support.shared import made_once

from gpt_pretrain.forecast.hlo import Program

pytestmark = pytest.mark.slow

SEQ_LEN, N_LAYER, N_EMBD, VOCAB_SIZE = 384, 3, 512, 8064
SMALLEST_MATRIX = 4 * N_EMBD**2  # bytes, in float32
NETWORK_OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MODEL = (
    f"--model.n_layer={N_LAYER}",
    "--model.n_head=4",
    f"--model.n_embd={N_EMBD}",
    f"--model.vocab_size={VOCAB_SIZE}",
    f"--seq_len={SEQ_LEN}",
    "--num_tokens=1e7",
    "--data_dir=nothing",
    "--topology=v5e:2x2",
)
TWO_MICROBATCHES = (*MODEL, "--batch_size=16", "--per_device_batch_size=2")
LARGE_BATCH = (*MODEL, "--batch_size=128", "--per_device_batch_size=32")


def setting(name: str, value: object) -> str:
    return f"--gin_param={name} = {value!r}"


PER_STEP, PER_USE = ((setting("mesh.fsdp", 4), setting("train.gather_weights", how)) for how in ("per_step", "per_use"))
CASES = {
    "data": TWO_MICROBATCHES,
    "documents": (*TWO_MICROBATCHES, setting("data.document_mask", True), setting("train.reduce_dtype", "bfloat16")),
    "per_step": (*TWO_MICROBATCHES, *PER_STEP),
    "per_use": (*TWO_MICROBATCHES, *PER_USE),
    # Only at full effort, which takes long, does XLA for TPUs move collectives out of loops.
    "per_use in full": (
        *(*TWO_MICROBATCHES, *PER_USE, "--exact"),
        *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=256", "--model.vocab_size=1024"),
    ),
    "sixteen": (
        *(*MODEL, "--batch_size=64", "--per_device_batch_size=2", "--topology=v5e:4x4"),
        *(setting("mesh.fsdp", 16), setting("train.gather_weights", "per_use")),
    ),
    "none": LARGE_BATCH,
    "dots": (*LARGE_BATCH, setting("model.remat", "dots")),
    "full": (*LARGE_BATCH, setting("model.remat", "full")),
    "whole matrices": (*TWO_MICROBATCHES, "--model.n_embd=250", "--model.n_head=2", setting("mesh.fsdp", 4)),
    "too large": (*MODEL, "--model.n_embd=8192", "--model.n_head=64", "--batch_size=4", "--per_device_batch_size=1"),
}


@pytest.fixture
def foretold(tmp_path_factory):
    """`foretold(case)`; each is compiled once a session."""

    def of(case: str) -> Foretold:
        name = f"absent-{case.replace(' ', '-')}"
        return foretold_in(made_once(tmp_path_factory, name, lambda directory: foretell(directory, *CASES[case])))

    return of


@pytest.fixture
def compiled(foretold):
    """`compiled(case)`; the case must fit."""

    def of(case: str) -> Foretold:
        found = foretold(case)
        assert found.status == 0, found.output
        return found

    return of


def network_ops_inside_loops(found: Foretold) -> set[str]:
    instructions = (each for body in inside_loops(Program(found.hlo)) for each in body.instructions)
    ops = {each.op.removesuffix("-start").removesuffix("-done") for each in instructions}
    return ops & set(NETWORK_OPS)


def big_ops(found: Foretold) -> set[tuple[str, str, int]]:
    """(what, in which dtype, how often a step) of all that sends as much as a matrix at once."""
    sent = found.json["collectives"]
    return {(each["op"], each["dtype"], each["times_a_step"]) for each in sent if each["bytes"] >= SMALLEST_MATRIX}


@pytest.mark.parametrize("case", ["data", "documents", "per_step", "per_use"])
def test_attention_is_the_splash_kernel_and_no_array_is_as_large_as_all_pairs_of_tokens(compiled, case):
    text = compiled(case).hlo
    kernels = re.findall(r'%(\w+)[.\d]* = .*custom_call_target="tpu_custom_call"', text)
    assert len(kernels) >= 2 * N_LAYER and all(name.startswith("splash_mha") for name in kernels)
    # XLA's attention cuts the pairs into four pieces.
    quarters = {str(SEQ_LEN * n // 4) for n in range(1, 5)}
    shapes = {tuple(dims.split(",")) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    assert not [shape for shape in shapes if len(shape) > 1 and set(shape[-2:]) <= quarters]


@pytest.mark.parametrize("case, dtype, num_bytes", [("data", "f32", 4), ("documents", "bf16", 2)])
def test_over_data_each_gradient_crosses_once_a_step_after_the_last_microbatch(compiled, case, dtype, num_bytes):
    found = compiled(case)
    assert found.json["num_microbatches"] == 2
    assert network_ops_inside_loops(found) == set()
    sums = [each for each in found.traffic("all-reduce") if each["dtype"] == dtype]
    # The tied embedding once; beside the gradients a few scalars.
    assert sum(each["bytes"] for each in sums) == pytest.approx(num_bytes * found.json["num_params"], abs=64)
    assert big_ops(found) == {("all-reduce", dtype, 1)}


@pytest.mark.parametrize("case, times", [("per_step", 1), ("per_use", 2)])
def test_over_fsdp_weights_are_gathered_in_bfloat16_and_gradients_are_scattered_in_float32(compiled, case, times):
    found = compiled(case)
    assert found.json["num_microbatches"] == 2
    # No sum of a whole table or matrix among them.
    assert big_ops(found) == {("all-gather", "bf16", times), ("reduce-scatter", "f32", times)}
    (scattered,) = (each for each in found.traffic("reduce-scatter") if each["times_a_step"] == times)
    matrices = found.json["num_params"] * (1 - found.json["whole_params_fraction"])
    assert scattered["bytes"] == pytest.approx(4 * matrices, rel=0.02)  # padded to whole tiles
    gathered = sum(each["bytes"] for each in found.traffic("all-gather"))
    # Per use, the weights of layers once in the forward pass, once in the backward pass.
    layers = N_LAYER * 12 * N_EMBD**2
    assert gathered == pytest.approx(2 * (matrices + (layers if case == "per_use" else 0)), rel=0.02)
    inside = network_ops_inside_loops(found)
    assert inside >= {"all-gather"} if case == "per_use" else inside == set()


def test_for_each_use_gradients_are_scattered_in_every_microbatch_at_full_effort_too(compiled):
    found = compiled("per_use in full")
    assert {each["times_a_step"] for each in found.traffic("reduce-scatter")} == {2}
    assert network_ops_inside_loops(found) >= {"all-gather"}


def test_over_sixteen_devices_gradients_are_scattered_in_two_stages_and_no_matrix_is_added_up_whole(compiled):
    found = compiled("sixteen")
    assert big_ops(found) == {("all-gather", "bf16", 2), ("reduce-scatter", "f32", 2)}
    assert {each["group_size"] for each in found.traffic("reduce-scatter")} == {4}


def test_gathered_for_each_use_whole_weights_and_gradients_take_no_memory(compiled):
    per_step, per_use = compiled("per_step").json, compiled("per_use").json
    num_params = per_step["num_params"]
    assert per_step["state_bytes"] == per_use["state_bytes"] == pytest.approx(12 * num_params / 4, rel=0.01)
    # Of the 6 bytes a parameter most; the embedding is whole in both.
    assert per_step["temp_bytes"] - per_use["temp_bytes"] > 3 * num_params
    assert per_step["peak_bytes"] > per_use["peak_bytes"]


def test_the_less_is_kept_for_the_backward_pass_the_less_memory_it_takes(compiled):
    none, dots, full = (compiled(case).json["temp_bytes"] for case in ("none", "dots", "full"))
    assert none > dots > full


@pytest.mark.parametrize("case", ["data", "per_step", "none"])
def test_the_state_is_updated_in_its_own_memory(compiled, case):
    found = compiled(case)
    aliased = re.findall(r"\{\d+\}: \(\d+, \{\}, (?:may|must)-alias\)", found.hlo.splitlines()[0])
    assert len(aliased) > 3 * 12 * N_LAYER  # parameters and AdamW's two moments, at least twelve arrays a layer
    json = found.json
    assert json["peak_bytes"] < json["state_bytes"] + json["temp_bytes"] + 2**24  # the code, too


def test_a_mesh_that_leaves_matrices_whole_is_refused_with_the_arithmetic(foretold):
    found = foretold("whole matrices")
    assert found.status == 2 and not found.hlo
    assert "mesh.fsdp=4 divides no axis of" in found.output and "250 / 4 = 62.50" in found.output


def test_a_step_that_needs_more_than_there_is_ends_with_status_1_and_advice(foretold):
    found = foretold("too large")
    assert found.status == 1 and found.json["fits"] is False
    assert found.json["peak_bytes"] > found.json["device_bytes"] > found.json["state_bytes"] / 2
    assert "DOES NOT FIT. What to change" in found.output
    assert "  - --gin_param='mesh.fsdp=4': splits the state" in found.output
