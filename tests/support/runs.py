"""Configurations of tiny runs, what is built of them, and what their checkpoints say."""

from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.model.spec import GPTConfig, ModelSpec
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.optim.optimizer import Optimizer
from gpt_pretrain.train.build import Built, build
from gpt_pretrain.train.config import TrainConfig
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.opened_data import open_data
from gpt_pretrain.train.start import Start
from support.models import TINY_MODEL, make_spec, make_test_mesh


def constant_adamw(total_steps: int) -> Optimizer:
    """Whose step does not depend on the length of the run, so that runs of all lengths share a compiled step."""
    return adamw(total_steps, lr=0.01, schedule="constant", warmup_steps=0)


def run_config(
    dataset, save_dir="runs/test", *, num_steps=8, model=None, data=None, mesh=(1, 1), **changes
) -> TrainConfig:
    """A run of `num_steps` steps of 8 windows of 8 tokens; `changes` are fields of TrainConfig."""
    data_config = DataConfig(**({"dir": str(dataset), "seq_len": 8} | (data or {})))
    settings = {
        "optimizer": constant_adamw,
        "save_dir": str(save_dir),
        "batch_size": 8,
        "per_device_batch_size": 4,
        "num_tokens": num_steps * 8 * data_config.seq_len,
        "log_interval": 1,
        "save_interval": 0,
        "eval_interval": 0,
        "eval_tokens": 64,
        "writers": (),
    }
    return TrainConfig(
        model=GPTConfig(**(TINY_MODEL | {"n_layer": 1} | (model or {}))),
        data=data_config,
        mesh=lambda _: make_test_mesh(*mesh),
        **(settings | changes),
    )


def build_anew(config: TrainConfig) -> tuple[Built, Start]:
    """What a new run computes with."""
    data = open_data(config)
    start = Start.anew(data)
    return build(config, data, start), start


def make_metadata(step: int, *, spec: ModelSpec | None = None, seq_len=8, **changes) -> CheckpointMetadata:
    """What a checkpoint of a run over one stream of 1,000 tokens says."""
    stage = Stage(seed=0, seq_len=seq_len, batch_sizes=((0, 8),), streams=(Stream("", "fingerprint", 1000),))
    fields = {
        "run_id": "a run",
        "step": step,
        "seed": 0,
        "model": spec or make_spec(seq_len),
        "seq_len": seq_len,
        "plan": Plan((stage,)),
        "ledger": Ledger(range(step)),
        "tokenizer": "byte",
        "tokenizer_digest": None,
        "config": "train.seed = 0\n",
    }
    return CheckpointMetadata(**(fields | changes))
