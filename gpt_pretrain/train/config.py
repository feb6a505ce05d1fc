"""What a user says of a run."""

import dataclasses
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.model.spec import GPTConfig
from gpt_pretrain.optim.optimizer import Optimizer
from gpt_pretrain.train.writers import check_names

BatchSizes = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run: a model, data, an optimizer, a mesh, and how often what happens.

    Attributes:
      model: shape and arithmetic.
      data: which tokens, in which order.
      optimizer: total steps -> Optimizer.
      mesh: () -> device mesh.
      save_dir: everything the run writes: checkpoints, curves, the gin configuration.
      batch_size: windows an update, over all devices; or a schedule of (updates made, size):
        ((0, 64), (1000, 512)) is 64 at first and 512 once 1,000 updates are made, that is from step 1,001 on.
      per_device_batch_size: windows that a device holds at once; more than that times the devices is
        accumulated.
      num_tokens: to train on; the run has as many whole steps as fit.
      seed: of the initial weights, dropout and perturbations (the order has `data.seed`).
      from_pretrained: a save_dir or checkpoint of another run whose weights alone are taken at the start.
      log_interval, eval_interval, save_interval, statistics_interval: in steps; 0 means never (the last
        step is always logged, evaluated and saved).
      eval_tokens: of the validation split, at most, from its front.
      num_checkpoints_kept: the newest ones, at least 2: one may be damaged.
      verify_steps: on resume, read the batches of this many last steps again and compare them with the ledger.
      fork: resume with other data, another data.seed or train.seed: a new branch of the run. Changes of batch
        size, mixture, sequence length and exclusions need no fork.
      profile_step: start a profile of 5 steps after this one; 0 for none.
      writers: some of "console", "tensorboard", "wandb".
      wandb_project: in Weights & Biases.
      peak_flops_per_device: for MFU, where the device's datasheet number is not known here.
      sample_prompt: continue this text at the end and print it; None for no sample.
      sample_tokens: how long that sample is.
      describe_config: () -> the configuration as text, kept with curves and checkpoints.
      command: what the user typed, for the last lines.

    Raises ValueError for a value that cannot be.
    """

    model: GPTConfig
    data: DataConfig
    optimizer: Callable[[int], Optimizer]
    mesh: Callable[[], Mesh]
    save_dir: str = "runs/gpt2"
    batch_size: int | Sequence[tuple[int, int]] = 512
    per_device_batch_size: int = 16
    num_tokens: int = 10_000_000_000
    seed: int = 0
    from_pretrained: str | None = None
    log_interval: int = 10
    eval_interval: int = 250
    eval_tokens: int = 10_485_760
    save_interval: int = 1000
    statistics_interval: int = 0
    num_checkpoints_kept: int = 2
    verify_steps: int = 8
    fork: bool = False
    profile_step: int = 0
    writers: Sequence[str] = ("console", "tensorboard", "wandb")
    wandb_project: str = "gpt_pretrain"
    peak_flops_per_device: float | None = None
    sample_prompt: str | None = None
    sample_tokens: int = 100
    describe_config: Callable[[], str] = str
    command: str = "python -m gpt_pretrain.main"

    def __post_init__(self):
        for name, least in _LEAST.items():
            object.__setattr__(self, name, whole_number(f"train.{name}", getattr(self, name), at_least=least))
        for name in ("save_dir", "from_pretrained"):
            if "://" in (value := getattr(self, name) or ""):
                raise ValueError(
                    f"train.{name}: {value} is a URL; expected a directory (mount the bucket, or use a shared disk)"
                )
        check_names(self.writers)
        _ = self.batch_sizes
        self.model.num_positions(self.data.seq_len)  # raises where the model has too few

    @property
    def batch_sizes(self) -> BatchSizes:
        """The schedule: (updates made, size) pairs, the first from 0. ValueError where `batch_size` is none."""
        given, schedule = self.batch_size, ()
        try:
            schedule = ((0, given),) if isinstance(given, int | float) else tuple(map(tuple, given))
            firsts = [first for first, _ in schedule]
            good = firsts[0] == 0 and firsts == sorted(set(firsts))
            good = good and all(number == int(number) for pair in schedule for number in pair)
        except (TypeError, ValueError, IndexError):
            good = False
        if not good or any(size < 1 for _, size in schedule):
            raise ValueError(
                f"train.batch_size: found {given!r}, expected a size, or ((0, size), (updates made, size), ...) with "
                "ascending numbers of updates"
            )
        return tuple((int(first), int(size)) for first, size in schedule)


_LEAST = {
    "log_interval": 0,
    "eval_interval": 0,
    "save_interval": 0,
    "statistics_interval": 0,
    "profile_step": 0,
    "per_device_batch_size": 1,
    "num_tokens": 1,
    "eval_tokens": 1,
    "sample_tokens": 1,
    "num_checkpoints_kept": 2,
    "verify_steps": 0,
}


def whole_number(name: str, value: object, *, at_least: int) -> int:
    """An integer, also where it is written as 1e10. ValueError, with its name, for anything else."""
    if not isinstance(value, int | float) or value != value or value in (float("inf"), float("-inf")):
        good = False
    else:
        good = value == int(value) and value >= at_least
    if not good:
        raise ValueError(f"{name}: found {value!r}, expected a whole number, at least {at_least}")
    return int(value)  # pyright: ignore[reportArgumentType]
