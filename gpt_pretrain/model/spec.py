"""What a model is: as a user asks for it, and with everything settled."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from gpt_pretrain import checks
from gpt_pretrain.model.interventions import Intervention

AttentionKernel = Literal["xla", "cudnn", "triton", "splash"]
Remat = Literal["none", "dots", "full"]
Dtype = Literal["bfloat16", "float32"]
PALLAS_TOKENS = 128  # the smallest tile of splash, the largest of Triton's
VERSION = 1  # of a spec as JSON


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of the model and how it computes.

    Attributes:
      n_layer, n_head, n_embd: GPT-2's letters for depth, heads and width; n_head divides n_embd.
      vocab_size: columns of the embedding. Those beyond the tokenizer's vocabulary are padding for
        speed (50,257 -> 50,304) and never predicted.
      block_size: positions the model has; None for as many as the training sequences are long. A run whose
        sequences are to become longer later sets it to the longest; shorter ones use the front of the table.
      dropout: rate after embedding, attention probabilities, and both sublayers.
      dtype: of the computation; "auto" is bfloat16 on accelerators and float32 on CPU. Parameters and
        optimizer state are float32 always.
      attention: "splash" (Pallas, for TPUs), "cudnn" or "triton" (Pallas, both for NVIDIA GPUs), "xla", or "auto". That
        is splash on TPUs and, on NVIDIA GPUs in bfloat16, cuDNN, or with a document mask Triton. It is XLA with
        dropout, and where a Pallas kernel would need sequences of a multiple of 128 tokens.
      remat: what the backward pass computes again, for memory: "none", "dots" (all of a layer but its matrix products),
        "full" (each layer).
      logits_dtype: in which they leave the head's product. The softmax over them is in float32 always; bfloat16 spares
        memory traffic and keeps 8 bits of each logit.
      interventions: what happens at the hook sites; see `interventions.py`.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50304
    block_size: int | None = None
    dropout: float = 0.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attention: Literal["auto", "xla", "cudnn", "triton", "splash"] = "auto"
    remat: Remat = "none"
    logits_dtype: Dtype = "float32"
    interventions: Sequence[Intervention] = ()

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
            if (value := getattr(self, name)) is not None or name != "block_size":
                value = checks.whole_number(f"model.{name}", value, least=1, most=checks.MOST_ROWS)
                object.__setattr__(self, name, value)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}: "
                f"{self.n_embd} / {self.n_head} = {self.n_embd / self.n_head:.2f}. Change one of them."
            )
        checks.fraction("model.dropout", self.dropout, with_one=False)
        for name, known in (
            ("dtype", ("auto", *get_args(Dtype))),
            ("attention", ("auto", *get_args(AttentionKernel))),
            ("remat", get_args(Remat)),
            ("logits_dtype", get_args(Dtype)),
        ):
            checks.choice(f"model.{name}", getattr(self, name), known)
        given = self.interventions
        if not isinstance(given, Sequence) or not all(isinstance(each, Intervention) for each in given):
            raise ValueError(f"model.interventions: found {given!r}, expected a list such as [@intervention()]")
        for intervention in given:
            intervention.check(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)

    def num_positions(self, seq_len: int) -> int:
        """Rows of the position table of a model that is trained on sequences of `seq_len` tokens.

        Raises ValueError where they are longer than `block_size`.
        """
        if self.block_size is None:
            return seq_len
        if seq_len > self.block_size:
            raise ValueError(
                f"data.seq_len={seq_len} is longer than model.block_size={self.block_size}, the positions the model "
                "has. Use a shorter data.seq_len or a larger model.block_size (which makes another model)."
            )
        return self.block_size

    def settle(
        self,
        platform: str,
        *,
        seq_len: int,
        vocab_size: int,
        end_of_text: int,
        document_mask: bool = False,
    ) -> "ModelSpec":
        """Decides everything that depends on the platform and the data.

        Args:
          platform: see `parallel.devices.platform_of`.
          seq_len: tokens of a training sequence.
          vocab_size: of the tokenizer, at most as many as the embedding has columns.
          end_of_text: the id that begins each document.
          document_mask: attention is kept within documents.

        Raises ValueError for what does not fit together or cannot run.
        """
        if vocab_size > self.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.vocab_size} is smaller than the {vocab_size} ids of the data; expected at "
                f"least {vocab_size}."
            )
        dtype = self.dtype if self.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
        return ModelSpec(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            padded_vocab_size=self.vocab_size,
            num_positions=self.num_positions(seq_len),
            document_mask=document_mask,
            vocab_size=vocab_size,
            end_of_text=end_of_text,
            dtype=dtype,
            attention=self._kernel(platform, dtype, seq_len, document_mask),
            dropout=self.dropout,
            remat=self.remat,
            logits_dtype=self.logits_dtype,
            interventions=tuple(self.interventions),
        )

    def _kernel(self, platform: str, dtype: str, seq_len: int, document_mask: bool) -> AttentionKernel:
        """The one that was asked for, or the fastest that can run. ValueError where it cannot."""
        obstacles = {kernel: _obstacle(kernel, platform, dtype, seq_len, document_mask) for kernel in _FASTEST_FIRST}
        for kernel in _FASTEST_FIRST:
            obstacle = "dropout, which no fused kernel has" if self.dropout and kernel != "xla" else obstacles[kernel]
            if kernel == self.attention and obstacle:
                raise ValueError(
                    f"model.attention={kernel!r} cannot run: found {obstacle}. Use model.attention='xla', or 'auto': "
                    "the fastest that can run."
                )
            if self.attention in ("auto", kernel) and not obstacle:
                return kernel
        raise AssertionError("XLA's attention can always run")


_FASTEST_FIRST: tuple[AttentionKernel, ...] = ("splash", "cudnn", "triton", "xla")


def _obstacle(kernel: AttentionKernel, platform: str, dtype: str, seq_len: int, document_mask: bool) -> str | None:
    """Why a kernel cannot run, apart from dropout; None if it can."""
    if kernel == "xla":
        return None
    wanted, name = ("tpu", "a TPU") if kernel == "splash" else ("gpu", "an NVIDIA GPU, Ampere or newer")
    if platform != wanted:
        return f"platform {platform!r}, expected {name}"
    if dtype != "bfloat16" and kernel != "splash":
        return f"dtype {dtype!r}, expected 'bfloat16'"
    if seq_len % PALLAS_TOKENS and kernel != "cudnn":
        return f"data.seq_len {seq_len}, expected a multiple of {PALLAS_TOKENS}"
    if document_mask and kernel == "cudnn":
        # JAX passes cuDNN no segment ids. `mask=` becomes a dense (B, 1, T, T) bias, whose gradient JAX 0.10 asks for
        # too (jax-ml/jax issue 30593: it has that for one sequence at a time) and 0.12 does not. The packed layout
        # (0.10, 0.12) and score_mod (0.12) are private to JAX.
        return "a document mask, for which JAX's interface to cuDNN has no segment ids"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the parameters of a model are: its identity.

    Every field of this class, and no other, decides whether a checkpoint is one of this model. So a field that
    shapes the parameters, or says what they mean, belongs here; one that only says how to compute belongs into
    `ModelSpec`.

    Attributes:
      padded_vocab_size: rows of the token embedding.
      num_positions: rows of the position embedding.
      document_mask: attention stays within a document, and positions count from its beginning.
    """

    n_layer: int
    n_head: int
    n_embd: int
    padded_vocab_size: int
    num_positions: int
    document_mask: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of this class by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Architecture)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(Architecture):
    """A model with nothing left to decide; `GPTConfig.settle` makes it.

    Attributes:
      vocab_size: ids are below it; the embedding's rows from there on are padding.
      end_of_text: the id that begins each document.
      dtype: of the computation, "float32" or "bfloat16".
    """

    vocab_size: int
    end_of_text: int
    dtype: str
    attention: AttentionKernel = "xla"
    dropout: float = 0.0
    remat: Remat = "none"
    logits_dtype: Dtype = "float32"
    interventions: tuple[Intervention, ...] = ()

    @property
    def document_end(self) -> int | None:
        """The end-of-text id where attention is kept within documents, else None."""
        return self.end_of_text if self.document_mask else None

    def plain(self, dtype: str | None = None) -> "ModelSpec":
        """Without what only training needs, or what may not run here: the weights mean the same."""
        return dataclasses.replace(
            self, dtype=dtype or self.dtype, remat="none", attention="xla", dropout=0.0, interventions=()
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "interventions"]
        interventions = {"interventions": [each.to_json() for each in self.interventions]} if self.interventions else {}
        return {"version": VERSION, **{name: getattr(self, name) for name in names}, **interventions}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ModelSpec":
        """The inverse of `to_json`. ValueError for another version, or fields that are missing or not known."""
        if fields.get("version") != VERSION:
            raise ValueError(f"model spec of version {fields.get('version')!r}, expected {VERSION}")
        given = {name: value for name, value in fields.items() if name not in ("version", "interventions")}
        interventions = fields.get("interventions", [])
        if not isinstance(interventions, list):
            raise ValueError(f"model spec: interventions are {interventions!r:.80}, expected a list")
        try:
            spec = cls(**given, interventions=tuple(map(Intervention.from_json, interventions)))
            for each in spec.interventions:
                each.check(n_layer=spec.n_layer, n_head=spec.n_head, n_embd=spec.n_embd)
            return spec
        except TypeError as error:
            raise ValueError(f"model spec: {error}") from None
