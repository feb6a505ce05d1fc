"""Where in the model something may be watched or changed: the hook sites.

In every layer:

  block_in    the residual stream that enters the layer
  attn_heads  the outputs of the attention's heads, side by side, before the projection that mixes them
  attn_out    the output of the attention sublayer, before it is added to the stream
  stream_mid  the stream after that
  mlp_hidden  the hidden units of the MLP after their GELU: 4 n_embd channels, everywhere else there are n_embd
  mlp_out     the output of the MLP sublayer, before it is added to the stream
  stream_out  the stream after that, which leaves the layer

And once: `embeddings`, the stream before the first layer, and `final_norm`, what the head multiplies.
"""

from typing import Protocol

import jax

LAYER_SITES = ("block_in", "attn_heads", "attn_out", "stream_mid", "mlp_hidden", "mlp_out", "stream_out")
OTHER_SITES = ("embeddings", "final_norm")
SITES = (*LAYER_SITES, *OTHER_SITES)


class Hook(Protocol):
    """Called at every site, with `layer` None where it is of no layer; returns what takes the activation's place."""

    def __call__(self, site: str, layer: int | None, x_BTD) -> jax.Array: ...


def no_hook(site: str, layer: int | None, x_BTD) -> jax.Array:
    """The hook that is not there: adds no operation."""
    del site, layer
    return x_BTD


def width_of(site: str, n_embd: int) -> int:
    """Channels of the activation at a site."""
    return 4 * n_embd if site == "mlp_hidden" else n_embd
