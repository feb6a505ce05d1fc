"""`python -m data_prep.convert IN OUT`: shards that are there -> a new prepared dataset."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from data_prep.bare_shards import PRESETS, BareShards
from data_prep.engines.local import WorkerDied, Workers, all_cores, locked
from data_prep.fineweb import count, summary
from data_prep.options import Options
from data_prep.pipeline import Outcome, agree_on_spec, disk_full, is_disk_full, refuse_strays
from data_prep.prepared_dataset import CHANGEABLE, PreparedDataset
from data_prep.store.manifest import MANIFEST_NAME, WORK_DIR
from data_prep.writing import publish, write_dataset

DESCRIPTION = """\
Writes a prepared dataset from the shards of another one, or from .bin shards made elsewhere: .bin
<-> ArrayRecord, short <-> llm.c's headers, shards and records of another length. The stream and the
documents stay what they are.

From a prepared dataset it is what preparing the same text with these options would have given, byte
for byte. Shards made elsewhere (llm.c, modded-nanogpt) need no manifest: `val` in a file's name
makes it part of the validation split, and documents are found by their end-of-text tokens.

A killed run is continued by the same command."""

EXAMPLES = """\
examples:
  python -m data_prep.convert data/sample data/sample-records --formats=array_record
  python -m data_prep.convert data/sample data/sample-llmc --bin_header=llmc --shard_tokens=1e7
  python -m data_prep.convert fineweb100B-gpt2 data/fineweb100B --num_shards=10
  python -m data_prep.convert --input='hf://datasets/kjj0/fineweb10B-gpt2/*.bin' data/fineweb10B
  python -m data_prep.convert 'llm.c/dev/data/fineweb10B/*.bin' data/fineweb10B --formats=bin
"""


def open_origin(
    source: str, changes: dict[str, Any], tokenizer: str | None, num_shards: int | None
) -> PreparedDataset | BareShards:
    """What IN is. Raises ValueError for options that it cannot have."""
    if not any(os.path.exists(os.path.join(source, n)) for n in (MANIFEST_NAME, WORK_DIR)):
        options = Options(source, 0, tokenizer=tokenizer or "gpt2", **changes)
        return BareShards(options, num_shards)
    if num_shards is not None:
        raise ValueError(f"{source}: a prepared dataset is converted whole, without --num_shards")
    origin = PreparedDataset(source, changes)
    there = origin.spec(Path())["tokenizer"]
    if tokenizer not in (None, there):
        raise ValueError(
            f"{source}: was prepared by the tokenizer {there}, and ids do not become "
            f"{tokenizer}'s. Leave --tokenizer out, or prepare the text again."
        )
    return origin


def convert(
    source: str,
    output_dir: str,
    changes: dict[str, Any],
    num_workers: int,
    *,
    tokenizer: str | None = None,
    num_shards: int | None = None,
) -> Outcome:
    """Makes a prepared dataset of the shards that `source` names, or finishes making it.

    Args:
      source: IN, as the command line takes it.
      changes: the values of CHANGEABLE that differ from IN's, or from the defaults of `Options`.
      tokenizer: of shards without a manifest; None is gpt2.
      num_shards: how many training shards of those; None is all.

    Raises:
      ValueError: a user's mistake, before any work, or damaged input; what is done is kept.
      engines.WorkerDied: a worker process was killed.
    """
    if "://" in output_dir:
        raise ValueError(f"{output_dir}: write into a directory of this machine, not a URL")
    output, work = Path(output_dir), Path(output_dir, WORK_DIR)
    if os.path.realpath(source) == os.path.realpath(output):
        raise ValueError(f"{output_dir}: is both IN and OUT; write into another directory")
    origin = open_origin(source, changes, tokenizer, num_shards)
    if (output / MANIFEST_NAME).exists():
        return origin.confirm(output)
    spec = origin.spec(output)
    if not (work / "spec.json").exists():
        refuse_strays(output)
    try:
        with locked(work), Workers(num_workers, work) as workers:
            agree_on_spec(spec, output, work)
            tokens, tables = origin.read(work, workers)
            manifest = write_dataset(tokens, spec, output, work / "shards", workers, tables)
            try:
                manifest = origin.finish(manifest)
            except ValueError:
                # The notes call files whole that came of something else than they say.
                shutil.rmtree(work / "shards")
                raise
            publish(manifest, output, num_workers)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise disk_full(output, error, origin.num_tokens) from error
    return Outcome(manifest, False)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.convert",
        usage="%(prog)s [--input=]IN OUT [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="IN OUT",
        help="IN: a prepared dataset; or .bin shards made elsewhere: a preset "
        f"({', '.join(PRESETS)}), or comma-separated directories, paths, globs and URLs (https:// "
        "hf:// gs:// s3://). OUT: the directory to write",
    )
    add("--input", help="IN, spelt as for data_prep.fineweb")
    add("--num_shards", type=count, help="of shards made elsewhere: the first N of train, and val")
    add("--tokenizer", help="of shards made elsewhere (default: gpt2)")
    kept = "(default: IN's; of shards made elsewhere %s)"
    add("--formats", help=f"bin, array_record or both {kept % 'both'}")
    add("--bin_header", choices=["short", "llmc"], help=f"12 bytes or 1024 {kept % 'short'}")
    add("--shard_tokens", type=count, help=f"tokens in one file {kept % '1e8'}")
    add("--record_tokens", type=count, help=f"tokens in one ArrayRecord record {kept % '2048'}")
    add("--record_compression", choices=["none", "zstd"], help=f"of ArrayRecord {kept % 'none'}")
    add("--num_workers", type=count, help="processes (default: all cores)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or already complete, 1 an error the user can remove, 130 Ctrl-C."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    named = [args.input, *args.paths] if args.input is not None else args.paths
    if len(named) != 2:
        parser.error(f"expected IN and OUT, found {' '.join(named)}")
    source, output_dir = named
    changes = {name: value for name in CHANGEABLE if (value := getattr(args, name)) is not None}
    if args.formats is not None:
        changes["formats"] = tuple(args.formats.split(","))
    num_workers = all_cores() if args.num_workers is None else args.num_workers
    options = {"tokenizer": args.tokenizer, "num_shards": args.num_shards}
    start = time.monotonic()
    try:
        if num_workers < 1:
            raise ValueError(f"--num_workers={num_workers}: expected at least 1")
        outcome = convert(source, output_dir, changes, num_workers, **options)
    except (ValueError, OSError, WorkerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what is complete is kept, the same command continues.", file=sys.stderr)
        return 130
    made_of = outcome.manifest.spec["source"]
    print(summary(outcome, made_of, output_dir, time.monotonic() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
