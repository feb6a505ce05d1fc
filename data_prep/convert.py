"""`python -m data_prep.convert IN OUT`: shards that are there -> a new prepared dataset."""

import argparse
import sys
import time

from data_prep.arguments import add_engine, directory, engine_choice, name, path
from data_prep.bare_shards import PRESETS
from data_prep.conversion import convert
from data_prep.engines.choice import ENGINES
from data_prep.engines.engine import WorkerDied
from data_prep.finishing import finish
from data_prep.outcome import summary, warn
from data_prep.pages.command_line import ArgumentParser, count
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable
from data_prep.prepared_dataset import CHANGEABLE
from data_prep.store.secrets import hide_secrets

DESCRIPTION = """\
Writes a prepared dataset from the shards of another one, or from .bin shards made elsewhere: .bin
<-> ArrayRecord, short <-> llm.c's headers, shards and records of another length. The stream and the
documents stay what they are.

From a prepared dataset it is what preparing the same text with these options would have given, byte
for byte. Shards made elsewhere (llm.c's and modded-nanogpt's .bin, build-nanogpt's .npy, nanoGPT's
train.bin with --headerless=uint16) need no manifest: `val` in a file's name makes it part of the
validation split, and documents are found by their end-of-text tokens.

A killed run is continued by the same command."""

EXAMPLES = """\
examples:
  python -m data_prep.convert data/sample data/sample-records --formats=array_record
  python -m data_prep.convert data/sample data/sample-llmc --bin_header=llmc --shard_tokens=1e7
  python -m data_prep.convert fineweb100B-gpt2 data/fineweb100B --num_shards=10
  python -m data_prep.convert --input='hf://datasets/kjj0/fineweb10B-gpt2/*.bin' data/fineweb10B
  python -m data_prep.convert 'llm.c/dev/data/fineweb10B/*.bin' data/fineweb10B --formats=bin
  python -m data_prep.convert build-nanogpt/edu_fineweb10B data/edu-fineweb10B
  python -m data_prep.convert nanoGPT/data/openwebtext data/openwebtext --headerless=uint16
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
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
        type=path,
        help="IN: a prepared dataset; or .bin or .npy shards made elsewhere: a preset "
        f"({', '.join(PRESETS)}), or comma-separated directories, paths, globs and URLs (https:// "
        "hf:// gs:// s3://). OUT: the directory or bucket (gs://BUCKET/NAME, s3://BUCKET/NAME) to write",
    )
    add("--input", type=path, help="IN, spelt as for data_prep.fineweb")
    add("--num_shards", type=count, help="of shards made elsewhere: the first N of train, and val")
    add(
        "--headerless",
        choices=["uint16", "uint32"],
        help="of .bin files that are ids of this kind and nothing else: nanoGPT's train.bin and val.bin are uint16",
    )
    add("--tokenizer", type=path, help="of shards made elsewhere (default: gpt2)")
    kept = "(default: IN's; of shards made elsewhere %s)"
    add("--formats", type=name, help=f"bin, array_record or both {kept % 'both'}")
    add("--bin_header", choices=["short", "llmc"], help=f"12 bytes or 1024 {kept % 'short'}")
    add("--shard_tokens", type=count, help=f"tokens in one file {kept % '1e8'}")
    add("--record_tokens", type=count, help=f"tokens in one ArrayRecord record {kept % '2048'}")
    add("--record_compression", choices=["none", "zstd"], help=f"of ArrayRecord {kept % 'none'}")
    add_engine(parser, [name for name in ENGINES if name != "slurm"])
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or already complete, 1 an error the user can remove, 130 Ctrl-C."""
    print_anything()
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    named = [args.input, *args.paths] if args.input is not None else args.paths
    if len(named) != 2:
        parser.error(f"expected IN and OUT, found {' '.join(named)}")
    source, output_dir = named
    changes = {name: value for name in CHANGEABLE if (value := getattr(args, name)) is not None}
    if args.formats is not None:
        changes["formats"] = tuple(args.formats.split(","))
    start = time.monotonic()
    try:
        engine, output_dir = engine_choice(args), directory("OUT", output_dir)
        outcome = convert(
            source,
            output_dir,
            changes,
            engine,
            tokenizer=args.tokenizer,
            num_shards=args.num_shards,
            headerless=args.headerless,
        )
        finish(output_dir, engine.num_workers, args.tokenizer)
    except (ValueError, OSError, WorkerDied) as error:
        print(f"error: {printable(hide_secrets(str(error)))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what is complete is kept, the same command continues.", file=sys.stderr)
        return 130
    warn(outcome, output_dir)
    print(summary(outcome, outcome.manifest.spec.source, output_dir, time.monotonic() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
