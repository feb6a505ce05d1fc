"""Everything that is to be known of this device, in one command: about eight minutes on a GPU, one on a CPU.

    python benchmarks/device.py --output=device.json

Attention kernels against their reference, the four GPT-2 sizes with the real loader, the variants of the step, whether
two runs are bitwise equal and what that costs, and memory and time as predicted and as measured. Writes one JSON file
and prints a table. Each measurement is a process of its own, by `step.py` and `kernels.py`; what does not fit the
minutes is listed as skipped, what fails as failed. On CPUs the model is tiny, and the numbers say only that it works.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data_prep.pages.command_line import ArgumentParser, number

HERE = Path(__file__).parent
SIZES = {"gpt2_124m": 64, "gpt2_350m": 32, "gpt2_774m": 16, "gpt2_1558m": 8}  # windows a device holds at once
MICROBATCHES = 4
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
TABLE = ("tokens_per_sec", "step_ms", "predicted_ms", "mfu", "peak_memory_mib", "predicted_memory_mib", "compile_secs")


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python benchmarks/device.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="device.json", metavar="FILE", help="(default %(default)s)")
    parser.add_argument("--minutes", type=number, default=8.0, help="for all of it (default %(default)g)")
    parser.add_argument("--data_dir", metavar="DIR", help="prepared dataset; without, the embedded sample is prepared")
    return parser


class Measurements:
    """Runs one script after the other, as long as there is time.

    Attributes:
      rows: {"name": ..., and what the script printed, or "failed" or "skipped" with the reason}.
    """

    def __init__(self, minutes: float, output: Path):
        self._deadline = time.monotonic() + 60 * minutes
        self._output = output
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, *command: str, xla_flags: str = "") -> dict[str, Any]:
        """The row of a script that prints a JSON line last."""
        left = self._deadline - time.monotonic()
        row: dict[str, Any] = {"name": name}
        self.rows.append(row)
        if left < 10:
            row["skipped"] = "no time left"
            return row
        print(f"{name} ...", file=sys.stderr, flush=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
        environment = os.environ | ({"XLA_FLAGS": flags} if flags else {})
        how = {"capture_output": True, "text": True, "timeout": left, "env": environment}
        try:
            done = subprocess.run([sys.executable, *command], **how)
        except subprocess.TimeoutExpired:
            row["skipped"] = "no time left"
            return row
        try:
            row |= json.loads(done.stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            row["failed"] = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])[-500:]
        self._output.write_text(json.dumps(self.rows, indent=1) + "\n")  # what is measured is not lost
        return row


def main() -> int:
    """Exit status 1 where something failed."""
    args = make_parser().parse_args()
    measured = Measurements(args.minutes, Path(args.output))
    with tempfile.TemporaryDirectory() as folder:
        kernels = measured.run("kernels", str(HERE / "kernels.py"), *_if_tiny("--batch=2", "--time=256"))
        is_cpu = kernels.get("platform", "cpu") == "cpu"
        data_dir = args.data_dir or _prepared_sample(Path(folder))
        _measure_steps(measured, data_dir, is_cpu)
    print(as_table(measured.rows))
    print(f"\nWritten to {args.output}")
    return 1 if any("failed" in row for row in measured.rows) else 0


def _if_tiny(*flags: str) -> tuple[str, ...]:
    """The flags, where JAX was told to use the CPU."""
    return flags if os.environ.get("JAX_PLATFORMS") == "cpu" else ()


def _prepared_sample(folder: Path) -> str:
    command = ["-m", "data_prep.fineweb", "--input=sample", f"--output_dir={folder / 'data'}"]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return str(folder / "data")


def _measure_steps(measured: Measurements, data_dir: str, is_cpu: bool) -> None:
    sizes = {"quickstart": 4} if is_cpu else SIZES

    def step(name: str, config: str, *flags: str, steps: int = 12, xla_flags: str = "") -> dict[str, Any]:
        rows, microbatches, steps = (sizes[config], 1, 3) if is_cpu else (sizes[config], MICROBATCHES, steps)
        batch = (f"--per_device_batch_size={rows}", f"--batch_size={rows * microbatches}")
        script = (str(HERE / "step.py"), f"--config={config}", f"--data_dir={data_dir}", f"--steps={steps}")
        return measured.run(name, *script, *batch, *flags, xla_flags=xla_flags)

    first = next(iter(sizes))
    plain = step(first, first, "--digest")
    flags = DETERMINISTIC * (not is_cpu)
    runs = [step(f"{first}, deterministic, {name}", first, "--digest", xla_flags=flags) for name in ("once", "again")]
    digests = [row.get("params_digest") for row in runs]
    if None not in digests:
        equal = {"name": "two deterministic runs are bitwise equal", "is_true": digests[0] == digests[1]}
        if plain.get("step_ms"):
            equal["cost"] = f"{runs[0]['step_ms'] / plain['step_ms'] - 1:+.1%} of a step"
        measured.rows.append(equal)
    for size in list(sizes)[1:]:
        step(size, size, steps=6)
    variants = {
        "bfloat16 logits": ("--gin_param=model.logits_dtype='bfloat16'",),
        "document mask": ("--gin_param=data.document_mask=True",),
        "remat dots": ("--gin_param=model.remat='dots'",),
        "remat full": ("--gin_param=model.remat='full'",),
    }
    for name, flags in variants.items():
        step(f"{first}, {name}", first, *flags)
    if not is_cpu:
        step(f"{first}, no Triton products", first, xla_flags="--xla_gpu_enable_triton_gemm=false")


def as_table(rows: list[dict[str, Any]]) -> str:
    """
    >>> print(as_table([{"name": "a", "step_ms": 5, "mfu": None}, {"name": "b", "skipped": "no time left"}]))
    | name | tokens_per_sec | step_ms | predicted_ms | mfu | peak_memory_mib | predicted_memory_mib | compile_secs | |
    | --- | --- | --- | --- | --- | --- | --- | --- | --- |
    | a |  | 5 |  |  |  |  |  |  |
    | b |  |  |  |  |  |  |  | skipped: no time left |
    """
    lines = ["| " + " | ".join(("name", *TABLE)) + " | |", "| " + " | ".join(["---"] * (len(TABLE) + 2)) + " |"]
    for row in rows:
        values = ["" if row.get(name) is None else str(row[name]) for name in TABLE]
        lines.append("| " + " | ".join((row["name"], *values, _remarks(row))) + " |")
    return "\n".join(lines)


def _remarks(row: dict[str, Any]) -> str:
    told = [f"{name}: {row[name]}" for name in ("skipped", "failed", "is_true", "cost") if name in row]
    for each in row.get("kernels", ()):
        what = each.get("error") or f"{each['ms']} ms, error {max(each['errors'])}"
        told.append(f"{each['kernel']}{' with documents' * each['documents']}: {what}")
    return "; ".join(told)


if __name__ == "__main__":
    sys.exit(main())
