"""The flags of a run, which its command lines share: gin files, bindings and shorthands for them."""

import argparse
import ast
from collections.abc import Callable
from typing import Any, NamedTuple

from data_prep.pages.command_line import count, number

START_SECS = 20.0  # after the imports: who lost another one at the start leaves within 30 s
CLUSTER_START_SECS = 300.0  # schedulers start machines minutes apart, and stop all when one fails


class Shorthand(NamedTuple):
    """A flag with a name that users of GPT trainers type. It is a gin binding and nothing else."""

    flag: str
    binding: str
    kind: Callable[[str], Any]
    metavar: str
    help: str


SHORTHANDS = [
    Shorthand("model.n_layer", "model.n_layer", int, "INT", "layers (12)"),
    Shorthand("model.n_head", "model.n_head", int, "INT", "attention heads (12)"),
    Shorthand("model.n_embd", "model.n_embd", int, "INT", "width (768)"),
    Shorthand("model.vocab_size", "model.vocab_size", int, "INT", "embedding columns, padding included (50304)"),
    Shorthand("model.dropout", "model.dropout", number, "FLOAT", "dropout rate (0.0)"),
    Shorthand("batch_size", "train.batch_size", int, "INT", "windows an update, over all devices (512)"),
    Shorthand(
        "per_device_batch_size",
        "train.per_device_batch_size",
        int,
        "INT",
        "windows a device has at once (16, or what fits)",
    ),
    Shorthand("seq_len", "data.seq_len", int, "INT", "tokens a window (1024)"),
    Shorthand("num_tokens", "train.num_tokens", count, "COUNT", "tokens to train on; 1e9 is understood (10e9)"),
    Shorthand("optimizer.lr", "optimizer.lr", number, "FLOAT", "peak learning rate (6e-4)"),
    Shorthand("optimizer.weight_decay", "optimizer.weight_decay", number, "FLOAT", "decay of matrices (0.1)"),
    Shorthand(
        "optimizer.warmup_steps", "optimizer.warmup_steps", int, "INT", "steps of warm-up (700; short runs: less)"
    ),
    Shorthand("data_dir", "data.dir", str, "DIR", "prepared dataset (also gs://, s3://), or .bin files"),
    Shorthand("save_dir", "train.save_dir", str, "DIR", "where checkpoints and curves go; also gs://..., s3://..."),
    Shorthand("save_interval", "train.save_interval", int, "INT", "steps between checkpoints (1000)"),
    Shorthand(
        "from_pretrained",
        "train.from_pretrained",
        str,
        "SOURCE",
        "take the weights alone from that run or checkpoint (also gs://, s3://), folder of transformers, hf://ID, "
        ".safetensors or llm.c file",
    ),
]


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of `gpt_pretrain.main`."""
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="configuration; repeatable")
    parser.add_argument(
        "--gin_param",
        action="append",
        default=[],
        metavar="'NAME=VALUE'",
        help="a gin binding, such as 'optimizer.warmup_steps=100'; repeatable, wins over files",
    )
    parser.add_argument(
        "bindings",
        nargs="*",
        type=_binding,
        metavar="NAME=VALUE",
        help="the same as trackers' sweeps pass it: a VALUE that is no number, list or the like is a text",
    )
    short = parser.add_argument_group("shorthands for gin bindings (defaults in brackets; they win over --gin_param)")
    for each in SHORTHANDS:
        names = "" if each.flag == each.binding else f"{each.binding}: "
        short.add_argument(
            f"--{each.flag}", dest=each.flag, type=each.kind, metavar=each.metavar, help=names + each.help
        )
    parser.add_argument(
        "--fork", action="store_true", help="resume with other data or another seed, as a new branch of the run"
    )
    add_process_flags(parser)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Those of a command that several processes run together."""
    several = parser.add_argument_group("several processes (detected automatically on Slurm, GKE and TPU pods)")
    several.add_argument("--coordinator_address", metavar="HOST:PORT")
    several.add_argument("--num_processes", type=int)
    several.add_argument("--process_id", type=int)
    several.add_argument(
        "--start_timeout_secs",
        type=number,
        metavar="SECS",
        help=f"how long to wait for the others to start ({START_SECS:.0f}; on a cluster {CLUSTER_START_SECS:.0f})",
    )


def _binding(text: str) -> str:
    """NAME=VALUE -> a gin binding, in which a text has quotation marks.

    >>> _binding("optimizer.schedule=wsd"), _binding("optimizer.lr=1e-05"), _binding("train.optimizer=@mine.lion")
    ("optimizer.schedule = 'wsd'", 'optimizer.lr = 1e-05', 'train.optimizer = @mine.lion')
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE, such as optimizer.lr=0.001")
    return f"{name.strip()} = {value if _is_gin(value) else repr(value)}"


def _is_gin(value: str) -> bool:
    try:
        ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value.startswith(("@", "%"))
    return True


def bindings_of(args: argparse.Namespace) -> list[str]:
    """--gin_param, NAME=VALUE and the shorthands as gin bindings, in the order in which they apply."""
    bindings = [*args.gin_param, *args.bindings]
    for each in SHORTHANDS:
        if (value := getattr(args, each.flag)) is not None:
            bindings.append(f"{each.binding} = {value!r}")
    if args.fork:
        bindings.append("train.fork = True")
    return bindings
