"""What a run says in words, at its start and at its end."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from data_prep.store.datasets import TokenDataset
from gpt_pretrain.data.stages import Segment
from gpt_pretrain.model.gpt import GPTConfig
from gpt_pretrain.parallel.mesh import BatchLayout

log = logging.getLogger(__name__)


def say_what_runs(
    datasets: Mapping[str, TokenDataset],
    config: GPTConfig,
    layout: BatchLayout,
    mesh: Mesh,
    *,
    num_params: int,
    segment: Segment,
    document_mask: bool = False,
) -> None:
    """One line for each thing that was chosen: data, model, attention, precision, devices, batch."""
    seq_len, block = segment.seq_len, sum(stream.count for stream in segment.streams)
    for stream in segment.streams:
        dataset = datasets[stream.name]
        share = f"{stream.name}, {stream.count} of {block} examples: " if stream.name else ""
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
    is_tf32 = config.dtype == "float32" and mesh.devices.flat[0].platform == "gpu"
    log.info(
        "Model: %s parameters, %d layers x %d wide, %d positions, compute in %s%s, attention by %s%s",
        f"{num_params:,}",
        config.n_layer,
        config.n_embd,
        config.num_positions(seq_len),
        config.dtype,
        " (matrix products in TF32 where JAX chooses so)" * is_tf32,
        config.attention,
        " within documents" * document_mask,
    )
    for perturbation in config.perturbations:
        log.info("Perturbation: %s", perturbation)
    log.info(
        "Devices: %d x %s as data=%d x fsdp=%d, %d process(es)",
        mesh.size,
        mesh.devices.flat[0].device_kind,
        mesh.shape["data"],
        mesh.shape["fsdp"],
        jax.process_count(),
    )
    log.info(
        "Batch: %d windows of %d tokens = %d microbatch(es) x %d devices x %d",
        layout.batch_size,
        seq_len,
        layout.num_microbatches,
        layout.num_devices,
        layout.per_device,
    )


def python_as_typed() -> str:
    """How to call this interpreter from here: ".venv/bin/python", or "python" where the PATH finds the same."""
    found = shutil.which("python")
    if found and os.path.samefile(os.path.dirname(found), os.path.dirname(sys.executable)):
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith("..") else relative)


def say_where_things_are(
    save_dir: str, writers: Sequence[str], *, step: int, total_steps: int, position: int, command: str
) -> None:
    """The last lines: how far the run got, where its results are, which commands come next."""
    finished = step == total_steps
    python = python_as_typed()
    directory = shlex.quote(os.path.join(save_dir, ""))
    print(f"\n{'Done' if finished else 'Stopped and saved'} at step {step} of {total_steps} ({position:,} examples).")
    print(f"  checkpoints: {directory}checkpoints   configuration: {directory}config.gin")
    if "tensorboard" in writers:
        print(f"  curves:      tensorboard --logdir={directory}tensorboard   (pip install tensorboard)")
    print(f"  sample:      {python} -m gpt_pretrain.generate --checkpoint={shlex.quote(save_dir)} --prompt='Once upon'")
    if finished:
        print(
            f"  train on:    {command} --num_tokens=...   (more; the learning-rate schedule is stretched)", flush=True
        )
    else:
        print(f"  continue:    {command}", flush=True)
