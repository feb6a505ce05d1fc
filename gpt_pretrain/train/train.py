"""One run: check, build, restore, loop."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from data_prep.store.datasets import TokenDataset
from data_prep.store.files import whole_file
from data_prep.store.tokenizers import Tokenizer, get_tokenizer
from gpt_pretrain.data import loader
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.config import DataConfig
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan, PlanError
from gpt_pretrain.data.run import FILE_NAME as RUN_FILE
from gpt_pretrain.data.run import RunData, open_run
from gpt_pretrain.data.stages import Segment
from gpt_pretrain.model import statistics as metrics
from gpt_pretrain.model.gpt import GPTConfig
from gpt_pretrain.model.losses import num_loss_chunks
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.optim.adamw import Optimizer
from gpt_pretrain.parallel import mesh as sharding
from gpt_pretrain.train import checkpoints as checkpoints_lib
from gpt_pretrain.train import state as train_state
from gpt_pretrain.train import step as train_step
from gpt_pretrain.train.actions.evaluation import Diverged, Evaluation
from gpt_pretrain.train.loop import Loop
from gpt_pretrain.train.report import say_what_runs, say_where_things_are
from gpt_pretrain.train.stopping import Agreement, StopSignal
from gpt_pretrain.train.verify import check_last_steps
from gpt_pretrain.train.writers.console import check_names, make_writer

log = logging.getLogger(__name__)


def train(
    *,
    model: GPTConfig,
    data: DataConfig,
    optimizer: Callable[[int], Optimizer],
    mesh: Callable[[], Mesh],
    save_dir: str = "runs/gpt2",
    batch_size: int | Sequence[tuple[int, int]] = 512,
    per_device_batch_size: int = 16,
    num_tokens: int = 10_000_000_000,
    seed: int = 0,
    from_pretrained: str | None = None,
    log_interval: int = 10,
    eval_interval: int = 250,
    eval_tokens: int = 10_485_760,
    save_interval: int = 1000,
    statistics_interval: int = 0,
    num_checkpoints_kept: int = 2,
    verify_steps: int = 8,
    fork: bool = False,
    profile_step: int = 0,
    writers: Sequence[str] = ("console", "tensorboard", "wandb"),
    wandb_project: str = "gpt_pretrain",
    peak_flops_per_device: float | None = None,
    sample_prompt: str | None = None,
    sample_tokens: int = 100,
    describe_config: Callable[[], str] = str,
    command: str = "python -m gpt_pretrain.main",
) -> int:
    """Trains from the newest checkpoint in `save_dir`, or from the start, to the end of `num_tokens`.

    Args:
      model: shape and arithmetic.
      data: which tokens, in which order.
      optimizer: total steps -> Optimizer.
      mesh: () -> device mesh.
      save_dir: everything the run writes: checkpoints, curves, the gin configuration.
      batch_size: windows an update, over all devices; or a schedule ((0, 64), (1000, 512)): 64 at first, 512
        from step 1000 on.
      per_device_batch_size: windows that a device holds at once; more than that times the devices is
        accumulated.
      num_tokens: to train on; the run has as many whole steps as fit.
      seed: of the initial weights, dropout and perturbations (the order has `data.seed`).
      from_pretrained: a save_dir or checkpoint of another run whose weights alone are taken at the start.
      log_interval, eval_interval, save_interval, statistics_interval: in steps; 0 means never (the last
        step is always logged, evaluated and saved).
      eval_tokens: of the validation split, at most, from its front.
      num_checkpoints_kept: the newest ones, at least 2.
      verify_steps: on going on, read the batches of this many last steps again and compare them with the ledger.
      fork: go on with other data, another data.seed or train.seed: a new branch of the run. Changes of batch
        size, mixture, sequence length and exclusions need no fork.
      profile_step: start a profile of 5 steps here; 0 for none.
      writers: some of "console", "tensorboard", "wandb".
      wandb_project: in Weights & Biases.
      peak_flops_per_device: for MFU, where the device's datasheet number is not known here.
      sample_prompt: continue this text at the end and print it; None for no sample.
      sample_tokens: how long that sample is.
      describe_config: () -> the configuration as text, kept with curves and checkpoints.
      command: what the user typed, for the last lines.

    Returns:
      0 when the run is complete, 128 + signal number when it was stopped by SIGTERM or SIGINT and saved.

    Raises:
      ValueError: for anything wrong with the settings, before work starts.
      Diverged: the loss became NaN or infinite; says where.
    """
    intervals = {
        "log_interval": log_interval,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
        "statistics_interval": statistics_interval,
        "profile_step": profile_step,
    }
    for name, value in intervals.items():
        _check_whole(f"train.{name}", value, at_least=0)
    counts = {
        "per_device_batch_size": per_device_batch_size,
        "num_tokens": num_tokens,
        "eval_tokens": eval_tokens,
        "sample_tokens": sample_tokens,
    }
    for name, value in counts.items():
        _check_whole(f"train.{name}", value)
    _check_whole("train.num_checkpoints_kept", num_checkpoints_kept, at_least=2)  # one may be damaged
    _check_whole("train.verify_steps", verify_steps, at_least=0)
    batch_sizes = _batch_schedule(batch_size)
    num_tokens, eval_tokens = int(num_tokens), int(eval_tokens)  # 1e10 is a float
    for name, value in (("save_dir", save_dir), ("from_pretrained", from_pretrained or "")):
        if "://" in value:
            raise ValueError(
                f"train.{name}: {value} is a URL; expected a directory (mount the bucket, or use a shared disk)"
            )
    check_names(writers)
    datasets = data.open()
    dataset = next(iter(datasets.values()))  # all have its tokenizer
    model.num_positions(data.seq_len)  # raises where the model has too few
    wanted = data.segment(datasets, batch_sizes)
    _check_sizes(dataset, model, wanted, num_tokens=num_tokens)
    tokenizer = get_tokenizer(dataset.tokenizer or "gpt2")
    prompt = None if sample_prompt is None else tokenizer.encode(sample_prompt)
    if prompt is not None and len(prompt) >= data.seq_len:
        raise ValueError(
            f"train.sample_prompt has {len(prompt)} tokens; expected fewer than data.seq_len={data.seq_len}"
        )

    with contextlib.ExitStack() as stack:
        stop_signal = stack.enter_context(StopSignal())
        device_mesh = mesh()
        platform = sharding.platform_of(jax.devices()[0])
        config = model.resolve(platform, document_mask=data.document_mask)
        placement = loader.Placement(sharding.batch_sharding(device_mesh), per_device_batch_size)

        # Where to start.
        identity = {"train.seed": seed, **{f"model.{name}": value for name, value in model.shape.items()}}
        identity |= {"data.document_mask": data.document_mask, "model's positions": model.num_positions(data.seq_len)}
        stack.enter_context(checkpoints_lib.exclusive(save_dir))
        found = checkpoints_lib.choose(save_dir)
        step, plan, ledger = 0, Plan((wanted,)), Ledger()
        if found:
            step = found[0]
            plan, ledger = _continue(found[1], identity, wanted, save_dir, fork=fork)
            check_last_steps(ledger, plan, datasets, num_steps=verify_steps)
        # Sizes that are past need not fit the devices that there are now.
        layouts = [placement.layout(size) for size in plan.segments[-1].batch_sizes_from(step)]
        total_steps = max(step, plan.num_steps(num_tokens))
        data.check_epochs(plan, total_steps)
        made = optimizer(total_steps)
        checkpoints = checkpoints_lib.Checkpoints(save_dir, num_kept=num_checkpoints_kept)
        stack.callback(checkpoints.close)
        abstract = train_state.abstract(config, data.seq_len, made.transform, device_mesh)
        if found:
            state = checkpoints.restore(step, abstract)
        else:
            state = train_state.create(config, data.seq_len, made.transform, device_mesh, seed)
            if from_pretrained:
                state = state._replace(params=_weights_of(from_pretrained, config, data.seq_len, abstract.params))
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        is_primary = jax.process_index() == 0
        if is_primary:
            say_what_runs(
                datasets,
                config,
                layouts[-1],
                device_mesh,
                num_params=num_params,
                segment=plan.segments[-1],
                document_mask=data.document_mask,
            )
            if found:
                position = f"{plan.position(step):,}"
                log.info("Continuing %s from step %d of %d (%s examples seen)", save_dir, step, total_steps, position)
                if plan.segments[-1].from_step == step:
                    log.info("Data plan: from step %d on, %s", step, plan.segments[-1].change)
            else:
                log.info("Starting in %s: %d steps; the first takes longer, it is compiled", save_dir, total_steps)

        # The compiled functions and what feeds them.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        most_at_once = max(layout.per_device for layout in layouts)
        how = {
            "seq_len": data.seq_len,
            "num_valid": dataset.vocab_size,
            "seed": seed,
            "mesh": device_mesh,
            "document_end": dataset.end_of_text if data.document_mask else None,
            "num_chunks": num_loss_chunks(most_at_once, data.seq_len, model.vocab_size, platform),
        }
        step_fn = train_step.make_train_step(config, made, **how)
        statistics_fn = train_step.make_statistics(config, **how)
        batches = Batches(
            {name: each.splits["train"] for name, each in datasets.items()},
            plan,
            vocab_size=dataset.vocab_size,
            first_step=step,
            num_steps=total_steps - step,
            rows_of=placement.rows,
        )
        evaluation = None
        if validation := {name: each.splits["val"] for name, each in datasets.items() if "val" in each.splits}:
            eval_step = train_step.make_eval_step(config, **how)
            evaluation = Evaluation(
                train_step.compile_eval_step(eval_step, shardings, device_mesh),
                validation,
                seq_len=data.seq_len,
                max_tokens=eval_tokens,
                rows_at_once=layouts[-1].microbatch,
                placement=placement,
            )
        else:
            log.warning("%s has no validation split: no validation loss will be computed.", dataset.directory)

        config_text = describe_config()
        if is_primary:
            with whole_file(Path(save_dir, "config.gin")) as partial:
                partial.write_text(config_text)
            directories = {}
            if found and Path(save_dir, RUN_FILE).exists():
                try:
                    directories = open_run(save_dir).directories
                except (ValueError, KeyError, TypeError) as error:  # all else in it is written anew
                    log.warning("%s; it is written anew, without the directories of earlier datasets.", error)
            for name, path in data.directories.items():  # by fingerprint, too: a fork gives a name other data
                directories |= {key: os.path.abspath(path) for key in (name, datasets[name].fingerprint)}
            RunData(save_dir, plan, directories, total_steps).write()
            ledger.write(save_dir)
        writer = make_writer(
            tuple(writers),
            save_dir=save_dir,
            total_steps=total_steps,
            start_step=step,
            config_text=config_text,
            wandb_project=wandb_project,
            run_name=os.path.basename(os.path.normpath(save_dir)),
            is_primary=is_primary,
        )
        stack.callback(writer.close)

        def metadata(step: int) -> dict:
            return {
                "step": step,
                "examples_seen": plan.position(step),
                "identity": identity,
                "plan": plan.to_json(),
                "model": _as_json(model),
                "seq_len": data.seq_len,
                "vocab_size": dataset.vocab_size,
                "document_mask": data.document_mask,
                "tokenizer": dataset.tokenizer,
                "config": describe_config(),
            }

        peak = peak_flops_per_device or metrics.peak_flops(jax.devices()[0])
        loop = Loop(
            state=state,
            step=step,
            total_steps=total_steps,
            plan=plan,
            ledger=ledger,
            save_dir=save_dir,
            step_fn=train_step.compile_train_step(step_fn, shardings, device_mesh),
            statistics_fn=train_step.compile_statistics(statistics_fn, shardings, device_mesh),
            evaluation=evaluation,
            checkpoints=checkpoints,
            metadata=metadata,
            writer=writer,
            flops_per_token=metrics.flops_per_token(config, num_params, data.seq_len),
            peak_flops=peak and peak * device_mesh.size,
        )
        del state  # the loop donates it
        try:
            loop.run(
                loader.prefetch_to_devices(loader.load(batches), placement),
                stop_signal,
                Agreement(device_mesh),
                profile_dir=os.path.join(save_dir, "tensorboard"),
                **intervals,
            )
        except Diverged as error:
            checkpoints.wait()
            last = checkpoints.latest_step
            raise Diverged(
                f"{error} (`python -m gpt_pretrain.inspect {save_dir} --step {error.step}` shows its documents). "
                "Stopped; nothing was saved after it. Last good checkpoint: "
                + ("none was saved yet" if last is None else str(checkpoints.directory / str(last)))
                + ". Lower optimizer.lr or raise optimizer.warmup_steps and start again; or begin a new run from that "
                "checkpoint: another --save_dir, --from_pretrained, another data.seed.",
                error.step,
            ) from None

    finished = loop.step == total_steps
    if is_primary:
        if finished and prompt is not None:
            _print_sample(
                loop.state.params,
                config,
                tokenizer,
                prompt,
                seq_len=data.seq_len,
                num_valid=dataset.vocab_size,
                num_tokens=sample_tokens,
                document_end=how["document_end"],
            )
        position = plan.position(loop.step)
        say_where_things_are(
            save_dir, writers, step=loop.step, total_steps=total_steps, position=position, command=command
        )
    return 0 if finished else 128 + int(stop_signal.received or 15)


def _check_whole(name: str, value, *, at_least: int = 1) -> None:
    if not isinstance(value, int | float) or value != int(value) or value < at_least:
        raise ValueError(f"{name}: found {value!r}, expected a whole number, at least {at_least}")


def _batch_schedule(batch_size) -> tuple[tuple[int, int], ...]:
    """512 -> ((0, 512),); a schedule is checked."""
    schedule: tuple = ()
    try:
        schedule = ((0, batch_size),) if isinstance(batch_size, int | float) else tuple(map(tuple, batch_size))
        steps = [step for step, _ in schedule]
        good = steps[0] == 0 and steps == sorted(set(steps))
        good = good and all(number == int(number) for pair in schedule for number in pair)
    except (TypeError, ValueError, IndexError):
        good = False
    if not good or any(size < 1 for _, size in schedule):
        raise ValueError(
            f"train.batch_size: found {batch_size!r}, expected a size, or ((0, size), (step, size), ...) with "
            "ascending steps"
        )
    return tuple((int(step), int(size)) for step, size in schedule)


def _check_sizes(dataset: TokenDataset, model: GPTConfig, wanted: Segment, *, num_tokens: int) -> None:
    """Vocabulary, model and length of the run fit together."""
    if dataset.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the {dataset.vocab_size} ids of {dataset.directory}; "
            f"expected at least {dataset.vocab_size}."
        )
    if Plan((wanted,)).num_steps(num_tokens) < 1:
        size = wanted.batch_size(0)
        raise ValueError(
            f"train.num_tokens={num_tokens} is less than one step: batch_size {size} x seq_len {wanted.seq_len} = "
            f"{size * wanted.seq_len} tokens"
        )


def _continue(metadata: dict, identity: dict, wanted: Segment, save_dir: str, *, fork: bool) -> tuple[Plan, Ledger]:
    """The plan and the ledger of a checkpoint, the plan with what is wanted from here on."""
    step, theirs = metadata["step"], metadata["identity"]
    changed = checkpoints_lib.differences(identity, theirs)
    problems = changed
    if fork and identity | {"train.seed": 0} == theirs | {"train.seed": 0}:
        problems = []
    plan = Plan.from_json(metadata["plan"])
    try:
        plan = plan.continued(wanted, step, fork=fork)
    except PlanError as error:
        problems = [*problems, str(error)]
    if problems:
        raise ValueError(
            f"{save_dir} holds the checkpoint of another run (step {step}):\n"
            + "\n".join(problems)
            + "\nChoose another --save_dir, or set these back. Other data or another seed can be taken up on purpose, "
            "as a new branch of the run, by --fork. To start a new run from its weights, use "
            f"--from_pretrained={save_dir} with another --save_dir."
        )
    if changed:
        log.warning("Fork: train.seed is another from step %d on.", step)
    return plan, Ledger.from_text(metadata["ledger"])


def _weights_of(directory: str, config: GPTConfig, seq_len: int, abstract_params):
    """The parameters of another run, refused if their shapes are others."""
    source = checkpoints_lib.locate(directory)
    metadata = checkpoints_lib.read_metadata(source)
    theirs = {"model's positions": metadata["identity"]["model's positions"]}
    theirs |= {name: metadata["model"][name] for name in config.shape}
    ours = {"model's positions": config.num_positions(seq_len), **config.shape}
    if changed := checkpoints_lib.differences(ours, theirs):
        raise ValueError(f"from_pretrained={directory}: the model's shape differs:\n" + "\n".join(changed))
    log.info("Weights from %s; optimizer state, step and data position start fresh.", source)
    return checkpoints_lib.restore_params(source, abstract_params)


def _as_json(model: GPTConfig) -> dict:
    """Without the perturbations, which are code; the gin configuration names them."""
    return {**dataclasses.asdict(dataclasses.replace(model, perturbations=())), "perturbations": []}


def _print_sample(params, config, tokenizer: Tokenizer, prompt, **how) -> None:
    if jax.process_count() > 1:
        log.info("No text sample: with several processes, use gpt_pretrain.generate on the checkpoint.")
        return
    new = sample(
        jax.device_put(params, jax.devices()[0]),
        config,
        np.concatenate([[tokenizer.end_of_text], prompt]),
        stop=tokenizer.end_of_text,
        **how,
    )
    print(f"\n--- a sample ---\n{tokenizer.decode(prompt)}{tokenizer.decode(new)}\n----------------", flush=True)
