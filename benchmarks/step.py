"""Speed of the compiled training step, as one JSON line.

    python benchmarks/step.py --config gpt2_124m --steps 30 [--data_dir DIR] [any flag of gpt_pretrain.main]

The step is the one that `gpt_pretrain.main` runs, fed by its loader with `--data_dir`, by random tokens without.
tokens/s is the median over steps that are waited for one by one after two that are not counted; MFU is by the
convention in gpt_pretrain/metrics.py, null where the device's peak is not known.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

from gpt_pretrain import main as cli
from gpt_pretrain import runtime

CONFIGS = Path(__file__).parent.parent / "configs"
NUM_WARMUP_STEPS = 2


class RandomTokens:
    """Stands in for a dataset: uniformly distributed ids."""

    def __init__(self, num_tokens: int, vocab_size: int):
        import numpy as np

        self.num_tokens = num_tokens
        self._tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens, np.uint16)
        self.dtype = self._tokens.dtype

    def read(self, starts, length):
        import numpy as np

        return self._tokens[np.asarray(starts)[:, None] + np.arange(length)]


def main() -> int:
    parser = cli.make_parser()
    parser.prog, parser.description = "python benchmarks/step.py", __doc__
    parser.add_argument("--config", default="gpt2_124m", help="name in configs/ or path of a .gin file")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    runtime.configure()
    import gin
    import jax

    from data_prep.store import datasets as token_sources
    from gpt_pretrain.data import loader
    from gpt_pretrain.data.batches import Batches
    from gpt_pretrain.data.plan import Plan
    from gpt_pretrain.data.stages import Segment, Stream
    from gpt_pretrain.model import statistics as metrics
    from gpt_pretrain.model.losses import num_loss_chunks
    from gpt_pretrain.parallel import mesh as sharding
    from gpt_pretrain.settings import parse
    from gpt_pretrain.train import state as train_state
    from gpt_pretrain.train import step as train_step

    named = CONFIGS / f"{args.config}.gin"
    parse([str(named) if named.exists() else args.config, *args.gin_file], cli.bindings_of(args))
    bound = gin.get_bindings("train")
    data = gin.get_configurable("data")()
    mesh = gin.get_configurable("mesh")()
    model = gin.get_configurable("model")()
    optimizer = gin.get_configurable("optimizer")(10**6)
    platform = sharding.platform_of(jax.devices()[0])
    config = model.resolve(platform)
    batch_sharding = sharding.batch_sharding(mesh)
    placement = loader.Placement(batch_sharding, bound.get("per_device_batch_size", 16))
    layout = placement.layout(bound.get("batch_size", 512))
    if args.data_dir:
        dataset = token_sources.open_dataset(args.data_dir, format=data.format)
        source, num_valid = dataset.splits["train"], dataset.vocab_size
    else:
        num_valid = min(50257, model.vocab_size)
        source = RandomTokens(10**7, num_valid)

    stream = Stream("", "", source.num_tokens)
    batch_sizes = ((0, layout.batch_size),)
    plan = Plan((Segment(seed=0, seq_len=data.seq_len, batch_sizes=batch_sizes, streams=(stream,)),))
    num_steps = args.steps + NUM_WARMUP_STEPS
    batches = Batches({"": source}, plan, vocab_size=num_valid, num_steps=num_steps, rows_of=placement.rows)
    num_chunks = num_loss_chunks(layout.per_device, data.seq_len, model.vocab_size, platform)
    step_fn = train_step.make_train_step(
        config, optimizer, seq_len=data.seq_len, num_valid=num_valid, num_chunks=num_chunks, seed=0, mesh=mesh
    )
    shardings = train_state.state_shardings(config, data.seq_len, optimizer.transform, mesh)
    state = train_state.create(config, data.seq_len, optimizer.transform, mesh, 0)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    start = time.perf_counter()
    shape = (layout.num_microbatches, layout.microbatch, data.seq_len + 1)
    compiled = (
        train_step.compile_train_step(step_fn, shardings, mesh)
        .lower(state, jax.ShapeDtypeStruct(shape, "uint16", sharding=batch_sharding))
        .compile()
    )
    compile_secs = time.perf_counter() - start

    secs, loss = [], float("nan")
    for _, batch in loader.prefetch_to_devices(loader.load(batches), placement):
        start = time.perf_counter()
        state, step_metrics = compiled(state, batch)
        loss = float(step_metrics["loss"])
        secs.append(time.perf_counter() - start)
    secs_per_step = statistics.median(secs[NUM_WARMUP_STEPS:])
    tokens_per_sec = layout.batch_size * data.seq_len / secs_per_step
    peak = metrics.peak_flops(jax.devices()[0])
    memory = jax.devices()[0].memory_stats() or {}
    result = {
        "config": args.config,
        "platform": jax.devices()[0].device_kind,
        "num_devices": mesh.size,
        "jax": jax.__version__,
        "num_params": num_params,
        "batch": f"{layout.num_microbatches} x {layout.microbatch} x {data.seq_len}",
        "dtype": config.dtype,
        "attention": config.attention,
        "data": args.data_dir or "random tokens",
        "steps": args.steps,
        "tokens_per_sec": round(tokens_per_sec, 1),
        "step_ms": round(1e3 * secs_per_step, 2),
        "mfu": peak
        and round(tokens_per_sec * metrics.flops_per_token(config, num_params, data.seq_len) / peak / mesh.size, 4),
        "peak_memory_mib": round(
            memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20
        ),
        "compile_secs": round(compile_secs, 1),
        "last_loss": round(loss, 4),
    }
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
