"""How much the validation loss rises when one site of one layer is ablated or disturbed: all of them, one by one.

One program is compiled for the whole sweep. The model in it has an intervention at every place, each with a strength of
its own that is an input: all are 0 but one. The means for mean ablation, too, are an input: the first pass, in which
every strength is 0, gives the loss to compare with and, beside it, the mean of every channel over all tokens.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.store.token_sources import TokenSource, num_windows
from gpt_pretrain import checks
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import model_of
from gpt_pretrain.model.intervening import Doses, Rows, make_hook
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.losses import nll_per_row, num_loss_chunks
from gpt_pretrain.model.sites import LAYER_SITES
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.train import pretrained
from gpt_pretrain.train.checkpoint_copies import checkpoint_at
from gpt_pretrain.train.step import split_tokens

ABLATIONS = ("zero", "mean", "noise", "relative_noise")
_TOKENS_AT_ONCE = 1 << 13


@dataclasses.dataclass(frozen=True)
class Ablated:
    """The losses of a sweep, in nats a token.

    Attributes:
      checkpoint: the directory it was read from.
      updates: that the checkpoint has made.
      num_tokens: targets over which each loss is the mean.
      kinds: some of `ABLATIONS`.
      dose: the strength of those that are noise.
      sites: some of `LAYER_SITES`.
      loss: with nothing done.
      losses: float64 (kinds, layers, sites).
      compile_secs, run_secs: of the program, and of all passes.
    """

    checkpoint: str
    updates: int
    num_tokens: int
    kinds: tuple[str, ...]
    dose: float
    sites: tuple[str, ...]
    loss: float
    losses: np.ndarray
    compile_secs: float
    run_secs: float

    @property
    def rises(self) -> np.ndarray:
        """Losses less the loss with nothing done."""
        return self.losses - self.loss


def run_of(checkpoint: str) -> str:
    """The save_dir of a checkpoint that is named as a user does.

    >>> run_of("runs/a"), run_of("gs://b/runs/a/checkpoints/300/")
    ('runs/a', 'gs://b/runs/a')
    """
    return re.sub(r"/checkpoints(/\d+)?/?$", "", checkpoint)


def ablate(
    run: OpenedRun,
    checkpoint: str,
    *,
    kinds: Sequence[str] = ("zero", "mean"),
    sites: Sequence[str] = ("attn_out", "mlp_out"),
    dose: float = 1.0,
    num_tokens: int = 16_384,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Ablated:
    """Losses over the first windows of the validation streams, as evaluation takes them.

    Args:
      checkpoint: a run's save_dir, or one checkpoint in it. Its own interventions and dropout are left out.
      dose: strength of noise.
      num_tokens: at most so many targets, of several streams shared out equally; at least a window of each.
      progress: told passes done and their number.

    Raises ValueError: no good checkpoint, no validation split, names that are none.
    """
    for name, given, known in (("kinds", kinds, ABLATIONS), ("sites", sites, LAYER_SITES)):
        if not given:
            raise ValueError(f"--{name}: found none, expected some of {', '.join(known)}")
        for each in given:
            checks.choice(f"--{name}", each, known)
    kinds, sites = (tuple(dict.fromkeys(each)) for each in (kinds, sites))
    place = checkpoint_at(checkpoint)
    params, metadata = pretrained.load(place.directory)
    spec, seq_len = metadata.model, metadata.seq_len
    windows_NT = _validation_windows(run, seq_len, max(1, num_tokens))
    if windows_NT.max() >= spec.vocab_size:
        raise ValueError(f"{place.name}: knows the ids below {spec.vocab_size}, the data has {windows_NT.max()}")
    interventions = tuple(
        Intervention(kind, sites=[site], layers=[layer], strength=dose if "noise" in kind else 1.0)
        for kind in kinds
        for layer in range(spec.n_layer)
        for site in sites
    )
    num_at_once = max(1, min(len(windows_NT), _TOKENS_AT_ONCE // seq_len))
    batches = _batches(windows_NT, num_at_once)
    sums_of = _sums_of(spec, interventions, seq_len, num_at_once)
    zeros = tuple(np.zeros(_width(spec, each), np.float32) if each.kind == "mean" else None for each in interventions)
    nothing = Doses(np.array(metadata.step, np.int32), np.zeros(len(interventions), np.float32), zeros)
    started = time.perf_counter()
    compiled = jax.jit(sums_of).lower(params, *batches[0], nothing).compile()
    compiled_at = time.perf_counter()

    def total(doses: Doses) -> tuple[float, dict[str, np.ndarray]]:
        found = [jax.device_get(compiled(params, *batch, doses)) for batch in batches]
        sums = {place: sum(np.asarray(means[place], np.float64) for _, means in found) for place in found[0][1]}
        return sum(float(nll) for nll, _ in found) / targets, sums  # pyright: ignore[reportReturnType]

    targets = len(windows_NT) * seq_len
    loss, sums = total(nothing)
    vectors = tuple(np.float32(sums[_key(each)] / targets) if each.kind == "mean" else None for each in interventions)
    losses = []
    for index, each in enumerate(interventions):
        progress(index + 1, len(interventions) + 1)
        strengths_I = np.zeros(len(interventions), np.float32)
        strengths_I[index] = each.strength
        losses.append(total(nothing._replace(strengths_I=strengths_I, vectors=vectors))[0])
    progress(len(interventions) + 1, len(interventions) + 1)
    return Ablated(
        checkpoint=place.name,
        updates=metadata.step,
        num_tokens=targets,
        kinds=kinds,
        dose=dose,
        sites=sites,
        loss=loss,
        losses=np.reshape(losses, (len(kinds), spec.n_layer, len(sites))),
        compile_secs=compiled_at - started,
        run_secs=time.perf_counter() - compiled_at,
    )


def _key(each: Intervention) -> str:
    assert each.layers is not None
    return f"{each.layers[0]}/{each.sites[0]}"


def _width(spec: ModelSpec, each: Intervention) -> int:
    return (4 if each.sites[0] == "mlp_hidden" else 1) * spec.n_embd


def _sums_of(spec: ModelSpec, interventions: Sequence[Intervention], seq_len: int, num_rows: int) -> Callable:
    """`(params, window_BT, first, weights_B, doses) -> (summed nll, sums of the activations over tokens)`."""
    to_model, means_of = model_of(spec), {_key(each) for each in interventions if each.kind == "mean"}
    num_chunks = num_loss_chunks(num_rows, seq_len, spec.padded_vocab_size, jax.default_backend())

    def sums_of(params, window_BT, first, weights_B, doses):
        model, sums = to_model(params), {}
        inputs_BT, targets_BT = split_tokens(window_BT)
        rows = Rows(inputs_BT, first + jnp.arange(num_rows), 0, 0)
        change = make_hook(interventions, spec.n_layer, spec.n_head, doses, rows)

        def hook(site, layer, x_BTD):
            if (place := f"{layer}/{site}") in means_of:
                sums[place] = jnp.einsum("btd,b->d", x_BTD.astype(jnp.float32), weights_B)
            return change(site, layer, x_BTD)

        documents = documents_of(inputs_BT, spec.end_of_text) if spec.document_mask else None
        x_BTD = model(inputs_BT, documents=documents, hook=hook)
        nll_B, _ = nll_per_row(x_BTD, model.head_VD, targets_BT, spec.vocab_size, num_chunks, spec.logits_dtype)
        return (nll_B * weights_B).sum(), sums

    return sums_of


def _batches(windows_NT: np.ndarray, num_rows: int) -> list[tuple[np.ndarray, np.int32, np.ndarray]]:
    """(windows, number of the first, weights) of equal shape; what fills up the last one has weight 0."""
    found = []
    for first in range(0, len(windows_NT), num_rows):
        numbers = first + np.arange(num_rows)
        weights_B = (numbers < len(windows_NT)).astype(np.float32)
        found.append((windows_NT[np.minimum(numbers, len(windows_NT) - 1)], np.int32(first), weights_B))
    return found


def _validation_windows(run: OpenedRun, seq_len: int, num_tokens: int) -> np.ndarray:
    """(windows, seq_len + 1): the first ones of every stream's validation split."""
    splits: dict[str, TokenSource] = {}
    for stream in run.plan.stages[-1].streams:
        dataset = run.dataset(stream)
        if "val" not in dataset.splits:
            raise ValueError(f"{dataset.directory}: has no validation split; prepare it with --val_tokens")
        splits[stream.name] = dataset.splits["val"]
    most = max(1, num_tokens // len(splits) // seq_len)
    found = []
    for source in splits.values():
        try:
            count = min(num_windows(source, seq_len), most)
        except ValueError as error:
            raise ValueError(f"validation split: {error}") from None
        found.append(source.read(np.arange(count) * seq_len, seq_len + 1))
    return np.concatenate(found)
