"""Where documents begin and end inside a window, and who may attend to whom."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Documents(NamedTuple):
    """The documents of a batch of windows, int32 (batch, time) each.

    Attributes:
      segment_ids_BT: which document of its window a token belongs to, counted from the left. 0 is the one
        that began before the window.
      positions_BT: how many tokens of the same document come before this one in the window.
    """

    segment_ids_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]


def documents_of(tokens_BT: Int[Array, "B T"], end_of_text: int) -> Documents:
    """Each end-of-text token begins a document and belongs to it, as in the token stream.

    With end-of-text E, [5, 6, E, 7, 8, E] -> segment ids [0, 0, 1, 1, 1, 2], positions [0, 1, 0, 1, 2, 0].
    """
    is_first_BT = tokens_BT == end_of_text
    index_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, index_T, 0), axis=1)
    return Documents(jnp.cumsum(is_first_BT, axis=1, dtype=jnp.int32), index_T - first_BT)


def is_same_document(queries_BT: Int[Array, "B T"], keys_BS: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """From their segment ids: may the query (third axis) attend to the key (last axis), causality apart?"""
    return queries_BT[:, None, :, None] == keys_BS[:, None, None, :]
