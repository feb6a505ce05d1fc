"""Interventions: what is done to activations or gradients at the hook sites, said as data.

An intervention is a kind, sites and layers, a strength with a schedule over the steps, and to which rows, tokens and
channels it is done. `intervening.py` does it. The kinds, with strength s, each of them nothing at all where s is 0:

  noise           x + s n           n is normal noise of standard deviation 1
  relative_noise  x + s rms(x) n    rms over the channels of each token
  scale           (1 + s) x
  zero            (1 - s) x                at 1: zero ablation
  mean            (1 - s) x + s mean       at 1: mean ablation, by `vector`, or by the mean over all tokens of the rows
                                           that all devices hold at once
  add             x + s vector             steering
  clip            (1 - s) x + s clip(x)    to [-limit, limit]
  round           (1 - s) x + s round(x)   to `bits` bits, the largest magnitude of each token being the last step; the
                                           gradient takes it for the identity
  dropout         x / (1 - s), a fraction s of the elements zero

Any other kind, "module:f", is a function of the user's, `(x_BTD, ctx) -> x_BTD`; see `intervening.Context`.

A strength is an input of the compiled step and no part of it. Kinds are data and may come from a file. A function is
recorded by its name, and imported only where the user has typed that name: never from a file.
"""

import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_pretrain import checks
from gpt_pretrain.model.sites import OTHER_SITES, SITES, width_of

VERSION = 1  # of an intervention as JSON
_OPTION_OF = {"add": "vector", "clip": "limit", "round": "bits"}  # without which a kind means nothing
KINDS = ("noise", "relative_noise", "scale", "zero", "mean", "add", "clip", "round", "dropout")


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One kind of change at chosen places and times.

    Attributes:
      kind: one of `KINDS`, or "module:f" (or the function itself), a function of your own.
      sites: some of `sites.SITES`.
      layers: from 0, negative ones count from the end; None means every layer.
      strength: what the kind makes of it; 0 is nothing.
      schedule: (step, factor) pairs, steps ascending and from 1: from this step on, `strength` times this factor, and
        times the first one before. None: 1 always.
      ramp: between two steps of the schedule, the factor is on the straight line between theirs.
      first_step, last_step: steps of the first and the last update with it; None for no limit.
      heads, channels: only these, from 0; heads at the site "attn_heads" alone. None: all.
      positions: only (start, stop) of the window: positions from start to stop - 1.
      token_ids: only where the input token is one of these.
      rows: only these rows of each batch, from 0; or a fraction of them, drawn anew at every step.
      on_gradients: the activation stays as it is, its gradient is changed.
      in_evaluation: also when the validation loss is computed, and when text is sampled or tasks are asked with what a
        checkpoint keeps.
      vector: of "add" and "mean", one number a channel; or PATH.safetensors, with :NAME if several tensors are there.
      limit: of "clip". bits: of "round", at least 2.
      function: what `kind` names, if it is the user's. From a file it is never imported.

    Raises ValueError for what cannot be.
    """

    kind: str | Callable
    sites: Sequence[str] = ("block_in",)
    layers: Sequence[int] | None = None
    strength: float = 1.0
    schedule: Sequence[tuple[int, float]] | None = None
    ramp: bool = False
    first_step: int | None = None
    last_step: int | None = None
    heads: Sequence[int] | None = None
    channels: Sequence[int] | None = None
    positions: tuple[int, int] | None = None
    token_ids: Sequence[int] | None = None
    rows: Sequence[int] | float | None = None
    on_gradients: bool = False
    in_evaluation: bool = True
    vector: Sequence[float] | str | None = None
    limit: float | None = None
    bits: int | None = None
    function: Callable | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        self._settle_kind()
        sites = self._sequence("sites", lambda name, each: checks.choice(name, each, SITES))
        if not sites:
            raise ValueError(f"intervention.sites: found none, expected some of {', '.join(SITES)}")
        for name in ("ramp", "on_gradients", "in_evaluation"):
            checks.flag(f"intervention.{name}", getattr(self, name))
        self._set("strength", checks.number("intervention.strength", self.strength, least=-1e30, most=1e30))
        if self.kind == "dropout" and not 0 <= self.strength < 1:
            raise ValueError(f"intervention.strength: found {self.strength}, expected for 'dropout' one in [0, 1)")
        self._settle_schedule()
        self._settle_places()
        self._settle_options()

    def _settle_kind(self) -> None:
        if callable(self.kind):
            self._set("function", self.kind)
            self._set("kind", f"{self.kind.__module__}:{getattr(self.kind, '__qualname__', self.kind)}")
        if not isinstance(self.kind, str) or (self.kind not in KINDS and ":" not in self.kind):
            raise ValueError(
                f"intervention.kind: found {self.kind!r:.80}, expected one of {', '.join(map(repr, KINDS))}, or "
                "'module:f', a function of yours"
            )
        if not self.is_own:
            self._set("function", None)
            return
        if self.function is None:
            self._set("function", _imported(self.kind))
        try:
            inspect.signature(self.function).bind("x_BTD", "ctx")  # pyright: ignore
        except (TypeError, ValueError) as error:
            raise ValueError(f"intervention.kind: {self.kind} cannot be called as (x_BTD, ctx): {error}") from None

    def _settle_schedule(self) -> None:
        for name in ("first_step", "last_step"):
            if (step := getattr(self, name)) is not None:
                self._set(name, checks.whole_number(f"intervention.{name}", step, least=1, most=checks.MOST_ROWS))
        first, last = self.first_step or 1, self.last_step or checks.MOST_ROWS
        if first > last:
            raise ValueError(f"intervention.last_step: found {last}, expected at least first_step, {first}")
        if self.schedule is None:
            return
        pairs = []
        for pair in self._sequence("schedule", lambda name, each: each) or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(f"intervention.schedule: found {pair!r:.80}, expected (step, factor)")
            step = checks.whole_number("intervention.schedule, step", pair[0], least=1, most=checks.MOST_ROWS)
            pairs.append((step, checks.number("intervention.schedule, factor", pair[1], least=-1e30, most=1e30)))
        steps = [step for step, _ in pairs]
        if not pairs or any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"intervention.schedule: found the steps {steps}, expected at least one, and ascending")
        if self.kind == "dropout" and not all(0 <= self.strength * factor < 1 for _, factor in pairs):
            raise ValueError("intervention.schedule: of 'dropout', strength times each factor must be in [0, 1)")
        self._set("schedule", tuple(pairs))

    def _settle_places(self) -> None:
        def number(name, each):
            return checks.whole_number(name, each, least=0, most=checks.MOST_ROWS)

        for name in ("heads", "channels", "token_ids"):
            self._sequence(name, number)
        self._sequence("layers", lambda name, each: checks.whole_number(name, each, least=-1000, most=999))
        if self.layers is not None and set(self.sites) & set(OTHER_SITES):
            raise ValueError(f"intervention.layers: found layers, but {', '.join(OTHER_SITES)} belong to no layer")
        if self.heads is not None and (set(self.sites) != {"attn_heads"} or self.channels is not None):
            raise ValueError("intervention.heads: expected the site 'attn_heads' alone, and no channels beside them")
        positions = self._sequence("positions", number)
        if positions is not None and (len(positions) != 2 or positions[0] >= positions[1]):
            raise ValueError(f"intervention.positions: found {positions}, expected (start, stop), start below stop")
        if isinstance(self.rows, list | tuple):
            self._sequence("rows", number)
        elif self.rows is not None:
            self._set("rows", checks.fraction("intervention.rows", self.rows))

    def _settle_options(self) -> None:
        if not isinstance(self.vector, str):
            self._sequence("vector", lambda name, each: checks.number(name, each, least=-1e30, most=1e30))
        if self.limit is not None:
            self._set("limit", checks.number("intervention.limit", self.limit, least=0, most=1e30))
        if self.bits is not None:
            self._set("bits", checks.whole_number("intervention.bits", self.bits, least=2, most=24))
        wanted = _OPTION_OF.get(self.kind)  # pyright: ignore[reportArgumentType]
        for option in ("vector", "limit", "bits"):
            is_given, may_be = getattr(self, option) is not None, (self.kind, option) == ("mean", "vector")
            if is_given != (option == wanted) and not (is_given and (may_be or self.is_own)):
                found = "one" if is_given else "none"
                raise ValueError(f"intervention.{option}: found {found} for the kind {self.kind!r}")

    def _sequence(self, name: str, checked: Callable[[str, Any], Any]) -> tuple | None:
        """A setting that is a sequence, or None, as a tuple of values that were checked."""
        given = getattr(self, name)
        if given is None:
            return None
        if isinstance(given, str) or not isinstance(given, list | tuple):
            raise ValueError(f"intervention.{name}: found {given!r:.80}, expected a list")
        self._set(name, tuple(checked(f"intervention.{name}", each) for each in given))
        return getattr(self, name)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def is_own(self) -> bool:
        """Whether `kind` is a function of the user's."""
        return self.kind not in KINDS

    @property
    def needs_batch(self) -> bool:
        """Whether what becomes of a token depends on the others of its batch."""
        return self.kind == "mean" and self.vector is None

    def check(self, *, n_layer: int, n_head: int, n_embd: int) -> None:
        """Raises ValueError for layers, heads, channels or a vector that a model of this shape has not."""
        layers = [each for each in self.layers or () if not -n_layer <= each < n_layer]
        if layers:
            raise ValueError(f"intervention.layers: no layer {layers}; the model has {n_layer} (0 to {n_layer - 1})")
        width = min(width_of(site, n_embd) for site in self.sites)
        for name, count in (("heads", n_head), ("channels", width)):
            if wrong := [each for each in getattr(self, name) or () if each >= count]:
                raise ValueError(f"intervention.{name}: found {wrong}, expected numbers from 0 to {count - 1}")
        if isinstance(self.vector, tuple):
            found, expected = len(self.vector), {width_of(site, n_embd) for site in self.sites}
            if expected != {found}:
                raise ValueError(
                    f"intervention.vector: found {found} numbers, expected {' or '.join(map(str, sorted(expected)))}, "
                    f"the channels at {', '.join(self.sites)}"
                )

    def applies(self, site: str, layer: int | None, n_layer: int) -> bool:
        """Whether it is done at this place of a model of `n_layer` layers."""
        if site not in self.sites:
            return False
        return layer is None or self.layers is None or layer in {each % n_layer for each in self.layers}

    def strength_at(self, step: int) -> float:
        """Of an update, counted from 1.

        >>> warm = Intervention("noise", strength=0.5, schedule=[(10, 0), (20, 1)], ramp=True, last_step=30)
        >>> [warm.strength_at(step) for step in (1, 15, 25, 31)]
        [0.0, 0.25, 0.5, 0.0]
        """
        if not (self.first_step or 1) <= step <= (self.last_step or checks.MOST_ROWS):
            return 0.0
        if self.schedule is None:
            return self.strength
        steps, factors = zip(*self.schedule, strict=True)
        if self.ramp:
            return self.strength * float(np.interp(step, steps, factors))
        return self.strength * factors[max(0, int(np.searchsorted(steps, step, side="right")) - 1)]

    def described(self) -> str:
        """What differs from the defaults, in a line.

        >>> Intervention("zero", sites=["mlp_out"], layers=[5], strength=0.5).described()
        'zero at mlp_out, layers=(5,), strength=0.5'
        """
        parts = [f"{self.kind} at {', '.join(self.sites)}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("kind", "sites", "function") or value == field.default:
                continue
            is_long = field.name == "vector" and not isinstance(value, str)
            parts.append(f"vector of {len(value)} numbers" if is_long else f"{field.name}={value!r}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """JSON values only: what differs from the defaults. A function is there by name."""
        assert not isinstance(self.vector, str), "a vector's numbers are kept, not its file"
        fields = {each.name: (getattr(self, each.name), each.default) for each in dataclasses.fields(self)}
        del fields["function"]
        differing = {name: value for name, (value, default) in fields.items() if value != default}
        return {"version": VERSION, **differing}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Intervention":
        """The inverse of `to_json`. A function that is named there is not imported, and cannot be called.

        Raises ValueError for another version, and for what is no intervention.
        """
        if not isinstance(fields, Mapping) or fields.get("version") != VERSION:
            found = fields.get("version") if isinstance(fields, Mapping) else fields
            raise ValueError(f"intervention of version {found!r:.80}, expected {VERSION}")
        fields = {name: value for name, value in fields.items() if name != "version"}
        if "function" in fields or isinstance(fields.get("vector"), str):
            raise ValueError("intervention in a file: expected the numbers of its vector, and no function")
        try:
            return cls(**fields, function=named_in_a_file)
        except TypeError as error:
            raise ValueError(f"intervention: {error}") from None


def check_use(interventions: Sequence[Intervention], *, n_layer: int, n_head: int, n_embd: int) -> None:
    """Raises ValueError for what cannot be done where a trained model is used on texts: what the model has not, and
    what only steps of training have."""
    for each in interventions:
        each.check(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        for is_so, problem in (
            (each.needs_batch, "texts are no batch to take a mean of; expected a vector"),
            (isinstance(each.rows, tuple), "texts are no rows of a batch, which have numbers; expected a fraction"),
            (each.on_gradients, "no gradients are computed here; expected one that changes activations"),
        ):
            if is_so:
                raise ValueError(f"intervention {each.described()}: {problem}")


def named_in_a_file(x_BTD, ctx):
    """Stands in for a function of the user's that only a file has named."""
    del x_BTD, ctx
    raise ValueError("an intervention that a file names is a function, which is never imported from there")


def _imported(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"intervention.kind: cannot load {name!r}: {error}") from error
