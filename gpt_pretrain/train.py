"""One run: build, restore, loop."""

import dataclasses
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_pretrain import checkpoints as checkpoints_lib
from gpt_pretrain import metrics as metrics_lib
from gpt_pretrain import sharding, train_state, train_step
from gpt_pretrain.actions import Diverged, Evaluation, MetricsReader, StepResult, Throughput
from gpt_pretrain.data import loader
from gpt_pretrain.data.token_sources import Format, TokenDataset, open_dataset
from gpt_pretrain.llm import GPTConfig
from gpt_pretrain.losses import num_loss_chunks
from gpt_pretrain.optimizers import Optimizer
from gpt_pretrain.stopping import Agreement, StopSignal
from gpt_pretrain.writers import make_writer, periodic_actions

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tokens, in which order.

    Attributes:
      dir: a prepared dataset (`data_prep.fineweb --output_dir`), or a directory or glob of .bin files.
      format: "bin", "array_record", or "auto" for the first of these that is there. Same windows either way.
      seed: of the order of windows.
      seq_len: tokens a window; also the number of positions of the model.
      verify: "digest" reads every byte at the start, "size" none, "auto" all up to 1 GiB.
    """

    dir: str = "data/fineweb-10BT"
    format: Format = "auto"
    seed: int = 0
    seq_len: int = 1024
    verify: Literal["auto", "size", "digest"] = "auto"


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How a global batch lies on the devices: `num_microbatches` parts of `microbatch` rows each."""

    num_microbatches: int
    microbatch: int
    num_devices: int

    @property
    def batch_size(self) -> int:
        return self.num_microbatches * self.microbatch

    @property
    def per_device(self) -> int:
        return self.microbatch // self.num_devices


def batch_layout(batch_size: int, per_device_batch_size: int, num_devices: int) -> BatchLayout:
    """Accumulates gradients when the batch does not fit the devices at once: 512, 16, 8 -> 4 x 128."""
    if min(batch_size, per_device_batch_size) < 1:
        raise ValueError(
            f"train.batch_size={batch_size} and train.per_device_batch_size={per_device_batch_size} must be at least 1"
        )
    at_once = per_device_batch_size * num_devices
    if batch_size <= at_once:
        if batch_size % num_devices:
            raise ValueError(
                f"train.batch_size={batch_size} cannot be split over {num_devices} devices: {batch_size} / "
                f"{num_devices} = {batch_size / num_devices:.2f} rows each. Use a multiple of {num_devices}."
            )
        return BatchLayout(1, batch_size, num_devices)
    if batch_size % at_once:
        raise ValueError(
            f"train.batch_size={batch_size} is not a whole number of microbatches: train.per_device_batch_size="
            f"{per_device_batch_size} x {num_devices} devices = {at_once} rows at once, {batch_size} / {at_once} = "
            f"{batch_size / at_once:.2f}. Use a batch_size that is a multiple of {at_once}, or change "
            "per_device_batch_size."
        )
    return BatchLayout(batch_size // at_once, at_once, num_devices)


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
    for name, value in (("log", log_interval), ("eval", eval_interval), ("save", save_interval),
                        ("statistics", statistics_interval)):  # fmt: skip
        if value < 0:
            raise ValueError(f"train.{name}_interval: found {value}, expected steps, or 0 for never")
    dataset = open_dataset(data.dir, format=data.format, verify=data.verify)
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

    with StopSignal() as stop_signal:
        device_mesh = mesh()
        layout = batch_layout(batch_size, per_device_batch_size, device_mesh.size)
        platform = jax.devices()[0].platform
        config = model.resolve(platform)
        identity = {
            "dataset": dataset.fingerprint,
            "data.seed": data.seed,
            "data.seq_len": data.seq_len,
            **{f"model.{name}": value for name, value in model.shape.items()},
        }
        found = checkpoints_lib.choose(save_dir)
        step, position = 0, 0
        if found:
            step, position = _check_same_run(found[1], identity, save_dir, batch_size)
        total_steps = step + max(0, total_examples - position) // batch_size
        made = optimizer(total_steps)
        state, shardings = _initial_state(
            config, data.seq_len, made, device_mesh, seed, found, save_dir, from_pretrained
        )
        _say_what_runs(dataset, config, layout, state, total_steps, found, save_dir, device_mesh, data.seq_len)

        saved = checkpoints_lib.Checkpoints(save_dir, num_kept=num_checkpoints_kept)
        is_primary = jax.process_index() == 0
        config_text = describe_config()
        if is_primary:
            Path(save_dir, "config.gin").write_text(config_text)
        writer = make_writer(
            tuple(writers), save_dir=save_dir, total_steps=total_steps, start_step=step, config_text=config_text,
            wandb_project=wandb_project, run_name=os.path.basename(os.path.normpath(save_dir)), is_primary=is_primary,
        )  # fmt: skip

        num_valid = dataset.vocab_size
        how = {
            "seq_len": data.seq_len, "num_valid": num_valid, "seed": seed,
            "num_chunks": num_loss_chunks(layout.per_device, data.seq_len, model.vocab_size, platform),
        }  # fmt: skip
        run_step = train_step.compile_train_step(
            train_step.make_train_step(config, made, **how), shardings, device_mesh
        )
        batch_sharding = sharding.batch_sharding(device_mesh)
        rows = loader.local_rows(batch_sharding, layout.num_microbatches, layout.microbatch)
        batches = loader.Batches(
            dataset.splits["train"], seed=data.seed, seq_len=data.seq_len, vocab_size=num_valid,
            num_microbatches=layout.num_microbatches, microbatch=layout.microbatch, rows=rows,
            start=position, num_batches=total_steps - step,
        )  # fmt: skip
        on_devices = loader.prefetch_to_devices(loader.load(batches), batch_sharding, layout.microbatch, rows)

        evaluation = None
        if "val" in dataset.splits:
            evaluation = Evaluation(
                train_step.compile_eval_step(train_step.make_eval_step(config, **how), shardings, device_mesh),
                dataset.splits["val"], seq_len=data.seq_len, max_tokens=eval_tokens, microbatch=layout.microbatch,
                rows=rows, sharding=batch_sharding,
            )  # fmt: skip
        else:
            log.warning("%s has no validation split: no validation loss will be computed.", data.dir)
        run_statistics = train_step.compile_statistics(
            train_step.make_statistics(config, **how), shardings, device_mesh
        )

        reader, throughput, agreement = MetricsReader(), Throughput(), Agreement(device_mesh)
        tokens_per_step = batch_size * data.seq_len
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        flops = metrics_lib.flops_per_token(config, num_params, data.seq_len)
        peak = peak_flops_per_device or metrics_lib.peak_flops(jax.devices()[0])

        # The callbacks close over `state`, `step` and `position`, which the loop below rebinds.
        def write_metrics(result: StepResult) -> None:
            values = {f"train/{name}": value for name, value in result.metrics.items()}
            values["train/examples_seen"] = result.position + batch_size
            if rate := throughput.lap():
                values["train/tokens_per_sec"] = rate
                values["train/eta_secs"] = (total_steps - result.step) * tokens_per_step / rate
                if peak:
                    values["train/mfu"] = rate * flops / (peak * device_mesh.size)
            writer.write_scalars(result.step, values)

        log_action = periodic_actions.PeriodicCallback(
            every_steps=log_interval or None, on_steps=[step + 1, total_steps],
            callback_fn=lambda step, t, result: write_metrics(result),
        )  # fmt: skip

        def report(result: StepResult | None) -> None:
            if result:
                throughput.step_done(tokens_per_step)
                log_action(result.step, result=result)

        def evaluate(step: int, t: float | None = None) -> None:
            del t
            report(reader.flush())
            with throughput.paused():
                # Processes may see a signal at different times; only one alone may leave half way.
                alone = jax.process_count() == 1
                values = evaluation(state.params, lambda: alone and stop_signal.received is not None)  # pyright: ignore
                if values:
                    writer.write_scalars(step, {f"validation/{name}": value for name, value in values.items()})

        def save(step: int, t: float | None = None) -> None:
            del t
            report(reader.flush())  # raises if this step diverged: a bad state is never saved
            with throughput.paused():
                if saved.latest_step != step:
                    metadata = {
                        "step": step, "examples_seen": position, "batch_size": batch_size, "identity": identity,
                        "model": _saved_model(model), "seq_len": data.seq_len, "vocab_size": num_valid,
                        "tokenizer": dataset.tokenizer, "config": describe_config(),
                    }  # fmt: skip
                    saved.save(step, state, metadata)

        actions: list[Callable] = []
        if evaluation:
            actions.append(
                periodic_actions.PeriodicCallback(
                    every_steps=eval_interval or None, on_steps=[total_steps], callback_fn=evaluate
                )
            )
        if save_interval:
            actions.append(periodic_actions.PeriodicCallback(every_steps=save_interval, callback_fn=save))
        if profile_step:
            actions.append(
                periodic_actions.Profile(
                    logdir=os.path.join(save_dir, "tensorboard"), first_profile=profile_step, every_secs=None
                )
            )

        try:
            for element, batch in on_devices:
                if statistics_interval and (step + 1) % statistics_interval == 0:
                    with throughput.paused():
                        values = jax.device_get(run_statistics(state, batch))
                        writer.write_scalars(step + 1, {f"statistics/{k}": float(v) for k, v in values.items()})
                state, metrics = run_step(state, batch)
                step += 1
                position = element["position"] + batch_size
                report(reader.push(step, element["position"], metrics))
                for action in actions:
                    action(step)
                if agreement.should_stop(stop_signal.received is not None):
                    break
            save(step)
            saved.wait()
        except Diverged as error:
            raise Diverged(_explain_divergence(error, batch_size, saved)) from None
        finally:
            writer.close()
            saved.close()

        finished = step == total_steps
        if is_primary:
            if finished and sample_prompt is not None:
                _print_sample(state.params, config, dataset, data.seq_len, sample_prompt, sample_tokens)
            _say_where_things_are(save_dir, writers, step, total_steps, position, finished, command)
        return 0 if finished else 128 + (stop_signal.received or 15)


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


def _initial_state(config, seq_len, optimizer, mesh, seed, found, save_dir, from_pretrained):
    """The state to start from and its shardings: restored, or fresh, or fresh with another run's weights."""
    args = (config, seq_len, optimizer.transform, mesh)
    shardings = train_state.state_shardings(*args)
    if found:
        directory = checkpoints_lib.Checkpoints(save_dir)
        state = directory.restore(found[0], train_state.abstract(*args))
        directory.close()
        return state, shardings
    state = train_state.create(*args, seed)
    if from_pretrained:
        source = checkpoints_lib.locate(from_pretrained)
        metadata = checkpoints_lib.read_metadata(source)
        theirs = {"data.seq_len": metadata["seq_len"]} | {k: metadata["model"][k] for k in config.shape}
        if changed := checkpoints_lib.differences({"data.seq_len": seq_len} | config.shape, theirs):
            raise ValueError(f"from_pretrained={from_pretrained}: the model's shape differs:\n" + "\n".join(changed))
        params = checkpoints_lib.restore_params(source, train_state.abstract(*args).params)
        log.info("Weights from %s; optimizer state, step and data position start fresh.", source)
        state = state._replace(params=params)
    return state, shardings


def _saved_model(model: GPTConfig) -> dict:
    """The configuration as JSON; perturbations are code, the gin configuration names them."""
    return {**dataclasses.asdict(dataclasses.replace(model, perturbations=())), "perturbations": []}


def _say_what_runs(dataset: TokenDataset, config, layout, state, total_steps, found, save_dir, mesh, seq_len) -> None:
    if jax.process_index() != 0:
        return
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    train_tokens = dataset.splits["train"].num_tokens
    log.info("Data: %s, %s tokens in %s, fingerprint %.12s", dataset.directory, f"{train_tokens:,}", dataset.format,
             dataset.fingerprint)  # fmt: skip
    if dataset.unigram_entropy is not None:
        log.info("Unigram entropy of the training data: %.2f nats (the loss of a model that knows only how frequent "
                 "each token is)", dataset.unigram_entropy)  # fmt: skip
    log.info("Model: %s parameters, %d layers x %d wide, compute in %s, attention by %s", f"{num_params:,}",
             config.n_layer, config.n_embd, config.dtype, config.attention)  # fmt: skip
    if config.perturbations:
        log.info("Perturbations: %s", config.perturbations)
    log.info("Devices: %d x %s as data=%d x fsdp=%d, %d process(es)", mesh.size, jax.devices()[0].device_kind,
             mesh.shape["data"], mesh.shape["fsdp"], jax.process_count())  # fmt: skip
    log.info("Batch: %d windows of %d tokens = %d microbatch(es) x %d devices x %d", layout.batch_size, seq_len,
             layout.num_microbatches, layout.num_devices, layout.per_device)  # fmt: skip
    if found:
        log.info("Continuing %s from step %d of %d (%s examples seen)", save_dir, found[0], total_steps,
                 f"{found[1]['examples_seen']:,}")  # fmt: skip
    else:
        log.info("Starting in %s: %d steps; the first one takes longer, it is compiled", save_dir, total_steps)


def _explain_divergence(error: Diverged, batch_size: int, saved: checkpoints_lib.Checkpoints) -> str:
    saved.wait()
    good = saved.latest_step
    where = f"{saved.directory / str(good)}" if good is not None else "none was saved yet"
    return (
        f"{error} and has {batch_size} examples (`gpt_pretrain.data.order.window_at` names their windows). Stopped; "
        f"nothing was saved after it. Last good checkpoint: {where}. Lower optimizer.lr, raise warmup_steps or change "
        "data.seed, then start again."
    )


def _print_sample(params, config, dataset, seq_len, prompt, num_tokens) -> None:
    from data_prep.tokenizers import get_tokenizer
    from gpt_pretrain.generate import sample

    if jax.process_count() > 1:
        log.info("No text sample: with several processes, use gpt_pretrain.generate on the checkpoint.")
        return
    tokenizer = get_tokenizer(dataset.tokenizer or "gpt2")
    ids = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(prompt)])
    new = sample(jax.device_put(params, jax.devices()[0]), config, ids, seq_len=seq_len,
                 num_valid=dataset.vocab_size, num_tokens=num_tokens, stop=tokenizer.end_of_text)  # fmt: skip
    print(f"\n--- a sample ---\n{prompt}{tokenizer.decode(new)}\n----------------", flush=True)


def _say_where_things_are(save_dir, writers, step, total_steps, position, finished, command) -> None:
    state = "Done" if finished else "Stopped and saved"
    print(f"\n{state} at step {step} of {total_steps} ({position:,} examples).")
    print(
        f"  checkpoints: {os.path.join(save_dir, 'checkpoints')}   configuration: {os.path.join(save_dir, 'config.gin')}"
    )
    if "tensorboard" in writers:
        print(f"  curves:      tensorboard --logdir={shlex.quote(os.path.join(save_dir, 'tensorboard'))}")
    print(f"  sample:      python -m gpt_pretrain.generate --checkpoint={shlex.quote(save_dir)} --prompt='Once'")
    more = " with a larger --num_tokens" if finished else ""
    print(f"  continue{more}: {command}", flush=True)
