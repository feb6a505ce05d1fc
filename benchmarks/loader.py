"""Speed of the loader alone, against plain gathers from the same files, on one core.

    python benchmarks/loader.py --data_dir data/sample [--seq_len 1024 --batch_size 64 --batches 300]
    python benchmarks/loader.py --data_dir data/sample --others
    python benchmarks/loader.py --cold [--cold_gb 2]

Contenders take turns (A B C ... A B C ...), medians of seven turns, in million tokens per second. "Loader" is what the
trainer iterates: the plan's order, tokens and digests, through Grain, from the page cache. The plain contenders read
the first shard alone, so the ratios to them are fair for a dataset of one shard only. Then: how long it takes from
nothing to the first batch, near and far into a run, and what memory the order needs. `--cold` makes a file, drops it
from the page cache before each turn, and counts what is read from the disk. `--others` compares with the loader what
trainers of other people iterate (docs/other-trainers.md); PyTorch's way where that is installed. The last line is JSON.
"""

import argparse
import contextlib
import importlib.util
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import grain
import numpy as np

from data_prep.store import token_bin
from data_prep.store.datasets import open_dataset
from data_prep.store.manifest import load as load_manifest
from data_prep.store.token_records import record_prefix
from data_prep.store.token_sources import BinSource, TokenSource
from gpt_pretrain.data import loader
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.order import SHUFFLES, Shuffle
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.order_api import open_order

NUM_TURNS = 7
MIXTURE = {"a": 500, "b": 300, "c": 200}  # of each 1,000 examples


def plan_of(num_tokens: int, args, names: Iterable[str] = ("",), shuffle: Shuffle = "global") -> Plan:
    streams = tuple(Stream(name, f"fingerprint {name}", num_tokens, MIXTURE.get(name, 1)) for name in names)
    fields = {"shuffle": shuffle, "block_windows": args.block_windows, "group_blocks": args.group_blocks}
    stage = Stage(seed=0, seq_len=args.seq_len, batch_sizes=((0, args.batch_size),), streams=streams, **fields)
    return Plan((stage,))


def loader_of(
    source: TokenSource,
    args,
    *,
    names: Iterable[str] = ("",),
    shuffle: Shuffle = "global",
    first_index: int = 0,
    num_steps: int | None = None,
):
    """What the trainer iterates."""
    plan = plan_of(source.num_tokens, args, names, shuffle)
    batches = Batches(
        dict.fromkeys(names, source),
        plan,
        vocab_size=2**16,
        first_index=first_index,
        num_steps=num_steps or args.batches,
    )
    return loader.load(batches)


def bare_gather(tokens: np.ndarray, args):
    """The least that NumPy can do: windows drawn at random, one fancy index into the memory map a batch."""
    windows_NT = np.lib.stride_tricks.sliding_window_view(tokens, args.seq_len + 1)[:: args.seq_len]
    rng = np.random.default_rng(0)
    for _ in range(args.batches):
        yield windows_NT[rng.integers(0, len(windows_NT), args.batch_size)]


def bare_slices(tokens: np.ndarray, args):
    """The same by a slice a row."""
    num_windows, rng = (len(tokens) - 1) // args.seq_len, np.random.default_rng(0)
    for _ in range(args.batches):
        starts = (rng.integers(0, num_windows, args.batch_size) * args.seq_len).tolist()
        yield np.concatenate([tokens[start : start + args.seq_len + 1] for start in starts])


def get_batch(path: str, args):
    """As nanoGPT does it, without torch: a new map each time, any start, each row cast to int64, then stacked."""
    rng, header = np.random.default_rng(0), token_bin.read_header(path)
    for _ in range(args.batches):
        tokens = np.memmap(path, header.dtype, "r", offset=header.num_bytes)
        starts = rng.integers(0, len(tokens) - args.seq_len, args.batch_size)
        inputs = np.stack([tokens[i : i + args.seq_len].astype(np.int64) for i in starts])
        targets = np.stack([tokens[i + 1 : i + 1 + args.seq_len].astype(np.int64) for i in starts])
        yield inputs, targets


def stock_grain(paths: list[str], record_tokens: int, args, num_threads: int):
    """Grain's own way with ArrayRecord: one record an element, shuffled, decoded and batched; as many tokens."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    offset, records_a_batch = len(record_prefix(record_tokens)), args.batch_size * args.seq_len // record_tokens
    dataset = (
        grain.MapDataset.source(ArrayRecordDataSource(paths))  # pyright: ignore
        .shuffle(seed=0)
        .repeat()
        .map(lambda record: np.frombuffer(record, np.uint16, record_tokens, offset))
        .batch(records_a_batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=16 * bool(num_threads)))
    )
    iterator = iter(dataset)
    for _ in range(args.batches):
        yield next(iterator)


def in_turns(contenders: dict[str, Callable[[], Iterable]], limits: dict[str, int]) -> dict[str, float]:
    """Seconds per batch of each, the median of its turns; the first batch of a turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(NUM_TURNS):
        for name, make in contenders.items():
            iterator = iter(make())
            next(iterator)
            start, count = time.perf_counter(), 0
            for _ in iterator:
                count += 1
                if count == limits.get(name):
                    break
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def speeds(args) -> dict[str, dict[str, float]]:
    """Warm, from the page cache."""
    manifest = load_manifest(args.data_dir)
    sources = {name: open_dataset(args.data_dir, format=name).splits["train"] for name in ("bin", "array_record")}
    shards = {name: manifest.shards_of("train", name) for name in sources}
    paths = {name: [os.path.join(args.data_dir, shard.name) for shard in shards[name]] for name in sources}
    tokens = np.asarray(token_bin.open_tokens(paths["bin"][0]))  # the plain contenders read one shard
    record_tokens = manifest.spec.record_tokens
    contenders = {
        "bare gather": lambda: bare_gather(tokens, args),
        "bare slices": lambda: bare_slices(tokens, args),
        "get_batch": lambda: get_batch(paths["bin"][0], args),
        "loader, .bin": lambda: loader_of(sources["bin"], args),
        "loader, .bin, block shuffle": lambda: loader_of(sources["bin"], args, shuffle="block"),
        "loader, .bin, 3 streams": lambda: loader_of(sources["bin"], args, names=MIXTURE),
        "loader, ArrayRecord": lambda: loader_of(sources["array_record"], args),
        "loader, ArrayRecord, 3 streams": lambda: loader_of(sources["array_record"], args, names=MIXTURE),
        "Grain's stock path, ArrayRecord": lambda: stock_grain(paths["array_record"], record_tokens, args, 0),
        "Grain's stock path, 16 threads": lambda: stock_grain(paths["array_record"], record_tokens, args, 16),
    }
    # The slow ones show in fewer batches what they can.
    slow = [name for name in contenders if "ArrayRecord" in name or "Grain" in name]
    limits = dict.fromkeys(slow, max(10, args.batches // 10)) | {"get_batch": max(10, args.batches // 3)}
    seconds = in_turns(contenders, limits)
    found = {name: args.batch_size * args.seq_len / each / 1e6 for name, each in seconds.items()}
    bare, stock = max(found["bare gather"], found["bare slices"]), max(v for k, v in found.items() if "stock" in k)
    out = {}
    print(f"{'M tokens/s':34} {'':>8} of bare  x get_batch  x stock")
    for name, speed in found.items():
        out[name] = {"M tokens/s": round(speed, 1), "of bare": round(speed / bare, 3)}
        out[name] |= {"x get_batch": round(speed / found["get_batch"], 1), "x stock": round(speed / stock, 1)}
        print(f"{name:34} {speed:8.1f} {speed / bare:7.0%} {speed / found['get_batch']:10.1f} {speed / stock:9.1f}")
    return out


def others(args) -> dict[str, dict[str, float]]:
    """The ways of `order_api` and `torch_data`, against the trainer's loader on the same batches."""
    steps = args.batches
    order = open_order(
        args.data_dir, format="bin", seq_len=args.seq_len, batch_size=args.batch_size, num_steps=steps, verify="size"
    )
    source = open_dataset(args.data_dir, format="bin", verify="size").splits["train"]
    contenders: dict[str, Callable[[], Iterable]] = {
        "loader": lambda: loader_of(source, args),
        "order.read": order.read,
        "order.batches, one by one": lambda: map(order.batches().__getitem__, range(steps)),
        "order.batches through Grain": lambda: order.batches().to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)
        ),
    }
    if importlib.util.find_spec("torch"):
        from gpt_pretrain.torch_data import OrderedBatches

        contenders["OrderedBatches"] = lambda: OrderedBatches(order)
    contenders["order.examples, one by one"] = lambda: map(order.examples().__getitem__, range(steps * args.batch_size))
    seconds = in_turns(contenders, {})
    seconds["order.examples, one by one"] *= args.batch_size
    out = {}
    for name, each in seconds.items():
        out[name] = {
            "M tokens/s": round(args.batch_size * args.seq_len / each / 1e6, 1),
            "of the loader": round(seconds["loader"] / each, 2),
        }
        print(f"{name:34} {out[name]['M tokens/s']:8.1f} M tokens/s {out[name]['of the loader']:8.2f} of the loader")
    return out


def resume(args) -> dict[str, float]:
    """Milliseconds from nothing to the first batch; the dataset's sizes are checked, its digests are not read."""
    out: dict[str, list[float]] = {}
    for _ in range(NUM_TURNS):
        for position in (0, 10**9):
            for names in (("",), tuple(MIXTURE)):
                start = time.perf_counter()
                source = open_dataset(args.data_dir, format="bin", verify="size").splits["train"]
                first_index = position // args.batch_size
                next(loader_of(source, args, names=names, first_index=first_index, num_steps=10))
                name = f"first batch at position {position:,}" + (", 3 streams" if len(names) > 1 else "")
                out.setdefault(name, []).append(1000 * (time.perf_counter() - start))
    medians = {name: round(statistics.median(values), 1) for name, values in out.items()}
    for name, value in medians.items():
        print(f"{name:50} {value:8.1f} ms")
    return medians


class Zeros:
    """A stream of any length that takes no memory: what is left is the order's."""

    dtype = np.dtype(np.uint16)

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def read(self, starts, length):
        return np.zeros((len(starts), length), np.uint16)


def memory(args) -> dict[str, float]:
    """MB by which the process grows while it iterates all over streams of several sizes."""
    out = {}
    for shuffle in SHUFFLES[:2]:
        for num_windows in (10**4, 10**6, 10**8, 10**10):
            source = Zeros(num_windows * args.seq_len + 1)
            last_step = 3 * num_windows // args.batch_size
            before = _resident_mb()
            for first_index in np.linspace(0, last_step, 40).astype(int).tolist():
                for _ in loader_of(source, args, shuffle=shuffle, first_index=first_index, num_steps=50):
                    pass
            out[f"{num_windows:,} windows, {shuffle}"] = round(_resident_mb() - before, 1)
    for name, value in out.items():
        print(f"memory for {name:39} {value:8.1f} MB")
    return out


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6


# ---- cold ----


def cold(args) -> dict[str, dict[str, float]]:
    """Global against block shuffle, each turn from a file that is not in the page cache."""
    with contextlib.ExitStack() as stack:
        directory = tempfile.mkdtemp(dir=args.scratch_dir)
        stack.callback(shutil.rmtree, directory)
        path = os.path.join(directory, "train.bin")
        num_tokens = int(args.cold_gb * 1e9 / 2)
        chunk = np.random.default_rng(0).integers(0, 50257, 2**24).astype(np.uint16)
        chunks = (chunk[: min(len(chunk), num_tokens - i)] for i in range(0, num_tokens, len(chunk)))
        token_bin.write_tokens(path, chunks, num_tokens)
        results: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(3):
            for shuffle in ("global", "block", "none"):
                resident = _drop(path)
                read_before, start, count = _bytes_read(), time.perf_counter(), 0
                for _ in loader_of(BinSource([path]), args, shuffle=shuffle):
                    count += args.batch_size * args.seq_len
                elapsed = time.perf_counter() - start
                read = (_bytes_read() - read_before) / (2 * count)
                results.setdefault(shuffle, []).append((count / elapsed / 1e6, read, resident))
    out = {}
    for shuffle, turns in results.items():
        speed, read, resident = (statistics.median(values) for values in zip(*turns, strict=True))
        out[shuffle] = {"M tokens/s": round(speed, 2), "bytes read / bytes used": round(read, 2)}
        print(
            f"cold, {shuffle:8} {speed:8.2f} M tokens/s; {read:5.2f} bytes read from the disk for each byte used; "
            f"{resident:.1%} of the file was in the page cache before"
        )
    return out


def _drop(path: str) -> float:
    """Drops a file from the page cache; returns which part of it is still there."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _resident_part(file)


def _resident_part(file) -> float:
    """By mincore(2), through the C library."""
    import ctypes

    size = os.fstat(file.fileno()).st_size
    # A private, writable map, because ctypes takes no address of a read-only one; nothing is written.
    with mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages
        )
        del first
        assert not failed, os.strerror(ctypes.get_errno())
        return float((np.frombuffer(pages.raw, np.uint8)[:-1] & 1).mean())


def _bytes_read() -> int:
    """What this process made the kernel fetch from storage."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="a prepared dataset with both formats")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--block_windows", type=int, default=1024)
    parser.add_argument("--group_blocks", type=int, default=32)
    parser.add_argument("--others", action="store_true", help="what other trainers iterate, against the loader")
    parser.add_argument("--cold", action="store_true", help="compare shuffles, from the disk")
    parser.add_argument("--cold_gb", type=float, default=2, help="of the file")
    parser.add_argument("--scratch_dir", help="where that file goes; a disk, not a tmpfs")
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    if not args.cold and not args.data_dir:
        parser.error("--data_dir or --cold is needed")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core
    measured = (cold,) if args.cold else (others,) if args.others else (speeds, resume, memory)
    print(json.dumps({each.__name__: each(args) for each in measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
