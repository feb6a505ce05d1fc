"""Runs as a page: `python -m gpt_pretrain.report runs/quickstart --html report.html`.

One file that opens in any browser, offline: what ran, its curves, statistics of its layers, where the time went,
evaluations, samples, and what happened on the way, each with the command that shows the batch of that step. Of several
runs the first is in front, and the others are behind it. Runs that are under way can be shown, too.
"""

import argparse
import os
import shlex
import sys
import time

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.numbers import plural, size_text
from data_prep.pages.terminal import print_anything, python_as_typed
from data_prep.pages.text import printable
from data_prep.store.files import whole_file


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a run is not there, or says nothing."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        _report(args)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.report",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="save_dir of a run; also gs://..., s3://...")
    parser.add_argument("--html", required=True, metavar="FILE", help="the page that is written")
    return parser


def _report(args: argparse.Namespace) -> None:
    from gpt_pretrain.history.report_page import MAX_RUNS, render_report  # loads JAX, which --help need not wait for
    from gpt_pretrain.history.reported_run import read_run
    from gpt_pretrain.settings import values_of

    if len(args.runs) > MAX_RUNS:
        raise ValueError(f"{len(args.runs)} runs: expected at most {MAX_RUNS} in one page")
    runs = [read_run(name, values_of) for name in args.runs]
    python = python_as_typed()
    command = " ".join(
        [python, "-m gpt_pretrain.report", *map(shlex.quote, args.runs), "--html", shlex.quote(args.html)]
    )
    with whole_file(args.html) as partial:
        text = render_report(runs, python=python, made_by=command, now=time.time())
        partial.write_text(text, encoding="utf-8", newline="\n")
    size = size_text(os.stat(args.html).st_size)
    print(f"{args.html}: {plural(len(runs), 'run')}, {size}; it opens in any browser, offline")


if __name__ == "__main__":
    sys.exit(main())
