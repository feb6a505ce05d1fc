"""Attention kernels of this device against attention written out in float32, and their speed, as one JSON line.

    python benchmarks/kernels.py --batch=16 --time=1024 --heads=12 --head_dim=64

Errors are relative to the norm of the reference, of outputs and of the three gradients. Times are of a forward and a
backward pass, the median of ten. A kernel that cannot run here is listed with the reason.
"""

import argparse
import json
import statistics
import sys
import time

from data_prep.pages.command_line import ArgumentParser
from gpt_pretrain import runtime

KERNELS = {"tpu": ["xla", "splash"], "gpu": ["xla", "cudnn", "triton"]}
NUM_DOCUMENTS = 4
TOLERANCE = 2e-2  # of bfloat16


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python benchmarks/kernels.py", description=__doc__, allow_abbrev=False)
    for name, default in (("batch", 16), ("time", 1024), ("heads", 12), ("head_dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="INT", help="(default %(default)s)")
    return parser


def main() -> int:
    """Prints the JSON line. Exit status 1 where a kernel that ran is wrong."""
    args = make_parser().parse_args()
    runtime.configure()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gpt_pretrain.model.attention import causal_attention
    from gpt_pretrain.parallel.devices import platform_of

    device = jax.devices()[0]
    shape = (args.batch, args.time, args.heads, args.head_dim)
    *qkv, upstream = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4))
    documents = jnp.broadcast_to(jnp.arange(args.time) * NUM_DOCUMENTS // args.time, shape[:2]).astype(jnp.int32)

    def both_passes(kernel, ids):
        def run(*arrays):
            outputs, vjp = jax.vjp(lambda *qkv: causal_attention(kernel, ids)(0, *qkv), *arrays[:3])
            return outputs, *vjp(arrays[3].astype(outputs.dtype))

        return jax.jit(run)

    found = []
    for ids in (None, documents):
        with jax.default_matmul_precision("highest"):
            expected = both_passes("xla", ids)(*(x.astype(jnp.float32) for x in (*qkv, upstream)))
        for kernel in KERNELS.get(platform_of(device), ["xla"]):
            row = {"kernel": kernel, "documents": ids is not None}
            found.append(row)
            try:
                run = both_passes(kernel, ids)
                results = jax.block_until_ready(run(*qkv, upstream))
            except Exception as error:  # a kernel that this device has not: the others are still measured
                row["error"] = (str(error).splitlines() or [type(error).__name__])[0][:300]
                continue
            errors = [
                float(np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b))
                for a, b in zip(results, expected, strict=True)
            ]
            row["errors"] = [round(each, 5) for each in errors]
            row["is_right"] = max(errors) < TOLERANCE
            secs = []
            for _ in range(10):
                started = time.perf_counter()
                jax.block_until_ready(run(*qkv, upstream))
                secs.append(time.perf_counter() - started)
            row["ms"] = round(1e3 * statistics.median(secs), 3)
    print(json.dumps({"platform": device.device_kind, "shape_BTHK": shape, "kernels": found}), flush=True)
    return 0 if all(row.get("is_right", True) for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
