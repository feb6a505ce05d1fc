"""Speed of the compiled training step, as one JSON line.

    python benchmarks/step.py --config=gpt2_124m --steps=30 [any flag of gpt_pretrain.main]

The step is the one that `gpt_pretrain.main` would run with the same settings, fed by its loader: from `--data_dir` if
that is given, else with random tokens. tokens/s is the median over steps that are waited for one by one after two that
are not counted; MFU is by the convention in `gpt_pretrain.model.gpt.flops_per_token`, null where the device's peak is
not known. Time and memory as `gpt_pretrain.preflight` predicts them stand beside what was measured.
"""

import argparse
import dataclasses
import hashlib
import json
import resource
import statistics
import sys
import time
from pathlib import Path

from data_prep.pages.command_line import ArgumentParser
from gpt_pretrain import runtime
from gpt_pretrain.flags import add_run_flags, bindings_of

CONFIGS = Path(__file__).parent.parent / "configs"
NUM_WARMUP_STEPS = 2


def make_parser() -> argparse.ArgumentParser:
    """The flags of `gpt_pretrain.main`, and two more."""
    parser = ArgumentParser(prog="python benchmarks/step.py", description=__doc__, allow_abbrev=False)
    add_run_flags(parser)
    parser.add_argument("--config", default="gpt2_124m", help="name in configs/ or path of a .gin file")
    parser.add_argument("--steps", type=int, default=30, help="that are timed (default %(default)s)")
    parser.add_argument("--digest", action="store_true", help="also print a digest of the parameters at the end")
    return parser


def main() -> int:
    """Prints the JSON line."""
    args = make_parser().parse_args()
    runtime.configure()
    import jax

    from gpt_pretrain.forecast import memory as forecast_memory
    from gpt_pretrain.forecast.hlo import Program
    from gpt_pretrain.forecast.kernels import kernels_of
    from gpt_pretrain.forecast.roofline import roofline_of
    from gpt_pretrain.parallel.devices import chip_of, peak_flops
    from gpt_pretrain.settings import parse, train_config
    from gpt_pretrain.train.build import build
    from gpt_pretrain.train.feed import feed
    from gpt_pretrain.train.opened_data import open_data
    from gpt_pretrain.train.stand_in import random_data
    from gpt_pretrain.train.start import Start

    named = CONFIGS / f"{args.config}.gin"
    parse([str(named) if named.exists() else args.config, *args.gin_file], bindings_of(args))
    config = dataclasses.replace(train_config(), sample_prompt=None, sample_interval=0)
    data = open_data(config) if args.data_dir else random_data(config)
    start = Start.anew(data)
    built = build(config, data, start)
    built = dataclasses.replace(built, total_steps=min(built.total_steps, args.steps + NUM_WARMUP_STEPS))
    state, layout = built.fresh_state(), built.layouts[0]

    secs, loss, compile_secs, compiled = [], float("nan"), float("nan"), None
    for _, batch in feed(built, start):
        started = time.perf_counter()
        if compiled is None:
            compiled = built.train_step.lower(state, batch, *built.doses(1)).compile()
            compile_secs = time.perf_counter() - started
            started = time.perf_counter()
        state, step_metrics = compiled(state, batch, *built.doses(1))
        loss = float(step_metrics["loss"])
        secs.append(time.perf_counter() - started)
    secs_per_step = statistics.median(secs[NUM_WARMUP_STEPS:] or secs)
    tokens_per_sec = layout.batch_size * config.data.seq_len / secs_per_step
    peak, device = built.peak_flops, jax.devices()[0]
    assert compiled is not None
    needed = forecast_memory.needed(
        compiled, forecast_memory.bytes_a_device(built.abstract_state), built.mesh.devices.flat[0].platform
    )
    kernels = list(kernels_of(Program(compiled.as_text() or "")))
    roofline = roofline_of(kernels, chip_of(device), config.peak_flops_per_device or peak_flops(device))
    memory = jax.devices()[0].memory_stats() or {}
    peak_memory = memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    result = {
        "config": args.config,
        "platform": jax.devices()[0].device_kind,
        "num_devices": built.mesh.size,
        "jax": jax.__version__,
        "num_params": built.num_params,
        "batch": f"{layout.num_microbatches} x {layout.microbatch} x {config.data.seq_len}",
        "dtype": built.spec.dtype,
        "attention": built.spec.attention,
        "document_mask": built.spec.document_mask,
        "data": args.data_dir or "random tokens",
        "steps": len(secs) - NUM_WARMUP_STEPS,
        "tokens_per_sec": round(tokens_per_sec, 1),
        "step_ms": round(1e3 * secs_per_step, 2),
        "mfu": peak and round(tokens_per_sec * built.flops_per_token / peak, 4),
        "predicted_ms": roofline.kernel_secs and round(1e3 * roofline.kernel_secs, 2),
        "peak_memory_mib": round(peak_memory / 2**20),
        "predicted_memory_mib": round(needed.peak / 2**20),
        "compile_secs": round(compile_secs, 1),
        "last_loss": round(loss, 4),
    }
    if args.digest:
        leaves = jax.tree.leaves(jax.device_get(state.params))
        result["params_digest"] = hashlib.blake2b(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:32]
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
