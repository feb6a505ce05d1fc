"""Linear layers: products whose weights are stored in float32 and used in the compute dtype."""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

PRODUCT = "product"  # what the remat policy "dots" keeps


class Multiply(Protocol):
    """How hidden states meet a weight that may be split over devices; see `multiply`.

    Args:
      x_BTI: in the compute dtype.
      kernel: (inputs, outputs) in float32, or this device's part of it.
      path: names at the end of its path among the parameters.
      num_parts: into so many the outputs are cut.
    """

    def __call__(
        self, x_BTI: jax.Array, kernel: jax.Array, path: tuple[str, ...], num_parts: int = 1
    ) -> list[jax.Array]: ...


def multiply(x_BTI, kernel, path: tuple[str, ...] = (), num_parts: int = 1) -> list[jax.Array]:
    """`x @ kernel`, its last axis cut into equal parts: without a copy, as each is a product of its own."""
    del path
    return _products(num_parts, x_BTI, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(
    num_parts: int, x_BTI: Float[Array, "B T I"], kernel_IO: Float[Array, "I O"]
) -> list[Float[Array, "B T _"]]:
    weight_IO = kernel_IO.astype(x_BTI.dtype)
    return [x_BTI @ part for part in jnp.split(weight_IO, num_parts, axis=1)]


def _products_fwd(num_parts, x_BTI, kernel_IO):
    return _products(num_parts, x_BTI, kernel_IO), (x_BTI, kernel_IO)


def _products_bwd(num_parts, residuals, dys):
    """The kernel's gradient leaves the product in the kernel's dtype: float32 sums of bfloat16 terms."""
    x_BTI, kernel_IO = residuals
    weights = jnp.split(kernel_IO.astype(x_BTI.dtype), num_parts, axis=1)
    dx_BTI = functools.reduce(jnp.add, [jnp.einsum("bto,io->bti", dy, w) for dy, w in zip(dys, weights, strict=True)])
    dkernels = [jnp.einsum("bti,bto->io", x_BTI, dy, preferred_element_type=kernel_IO.dtype) for dy in dys]
    return dx_BTI, jnp.concatenate(dkernels, axis=1)


_products.defvjp(_products_fwd, _products_bwd)


class Linear(nnx.Module):
    """`x @ kernel + bias`.

    Args:
      path: names at the end of the layer's path among the parameters.
      std: standard deviation of the initial kernel; the bias begins at 0.
      multiply: what makes the product.
    """

    def __init__(self, path: tuple[str, ...], n_in: int, n_out: int, *, std: float, multiply: Callable, rngs: nnx.Rngs):
        self.path, self.multiply = path, multiply
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (n_in, n_out), jnp.float32))
        rngs.params()  # not used: biases once had a key of their own, and initial weights stay what they were
        self.bias = nnx.Param(jnp.zeros((n_out,), jnp.float32))

    def products(self, x_BTI: Float[Array, "B T I"], num_parts: int) -> list[Float[Array, "B T _"]]:
        """`x @ kernel` without the bias, cut into so many parts."""
        parts = self.multiply(x_BTI, self.kernel[...], (*self.path, "kernel"), num_parts)
        return [checkpoint_name(part, PRODUCT) for part in parts]

    def parts(self, x_BTI: Float[Array, "B T I"], num_parts: int) -> list[Float[Array, "B T _"]]:
        """`self(x_BTI)`, cut into so many parts."""
        biases = jnp.split(self.bias[...], num_parts)
        return [add_bias(part, bias) for part, bias in zip(self.products(x_BTI, num_parts), biases, strict=True)]

    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """In the dtype of `x_BTI`."""
        return self.parts(x_BTI, 1)[0]


@jax.custom_vjp
def add_bias(y_BTO: Float[Array, "B T O"], bias_O: Float[Array, " O"]) -> Float[Array, "B T O"]:
    """In the dtype of `y_BTO`, so that it can join the product before; the bias's gradient is a float32 sum."""
    return y_BTO + bias_O.astype(y_BTO.dtype)


add_bias.defvjp(
    lambda y_BTO, bias_O: (add_bias(y_BTO, bias_O), None),
    lambda _, dy_BTO: (dy_BTO, dy_BTO.astype(jnp.float32).sum((0, 1))),
)


@jax.custom_vjp
def gelu_of_sum(h_BTF: Float[Array, "B T F"], bias_F: Float[Array, " F"]) -> Float[Array, "B T F"]:
    """GPT-2's tanh form of GELU of `h + bias`, computed in float32, in the dtype of `h_BTF`.

    For the backward pass only `h` is kept, the product before it. The tanh is computed again there: that costs no
    memory traffic, and what it would take to store is the largest activation of a layer.
    """
    return jax.nn.gelu(h_BTF.astype(jnp.float32) + bias_F, approximate=True).astype(h_BTF.dtype)


def _gelu_fwd(h_BTF, bias_F):
    return gelu_of_sum(h_BTF, bias_F), (h_BTF, bias_F)


def _gelu_bwd(residuals, dy_BTF):
    h_BTF, bias_F = residuals
    # Without the barrier, XLA finds that the forward pass has computed the same, and keeps that.
    h_BTF, dy_BTF = jax.lax.optimization_barrier((h_BTF, dy_BTF))
    _, vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), h_BTF.astype(jnp.float32) + bias_F)
    (dh_BTF,) = vjp(dy_BTF.astype(jnp.float32))
    # One kernel writes it, which three others read: the sum for the bias and two products.
    dh_BTF = jax.lax.optimization_barrier(dh_BTF.astype(h_BTF.dtype))
    return dh_BTF, dh_BTF.astype(jnp.float32).sum((0, 1))


gelu_of_sum.defvjp(_gelu_fwd, _gelu_bwd)
