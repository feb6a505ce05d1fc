"""What a run saw when: `python -m gpt_pretrain.inspect runs/quickstart --step 57`.

`--step N` prints the documents of the batch of update N, row by row; with `--html` and `--checkpoint` as a page
on which every token has the colour of its loss. `--document ID`, `--url URL` and `--token N` go the other way: in
which updates was that document seen, and in which is it planned? `--text WORDS` asks that of a text, wherever it
stands, and `--exposures FILE` of all documents at once.
"""

import argparse
import os
import sys
from pathlib import Path

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.numbers import duration, short
from data_prep.pages.progress import Done, Progress
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import json_line, printable
from data_prep.store.files import whole_file
from gpt_pretrain.history.occurrences import occurrences_of, replaced_of
from gpt_pretrain.history.occurrences_text import describe, notes
from gpt_pretrain.history.opened_run import NUMBERING, OpenedRun, add_data_dir
from gpt_pretrain.history.page import BatchPage, render_batch
from gpt_pretrain.history.replayed import check_batch
from gpt_pretrain.history.row_text import row_as_text
from gpt_pretrain.history.rows import read_rows, slice_of_rows
from gpt_pretrain.history.spans import find_spans


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for a document that is not there and for a user's mistake."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        run = OpenedRun(args.run, args.data_dir, args.tokenizer)
        _check_options(args)
        if args.step is not None:
            _show_batch(run, args)
        elif args.exposures is not None:
            _write_exposures(run, args)
        elif args.text is not None:
            _show_text(run, args)
        else:
            _show_occurrences(run, args)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.inspect",
        description=__doc__,
        epilog=NUMBERING,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="save_dir of a run; also gs://..., s3://...")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="N", help="the batch of update N, from 1")
    what.add_argument("--document", metavar="ID", help="which updates hold the document with this id?")
    what.add_argument("--url", metavar="URL", help="... with this url")
    what.add_argument("--token", type=int, metavar="N", help="... that holds token N of the training stream")
    what.add_argument(
        "--text", metavar="WORDS", help="... that holds these words, also after a space? Searches whole streams"
    )
    what.add_argument(
        "--exposures",
        metavar="FILE",
        help="write a parquet file: how often each document was seen, how many tokens of it, in which updates",
    )
    parser.add_argument(
        "--at", type=int, metavar="N", help="of --exposures: after update N (default: the last of the ledger)"
    )
    parser.add_argument("--stream", metavar="NAME", help="look for the document in this stream of the mixture")
    parser.add_argument("--rows", metavar="A:B", help="of the batch, only rows A to B - 1; or one row, A")
    parser.add_argument("--full", action="store_true", help="print whole texts, and every line of a long table")
    parser.add_argument("--jsonl", action="store_true", help="a JSON line a row of the batch, or an occurrence")
    parser.add_argument("--html", metavar="FILE", help="write the batch as a page; it opens in any browser, offline")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="also the loss of every token, by this checkpoint or the newest of this run (loads JAX)",
    )
    parser.add_argument("--tokenizer", help="the one that made the datasets, if it is your own: a file or module:Class")
    add_data_dir(parser)
    return parser


def _check_options(args: argparse.Namespace) -> None:
    """ValueError for an option that belongs to another question."""
    if args.step is None and (args.rows or args.html or args.checkpoint):
        raise ValueError("--rows, --html and --checkpoint belong to --step")
    if args.stream is not None and (args.step is not None or args.exposures is not None):
        raise ValueError("--stream belongs to --document, --url, --token or --text")
    if args.exposures is None and args.at is not None:
        raise ValueError("--at belongs to --exposures")
    if args.exposures is not None and (args.jsonl or args.full):
        raise ValueError("--jsonl and --full print; --exposures writes a file")


def _write_exposures(run: OpenedRun, args: argparse.Namespace) -> None:
    from gpt_pretrain.history.exposures import write_exposures  # reads tables: pyarrow

    if args.at is None and not len(run.ledger):
        raise ValueError(f"{run.save_dir}: its ledger has no update yet; --at N counts what is planned up to N")
    num_steps = len(run.ledger) if args.at is None else run.index_of(args.at, "--at") + 1
    progress = _Shares("exposures", 2000)
    found = write_exposures(run, args.exposures, num_steps, progress.show)
    progress.close()
    size = Path(args.exposures).stat().st_size
    print(
        f"{args.exposures}: {found.num_documents:,} documents, {found.num_seen:,} of them in updates 1 to {num_steps}, "
        f"{size / 1e6:.1f} MB"
    )


def _show_text(run: OpenedRun, args: argparse.Namespace) -> None:
    from gpt_pretrain.history.text_found import describe_found, to_json
    from gpt_pretrain.history.text_search import search_text

    progress = _Tokens("search", 0)
    found = list(search_text(run, args.text, stream=args.stream, on_progress=progress.searched))
    progress.close()
    if not args.jsonl:
        print(printable(describe_found(run, args.text, found, full=args.full)))
    for each in found if args.jsonl else ():
        print(json_line(to_json(run, each)))


class _Tokens(Progress):
    """In tokens that were searched."""

    def searched(self, done: int, total: int) -> None:
        self.total_work = total
        self.set(Done(work=done))

    def line(self) -> str:
        """1.2 B tokens, 2 B tokens/s"""
        done = self.done.work
        return f"{short(done)} tokens, {short(round(done / self.seconds()))} tokens/s"


class _Shares(Progress):
    """Of two things one after the other, half of the whole each."""

    def show(self, what: str, share: float) -> None:
        self._what = what
        self.set(Done(work=round(1000 * share) + 1000 * (what != "examples")))

    def line(self) -> str:
        """documents, 0:12"""
        return f"{self._what}, {duration(self.seconds())}"


def _show_occurrences(run: OpenedRun, args: argparse.Namespace) -> None:
    spans = find_spans(run, document=args.document, url=args.url, token=args.token, stream=args.stream)
    for number, span in enumerate(spans):
        found = occurrences_of(run, span)
        if not args.jsonl:
            print("\n" * (number > 0) + printable(describe(run, span, found, full=args.full)))
            continue
        where = {"stream": span.stream.name, "split": span.split, "document": span.document and span.document.id}
        for each in found:
            print(json_line(where | each.to_json(len(run.ledger))))
        for each in replaced_of(run, span):
            print(json_line(where | each.to_json()))
        for line in notes(run, span):
            print(printable(line), file=sys.stderr)


def _show_batch(run: OpenedRun, args: argparse.Namespace) -> None:
    step_index = run.index_of(args.step)
    batch_size, num_seen = run.plan.batch_size(step_index), len(run.ledger)
    chosen = slice_of_rows(args.rows, batch_size)
    check_batch(run, step_index)
    rows = read_rows(run, step_index, chosen)
    losses = None
    if args.checkpoint:
        from gpt_pretrain.history.token_losses import losses_of_rows  # loads JAX

        losses = losses_of_rows(run, step_index, rows, args.checkpoint)
    if args.jsonl:
        for index, row in enumerate(rows):
            found = {} if losses is None else {"mean_loss": losses.mean(index), "losses": losses.nll[index].tolist()}
            print(json_line(row.to_json(step_index) | found))
    if args.html:
        page = BatchPage(
            run=args.run,
            update=args.step,
            num_updates=run.data.num_steps,
            num_seen=num_seen,
            batch_size=batch_size,
            rows=rows,
            losses=losses,
        )
        with whole_file(args.html) as partial:
            partial.write_text(render_batch(page), encoding="utf-8", newline="\n")
        size = Path(args.html).stat().st_size
        print(f"{args.html}: {len(rows)} rows, {size / 1e6:.1f} MB", file=sys.stderr)
    if not args.jsonl and not args.html:
        seen = "consumed" if step_index < num_seen else "planned"
        some = "" if len(rows) == batch_size else f", {len(rows)} of them here"
        print(
            f"{args.run}: update {step_index + 1} of {run.data.num_steps}, {seen}: {batch_size} rows from position "
            f"{run.plan.position(step_index)}{some}"
        )
        for index, row in enumerate(rows):
            mean_loss = None if losses is None else losses.mean(index)
            print("\n" + printable(row_as_text(row, mean_loss=mean_loss, full=args.full)))


if __name__ == "__main__":
    sys.exit(main())
