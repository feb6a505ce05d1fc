"""`python -m data_prep.fineweb`: FineWeb, or any parquet, JSONL or text -> a prepared dataset."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from data_prep.arguments import add_engine, directory, engine_choice, name, path, unit_range
from data_prep.engines.choice import ENGINES
from data_prep.pages.command_line import ArgumentParser, count
from data_prep.pages.terminal import print_anything

if TYPE_CHECKING:
    from data_prep.outcome import Outcome, ShareOutcome

DESCRIPTION = """\
Turns text into a prepared dataset: one stream of tokens, stored as .bin shards and as ArrayRecord
(a TFDS dataset), with a table of documents and a manifest.

A killed run is continued by the same command. The output's bytes do not depend on --num_workers,
nor on --engine."""

EXAMPLES = """\
examples:
  python -m data_prep.fineweb                                       FineWeb's 10 B-token sample
  python -m data_prep.fineweb --input=sample                        the small embedded sample
  python -m data_prep.fineweb --input=CC-MAIN-2024-10 --max_tokens=1000000000
  python -m data_prep.fineweb --input='texts/*.jsonl.zst' --output_dir=data/mine
  python -m data_prep.fineweb --input=tfds:lm1b --output_dir=data/lm1b
  python -m data_prep.fineweb --output_dir=gs://bucket/fineweb      into a bucket
  python -m data_prep.check data/sample                             verify every digest
"""
DEFAULT_VAL_TOKENS = 10_485_760


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m data_prep.fineweb",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_input_and_output(parser)
    _add_tokenizer(parser)
    _add_stream_and_files(parser)
    add_engine(parser, ENGINES)
    _add_tasks(parser)
    parser.add_argument(
        "--text_column",
        type=name,
        default="text",
        help="column, key or feature of the text; meta.body is the field body of meta (default: %(default)s)",
    )
    return parser


def _add_input_and_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input",
        type=path,
        default="sample-10BT",
        help="a preset (sample, sample-10BT, sample-100BT, sample-350BT, a crawl such as "
        "CC-MAIN-2024-10; edu-... for FineWeb-Edu), or comma-separated files, directories, globs "
        "(also ** and {a,b}) and URLs (https:// hf:// gs:// s3://) of .parquet, .jsonl, .ndjson, .json or .txt, "
        "perhaps compressed (.gz .zst .bz2 .xz), and "
        "tfds:NAME[/CONFIG][:VERSION][@SPLIT] or tfds:DIRECTORY[@SPLIT] for a dataset of "
        "TensorFlow Datasets that is prepared as array_record (default: %(default)s)",
    )
    add(
        "--output_dir",
        help="where to write: a directory, gs://BUCKET/NAME or s3://BUCKET/NAME (default for presets: data/<name>)",
    )
    add(
        "--formats",
        type=name,
        default="bin,array_record",
        help="bin, array_record or both (default: %(default)s)",
    )
    add(
        "--bin_header",
        default="short",
        choices=["short", "llmc"],
        help="header of .bin files: 12 bytes, or llm.c's 1024 (default: %(default)s)",
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokenizer",
        type=path,
        default="gpt2",
        help="gpt2, byte, cl100k_base, o200k_base, PATH.tiktoken, PATH/tokenizer.json or "
        "module:Class; ids above 65,535 are stored as uint32 (default: %(default)s)",
    )
    add(
        "--tokenizer_engine",
        default="auto",
        choices=["auto", "gigatoken", "tiktoken"],
        help="what computes the ids, which are the same; auto: gigatoken where it can",
    )
    add(
        "--verify_tokenizer",
        default="sample",
        choices=["sample", "all", "none"],
        help="which documents the reference encodes again to check gigatoken (default: %(default)s"
        ", one in 1,024 and at least one of each piece of work)",
    )


def _add_stream_and_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shard_tokens",
        type=count,
        default=100_000_000,
        help="tokens in one output file (default: %(default)s)",
    )
    add(
        "--val_tokens",
        type=count,
        help="take whole documents from the front of the stream for the validation split until "
        f"it has this many tokens (default: {DEFAULT_VAL_TOKENS}; 100000 for --input=sample)",
    )
    add(
        "--max_tokens",
        type=count,
        help="stop the stream, validation included, at this many tokens (default: no limit)",
    )
    add(
        "--record_tokens",
        type=count,
        default=2048,
        help="tokens in one ArrayRecord record (default: %(default)s)",
    )
    add(
        "--record_compression",
        default="none",
        choices=["none", "zstd"],
        help="of ArrayRecord; zstd: 0.7 of the size, read at half the speed (default: %(default)s)",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unit_range",
        metavar="i/n",
        help="of --engine=slurm: tokenize the i-th of n shares of the input and stop; the same command without it, "
        "when all n are done, finishes",
    )
    parser.add_argument(
        "--require_parts",
        action="store_true",
        help="where tasks have left units out, name these and stop, rather than tokenize them here",
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or already complete, 1 an error the user can remove, 130 Ctrl-C."""
    print_anything()
    args = make_parser().parse_args(argv)
    # Only now: --help must not wait for pyarrow.
    from data_prep.engines.engine import WorkerDied
    from data_prep.outcome import ShareOutcome, share_summary, summary, warn
    from data_prep.pages.text import printable
    from data_prep.store.secrets import hide_secrets

    start = time.monotonic()
    try:
        outcome, output_dir = _prepare(args)
    except (ValueError, OSError, WorkerDied) as error:
        print(f"error: {printable(hide_secrets(str(error)))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what is complete is kept, the same command continues.", file=sys.stderr)
        return 130
    if isinstance(outcome, ShareOutcome):
        print(share_summary(outcome, output_dir, time.monotonic() - start))
        return 0
    warn(outcome, output_dir)
    print(summary(outcome, args.input, output_dir, time.monotonic() - start))
    return 0


def _prepare(args: argparse.Namespace) -> tuple["Outcome | ShareOutcome", str]:
    """What came of it, and where it is."""
    from data_prep.finishing import finish
    from data_prep.inputs.paths import find_preset
    from data_prep.options import Options
    from data_prep.pipeline import Wanted, prepare, prepare_share
    from data_prep.store.secrets import public_names

    preset = find_preset(args.input)
    output_dir = preset.output_dir if preset and args.output_dir is None else args.output_dir
    if output_dir is None:
        raise ValueError(f"--input={public_names(args.input)} is no preset, so say where to: --output_dir=...")
    output_dir = directory("--output_dir", output_dir)
    engine, share = engine_choice(args), unit_range(args)
    val_tokens = args.val_tokens
    if val_tokens is None:
        val_tokens = preset.val_tokens if preset else DEFAULT_VAL_TOKENS
    options = Options(
        source=args.input,
        val_tokens=val_tokens,
        max_tokens=args.max_tokens,
        formats=tuple(args.formats.split(",")),
        bin_header=args.bin_header,
        tokenizer=args.tokenizer,
        shard_tokens=args.shard_tokens,
        record_tokens=args.record_tokens,
        record_compression=args.record_compression,
        text_column=args.text_column,
    )
    wanted = Wanted(
        options,
        preset.patterns if preset else args.input,
        output_dir,
        tokenizer_engine=args.tokenizer_engine,
        verify=args.verify_tokenizer,
    )
    if share:
        return prepare_share(wanted, engine, share), output_dir
    outcome = prepare(wanted, engine, require_parts=args.require_parts)
    finish(output_dir, engine.num_workers, args.tokenizer)
    return outcome, output_dir


if __name__ == "__main__":
    sys.exit(main())
