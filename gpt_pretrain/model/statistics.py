"""Norms of parameters, gradients and updates a layer, statistics of the activations at the hook sites and of attention,
and the noise of gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gpt_pretrain.model.attention import Attend
from gpt_pretrain.model.gpt import parts_of
from gpt_pretrain.model.sites import Hook


class Moments(NamedTuple):
    """Of all elements of an activation, float32 scalars. Those of several devices can be put together.

    Attributes:
      largest_F: of hidden units alone, the largest value of each over all tokens.
    """

    mean: jax.Array
    mean_square: jax.Array
    mean_cube: jax.Array
    mean_fourth_power: jax.Array
    max_abs: jax.Array
    largest_F: jax.Array | None = None

    @classmethod
    def of(cls, x_BTD: Float[Array, "B T D"], *, are_units: bool = False) -> "Moments":
        x = x_BTD.astype(jnp.float32)
        square = x * x
        return cls(
            mean=x.mean(),
            mean_square=square.mean(),
            mean_cube=(square * x).mean(),
            mean_fourth_power=(square * square).mean(),
            max_abs=jnp.abs(x).max(),
            largest_F=x.max((0, 1)) if are_units else None,
        )

    def of_all_devices(self, axes: Sequence[str]) -> "Moments":
        """Inside `jax.shard_map`: of rows that lie on all devices along these axes, as many on each."""
        means = jax.lax.pmean(self._replace(max_abs=None, largest_F=None), axes)
        return means._replace(max_abs=jax.lax.pmax(self.max_abs, axes), largest_F=jax.lax.pmax(self.largest_F, axes))

    def described(self) -> dict[str, jax.Array]:
        """Mean, standard deviation, RMS, largest magnitude, kurtosis (3 of normal numbers) and, of hidden units, the
        fraction that is dead: at or below 0 after the GELU, hence before it, for every token."""
        mean, square = self.mean, self.mean_square
        variance = jnp.maximum(square - mean * mean, 0.0)
        fourth = self.mean_fourth_power - 4 * mean * self.mean_cube + 6 * mean**2 * square - 3 * mean**4
        found = {
            "mean": mean,
            "std": jnp.sqrt(variance),
            "rms": jnp.sqrt(square),
            "max_abs": self.max_abs,
            "kurtosis": fourth / jnp.maximum(variance**2, jnp.finfo(jnp.float32).tiny),
        }
        return found if self.largest_F is None else found | {"dead": (self.largest_F <= 0).mean()}


class Entropy(NamedTuple):
    """Of attention: mean over heads and tokens, in nats."""

    mean: jax.Array

    @classmethod
    def of(
        cls, q_BTHK: Float[Array, "B T H K"], k_BTHK: Float[Array, "B T H K"], segment_ids_BT: Int[Array, "B T"] | None
    ) -> "Entropy":
        """One row after the other: the probabilities of one are the largest array."""
        num_time, head_dim = q_BTHK.shape[1], q_BTHK.shape[3]
        may_attend_TS = jnp.tril(jnp.ones((num_time, num_time), bool))

        def of_row(row):
            q_THK, k_SHK, ids_T = row
            scores_HTS = jnp.einsum("thk,shk->hts", q_THK, k_SHK, preferred_element_type=jnp.float32) * head_dim**-0.5
            may_attend = may_attend_TS if ids_T is None else may_attend_TS & (ids_T[:, None] == ids_T)
            logs_HTS = jax.nn.log_softmax(jnp.where(may_attend, scores_HTS, -jnp.inf), axis=-1)
            return -jnp.where(may_attend, jnp.exp(logs_HTS) * logs_HTS, 0.0).sum(-1).mean()

        return cls(jax.lax.map(of_row, (q_BTHK, k_BTHK, segment_ids_BT)).mean())

    def of_all_devices(self, axes: Sequence[str]) -> "Entropy":
        """As for `Moments`."""
        return Entropy(jax.lax.pmean(self.mean, axes))

    def described(self) -> dict[str, jax.Array]:
        return {"entropy": self.mean}


Record = dict[str, Moments | Entropy]


def of_all_devices(record: Record, axes: Sequence[str]) -> Record:
    """Inside `jax.shard_map`: of activations whose rows lie on all devices along these axes, as many on each."""
    return {place: each.of_all_devices(axes) for place, each in record.items()}


def recording(hook: Hook, into: Record) -> Hook:
    """A hook that also writes the moments of what `hook` returns to `into["activations/3/attn_out"]`; of a site in no
    layer to `into["activations/embeddings"]`."""

    def record(site: str, layer: int | None, x_BTD) -> jax.Array:
        x_BTD = hook(site, layer, x_BTD)
        place = site if layer is None else f"{layer}/{site}"
        into[f"activations/{place}"] = Moments.of(x_BTD, are_units=site == "mlp_hidden")
        return x_BTD

    return record


def recording_entropy(into: Record) -> Callable[[Attend, Any], Attend]:
    """Goes around the attention of a model: writes its entropy to `into["activations/3/attention"]`."""

    def around(attend: Attend, segment_ids_BT: jax.Array | None) -> Attend:
        def watched(layer: int, q_BTHK, k_BTHK, v_BTHK) -> jax.Array:
            into[f"activations/{layer}/attention"] = Entropy.of(q_BTHK, k_BTHK, segment_ids_BT)
            return attend(layer, q_BTHK, k_BTHK, v_BTHK)

        return watched

    return around


def described(record: Record) -> dict[str, jax.Array]:
    """{"activations/3/attn_out/rms": ..., "activations/3/attention/entropy": ..., ...}"""
    return {f"{place}/{name}": value for place, each in record.items() for name, value in each.described().items()}


class NoiseScale(NamedTuple):
    """The simple noise scale of gradients: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, A.1.

    Attributes:
      trace: of the covariance of one window's gradient, estimated.
      square: of the true gradient's norm, estimated. One estimate may be below 0; averages over steps are not.
    """

    trace: jax.Array
    square: jax.Array

    @classmethod
    def of(cls, square_of_pieces, square_of_batch, rows_of_piece: int, rows: int) -> "NoiseScale":
        """From the mean of the squared norms of the gradients of pieces of a batch, and that of the whole batch's."""
        square = (rows * square_of_batch - rows_of_piece * square_of_pieces) / (rows - rows_of_piece)
        return cls((square_of_pieces - square_of_batch) / (1 / rows_of_piece - 1 / rows), square)

    def described(self) -> dict[str, jax.Array]:
        """The scale, in windows, is the batch size below which a larger batch makes up for as many steps."""
        scale = self.trace / self.square
        return {"gradient_noise/trace": self.trace, "gradient_noise/square": self.square, "gradient_noise/scale": scale}


def norms_per_part(tree: dict, prefix: str) -> dict[str, jax.Array]:
    """Global norm of each layer and of each other part of a tree like the parameters."""
    return {f"{prefix}/{name}": optax.global_norm(part) for name, part in parts_of(tree).items()}


def update_to_weight(updates: Any, params: dict) -> dict[str, jax.Array]:
    """Of each part, the norm of its update over that of its parameters: {"update_to_weight/layers/3": ..., ...}"""
    norms = norms_per_part(params, "update_to_weight")
    tiny = jnp.finfo(jnp.float32).tiny
    return {
        name: norm / jnp.maximum(norms[name], tiny)
        for name, norm in norms_per_part(updates, "update_to_weight").items()
    }
