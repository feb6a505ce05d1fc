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

from data_prep.files import whole_file
from data_prep.tokenizers import Tokenizer, get_tokenizer
from gpt_pretrain import checkpoints as checkpoints_lib
from gpt_pretrain import metrics, sharding, train_state, train_step
from gpt_pretrain.actions import Diverged, Evaluation
from gpt_pretrain.data import loader
from gpt_pretrain.data.token_sources import DataConfig, TokenDataset, open_dataset
from gpt_pretrain.generate import sample
from gpt_pretrain.llm import GPTConfig
from gpt_pretrain.loop import Loop
from gpt_pretrain.losses import num_loss_chunks
from gpt_pretrain.optimizers import Optimizer
from gpt_pretrain.report import say_what_runs, say_where_things_are
from gpt_pretrain.stopping import Agreement, StopSignal
from gpt_pretrain.writers import check_names, make_writer

log = logging.getLogger(__name__)


def train(
    *,
    model: GPTConfig,
    data: DataConfig,
    optimizer: Callable[[int], Optimizer],
    mesh: Callable[[], Mesh],
    save_dir: str = "runs/gpt2",
    batch_size: int = 512,
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
      batch_size: windows an update, over all devices.
      per_device_batch_size: windows that a device holds at once; more than that times the devices is
        accumulated.
      num_tokens: to train on; the run has num_tokens // (batch_size * seq_len) steps.
      seed: of the initial weights, dropout and perturbations (the order has `data.seed`).
      from_pretrained: a save_dir or checkpoint of another run whose weights alone are taken at the start.
      log_interval, eval_interval, save_interval, statistics_interval: in steps; 0 means never (the last
        step is always logged, evaluated and saved).
      eval_tokens: of the validation split, at most, from its front.
      num_checkpoints_kept: the newest ones, at least 2.
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
        "log_interval": log_interval, "eval_interval": eval_interval, "save_interval": save_interval,
        "statistics_interval": statistics_interval, "profile_step": profile_step,
    }  # fmt: skip
    for name, value in intervals.items():
        _check_whole(f"train.{name}", value, at_least=0)
    counts = {
        "batch_size": batch_size, "per_device_batch_size": per_device_batch_size, "num_tokens": num_tokens,
        "eval_tokens": eval_tokens, "sample_tokens": sample_tokens,
    }  # fmt: skip
    for name, value in counts.items():
        _check_whole(f"train.{name}", value)
    _check_whole("train.num_checkpoints_kept", num_checkpoints_kept, at_least=2)  # one may be damaged
    num_tokens, eval_tokens = int(num_tokens), int(eval_tokens)  # 1e10 is a float
    for name, value in (("save_dir", save_dir), ("from_pretrained", from_pretrained or "")):
        if "://" in value:
            raise ValueError(
                f"train.{name}: {value} is a URL; expected a directory (mount the bucket, or use a shared disk)"
            )
    check_names(writers)
    dataset = open_dataset(data.dir, format=data.format, verify=data.verify)
    total_examples = _check_sizes(dataset, model, data, batch_size=batch_size, num_tokens=num_tokens)
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
        config = model.resolve(platform)
        layout = sharding.batch_layout(batch_size, per_device_batch_size, device_mesh.size)

        # Where to start.
        identity = {
            "dataset": dataset.fingerprint, "data.seed": data.seed, "train.seed": seed, "data.seq_len": data.seq_len,
            **{f"model.{name}": value for name, value in model.shape.items()},
        }  # fmt: skip
        stack.enter_context(checkpoints_lib.exclusive(save_dir))
        found = checkpoints_lib.choose(save_dir)
        step, position = _check_same_run(found[1], identity, save_dir, batch_size) if found else (0, 0)
        total_steps = step + max(0, total_examples - position) // batch_size
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
            say_what_runs(dataset, config, layout, device_mesh, num_params=num_params, seq_len=data.seq_len)
            if found:
                log.info(
                    "Continuing %s from step %d of %d (%s examples seen)", save_dir, step, total_steps, f"{position:,}"
                )
            else:
                log.info("Starting in %s: %d steps; the first takes longer, it is compiled", save_dir, total_steps)

        # The compiled functions and what feeds them.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        how = {
            "seq_len": data.seq_len, "num_valid": dataset.vocab_size, "seed": seed, "mesh": device_mesh,
            "num_chunks": num_loss_chunks(layout.per_device, data.seq_len, model.vocab_size, platform),
        }  # fmt: skip
        step_fn = train_step.make_train_step(config, made, **how)
        statistics_fn = train_step.make_statistics(config, **how)
        batch_sharding = sharding.batch_sharding(device_mesh)
        rows = loader.local_rows(batch_sharding, layout.num_microbatches, layout.microbatch)
        batches = loader.Batches(
            dataset.splits["train"], seed=data.seed, seq_len=data.seq_len, vocab_size=dataset.vocab_size,
            num_microbatches=layout.num_microbatches, microbatch=layout.microbatch, rows=rows,
            start=position, num_batches=total_steps - step,
        )  # fmt: skip
        evaluation = None
        if "val" in dataset.splits:
            eval_step = train_step.make_eval_step(config, **how)
            evaluation = Evaluation(
                train_step.compile_eval_step(eval_step, shardings, device_mesh), dataset.splits["val"],
                seq_len=data.seq_len, max_tokens=eval_tokens, microbatch=layout.microbatch, rows=rows,
                sharding=batch_sharding,
            )  # fmt: skip
        else:
            log.warning("%s has no validation split: no validation loss will be computed.", data.dir)

        config_text = describe_config()
        if is_primary:
            with whole_file(Path(save_dir, "config.gin")) as partial:
                partial.write_text(config_text)
        writer = make_writer(
            tuple(writers), save_dir=save_dir, total_steps=total_steps, start_step=step, config_text=config_text,
            wandb_project=wandb_project, run_name=os.path.basename(os.path.normpath(save_dir)), is_primary=is_primary,
        )  # fmt: skip
        stack.callback(writer.close)

        def metadata(step: int, position: int) -> dict:
            return {
                "step": step, "examples_seen": position, "batch_size": batch_size, "identity": identity,
                "model": _as_json(model), "seq_len": data.seq_len, "vocab_size": dataset.vocab_size,
                "tokenizer": dataset.tokenizer, "config": describe_config(),
            }  # fmt: skip

        peak = peak_flops_per_device or metrics.peak_flops(jax.devices()[0])
        loop = Loop(
            state=state, step=step, position=position, total_steps=total_steps, batch_size=batch_size,
            seq_len=data.seq_len, step_fn=train_step.compile_train_step(step_fn, shardings, device_mesh),
            statistics_fn=train_step.compile_statistics(statistics_fn, shardings, device_mesh),
            evaluation=evaluation, checkpoints=checkpoints, metadata=metadata, writer=writer,
            flops_per_token=metrics.flops_per_token(config, num_params, data.seq_len),
            peak_flops=peak and peak * device_mesh.size,
        )  # fmt: skip
        del state  # the loop donates it
        try:
            loop.run(
                loader.prefetch_to_devices(loader.load(batches), batch_sharding, layout.microbatch, rows),
                stop_signal, Agreement(device_mesh), profile_dir=os.path.join(save_dir, "tensorboard"), **intervals,
            )  # fmt: skip
        except Diverged as error:
            checkpoints.wait()
            last = checkpoints.latest_step
            raise Diverged(
                f"{error} and has {batch_size} examples (`gpt_pretrain.data.order.window_at` names their windows). "
                "Stopped; nothing was saved after it. Last good checkpoint: "
                + ("none was saved yet" if last is None else str(checkpoints.directory / str(last)))
                + ". Lower optimizer.lr or raise optimizer.warmup_steps and start again; or begin a new run from that "
                "checkpoint: another --save_dir, --from_pretrained, another data.seed."
            ) from None

    finished = loop.step == total_steps
    if is_primary:
        if finished and prompt is not None:
            _print_sample(loop.state.params, config, dataset, tokenizer, prompt, data.seq_len, sample_tokens)
        say_where_things_are(
            save_dir, writers, step=loop.step, total_steps=total_steps, position=loop.position, command=command
        )
    return 0 if finished else 128 + int(stop_signal.received or 15)


def _check_whole(name: str, value, *, at_least: int = 1) -> None:
    if not isinstance(value, int | float) or value != int(value) or value < at_least:
        raise ValueError(f"{name}: found {value!r}, expected a whole number, at least {at_least}")


def _check_sizes(dataset: TokenDataset, model: GPTConfig, data: DataConfig, *, batch_size: int, num_tokens: int) -> int:
    """Vocabulary, stream and length of the run fit together; returns how many examples the run has."""
    if dataset.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the {dataset.vocab_size} ids of {data.dir}; "
            f"expected at least {dataset.vocab_size}."
        )
    loader.num_windows(dataset.splits["train"], data.seq_len)
    total_examples = num_tokens // data.seq_len
    if total_examples < batch_size:
        raise ValueError(
            f"train.num_tokens={num_tokens} is less than one step: batch_size {batch_size} x seq_len "
            f"{data.seq_len} = {batch_size * data.seq_len} tokens"
        )
    return total_examples


def _check_same_run(metadata: dict, identity: dict, save_dir: str, batch_size: int) -> tuple[int, int]:
    """Refuses to continue another run; returns (step, position)."""
    if changed := checkpoints_lib.differences(identity, metadata["identity"]):
        raise ValueError(
            f"{save_dir} holds the checkpoint of another run (step {metadata['step']}):\n" + "\n".join(changed)
            + "\nChoose another --save_dir, or set these back. To start a new run from its weights, use "
            f"--from_pretrained={save_dir} with another --save_dir."
        )  # fmt: skip
    if metadata["batch_size"] != batch_size:
        log.warning(
            "train.batch_size is %d, until step %d it was %d: the order goes on where it was, the run is not the "
            "one it would have been.", batch_size, metadata["step"], metadata["batch_size"],
        )  # fmt: skip
    return metadata["step"], metadata["examples_seen"]


def _weights_of(directory: str, config: GPTConfig, seq_len: int, abstract_params):
    """The parameters of another run, refused if their shapes are others."""
    source = checkpoints_lib.locate(directory)
    metadata = checkpoints_lib.read_metadata(source)
    theirs = {"data.seq_len": metadata["seq_len"], **{name: metadata["model"][name] for name in config.shape}}
    if changed := checkpoints_lib.differences({"data.seq_len": seq_len, **config.shape}, theirs):
        raise ValueError(f"from_pretrained={directory}: the model's shape differs:\n" + "\n".join(changed))
    log.info("Weights from %s; optimizer state, step and data position start fresh.", source)
    return checkpoints_lib.restore_params(source, abstract_params)


def _as_json(model: GPTConfig) -> dict:
    """Without the perturbations, which are code; the gin configuration names them."""
    return {**dataclasses.asdict(dataclasses.replace(model, perturbations=())), "perturbations": []}


def _print_sample(params, config, dataset: TokenDataset, tokenizer: Tokenizer, prompt, seq_len, num_tokens) -> None:
    if jax.process_count() > 1:
        log.info("No text sample: with several processes, use gpt_pretrain.generate on the checkpoint.")
        return
    new = sample(
        jax.device_put(params, jax.devices()[0]), config, np.concatenate([[tokenizer.end_of_text], prompt]),
        seq_len=seq_len, num_valid=dataset.vocab_size, num_tokens=num_tokens, stop=tokenizer.end_of_text,
    )  # fmt: skip
    print(f"\n--- a sample ---\n{tokenizer.decode(prompt)}{tokenizer.decode(new)}\n----------------", flush=True)
