"""Which axis of which array is split: one table, by the names of logical axes."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.models import make_spec, make_test_mesh

from gpt_pretrain.model.gpt import init_params, logical_axes
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel import axes, partition
from gpt_pretrain.parallel.partition import names_of, param_spec
from gpt_pretrain.train.state import abstract_state, shardings_of

MATRIX = (axes.EMBD, axes.MLP)


def specs_of(tree, mesh):
    """The partition of each array, by the names on its path."""
    paths, _ = jax.tree_util.tree_flatten_with_path(partition.param_shardings(tree, mesh, logical_axes))
    return {"/".join(names_of(path)): sharding.spec for path, sharding in paths}


@pytest.mark.parametrize(
    "shape, mesh, expected",
    [
        ((8, 32), (1, 4), P(None, "fsdp")),  # the longest
        ((32, 8), (1, 4), P("fsdp")),
        ((8, 8), (1, 4), P("fsdp")),  # of equals, the first
        ((8, 33), (1, 4), P("fsdp")),  # the longest that fsdp divides
        ((6, 33), (1, 4), P()),  # none
        ((6, 33), (2, 2), P("fsdp")),
        ((8, 32), (4, 1), P()),  # data holds copies
        ((32,), (1, 4), P()),  # vectors stay whole
        ((), (1, 4), P()),
        ((2, 8, 32), (1, 4), P()),  # axes that the model has not named
    ],
)
def test_fsdp_splits_the_longest_axis_that_it_divides_of_matrices_only(shape, mesh, expected):
    assert param_spec(shape, MATRIX if len(shape) != 1 else (axes.EMBD,), make_test_mesh(*mesh)) == expected
    assert param_spec(shape, None, make_test_mesh(*mesh)) == P()


@pytest.mark.parametrize("seq_len", [8, 128])
def test_every_matrix_of_the_model_is_split_along_its_longest_axis(seq_len):
    params = jax.eval_shape(lambda: init_params(make_spec(seq_len), jax.random.key(0)))
    found = specs_of(params, make_test_mesh(1, 4))
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in paths:
        expected = P()
        if len(leaf.shape) == 2:
            expected = P("fsdp") if leaf.shape[0] >= leaf.shape[1] else P(None, "fsdp")
        assert found["/".join(names_of(path))] == expected, path
    assert sum(spec != P() for spec in found.values()) == 2 + 2 * 4


def test_the_state_of_adamw_is_split_like_its_parameters():
    state = abstract_state(make_spec(), adamw(9, warmup_steps=0).transform, make_test_mesh(2, 2))
    shardings = shardings_of(state)
    moments = [part for part in shardings.opt_state if isinstance(part, optax.ScaleByAdamState)]
    assert len(moments) == 1 and moments[0].mu == shardings.params == moments[0].nu
    assert moments[0].count.spec == P() == shardings.step.spec


def test_arrays_that_the_model_does_not_know_stay_whole():
    tree = {"layers": {0: {"router": {"kernel": np.zeros((8, 32))}}}, "mlp": {"up": {"kernel": np.zeros((8, 32))}}}
    found = specs_of(tree, make_test_mesh(1, 4))
    assert found == {"layers/0/router/kernel": P(), "mlp/up/kernel": P(None, "fsdp")}


def test_the_rules_decide(monkeypatch):
    mesh, tree = make_test_mesh(2, 2), {"mlp": {"up": {"kernel": np.zeros((8, 32))}}}
    assert specs_of(tree, mesh) == {"mlp/up/kernel": P(None, "fsdp")}
    monkeypatch.setitem(partition.RULES, axes.MLP, ())
    assert specs_of(tree, mesh) == {"mlp/up/kernel": P("fsdp")}
    monkeypatch.setitem(partition.RULES, axes.MLP, ("data",))
    assert specs_of(tree, mesh) == {"mlp/up/kernel": P("fsdp", "data")}
    monkeypatch.setitem(partition.RULES, axes.BATCH, ("data",))
    assert partition.batch_sharding(mesh).spec == P(None, ("data",))
