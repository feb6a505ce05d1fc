"""What a run knows by heart: `python -m gpt_pretrain.memorization runs/quickstart --sample 50 --html m.html`.

Asks every kept checkpoint of a run about documents that it was trained on, and about as many of the same length that it
was not: the loss of each, and how many tokens it continues word for word from a prefix.
"""

import argparse
import shlex
import sys
from pathlib import Path

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.terminal import print_anything, python_as_typed
from data_prep.pages.text import json_line, printable
from data_prep.store.files import whole_file
from gpt_pretrain.history.opened_run import NUMBERING, OpenedRun, add_data_dir


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.memorization",
        description=__doc__,
        epilog=NUMBERING,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="save_dir of a run; also gs://..., s3://...")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", action="append", metavar="ID", help="ask about this document; repeatable")
    what.add_argument(
        "--token", action="append", type=int, metavar="N", help="... about the one that holds token N of the stream"
    )
    what.add_argument("--sample", type=int, metavar="N", help="ask about N documents that were seen, chosen by --seed")
    parser.add_argument(
        "--no_held_out", action="store_true", help="do not ask about documents that were not seen, for comparison"
    )
    parser.add_argument("--prefix_tokens", type=int, default=32, metavar="K", help="given (default %(default)s)")
    parser.add_argument("--asked_tokens", type=int, default=32, metavar="M", help="to continue (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents (default %(default)s)")
    parser.add_argument("--html", metavar="FILE", help="write a page with curves; it opens in any browser, offline")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    parser.add_argument("--tokenizer", help="the one that made the datasets, if it is your own: a file or module:Class")
    add_data_dir(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for a user's mistake."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        _run(args, sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    if args.sample is not None and args.sample < 1:
        raise ValueError(f"--sample {args.sample}: expected at least 1")
    if args.prefix_tokens < 1 or args.asked_tokens < 1:
        raise ValueError(
            f"--prefix_tokens {args.prefix_tokens} --asked_tokens {args.asked_tokens}: expected at least 1 of each"
        )
    run = OpenedRun(args.run, args.data_dir, args.tokenizer)
    if not len(run.ledger):
        raise ValueError(f"{args.run}: its ledger has no update yet; nothing has been seen")
    seq_len = run.plan.stage_at(len(run.ledger) - 1).seq_len
    least = 1 + args.prefix_tokens + args.asked_tokens
    if least > seq_len + 1:
        raise ValueError(
            f"--prefix_tokens {args.prefix_tokens} --asked_tokens {args.asked_tokens}: found {least - 1} tokens, "
            f"expected at most the {seq_len} that the model sees at once"
        )
    from gpt_pretrain.history import memorization as lib  # loads JAX
    from gpt_pretrain.history.memorization_page import render_memorization

    choice = lib.Choice(run, seq_len=seq_len, least_tokens=least, seed=args.seed)
    named = [{"document": each} for each in args.document or ()] + [{"token": each} for each in args.token or ()]
    passages = choice.seen(args.sample) if args.sample else lib.named_documents(run, named, seq_len)
    if not args.no_held_out:
        passages += choice.held_out([each for each in passages if each.group == "seen"])
    result = lib.measure(
        run,
        passages,
        prefix_tokens=args.prefix_tokens,
        asked_tokens=args.asked_tokens,
        on_checkpoint=lambda done, total: print(f"checkpoint {done} of {total}", file=sys.stderr, flush=True),
    )
    command = f"{python_as_typed()} -m gpt_pretrain.memorization {shlex.join(argv)}"
    if args.html:
        with whole_file(args.html) as partial:
            partial.write_text(render_memorization(args.run, result, command), encoding="utf-8", newline="\n")
    if args.json:
        with whole_file(args.json) as partial:
            partial.write_text(json_line(result.to_json()) + "\n", encoding="utf-8")
    print(printable("\n".join(_lines(lib, result))))
    for path in filter(None, (args.html, args.json)):
        print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def _lines(lib, result) -> list[str]:
    """A table of the groups over the checkpoints, and each document where they are few."""
    lines = [f"{'update':>10}" + "".join(f"  {name:>22}" for name in _columns(lib, result))]
    for column, step in enumerate(result.checkpoints):
        cells = []
        for _, chosen in lib.by_group(result):
            extracted = result.extracted[chosen, column]
            extracted = extracted[extracted >= 0]
            mean = f"{extracted.mean():.1f}" if len(extracted) else "-"
            cells += [f"{result.loss[chosen, column].mean():.4f}", f"{mean} of {result.asked_tokens}"]
        lines.append(f"{step:>10}" + "".join(f"  {cell:>22}" for cell in cells))
    few = result.passages if len(result.passages) <= 10 else ()
    for index, each in enumerate(few):
        when = f"seen in update {', '.join(map(str, each.steps))}" if each.steps else "held out"
        lines.append(
            f"{each.name}: {when}; loss {result.loss[index, -1]:.4f}"
            + (f", {result.extracted[index, -1]} tokens extracted" if result.extracted[index, -1] >= 0 else "")
        )
    return lines


def _columns(lib, result) -> list[str]:
    return [f"{group}: {what}" for group, _ in lib.by_group(result) for what in ("loss", "tokens extracted")]


if __name__ == "__main__":
    sys.exit(main())
