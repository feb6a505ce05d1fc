"""What a checkpoint says beside the state: of which run it is, and what is needed to use it without that run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_prep.store.typed import typed
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.model.spec import ModelSpec

VERSION = 1


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """Saved with every checkpoint, as JSON.

    Attributes:
      run_id: of the run, which its `data.json` and all its checkpoints share.
      step: updates made.
      seed: `train.seed`, of weights, dropout and interventions.
      model: with its identity, which a run that is resumed must share.
      seq_len: tokens of a sequence in the last update.
      plan: the data of all updates.
      ledger: digests of the batches so far.
      tokenizer, tokenizer_digest: name and digest, None where nobody recorded them (bare shards). The name is never
        imported: see `data_prep.store.tokenizers`.
      config: the operative gin configuration.
    """

    run_id: str
    step: int
    seed: int
    model: ModelSpec
    seq_len: int
    plan: Plan
    ledger: Ledger
    tokenizer: str | None
    tokenizer_digest: str | None
    config: str = ""

    def with_model(self, model: ModelSpec) -> "CheckpointMetadata":
        """The same of a model that computes otherwise."""
        return dataclasses.replace(self, model=model)

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "version": VERSION,
            "run_id": self.run_id,
            "step": self.step,
            "examples_seen": self.plan.position(self.step),
            "seed": self.seed,
            "model": self.model.to_json(),
            "seq_len": self.seq_len,
            "plan": self.plan.to_json(),
            "ledger": self.ledger.to_text(),
            "tokenizer": self.tokenizer,
            "tokenizer_digest": self.tokenizer_digest,
            "config": self.config,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CheckpointMetadata":
        """The inverse of `to_json`. ValueError for another version, or fields that are missing or of another kind."""
        version = fields.get("version") if isinstance(fields, Mapping) else None
        if version != VERSION:
            raise ValueError(
                f"checkpoint metadata of version {version!r}, expected {VERSION}: saved by another version of "
                "gpt_pretrain, which can read it"
            )
        try:
            metadata = cls(
                run_id=fields["run_id"],
                step=fields["step"],
                seed=fields["seed"],
                model=ModelSpec.from_json(fields["model"]),
                seq_len=fields["seq_len"],
                plan=Plan.from_json(fields["plan"]),
                ledger=Ledger.from_text(fields["ledger"]),
                tokenizer=typed(str | None, fields["tokenizer"], "tokenizer"),
                tokenizer_digest=typed(str | None, fields["tokenizer_digest"], "tokenizer_digest"),
                config=fields["config"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint metadata: {type(error).__name__}: {error}") from None
        metadata._check()
        return metadata

    def _check(self) -> None:
        """ValueError for what nobody has saved."""
        kinds = {"run_id": str, "step": int, "seed": int, "seq_len": int, "tokenizer": str | None, "config": str}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind) or isinstance(value, bool):
                raise ValueError(f"checkpoint metadata: {name} is {value!r}")
        if self.step < 1 or self.seq_len < 1 or len(self.ledger) != self.step:
            raise ValueError(
                f"checkpoint metadata: step {self.step}, sequences of {self.seq_len} tokens and a ledger of "
                f"{len(self.ledger)} steps do not belong together"
            )
