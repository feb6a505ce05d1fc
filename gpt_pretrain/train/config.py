"""What a user says of a run."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from jax.sharding import Mesh

from data_prep.store.buckets import is_bucket
from gpt_pretrain import checks
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.stages import batch_sizes_of
from gpt_pretrain.mirrors import folder_in_cache
from gpt_pretrain.model.spec import Dtype, GPTConfig
from gpt_pretrain.optim.optimizer import Optimizer
from gpt_pretrain.parallel.devices import Device
from gpt_pretrain.tasks.suite import check_names as check_tasks
from gpt_pretrain.train.validation import check_validation
from gpt_pretrain.train.weight_files import hub
from gpt_pretrain.train.writers import check_names

BatchSizes = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run: a model, data, an optimizer, a mesh, and how often what happens.

    Attributes:
      model: shape and arithmetic.
      data: which tokens, in which order.
      optimizer: total steps -> Optimizer.
      mesh: devices -> device mesh.
      save_dir: everything the run writes: checkpoints, curves, the gin configuration. A directory of this machine, or
        of a bucket: gs://BUCKET/NAME, s3://BUCKET/NAME.
      work_dir: where a run in a bucket has its files before they are there; several hosts need one on a disk that they
        share. None: a folder in the user's cache.
      batch_size: windows an update, over all devices; or a schedule of (updates made, size):
        ((0, 64), (1000, 512)) is 64 at first and 512 once 1,000 updates are made, that is from step 1,001 on.
      per_device_batch_size: windows that a device holds at once; more than that times the devices is
        accumulated. None: 16, or the most below that by which the batch can be cut.
      gather_weights: of parameters that are split over devices (`mesh.fsdp`), when they are made whole: "per_step", all
        of them once a step, or "per_use", each one while it multiplies, in every microbatch; see `weights.py`. "auto"
        is "per_step" where whole weights and gradients take at most a quarter of a device's memory.
      reduce_dtype: in which gradients are added up over devices, "float32" or "bfloat16".
      num_tokens: to train on; the run has as many whole steps as fit.
      seed: of the initial weights, dropout and interventions (the order has `data.seed`).
      from_pretrained: whose weights alone are taken at the start: a save_dir or checkpoint of another run, or what
        docs/exchange.md lists: a folder of transformers, hf://ID, a .safetensors file, llm.c's model file.
      log_interval, eval_interval, save_interval, statistics_interval: in steps; 0 means never (the last
        step is always logged, evaluated and saved). Statistics cost about a step more each time, so 0.5 % of the
        time at an interval of 250, and once the compilation of a function of their own.
      eval_tokens: of the validation split, at most, from its front.
      validation: other datasets to validate on, by the name of their curves: {"books": "data/books"}, or
        {"books": ("data/books", "train")} for another split than "val". Each is prepared with the run's tokenizer, and
        gives `eval_tokens` more.
      eval_tasks: asked of the model as it is trained: files of HellaSwag (llm.c's hellaswag_val.bin, or .jsonl), and
        tasks of lm-evaluation-harness, by name or .yaml.
      eval_tasks_interval: in steps; 0 means at the last step only.
      eval_tasks_limit: examples of each task, the first ones; None for all.
      num_checkpoints_kept: the newest ones, at least 2: one may be damaged.
      verify_steps: on resume, read the batches of this many last steps again and compare them with the ledger.
      fork: resume with other data, another data.seed or train.seed: a new branch of the run. Changes of batch
        size, mixture, sequence length and exclusions need no fork.
      profile_step: start a profile of 5 steps after this one; 0 for none.
      writers: some of "console", "tensorboard", "wandb".
      wandb_project: in Weights & Biases.
      peak_flops_per_device: for MFU, where the device's datasheet number is not known here.
      sample_prompt: a text, or several, that the model continues at the end; None for no samples.
      sample_tokens: how long each sample is.
      sample_interval: continue them every so many steps as well, with the same random numbers each time; 0: at the end
        only.
      describe_config: () -> the configuration as text, as far as it was used; kept with curves and checkpoints.
      bound_config: () -> what the user set, as text, used or not.
      parse_config: such a text -> values by name, such as {"optimizer.lr": 0.001}.
      command: what the user typed, for the last lines.

    Raises ValueError for a value that cannot be.
    """

    model: GPTConfig
    data: DataConfig
    optimizer: Callable[[int], Optimizer]
    mesh: Callable[[Sequence[Device]], Mesh]
    save_dir: str = "runs/gpt2"
    work_dir: str | None = None
    batch_size: int | Sequence[tuple[int, int]] = 512
    per_device_batch_size: int | None = None
    gather_weights: Literal["auto", "per_step", "per_use"] = "auto"
    reduce_dtype: Dtype = "float32"
    num_tokens: int = 10_000_000_000
    seed: int = 0
    from_pretrained: str | None = None
    log_interval: int = 10
    eval_interval: int = 250
    eval_tokens: int = 10_485_760
    validation: Mapping[str, Any] | None = None
    eval_tasks: Sequence[str] = ()
    eval_tasks_interval: int = 1000
    eval_tasks_limit: int | None = None
    save_interval: int = 1000
    statistics_interval: int = 250
    num_checkpoints_kept: int = 2
    verify_steps: int = 8
    fork: bool = False
    profile_step: int = 0
    writers: Sequence[str] = ("console", "tensorboard", "wandb")
    wandb_project: str = "gpt_pretrain"
    peak_flops_per_device: float | None = None
    sample_prompt: str | Sequence[str] | None = None
    sample_tokens: int = 100
    sample_interval: int = 0
    describe_config: Callable[[], str] = str
    bound_config: Callable[[], str] = str
    parse_config: Callable[[str], dict[str, Any]] = lambda _: {}
    command: str = "python -m gpt_pretrain.main"

    def __post_init__(self):
        for name, kind in (("model", GPTConfig), ("data", DataConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"train.{name}: found {getattr(self, name)!r}, expected a {kind.__name__} (@{name}())")
        for name in ("optimizer", "mesh"):
            if not callable(getattr(self, name)):
                raise ValueError(f"train.{name}: found {getattr(self, name)!r}, expected a function (@{name})")
        for name, (least, most) in _LIMITS.items():
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                value = checks.whole_number(f"train.{name}", value, least=least, most=most)
                object.__setattr__(self, name, value)
        checks.seed("train.seed", self.seed)
        checks.flag("train.fork", self.fork)
        checks.choice("train.gather_weights", self.gather_weights, ("auto", "per_step", "per_use"))
        checks.choice("train.reduce_dtype", self.reduce_dtype, get_args(Dtype))
        if self.peak_flops_per_device is not None:
            checks.number("train.peak_flops_per_device", self.peak_flops_per_device, least=1, most=1e18)
        object.__setattr__(self, "save_dir", checks.output_directory("train.save_dir", self.save_dir))
        if self.work_dir is not None:
            object.__setattr__(self, "work_dir", checks.local_directory("train.work_dir", self.work_dir))
            if not self.is_in_bucket:
                raise ValueError(
                    f"train.work_dir: found {self.work_dir}, expected None, as train.save_dir={self.save_dir} is on "
                    "this machine"
                )
        if self.from_pretrained is not None:
            source = self.from_pretrained
            is_hub = isinstance(source, str) and hub.is_hub(source)
            source = (hub.check_url if is_hub else checks.place)("train.from_pretrained", source)
            object.__setattr__(self, "from_pretrained", source)
        check_names(self.writers)
        object.__setattr__(self, "eval_tasks", check_tasks("train.eval_tasks", self.eval_tasks))
        if self.validation is not None:
            object.__setattr__(self, "validation", check_validation(self.validation, self.data.directories))
        checks.text("train.wandb_project", self.wandb_project)
        prompts = self.sample_prompt
        if prompts is not None and not isinstance(prompts, str):
            is_several = (
                isinstance(prompts, list | tuple) and prompts and all(isinstance(each, str) for each in prompts)
            )
            if not is_several:
                raise ValueError(f"train.sample_prompt: found {prompts!r}, expected a text, several, or None")
        elif prompts is None and self.sample_interval:
            raise ValueError(
                f"train.sample_interval: found {self.sample_interval} without train.sample_prompt; expected 0, or a "
                "text to continue"
            )
        _ = self.batch_sizes
        self.model.num_positions(self.data.seq_len)  # raises where the model has too few

    @property
    def batch_sizes(self) -> BatchSizes:
        """The schedule: (updates made, size) pairs, the first from 0. ValueError where `batch_size` is none."""
        return batch_sizes_of("train.batch_size", self.batch_size)

    @property
    def sample_prompts(self) -> tuple[str, ...]:
        """The texts of `sample_prompt`."""
        if self.sample_prompt is None:
            return ()
        return (self.sample_prompt,) if isinstance(self.sample_prompt, str) else tuple(self.sample_prompt)

    @property
    def is_in_bucket(self) -> bool:
        return is_bucket(self.save_dir)

    @property
    def directory(self) -> str:
        """Where the run's files are on this machine."""
        if not self.is_in_bucket:
            return self.save_dir
        return os.path.abspath(self.work_dir) if self.work_dir else folder_in_cache("runs", self.save_dir)

    @property
    def key_seed(self) -> int:
        """`seed`, which may be any integer, as JAX's keys take it."""
        return checks.key_seed(self.seed)


_INTERVAL = (0, checks.MOST_TOKENS)
_MAY_BE_NONE = ("per_device_batch_size", "eval_tasks_limit")
_LIMITS = {
    "log_interval": _INTERVAL,
    "eval_interval": _INTERVAL,
    "save_interval": _INTERVAL,
    "statistics_interval": _INTERVAL,
    "profile_step": _INTERVAL,
    "eval_tasks_interval": _INTERVAL,
    "eval_tasks_limit": (1, checks.MOST_ROWS),
    "per_device_batch_size": (1, checks.MOST_ROWS),
    "num_tokens": (1, checks.MOST_TOKENS),
    "eval_tokens": (1, checks.MOST_TOKENS),
    "sample_tokens": (1, checks.MOST_ROWS),
    "sample_interval": _INTERVAL,
    "num_checkpoints_kept": (2, checks.MOST_ROWS),
    "verify_steps": (0, checks.MOST_ROWS),
}
