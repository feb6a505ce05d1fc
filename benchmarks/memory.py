"""The memory of a training step as `gpt_pretrain.preflight` predicts it, against what is measured on the devices here.

    python benchmarks/memory.py

Each configuration is a process of its own. Prints a table and one JSON line. What is measured is the peak of three
steps, state included: on GPUs as the device says; on CPUs the growth of the process's peak resident memory over what it
was once all was compiled and before there was a state, with a malloc that keeps no page that is freed.
"""

import argparse
import gc
import json
import os
import subprocess
import sys

from data_prep.pages.command_line import ArgumentParser
from gpt_pretrain.flags import add_run_flags, bindings_of

BASE = (
    "--model.n_layer=6",
    "--model.n_head=6",
    "--model.n_embd=384",
    "--model.vocab_size=8064",
    "--seq_len=512",
    "--batch_size=8",
    "--per_device_batch_size=8",
    "--num_tokens=1e6",
    "--optimizer.warmup_steps=1",
)
NUM_STEPS = 3
CASES = {
    "one microbatch": BASE,
    "remat full": (*BASE, "--gin_param=model.remat='full'"),
    "four microbatches": (*BASE, "--per_device_batch_size=2"),
    "document mask": (*BASE, "--gin_param=data.document_mask=True"),
    "two devices, fsdp=2": (*BASE, "--gin_param=mesh.fsdp=2", "--per_device_batch_size=4"),
    "GPT-2's vocabulary": (*BASE, "--model.n_layer=4", "--model.vocab_size=50304", "--batch_size=4"),
}
_RETURN_FREED_PAGES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python benchmarks/memory.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="NAME", choices=CASES, help="this one, in this process; prints its numbers")
    return parser


def main() -> int:
    """Exit status 1 where a configuration failed."""
    args = make_parser().parse_args()
    if args.only is not None:
        print(json.dumps(measure(CASES[args.only])), flush=True)
        return 0
    rows = [{"name": name} | _in_a_process(name) for name in CASES]
    print(as_table(rows))
    print(json.dumps({"rows": rows}))
    return 1 if any("failed" in row for row in rows) else 0


def _in_a_process(name: str) -> dict:
    num_devices = 2 if "two devices" in name else 1
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    changes = {"XLA_FLAGS": flags.strip(), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = os.environ | _RETURN_FREED_PAGES | changes
    done = subprocess.run([sys.executable, __file__, f"--only={name}"], capture_output=True, text=True, env=environment)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"failed": " ".join(done.stderr.strip().splitlines()[-2:])[-300:]}


def measure(flags: tuple[str, ...]) -> dict:
    """{"predicted", "measured"} bytes of one device, and what they are of."""
    import jax

    from gpt_pretrain import settings
    from gpt_pretrain.forecast.memory import bytes_a_device, needed
    from gpt_pretrain.train.build import build
    from gpt_pretrain.train.feed import feed
    from gpt_pretrain.train.stand_in import random_data
    from gpt_pretrain.train.start import Start

    parser = argparse.ArgumentParser()
    add_run_flags(parser)
    settings.parse([], bindings_of(parser.parse_args(flags)))
    config = settings.train_config()
    data = random_data(config)
    start = Start.anew(data)
    built = build(config, data, start)
    device = built.mesh.devices.flat[0]
    batches = feed(built, start)
    _, batch = next(batches)
    compiled = built.train_step.lower(built.abstract_state, batch, *built.doses(1)).compile()
    memory = needed(compiled, bytes_a_device(built.abstract_state), device.platform)
    jax.block_until_ready(built.fresh_state())  # compiles what makes it, too
    gc.collect()
    base = _resident_bytes("VmRSS")
    state = jax.block_until_ready(built.fresh_state())
    _forget_peak()
    for _ in range(NUM_STEPS):
        state, metrics = compiled(state, batch, *built.doses(1))
        jax.block_until_ready((state, metrics))
    stats = device.memory_stats()
    measured = stats["peak_bytes_in_use"] if stats else (_resident_bytes("VmHWM") - base) // built.mesh.size
    return {
        "platform": device.device_kind,
        "num_devices": built.mesh.size,
        "num_params": built.num_params,
        "state": memory.state,
        "temporary": memory.temporary,
        "predicted": memory.peak,
        "measured": measured,
    }


def _resident_bytes(field: str) -> int:
    """VmRSS is what this process has now, VmHWM its peak."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def _forget_peak() -> None:
    """The peak is what there is now (proc(5))."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def as_table(rows: list[dict]) -> str:
    """
    >>> print(as_table([{"name": "a", "predicted": 3 * 2**20, "measured": 4 * 2**20}, {"name": "b", "failed": "why"}]))
    | configuration | predicted MiB | measured MiB | predicted / measured |
    | --- | --- | --- | --- |
    | a | 3.0 | 4.0 | 0.750 |
    | b | failed: why | | |
    """
    lines = ["| configuration | predicted MiB | measured MiB | predicted / measured |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed']} | | |")
            continue
        predicted, measured = row["predicted"] / 2**20, row["measured"] / 2**20
        lines.append(f"| {row['name']} | {predicted:,.1f} | {measured:,.1f} | {predicted / measured:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
