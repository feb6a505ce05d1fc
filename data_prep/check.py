"""Verifies a prepared dataset: `python -m data_prep.check DIR`.

Every size and digest, every count, the tables of documents against the stream, and the
fingerprint, computed anew from each stored format. One line for each problem; exit status 1.
`--repair` makes the damaged files again, from the other format or from the inputs.
"""

import argparse
import sys
from collections.abc import Iterator

from data_prep.arguments import directory, num_processes
from data_prep.checking import Problem, find_problems
from data_prep.engines.engine import WorkerDied
from data_prep.pages.command_line import ArgumentParser, count
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable
from data_prep.repair import repair
from data_prep.store.manifest import load


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m data_prep.check",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="a prepared dataset: a directory, gs://... or s3://...")
    parser.add_argument("--num_workers", type=count, help="default: all cores")
    parser.add_argument("--repair", action="store_true", help="make damaged files again")
    parser.add_argument(
        "--tokenizer", help="for --repair, where the dataset was made by one of your own: a file or module:Class"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the problems, or one line that there are none. Exit status 1 if any is left."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        args.directory = directory("DIR", args.directory)
        num_workers = num_processes(args.num_workers)
        problems = list(_printed(find_problems(args.directory, num_workers)))
        if problems and args.repair:
            damaged = [problem.damaged for problem in problems if problem.damaged]
            for sentence in repair(args.directory, damaged, num_workers, args.tokenizer):
                print(printable(sentence))
            print("checking again")
            problems = list(_printed(find_problems(args.directory, num_workers)))
        manifest = load(args.directory)
    except (ValueError, OSError, WorkerDied) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    if problems:
        advice = "" if args.repair else " `--repair` makes damaged files again."
        plural = "s" * (len(problems) > 1)
        print(f"{args.directory}: {len(problems)} problem{plural}.{advice}")
        return 1
    sizes = ", ".join(f"{name} {split.num_tokens:,}" for name, split in manifest.splits.items())
    print(
        f"{args.directory}: OK, {len(manifest.shards)} files, {sizes} tokens, fingerprint {manifest.fingerprint[:16]}"
    )
    return 0


def _printed(problems: Iterator[Problem]) -> Iterator[Problem]:
    for problem in problems:
        print(printable(str(problem)))
        yield problem


if __name__ == "__main__":
    sys.exit(main())
