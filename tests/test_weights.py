"""Split weights: when they are made whole, what crosses the network for it, and what cannot be split."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import VOCAB_SIZE, make_spec, make_test_mesh

from gpt_pretrain.model.gpt import init_params
from gpt_pretrain.train import step as step_lib
from gpt_pretrain.train.step import StepOptions
from gpt_pretrain.train.weights import check_that_all_are_split, reduction_stages

SEQ_LEN = 8
MESHES = [(4, 1), (2, 2), (1, 4)]


@pytest.fixture(scope="module")
def batch():
    return jax.random.randint(jax.random.key(1), (2, 8, SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)


@pytest.fixture(scope="module")
def params():
    return init_params(make_spec(SEQ_LEN), jax.random.key(0))


def gradients(params, batch, mesh=None, dtype="float32", **options):
    spec = dataclasses.replace(make_spec(SEQ_LEN), dtype=dtype)
    found = step_lib.make_gradients(StepOptions(spec, num_chunks=2, mesh=mesh and make_test_mesh(*mesh), **options))
    return jax.device_get(jax.jit(lambda params, batch: found(params, batch, None))(params, batch))


@pytest.fixture(scope="module")
def of_one_device(params, batch):
    return gradients(params, batch)


@pytest.mark.parametrize(
    "mesh, gather", [((4, 1), "per_step"), *((m, g) for m in MESHES[1:] for g in ("per_step", "per_use"))]
)
def test_every_mesh_and_way_to_gather_gives_the_gradients_of_one_device(params, batch, of_one_device, mesh, gather):
    found = gradients(params, batch, mesh, gather=gather)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, of_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["per_step", "per_use"])
def test_in_bfloat16_gradients_are_float32_and_close_and_a_reduction_in_bfloat16_is_another(
    params, batch, of_one_device, gather
):
    def distance(found):
        errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), found[0], of_one_device[0])
        return np.mean(jax.tree.leaves(errors))

    single = gradients(params, batch, dtype="bfloat16")
    split = gradients(params, batch, (2, 2), dtype="bfloat16", gather=gather)
    rounded = gradients(params, batch, (2, 2), dtype="bfloat16", gather=gather, reduce_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(split[0])} == {np.dtype("float32")}
    assert distance(split) < 1.1 * distance(single) < 0.05
    assert distance(split) < distance(rounded) < 0.05


def test_a_mesh_that_would_leave_matrices_whole_is_refused_with_the_arithmetic_and_a_way_out():
    spec = make_spec(SEQ_LEN, n_layer=1, n_head=1, n_embd=6)  # 6 and 18 are not multiples of 4
    mesh = make_test_mesh(1, 4)
    with pytest.raises(
        ValueError,
        match=r"mesh\.fsdp=4 divides no axis of 2 matrices, such as .*attention\.qkv\.kernel of 6 x 18 \(6 / 4 = 1\.50, 18 / 4 = 4\.50\).* Use mesh\.fsdp=2,",
    ):
        check_that_all_are_split(spec, mesh)
    check_that_all_are_split(spec, make_test_mesh(2, 2))
    check_that_all_are_split(spec, make_test_mesh(4, 1))
    check_that_all_are_split(make_spec(SEQ_LEN), mesh)


@pytest.mark.parametrize("gather", ["per_step", "per_use"])
def test_gradients_added_up_in_stages_are_the_same(params, batch, of_one_device, gather, monkeypatch):
    def in_pairs(num_devices, _):
        return reduction_stages(num_devices, 2)

    monkeypatch.setattr("gpt_pretrain.train.weights.reduction_stages", in_pairs)
    found = gradients(params, batch, (1, 4), gather=gather)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, of_one_device)


@pytest.mark.parametrize("num_devices, sizes", [(8, []), (16, [4, 4]), (32, [4, 8]), (64, [8, 8]), (11, [])])
def test_stages_have_groups_of_at_most_eight_where_there_can_be(num_devices, sizes):
    stages = reduction_stages(num_devices, 8)
    assert stages == [None] if not sizes else [len(groups[0]) for groups in stages] == sizes
    for groups in filter(None, stages):
        assert sorted(itertools.chain(*groups)) == list(range(num_devices))
