"""Arguments that the command lines share. One that cannot be is refused in one line: option, found, expected."""

import argparse
import os
import re
from collections.abc import Sequence

from data_prep.engines.choice import EngineChoice
from data_prep.engines.local import all_cores
from data_prep.engines.slurm import UnitRange
from data_prep.pages.command_line import count
from data_prep.store.locations import is_bucket
from data_prep.store.places import join

MAX_WORKERS = 10_000
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+:/|https?:)", re.IGNORECASE)  # s3:/ too, as paths are cleaned up


def num_processes(option: int | None) -> int:
    """--num_workers, or as many as there are cores. ValueError where it cannot be."""
    if option is None:
        return all_cores()
    if not 1 <= option <= MAX_WORKERS:
        at_most = f" and at most {MAX_WORKERS:,}" if option > 1 else ""
        raise ValueError(f"--num_workers={option}: expected at least 1{at_most}")
    return option


def add_engine(parser: argparse.ArgumentParser, engines: Sequence[str]) -> None:
    """The options that say where jobs run."""
    add = parser.add_argument
    add("--num_workers", type=count, help="processes of this machine (default: all cores)")
    add(
        "--engine",
        default="local",
        choices=engines,
        help="where jobs run, which changes no byte: processes of this machine, or a cluster (default: %(default)s)",
    )
    add("--dask_scheduler", metavar="ADDRESS", help="of --engine=dask: tcp://HOST:PORT of a scheduler with workers")
    add(
        "--beam_options",
        metavar="OPTIONS",
        help="of --engine=beam: Beam's own, in one argument: '--runner=DataflowRunner --region=...'",
    )


def engine_choice(args: argparse.Namespace) -> EngineChoice:
    """What `add_engine`'s options say. ValueError where that cannot be."""
    return EngineChoice(args.engine, num_processes(args.num_workers), args.dask_scheduler, args.beam_options)


def unit_range(args: argparse.Namespace) -> UnitRange | None:
    """--unit_range. ValueError where it is none, or does not go with the other options."""
    if args.unit_range is None:
        return None
    if args.engine != "slurm":
        raise ValueError(f"--unit_range={args.unit_range}: is of --engine=slurm, found --engine={args.engine}")
    if args.require_parts:
        raise ValueError(f"--unit_range={args.unit_range}: makes parts; leave out --require_parts")
    return UnitRange.parse(args.unit_range)


def name(text: str) -> str:
    """Text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"found {text!r}, which is empty")
    return text


def path(text: str) -> str:
    """A name that may be a path: one that begins with ~ is below a home."""
    return os.path.expanduser(name(text))


def directory(option: str, text: str) -> str:
    """A directory of this machine (~ expanded, file:// taken away) or of a bucket to work in.

    Raises ValueError: any other URL, or what is no directory.
    """
    text = text.removeprefix("file://")
    if not text.strip():
        raise ValueError(f"{option}={text!r}: expected a directory")
    if is_bucket(text):
        return join(text)
    if _URL.match(text):
        raise ValueError(
            f"{option}={text}: expected a directory of this machine, gs://BUCKET/NAME or s3://BUCKET/NAME, not a URL "
            "of another kind. Mount it as a directory, or work in one here and copy that when it is complete."
        )
    found = os.path.expanduser(text)
    if found.startswith("~") and not os.path.lexists(found):
        raise ValueError(f"{option}={text}: there is no such user's home")
    if os.path.lexists(found) and not os.path.isdir(found):
        raise ValueError(f"{option}={text}: is no directory")
    return found
