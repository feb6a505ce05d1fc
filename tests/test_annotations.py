"""Axes in annotations are checked in tests, and only there."""

import importlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from support.annotations import check_those_of

MODULE = """
from jax import Array
from jaxtyping import Float

def product(a_TD: Float[Array, "T D"], b_DV: Float[Array, "D V"], scale: float = 1.0) -> Float[Array, "T V"]:
    return scale * (a_TD @ b_DV if scale else a_TD)
"""


def test_an_array_with_other_axes_than_its_annotation_fails_in_tests(tmp_path, monkeypatch):
    (tmp_path / "annotated_example.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    check_those_of("annotated_example")
    example = importlib.import_module("annotated_example")
    a_TD, b_DV = jnp.ones((5, 3)), jnp.ones((3, 7))
    assert example.product(a_TD, b_DV, scale=2).shape == (5, 7)  # other annotations are pyright's
    with pytest.raises(TypeError, match="b_DV"):
        example.product(a_TD, b_DV.T)
    with pytest.raises(TypeError, match="return"):
        example.product(a_TD, b_DV, scale=0)


def test_a_run_checks_no_annotations():
    program = "import sys, gpt_pretrain.model.gpt; sys.exit('beartype' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
