"""`python -m data_prep.card DIR`."""

import argparse
import sys

from data_prep.arguments import directory, num_processes
from data_prep.card import HTML_NAME, README_NAME, __doc__, write_card
from data_prep.engines.engine import WorkerDied
from data_prep.pages.command_line import ArgumentParser, count
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m data_prep.card", description=__doc__, allow_abbrev=False)
    parser.add_argument("directory", metavar="DIR", help="a prepared dataset: a directory, gs://... or s3://...")
    parser.add_argument("--num_workers", type=count, default=1, help="processes (default: 1)")
    parser.add_argument("--tokenizer", help="the one that made the dataset, if it is your own: a file or module:Class")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for an error that the user can remove."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        args.directory = directory("DIR", args.directory)
        num_workers = num_processes(args.num_workers)
        write_card(args.directory, num_workers, args.tokenizer)
    except (ValueError, OSError, WorkerDied) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    print(f"{args.directory}: wrote {README_NAME} and {HTML_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
