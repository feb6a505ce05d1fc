"""Where a run starts: anew, or at the newest good checkpoint of its `save_dir`."""

import dataclasses
import logging
import os
import uuid
from collections.abc import Collection

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_pretrain.data.edits import edited
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan, PlanError
from gpt_pretrain.data.run import open_run
from gpt_pretrain.model.spec import ModelSpec
from gpt_pretrain.parallel.devices import Device, platform_of
from gpt_pretrain.train import checkpoints, events
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.interventions import with_vectors
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.opened_data import OpenedData
from gpt_pretrain.train.verify import check_last_steps

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """What is there before the first step of this process.

    Attributes:
      step: updates made.
      plan: the data of these and of those to come.
      ledger: of the updates made.
      run_id: what the run's files share; made when it begins.
      is_resumed: there is a checkpoint of this step; else the run begins anew.
      config: the configuration until then, as text; empty if the run begins anew.
    """

    step: int
    plan: Plan
    ledger: Ledger
    run_id: str = ""
    is_resumed: bool = False
    config: str = ""

    @classmethod
    def anew(cls, data: OpenedData, num_tokens: int | None = None) -> "Start":
        """A run's beginning; of a run of so many tokens, with its edits."""
        plan = Plan((data.wanted,))
        if num_tokens is not None:
            plan = edited(plan, 0, data.edits, num_steps=plan.num_steps(num_tokens))
        return cls(0, plan, Ledger(), _new_run_id())


def model_spec(config: TrainConfig, data: OpenedData, device: Device) -> ModelSpec:
    """The model of a run on devices like this one. ValueError for what cannot be, or a vector that is not there."""
    shape, interventions = config.model, with_vectors(config.model.interventions)
    return dataclasses.replace(shape, interventions=interventions).settle(
        platform_of(device),
        seq_len=config.data.seq_len,
        vocab_size=data.first.vocab_size,
        end_of_text=data.first.end_of_text,
        document_mask=config.data.document_mask,
    )


def resume_or_begin(config: TrainConfig, data: OpenedData, plan: Plan | None = None) -> Start:
    """Chooses the newest good checkpoint and continues its plan with what the configuration asks for.

    Args:
      plan: of the whole run, whatever the checkpoint and the configuration say of it.

    Raises ValueError: the checkpoint is of another run, or the data is not what it was trained on.
    """
    metadata = checkpoints.choose(config.directory, run_id=recorded_run_id(config.directory))
    if metadata is None:
        start = Start.anew(data, config.num_tokens)
        return start if plan is None else dataclasses.replace(start, plan=plan)
    plan = plan or _continued(metadata, config, data)
    try:
        check_last_steps(metadata.ledger, plan, {**data.datasets, **data.inserted}, num_steps=config.verify_steps)
    except ValueError as error:
        if jax.process_index() == 0:
            events.note(config.directory, metadata.step, events.Kind.DAMAGED, str(error))
        raise
    return Start(metadata.step, plan, metadata.ledger, metadata.run_id, is_resumed=True, config=metadata.config)


def _new_run_id() -> str:
    """The same on every process."""
    run_id = np.frombuffer(uuid.uuid4().bytes, np.uint8)
    if jax.process_count() > 1:
        run_id = np.asarray(multihost_utils.broadcast_one_to_all(run_id))
    return run_id.tobytes().hex()


def recorded_run_id(save_dir: str | os.PathLike) -> str | None:
    """Of the run whose data.json is there; None where it cannot be read: then the checkpoints say it alone."""
    try:
        return open_run(save_dir).run_id or None
    except ValueError:
        return None


def _continued(metadata: CheckpointMetadata, config: TrainConfig, data: OpenedData) -> Plan:
    problems = different_models(model_spec(config, data, jax.devices()[0]), metadata.model)
    is_other_seed = config.seed != metadata.seed
    if is_other_seed and not config.fork:
        problems.append(f"  train.seed: the checkpoint has {metadata.seed}, this run has {config.seed}")
    theirs, ours = metadata.tokenizer_digest, data.first.tokenizer_digest
    if theirs != ours:  # the plan's fingerprints, which cover it, may be others on purpose (--fork): ids may not
        problems.append(f"  tokenizer: the checkpoint has the digest {theirs}, the data of this run {ours}")
    plan = metadata.plan
    try:
        plan = plan.continued(data.wanted, metadata.step, fork=config.fork)
    except PlanError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(
            f"{config.save_dir} holds the checkpoint of another run (step {metadata.step}):\n"
            + "\n".join(problems)
            + "\nChoose another --save_dir, or set these back. Other data or another seed can be taken up on purpose, "
            "as a new branch of the run, by --fork. To start a new run from its weights, use "
            f"--from_pretrained={config.save_dir} with another --save_dir."
        )
    num_steps = max(metadata.step, plan.num_steps(config.num_tokens))
    plan = edited(plan, metadata.step, data.edits, num_steps=num_steps)
    if is_other_seed:
        log.warning("Fork: train.seed is another after step %d.", metadata.step)
    return plan


def different_models(ours: ModelSpec, theirs: ModelSpec, but: Collection[str] = ()) -> list[str]:
    """A line for each part of the identity, `but` for some, in which a checkpoint's model is another."""
    found, expected = ours.identity, theirs.identity
    return [
        f"  {_SETTINGS.get(name, f'model.{name}')}: the checkpoint has {expected[name]}, this run has {found[name]}"
        for name in found
        if name not in but and found[name] != expected[name]
    ]


_SETTINGS = {  # as a user knows those that are spelled otherwise there
    "padded_vocab_size": "model.vocab_size",
    "num_positions": "positions of the model (data.seq_len or model.block_size)",
    "document_mask": "data.document_mask",
}
