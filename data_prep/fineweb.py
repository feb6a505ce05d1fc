"""`python -m data_prep.fineweb`: FineWeb, or any parquet, JSONL or text -> a prepared dataset."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.pipeline import Outcome

DESCRIPTION = """\
Turns text into a prepared dataset: one stream of tokens, stored as .bin shards and as ArrayRecord
(a TFDS dataset), with a table of documents and a manifest.

A killed run is continued by the same command. The output's bytes do not depend on --num_workers."""

EXAMPLES = """\
examples:
  python -m data_prep.fineweb                                       FineWeb's 10 B-token sample
  python -m data_prep.fineweb --input=sample                        the small embedded sample
  python -m data_prep.fineweb --input=CC-MAIN-2024-10 --max_tokens=1000000000
  python -m data_prep.fineweb --input='texts/*.jsonl.zst' --output_dir=data/mine
  python -m data_prep.fineweb --input=tfds:lm1b --output_dir=data/lm1b
  python -m data_prep.check data/sample                             verify every digest
"""
DEFAULT_VAL_TOKENS = 10_485_760


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.fineweb",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--input",
        default="sample-10BT",
        help="a preset (sample, sample-10BT, sample-100BT, sample-350BT, a crawl such as "
        "CC-MAIN-2024-10; edu-... for FineWeb-Edu), or comma-separated paths, globs and URLs "
        "(https:// hf:// gs:// s3://) of .parquet, .jsonl[.gz|.zst] or .txt, and "
        "tfds:NAME[/CONFIG][:VERSION][@SPLIT] or tfds:DIRECTORY[@SPLIT] for a dataset of "
        "TensorFlow Datasets that is prepared as array_record (default: %(default)s)",
    )
    add("--output_dir", help="where to write (default for presets: data/<name>)")
    add(
        "--formats",
        default="bin,array_record",
        help="bin, array_record or both (default: %(default)s)",
    )
    add(
        "--bin_header",
        default="short",
        choices=["short", "llmc"],
        help="header of .bin files: 12 bytes, or llm.c's 1024 (default: %(default)s)",
    )
    add(
        "--tokenizer",
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
    add("--num_workers", type=count, help="processes (default: all cores)")
    add(
        "--text_column",
        default="text",
        help="column, key or feature of the text (default: %(default)s)",
    )
    return parser


def count(text: str) -> int:
    """100000, 100_000 or 1e5."""
    try:
        value = int(text)
    except ValueError:
        value = float(text)
        if value != int(value):
            raise ValueError(text) from None
    return int(value)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or already complete, 1 an error the user can remove, 130 Ctrl-C."""
    args = make_parser().parse_args(argv)
    # Only now: --help must not wait for pyarrow.
    from data_prep.engines.local import WorkerDied, all_cores
    from data_prep.inputs.paths import find_preset
    from data_prep.options import Options
    from data_prep.pipeline import prepare

    start = time.monotonic()
    try:
        preset = find_preset(args.input)
        output_dir = args.output_dir or (preset.output_dir if preset else None)
        if output_dir is None:
            raise ValueError(f"--input={args.input} is no preset, so say where to: --output_dir=...")
        num_workers = all_cores() if args.num_workers is None else args.num_workers
        if num_workers < 1:
            raise ValueError(f"--num_workers={num_workers}: expected at least 1")
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
        patterns = preset.patterns if preset else args.input
        outcome = prepare(
            options,
            patterns,
            output_dir,
            num_workers,
            engine=args.tokenizer_engine,
            verify=args.verify_tokenizer,
        )
    except (ValueError, OSError, WorkerDied) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; what is complete is kept, the same command continues.", file=sys.stderr)
        return 130
    print(summary(outcome, args.input, output_dir, time.monotonic() - start))
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def summary(outcome: "Outcome", source: str, output_dir: str, seconds: float) -> str:
    """The one line that a run ends with."""
    from data_prep.pages.numbers import duration

    config = "quickstart" if source == "sample" else "gpt2_124m"
    command = f"python -m gpt_pretrain.main --gin_file=configs/{config}.gin --data_dir={output_dir}"
    splits = outcome.manifest.splits
    sizes = ", ".join(f"{split} {splits[split].num_tokens:,}" for split in splits)
    if outcome.was_complete:
        return f"{output_dir}: already complete ({sizes} tokens); nothing to do. Next: {command}"
    skipped = [f"{outcome.num_null:,} null texts"] if outcome.num_null else []
    skipped += [f"{outcome.num_empty:,} empty texts"] if outcome.num_empty else []
    documents = sum(split.num_documents for split in splits.values())
    return (
        f"{output_dir}: {documents:,} documents, {sizes} tokens in {duration(seconds)}"
        + (f"; skipped {' and '.join(skipped)}" if skipped else "")
        + f". Next: {command}"
    )


if __name__ == "__main__":
    sys.exit(main())
