"""Batches of a run again, without its model: `python -m gpt_pretrain.replay runs/quickstart --verify`.

Every batch follows from the run's plan and its datasets, so it can be read again at any time, at the speed of the
disk. `--verify` compares what is read with the ledger, the digests of what the run was trained on; `--against`
finds where two runs part, from their ledgers alone, and says which parameter it is.
"""

import argparse
import os
import sys
import time

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.numbers import duration, short
from data_prep.pages.progress import Done, Progress
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import json_line, printable
from gpt_pretrain.history.differences import compare_runs
from gpt_pretrain.history.opened_run import NUMBERING, OpenedRun, add_data_dir
from gpt_pretrain.history.replayed import ReplayedBatch, describe_mismatch, is_as_the_ledger_says, replay


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where all is as it should be, 1 for a difference or a user's mistake."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        run = OpenedRun(args.run, args.data_dir, verify="size")
        if args.against:
            return _compare(run, OpenedRun(args.against), args)
        return _replay(run, args)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.replay",
        description=__doc__,
        epilog=NUMBERING,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="save_dir of a run; also gs://..., s3://...")
    parser.add_argument("--from_step", type=int, metavar="A", help="first update (default 1)")
    parser.add_argument(
        "--to_step",
        type=int,
        metavar="B",
        help="last update (default: the last that the ledger has, or of the whole run where nothing is saved yet)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare with the ledger; name the damaged file if it differs"
    )
    parser.add_argument("--against", metavar="OTHER_RUN", help="where do the two runs part, and why? Reads no data")
    add_data_dir(parser)
    out = parser.add_mutually_exclusive_group()
    out.add_argument("--list", action="store_true", help="print a line an update: number, position, digest")
    out.add_argument("--jsonl", action="store_true", help="print them as JSON, with stream and window of each row")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads that read (default %(default)s)",
    )
    return parser


def _compare(run: OpenedRun, other: OpenedRun, args: argparse.Namespace) -> int:
    if args.verify or args.list or args.jsonl or args.from_step or args.to_step:
        raise ValueError("--against compares two ledgers from their beginning; give no other option but --data_dir")
    comparison = compare_runs(run, other)
    print(printable("\n".join(comparison.lines)))
    return 0 if comparison.agree else 1


def _replay(run: OpenedRun, args: argparse.Namespace) -> int:
    steps = _steps(run, args)
    num_tokens = run.plan.tokens_before(steps.stop) - run.plan.tokens_before(steps.start)
    progress = _Progress("replay", num_tokens, in_tokens=True)
    unequal: list[ReplayedBatch] = []
    start = time.monotonic()
    for batches in replay(run, steps.start, steps.stop, with_rows=args.jsonl, num_threads=args.num_workers):
        for batch in batches:
            if args.list:
                print(f"{batch.step_index + 1} {batch.position} {batch.digest:016x}")
            elif args.jsonl:
                print(json_line(batch.to_json()))
            if args.verify and not is_as_the_ledger_says(run, batch):
                unequal.append(batch)
        done = batches[-1].step_index + 1
        num_read = run.plan.tokens_before(done) - run.plan.tokens_before(steps.start)
        progress.set(Done(tokens=num_read, work=done - steps.start))
    progress.close()
    secs = max(time.monotonic() - start, 1e-9)
    updates = f"updates {steps.start + 1} to {steps.stop}" if len(steps) > 1 else f"update {steps.stop}"
    speed = f"{short(num_tokens)} tokens in {secs:.1f} s, {short(round(num_tokens / secs))} tokens/s"
    # The summary must not become a part of the list.
    stream = sys.stderr if args.list or args.jsonl else sys.stdout
    if unequal:
        print(printable(describe_mismatch(run, unequal, len(steps))), file=stream)
        return 1
    if args.verify:
        print(f"{run.save_dir}: {updates} are as the ledger says ({speed})", file=stream)
    else:
        advice = "compare them with the ledger: --verify" if len(run.ledger) else "none is in the ledger yet"
        print(f"{run.save_dir}: {updates} replayed ({speed}); {advice}", file=stream)
    return 0


def _steps(run: OpenedRun, args: argparse.Namespace) -> range:
    """The steps of the plan, from 0, that the options choose. ValueError for what is not there."""
    if args.verify and not len(run.ledger):
        raise ValueError(f"{run.save_dir}: its ledger has no update yet; there is nothing to verify")
    first = run.index_of(1 if args.from_step is None else args.from_step, "--from_step")
    stop = run.index_of(args.to_step or len(run.ledger) or run.data.num_steps, "--to_step") + 1
    if stop <= first:
        raise ValueError(f"--from_step {first + 1} --to_step {stop}: the first is after the last")
    if args.verify and stop > len(run.ledger):
        raise ValueError(f"--to_step {stop}: the ledger of {run.save_dir} ends at update {len(run.ledger)}")
    return range(first, stop)


class _Progress(Progress):
    """In updates and tokens."""

    def line(self) -> str:
        """120 updates, 9.9 M tokens, 320 M tokens/s, 1:23 left"""
        updates, tokens, secs = self.done.work, self.done.tokens, self.seconds()
        left = (self.total_work - tokens) * secs / max(1, tokens)
        speed = f"{short(tokens)} tokens, {short(round(tokens / secs))} tokens/s"
        return f"{updates:,} updates, {speed}, {duration(left)} left"


if __name__ == "__main__":
    sys.exit(main())
