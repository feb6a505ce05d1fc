"""What may be done to the activations at a hook site while the model runs.

There are three sites in every block (see `transformer.Block`):

  block_in   the residual stream that enters the block
  attn_out   the output of the attention sublayer, before it is added to the stream
  mlp_out    the output of the MLP sublayer, before it is added to the stream

A perturbation is any function `(x_BTD, layer, rng) -> x_BTD`: those below, or one from your own module:

    import my_module                               # my_module.py: def shift(x_BTD, layer, rng): ...
    model.perturbations = [@perturb()]
    perturb.function = "my_module:shift"
    perturb.layers = [3, 4]
    perturb.sites = ["attn_out"]
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

SITES = ("block_in", "attn_out", "mlp_out")


class Hook(Protocol):
    """Called at every site; returns what takes the activation's place."""

    def __call__(self, site: str, layer: int, x_BTD) -> jax.Array: ...


def no_hook(site: str, layer: int, x_BTD) -> jax.Array:
    """The hook that is not there: adds no operation."""
    del site, layer
    return x_BTD


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """One function at chosen layers and sites.

    Attributes:
      function: `(x_BTD, layer, rng) -> x_BTD`, or "module:name" of one.
      layers: block numbers from 0 (negative ones count from the end); None means every block.
      sites: some of `SITES`.
      in_evaluation: also active when the validation loss is computed. An ablation wants that, a noise
        that is meant as regularisation does not.
    """

    function: Callable | str
    layers: Sequence[int] | None = None
    sites: Sequence[str] = ("block_in",)
    in_evaluation: bool = True

    def __post_init__(self):
        unknown = sorted(set(self.sites) - set(SITES))
        if unknown or isinstance(self.sites, str):
            raise ValueError(f"perturb.sites: found {self.sites!r}, expected some of {list(SITES)}")
        if isinstance(self.function, str):
            object.__setattr__(self, "function", _import_function(self.function))
        try:
            inspect.signature(self.function).bind("x_BTD", "layer", "rng")  # pyright: ignore
        except TypeError as error:
            raise ValueError(
                f"perturb.function: {self.function} cannot be called as (x_BTD, layer, rng): {error}"
            ) from None

    def check_layers(self, n_layer: int) -> None:
        """Raises ValueError if a layer does not exist in a model of `n_layer` blocks."""
        wrong = [layer for layer in self.layers or () if not -n_layer <= layer < n_layer]
        if wrong:
            raise ValueError(f"perturb.layers: no layer {wrong}; the model has {n_layer} (0 to {n_layer - 1})")

    def applies(self, site: str, layer: int, n_layer: int) -> bool:
        return site in self.sites and (self.layers is None or layer in {each % n_layer for each in self.layers})


def make_hook(perturbations: Sequence[Perturbation], n_layer: int, rng: jax.Array | None) -> Hook:
    """A hook that applies `perturbations` in their order; each call gets its own key from `rng`."""
    if not perturbations:
        return no_hook

    def hook(site, layer, x_BTD):
        for index, perturbation in enumerate(perturbations):
            if perturbation.applies(site, layer, n_layer):
                place = (index * n_layer + layer) * len(SITES) + SITES.index(site)
                key = None if rng is None else jax.random.fold_in(rng, place)
                y_BTD = perturbation.function(x_BTD, layer, key)  # pyright: ignore
                if y_BTD.shape != x_BTD.shape:
                    raise ValueError(
                        f"perturbation {perturbation.function} at {site} of layer {layer} returned shape "
                        f"{y_BTD.shape}, expected {x_BTD.shape}"
                    )
                x_BTD = y_BTD.astype(x_BTD.dtype)
        return x_BTD

    return hook


def gaussian_noise(x_BTD, layer, rng, *, stddev: float = 0.1):
    """Adds independent normal noise of standard deviation `stddev`."""
    del layer
    return x_BTD + stddev * jax.random.normal(rng, x_BTD.shape, x_BTD.dtype)


def scaling(x_BTD, layer, rng, *, factor: float):
    """Multiplies by `factor`."""
    del layer, rng
    return x_BTD * factor


def zeroing(x_BTD, layer, rng):
    """Replaces by zeros: at `attn_out` or `mlp_out`, ablates the sublayer."""
    del layer, rng
    return jnp.zeros_like(x_BTD)


def added_vector(x_BTD, layer, rng, *, vector: Sequence[float] | str, scale: float = 1.0):
    """Adds `scale * vector` at every position: n_embd numbers, or the path of a .npy file with them."""
    del layer, rng
    vector_D = np.load(vector) if isinstance(vector, str) else np.asarray(vector, np.float32)
    if vector_D.shape != x_BTD.shape[-1:]:
        raise ValueError(f"added_vector: found shape {vector_D.shape}, expected ({x_BTD.shape[-1]},)")
    return x_BTD + scale * vector_D


def _import_function(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"perturb.function: found {name!r}, expected 'module:function'")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"perturb.function: cannot load {name!r}: {error}") from error
