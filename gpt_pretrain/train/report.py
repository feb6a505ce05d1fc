"""What a run says in words, at its start and at its end."""

import logging
import os
import shlex

import jax

from data_prep.pages.numbers import plural, size_text
from data_prep.pages.terminal import python_as_typed
from gpt_pretrain.data.fetching import FirstBatch, cost_in_words
from gpt_pretrain.train.build import Built, bytes_of_whole
from gpt_pretrain.train.start import Start

log = logging.getLogger(__name__)


def say_what_runs(built: Built, start: Start) -> None:
    """One line for each thing that was chosen: data, model, attention, precision, devices, batch; and where from."""
    _say_data(built, start)
    _say_cache(built, start)
    _warn_of_data(built, start)
    spec, mesh, layout = built.spec, built.mesh, built.layouts[-1]
    is_tf32 = spec.dtype == "float32" and mesh.devices.flat[0].platform == "gpu"
    log.info(
        "Model: %s parameters, %d layers x %d wide, %d positions, compute in %s%s, attention by %s%s",
        f"{built.num_params:,}",
        spec.n_layer,
        spec.n_embd,
        spec.num_positions,
        spec.dtype,
        " (matrix products in TF32 where JAX chooses so)" * is_tf32,
        spec.attention,
        " within documents" * spec.document_mask,
    )
    for intervention in spec.interventions:
        log.info("Intervention: %s", intervention.described())
    log.info("Devices: %s", devices_in_words(built))
    if mesh.size > 1:
        log.info("Gradients: %s", how_reduced(built))
    log.info(
        "Batch: %d windows of %d tokens = %d microbatch(es) x %d devices x %d",
        layout.batch_size,
        start.plan.stages[-1].seq_len,
        layout.num_microbatches,
        layout.num_devices,
        layout.per_device,
    )
    save_dir, step, total_steps = built.config.save_dir, start.step, built.total_steps
    if not start.is_resumed:
        log.info("Starting in %s: %d steps; the first takes longer, it is compiled", save_dir, total_steps)
        return
    seen = f"{start.plan.position(step):,}"
    log.info("Continuing %s from step %d of %d (%s examples seen)", save_dir, step, total_steps, seen)
    if start.plan.stages[-1].from_step == step:
        log.info("Data plan: after step %d, %s", step, start.plan.stages[-1].change)


def devices_in_words(built: Built) -> str:
    """How many, of which kind, as which mesh, of how many processes."""
    mesh = built.mesh
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} as {axes}, {jax.process_count()} process(es)"


def how_reduced(built: Built) -> str:
    """Where weights are whole, when gradients cross the network, and what that costs."""
    dtype, fsdp = built.config.reduce_dtype, built.mesh.shape["fsdp"]
    if fsdp == 1:
        return f"added up over all devices once a step, in {dtype}"
    if built.options.gather == "per_step":
        size = size_text(bytes_of_whole(built.spec))
        return f"added up and split once a step, in {dtype}; weights and gradients are whole meanwhile, {size} a device"
    return f"added up over fsdp={fsdp} in every microbatch, in {dtype}; each weight is whole only while it multiplies"


MANY_EPOCHS = 4  # up to about so many, repeated text is worth nearly as much as new (Muennighoff et al., 2023)


def _warn_of_data(built: Built, start: Start) -> None:
    """One line for each thing that is allowed, and seldom meant."""
    for name, dataset in built.data.datasets.items():
        sizes = {split: source.num_tokens for split, source in dataset.splits.items()}
        if sizes.get("val", 0) > sizes["train"]:
            log.warning(
                "%s: the validation split, %s tokens, is larger than the training split, %s tokens.",
                dataset.directory,
                f"{sizes['val']:,}",
                f"{sizes['train']:,}",
            )
        epochs = start.plan.epochs(built.total_steps).get(name, 0.0)
        if epochs > MANY_EPOCHS and not built.config.data.limits_epochs(name):
            log.warning(
                "%s: will be seen %.0f times in this run's %d steps: the model may learn it by heart. Lower "
                "train.num_tokens, or prepare more text.",
                dataset.directory,
                epochs,
                built.total_steps,
            )


def say_first_batch(first: FirstBatch) -> None:
    """What a run that streams its data waits for, once the network was measured."""
    what = f"The first batch takes {plural(first.num_blocks, 'block')} of the stream"
    if not first.bytes_per_sec:
        log.info("%s, which the cache has", what)
        return
    log.info(
        "%s, %d of them from the bucket: %s at %s/s, about %.1f s",
        what,
        first.num_missing,
        size_text(first.missing_bytes),
        size_text(round(first.bytes_per_sec)),
        first.secs,
    )


def _say_cache(built: Built, start: Start) -> None:
    """Where what comes from buckets is kept, and what it costs where that is too small."""
    sources = built.data.sources("train")
    caches = [each.cache for each in built.data.datasets.values() if each.cache]
    if not caches:
        return
    log.info("Cache of what comes from buckets: %s, up to %s", caches[0].folder, size_text(caches[0].max_bytes))
    stage = start.plan.stages[-1]
    if cost := cost_in_words(sources, stage, stage.batch_size(start.step)):
        log.warning("The cache is small: %s.", cost)


def _say_data(built: Built, start: Start) -> None:
    stage = start.plan.stages[-1]
    num_examples = sum(stream.count for stream in stage.streams)
    for stream in stage.streams:
        dataset = built.data.datasets[stream.name]
        share = f"{stream.name}, {stream.count} of {num_examples} examples: " if stream.name else ""
        log.info(
            "Data: %s%s, %s tokens in %s, fingerprint %.12s",
            share,
            dataset.directory,
            f"{stream.num_tokens:,}",
            dataset.format,
            dataset.fingerprint,
        )
        if stream.excluded:
            log.info("Excluded: %d windows that hold documents of data.exclude", len(stream.excluded))
        if dataset.unigram_entropy is not None:
            log.info(
                "Unigram entropy of the training data: %.2f nats (the loss of a model that knows only how "
                "frequent each token is)",
                dataset.unigram_entropy,
            )


def say_where_things_are(
    built: Built, start: Start, step: int, where_time_went: str, *, may_go_on: bool = True
) -> None:
    """The last lines: how far the run got, where its time and its results are, which commands come next.

    Args:
      may_go_on: the command takes --num_tokens.
    """
    config, total_steps = built.config, built.total_steps
    finished = step == total_steps
    python = python_as_typed()
    save_dir = shlex.quote(config.save_dir)
    directory = shlex.quote(os.path.join(config.save_dir, ""))
    seen = f"{start.plan.position(step):,} examples"
    print(f"\n{'Done' if finished else 'Stopped and saved'} at step {step} of {total_steps} ({seen}).")
    print(f"  time:        {where_time_went}")
    print(f"  checkpoints: {directory}checkpoints   configuration: {directory}config.gin")
    if "tensorboard" in config.writers:
        print(f"  curves:      tensorboard --logdir={directory}tensorboard   # pip install tensorboard")
    print(f"  sample:      {python} -m gpt_pretrain.generate --checkpoint={save_dir} --prompt='Once upon'")
    if not finished:
        print(f"  continue:    {config.command}", flush=True)
    elif may_go_on and _may_be_twice_as_long(built, start):
        more = "# or another number; the learning-rate schedule is stretched"
        print(f"  train on:    {config.command} --num_tokens={2 * config.num_tokens}   {more}", flush=True)


def _may_be_twice_as_long(built: Built, start: Start) -> bool:
    config = built.config
    try:
        config.data.check_epochs(start.plan, start.plan.num_steps(2 * config.num_tokens))
    except ValueError:
        return False
    return True
