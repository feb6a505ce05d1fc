"""Texts of compiled programs, in XLA's notation: what runs how often, what it costs, what devices send one another."""

import pytest

from gpt_pretrain.forecast.collectives import Collective, collectives_of
from gpt_pretrain.forecast.hlo import Program, arrays_in
from gpt_pretrain.forecast.kernels import Kernel, kernels_of


def program(*entry: str, before: str = "") -> Program:
    """Of these instructions, after these computations."""
    lines = "".join(f"  {line}\n" for line in entry)
    return Program(f"HloModule step\n\n{before}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{lines}}}\n")


def kernels(*entry: str, before: str = "") -> list[Kernel]:
    return list(kernels_of(program(*entry, before=before)))


def collectives(*entry: str, before: str = "", num_devices: int = 4) -> list[Collective]:
    return collectives_of(program(*entry, before=before), num_devices)


# ---- how often an instruction runs ----

MULTIPLY = """
%body (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%s), index=1
  %w = f32[16,16]{1,0} constant({...})
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i, %y)
}
"""
UP_TO_5 = """
%compared (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%a, %five), direction=LT
}

%condition (s: (s32[], f32[8,16])) -> pred[] {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%compared
}
"""
UP_TO_THE_THIRD = """
%condition (s: (s32[], f32[8,16], s32[])) -> pred[] {
  %s = (s32[], f32[8,16]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %bound = s32[] get-tuple-element(%s), index=2
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}
"""
LOOP = "ROOT %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body"
START = ("%zero = s32[] constant(0)", "%p = f32[8,16]{1,0} parameter(0)", "%seven = s32[] constant(7)")


@pytest.mark.parametrize(
    "loop, condition, expected",
    [
        (LOOP + ', backend_config={"known_trip_count":{"n":"3"}}', UP_TO_5, 3),
        (LOOP, UP_TO_5, 5),
        (LOOP, UP_TO_THE_THIRD, 7),
        (LOOP, "", 1),
    ],
    ids=["noted", "constant in the condition", "constant among the first values", "not said"],
)
def test_what_a_loop_holds_counts_as_often_as_the_loop_runs(loop, condition, expected):
    start = "%start = (s32[], f32[8,16]{1,0}, s32[]) tuple(%zero, %p, %seven)"
    (kernel,) = kernels(*START, start, loop, before=MULTIPLY + condition)
    assert (kernel.times, kernel.flops) == (expected, 2 * 8 * 16 * 16)


def test_what_a_loop_in_a_loop_holds_counts_for_both():
    outer = """
%outer (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %start = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body
}
"""
    loop = 'while(%p), condition=%unknown, body=%outer, backend_config={"known_trip_count":{"n":"3"}}'
    (kernel,) = kernels(
        "%p = (s32[], f32[8,16]{1,0}) parameter(0)",
        f"ROOT %twice = (s32[], f32[8,16]{{1,0}}) {loop}",
        before=MULTIPLY + UP_TO_5 + outer,
    )
    assert kernel.times == 15


def test_what_a_call_an_asynchronous_call_or_a_branch_holds_counts_once():
    for call in (
        "call(%p), to_apply=%body",
        "async-start(%p), calls=%body",
        "conditional(%which, %p), branch_computations={%body}",
    ):
        (kernel,) = kernels("%p = (s32[], f32[8,16]{1,0}) parameter(0)", f"%it = f32[4] {call}", before=MULTIPLY)
        assert kernel.times == 1, call


def test_a_text_in_another_form_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("something else")


def test_comments_in_types_and_ends_of_lines_in_metadata_are_no_part_of_an_instruction():
    read = program(
        "%p = (f32[2]{0}, /*index=1*/bf16[3]{0}) parameter(0)",
        'ROOT %call = f32[2]{0} custom-call(%p, /*index=1*/%p), custom_call_target="of } somebody", metadata={of\n'
        "several) = lines}",
    )
    assert [array.num_bytes for array in read.entry.by_name["p"].arrays] == [8, 6]
    assert read.entry.root.operand_names == ("p", "p")
    assert read.entry.root.target == "of } somebody"


# ---- arrays ----


@pytest.mark.parametrize(
    "text, num_bytes, stored_bytes",
    [
        ("f32[10,100]{1,0}", 4000, 4000),
        ("f32[10,100]{1,0:T(8,128)}", 4000, 16 * 128 * 4),
        ("f32[10,100]{0,1:T(8,128)}", 4000, 104 * 128 * 4),
        ("bf16[3,10,100]{2,1,0:T(8,128)(2,1)}", 6000, 3 * 16 * 128 * 2),
        ("bf16[10,100]{1,0:T(8,128)(2,1)S(1)}", 2000, 0),
        ("f32[]{:T(128)}", 4, 4),
        ("s4[7]{0}", 4, 4),
        ("pred[7]", 7, 7),
        ("f32[<=16]{0}", 64, 64),
        ("token[]", 0, 0),
    ],
)
def test_an_array_takes_up_whole_tiles_of_main_memory_and_none_of_it_elsewhere(text, num_bytes, stored_bytes):
    (array,) = arrays_in(text)
    assert (array.num_bytes, array.stored_bytes) == (num_bytes, stored_bytes)


# ---- bytes of kernels ----

P = "%p = f32[100,16]{1,0} parameter(0)"


def test_a_fusion_reads_each_operand_once_and_of_a_slice_its_part_alone():
    fused = """
%fused (a: f32[100,16], b: f32[16], i: s32[]) -> f32[4,16] {
  %a = f32[100,16]{1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %i = s32[] parameter(2)
  %part = f32[4,16]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={4,16}
  %rows = f32[4,16]{1,0} broadcast(%b), dimensions={1}
  %sum = f32[4,16]{1,0} add(%part, %rows)
  ROOT %again = f32[4,16]{1,0} multiply(%sum, %rows)
}
"""
    entry = (P, "%q = f32[16]{0} parameter(1)", "%i = s32[] parameter(2)")
    (kernel,) = kernels(*entry, "ROOT %f = f32[4,16]{1,0} fusion(%p, %q, %i), kind=kLoop, calls=%fused", before=fused)
    assert kernel.num_bytes == 4 * (4 * 16 + 16 + 1 + 4 * 16)


def test_a_fusion_that_changes_a_part_writes_that_part_alone():
    fused = """
%fused (a: f32[100,16], b: f32[4,16], i: s32[]) -> f32[100,16] {
  %a = f32[100,16]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %changed = f32[100,16]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}
"""
    entry = (P, "%q = f32[4,16]{1,0} parameter(1)", "%i = s32[] parameter(2)")
    (kernel,) = kernels(*entry, "ROOT %f = f32[100,16]{1,0} fusion(%p, %q, %i), kind=kLoop, calls=%fused", before=fused)
    assert kernel.num_bytes == 4 * (4 * 16 + 1 + 4 * 16)


def test_what_is_not_in_main_memory_costs_no_bytes_and_names_cost_nothing():
    assert [kernel.num_bytes for kernel in kernels(P, "%q = f32[100,16]{1,0:S(1)} negate(%p)")] == [6400]
    assert not kernels(P, "%q = f32[1600]{0} bitcast(%p)", "ROOT %t = (f32[1600]{0}) tuple(%q)")


def test_copies_run_beside_other_kernels():
    (copy,) = kernels(P, "%c = (f32[100,16]{1,0:S(1)}, f32[100,16]{1,0}, u32[]{:S(2)}) copy-start(%p)")
    assert (copy.is_copy, copy.num_bytes) == (True, 6400)
    assert not kernels(P, "%d = f32[100,16]{1,0:S(1)} copy-done(%p)")


# ---- FLOPs ----

CONVOLUTIONS = [
    # A product, as TPUs write it.
    ("f32[4,256,64]", "f32[64,128]", "f32[4,256,128]", "window={size=1}, dim_labels=0bf_io0->0bf"),
    # A product for each of 4 heads: a window that meets one of them each time.
    (
        "f32[4,32,16]",
        "f32[4,16,8]",
        "f32[4,32,8]",
        "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
    ),
    # A window of 3 over 10 places, with padding.
    ("f32[2,10,6]", "f32[3,6,5]", "f32[2,10,5]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"),
]


@pytest.mark.parametrize(
    "left, right, out, attributes, expected",
    [
        (*CONVOLUTIONS[0], 2 * 4 * 256 * 64 * 128),
        (*CONVOLUTIONS[1], 2 * 4 * 32 * 16 * 8),
        (*CONVOLUTIONS[2], 2 * 2 * (3 * 10 - 2) * 6 * 5),
    ],
    ids=["product", "product by heads", "window"],
)
def test_flops_of_a_convolution_leave_out_padding_and_holes(left, right, out, attributes, expected):
    if "dim_labels=0bf_io0" in attributes:
        right = right.replace("]", ",1]")
    (kernel,) = kernels(
        f"%a = {left} parameter(0)", f"%b = {right} parameter(1)", f"%c = {out} convolution(%a, %b), {attributes}"
    )
    assert kernel.flops == expected


def test_flops_of_a_product_of_batches():
    dot = "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    (kernel,) = kernels(
        "%a = f32[4,8,16] parameter(0)", "%b = f32[4,16,32] parameter(1)", f"%c = f32[4,8,32]{{2,1,0}} {dot}"
    )
    assert kernel.flops == 2 * 4 * 8 * 16 * 32


HEADS = tuple(f"%{name} = bf16[2,4,256,64]{{3,2,1,0}} parameter({i})" for i, name in enumerate("qkv"))
CAUSAL = 2 * 4 * 256 * 256 * 64  # FLOPs of a product of queries and keys of which half is needed
CUDNN = '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","256","256"]},"mask_type":"CAUSAL"'


@pytest.mark.parametrize(
    "name, target, attributes, expected",
    [
        ("splash_mha_fwd_residuals.4", "tpu_custom_call", "", 2 * CAUSAL),
        ("splash_mha_dq_no_residuals", "tpu_custom_call", "", 3 * CAUSAL),
        ("splash_mha_dkv", "tpu_custom_call", "", 4 * CAUSAL),
        ("splash_mha_dkv", "tpu_custom_call", ', m={"use_fused_bwd_kernel": true}', 5 * CAUSAL),
        ("any", "tpu_custom_call", ', c={"cost_estimate": {"flops": "1234"}}', 1234),
        ("cudnn", "__cudnn$fmhaSoftmax", f", backend_config={{{CUDNN}}}", 2 * CAUSAL),
        ("cudnn", "__cudnn$fmhaSoftmaxBackward", f", backend_config={{{CUDNN}}}", 5 * CAUSAL),
        ("sort", "TopK", "", 0),
        ("mystery", "tpu_custom_call", "", None),
    ],
)
def test_flops_of_kernels_from_outside_xla(name, target, attributes, expected):
    line = f'%{name} = bf16[2,4,256,64]{{3,2,1,0}} custom-call(%q, %k, %v), custom_call_target="{target}"{attributes}'
    (kernel,) = kernels(*HEADS, line)
    assert (kernel.flops, kernel.is_opaque) == (expected or 0, expected is None)
    # TPUs put them into fusions as well.
    inside = "\n".join(f"  {each}" for each in (*HEADS, f"ROOT {line}"))
    fused = f"%fused (q: bf16[2]) -> bf16[2] {{\n{inside}\n}}\n"
    call = "ROOT %f = bf16[2,4,256,64]{3,2,1,0} fusion(%q, %k, %v), kind=kCustom, calls=%fused"
    (kernel,) = kernels(*HEADS, call, before=fused)
    assert (kernel.flops, kernel.is_opaque) == (expected or 0, expected is None)


def test_flops_of_a_cublas_product():
    config = 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    (kernel,) = kernels(
        "%a = bf16[8,16] parameter(0)",
        "%b = bf16[16,32] parameter(1)",
        f'%c = (bf16[8,32], s8[1024]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", {config}',
    )
    assert kernel.flops == 2 * 8 * 16 * 32


# ---- collectives ----

ROWS, COLUMNS, ALL = ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2, 3),)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,1},{2,3}}", ROWS),
        ("replica_groups={{0,2},{1,3}}", COLUMNS),
        ("replica_groups=[2,2]<=[4]", ROWS),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", COLUMNS),
        ("replica_groups=[1,4]<=[4]", ALL),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}", ROWS),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'data'}", COLUMNS),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'data','fsdp'}", ALL),
        ("replica_groups=mesh['data'=2,'fsdp'=2], device_ids=([2,2]T(1,0)) {'fsdp'}", COLUMNS),
        ("replica_groups=mesh['all'=4] {'all':(1)2}", COLUMNS),
        ("replica_groups=mesh['all'=4] {'all':(2)2}", ROWS),
        ("replica_groups={}", ALL),
        ("to_apply=%add", ALL),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(text, expected):
    (found,) = collectives(P, f"%r = f32[100,16]{{1,0}} all-reduce(%p), channel_id=1, {text}")
    assert found == Collective("all-reduce", "f32", 6400, 1, expected)


@pytest.mark.parametrize(
    "line, num_bytes, sent_bytes",
    [
        ("f32[100,16] all-reduce(%p)", 6400, 2 * 6400 * 3 / 4),
        ("f32[400,16] all-gather(%p), dimensions={0}", 4 * 6400, 6400 * 3),
        ("(f32[100,16], f32[400,16]) all-gather-start(%p), dimensions={0}", 4 * 6400, 6400 * 3),
        ("f32[25,16] reduce-scatter(%p), dimensions={0}", 6400, 6400 * 3 / 4),
        ("f32[100,16] all-to-all(%p), dimensions={0}", 6400, 6400 * 3 / 4),
        ("f32[100,16] collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,2}}", 6400, 6400),
    ],
)
def test_bytes_of_a_collective_are_those_of_the_whole_array(line, num_bytes, sent_bytes):
    kind, _, rest = line.partition("] ")
    (found,) = collectives(P, f"%r = {kind}] {rest}", f"%done = f32[400,16] {rest.split('-')[0]}-done(%r)")
    assert (found.num_bytes, found.sent_bytes) == (num_bytes, sent_bytes)


def test_arrays_that_are_sent_together_count_by_their_types():
    found = collectives(
        P,
        "%q = bf16[10]{0} parameter(1)",
        "%r = (f32[100,16], bf16[10], f32[100,16]) all-reduce(%p, %q, /*index=2*/%p), replica_groups={{0,1,2,3}}",
    )
    assert [(each.dtype, each.num_bytes) for each in found] == [("f32", 12800), ("bf16", 20)]


def test_collectives_that_share_a_channel_are_several():
    same = "channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true"
    found = collectives(P, *(f"%r{i} = f32[100,16]{{1,0}} all-reduce(%p), {same}" for i in range(3)))
    assert len(found) == 3


def test_one_device_sends_nothing():
    assert not collectives(P, "%r = f32[100,16] all-reduce(%p), replica_groups={{0},{1},{2},{3}}")
    assert not collectives(P, "%r = f32[100,16] all-reduce(%p), to_apply=%add", num_devices=1)
    assert not collectives(P, "%r = f32[100,16] collective-permute(%p), source_target_pairs={{0,0}}")


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs():
    body = MULTIPLY.replace("dot(%x, %w)", "all-reduce(%x), replica_groups=[1,4]<=[4]")
    start = "%start = (s32[], f32[8,16]{1,0}) tuple(%zero, %p)"
    (found,) = collectives(*START, start, LOOP, before=body + UP_TO_5)
    assert (found.num_bytes, found.times) == (512, 5)


SCATTERED = """
%all-reduce-scatter (input: f32[100,16]) -> f32[25,16] {
  %input = f32[100,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[100,16]{1,0:T(8,128)} all-reduce(%input), channel_id=41, replica_groups={{0,1,2,3}}
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = f32[25,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %id, %zero), dynamic_slice_sizes={25,16}
}
"""
IN_PIECES = """
%first (a: f32[100,16]) -> f32[100,16] {
  %a = f32[100,16]{1,0} parameter(0)
  ROOT %r = f32[100,16]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="CHAIN"}
}
"""


def test_a_sum_of_which_each_device_keeps_its_part_is_a_reduce_scatter():
    (found,) = collectives(
        P, "ROOT %f = f32[25,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter", before=SCATTERED
    )
    assert (found.op, found.num_bytes) == ("reduce-scatter", 6400)
    whole = SCATTERED.replace("ROOT %slice", "%slice").replace("%all-reduce.1 =", "ROOT %all-reduce.1 =")
    (found,) = collectives(
        P, "ROOT %f = f32[100,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter", before=whole
    )
    assert found.op == "all-reduce"


def test_one_that_is_spread_over_several_fusions_is_one():
    pieces = "".join(
        IN_PIECES.replace("%first", f"%piece{i}").replace("CHAIN", chain) for i, chain in enumerate(("7", "7", "8"))
    )
    calls = [f"%f{i} = f32[100,16]{{1,0}} fusion(%p), kind=kCustom, calls=%piece{i}" for i in range(3)]
    assert len(collectives(P, *calls, before=pieces)) == 2
