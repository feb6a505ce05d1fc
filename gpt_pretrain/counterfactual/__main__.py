"""The same run without a document: `python -m gpt_pretrain.counterfactual RUN --without ID --save_dir OUT`.

Finds the first step that held the document, restores the newest checkpoint from before it, and trains from there with
other windows in the place of its own, row by row: everything else stays as it was. Where the run has no checkpoint at
the end to compare with, or with --control, the run as it was is trained from the same checkpoint, too. Started again
after a crash, it continues.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_prep.pages.command_line import ArgumentParser, number
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable
from gpt_pretrain.flags import add_process_flags


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.counterfactual",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="save_dir of a run; also gs://..., s3://...")
    parser.add_argument("--save_dir", required=True, metavar="OUT", help="where the arms and the answer go")
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="ID",
        help="the id of a document, or a text file of ids, one a line; repeatable",
    )
    what.add_argument("--mask", action="store_true", help="its rows stay, and its tokens are read but not learned")
    what.add_argument(
        "--insert",
        nargs=3,
        action="append",
        default=[],
        metavar=("DIR", "ID", "STEP:ROW,..."),
        help="a document of another prepared dataset, and the rows that it overwrites; repeatable",
    )
    what.add_argument(
        "--intervene",
        action="append",
        default=[],
        metavar="JSON",
        help='an intervention in the edited arm, as {"kind": "zero", "sites": ["mlp_out"], "first_step": 100}, or a '
        ".json file (docs/training.md#hook-sites); repeatable",
    )
    what.add_argument("--until", type=int, metavar="STEP", help="the arms' last step (default: the run's last one)")
    several = parser.add_argument_group("many arms at once: only a table of effects, no page")
    several.add_argument("--each", metavar="FILE", help="an arm for each line: the ids of the documents it is without")
    several.add_argument("--subsets", type=int, metavar="N", help="N arms without random sets of documents")
    several.add_argument("--fraction", type=number, metavar="P", help="of the documents seen, in each set")
    several.add_argument("--seed", type=int, default=0, help="of the sets (default %(default)s)")
    several.add_argument(
        "--targets", metavar="FILE|N", help="documents whose losses are the effects: ids, or N seen and N held out (50)"
    )
    parser.add_argument("--control", action="store_true", help="train the run as it was, too, from the same checkpoint")
    parser.add_argument(
        "--num_probes", type=int, default=20, help="how often losses are measured (default %(default)s)"
    )
    parser.add_argument(
        "--gin_param", action="append", default=[], metavar="'NAME=VALUE'", help="a gin binding, for both arms"
    )
    add_process_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 answered, 1 an error or a check that failed, 2 wrong usage, 128 + signal stopped and saved."""
    print_anything()
    args = make_parser().parse_args(argv)
    several = (args.coordinator_address, args.num_processes, args.process_id)
    if any(each is not None for each in several) and None in several:
        print("error: --coordinator_address, --num_processes and --process_id belong together", file=sys.stderr)
        return 2
    from gpt_pretrain import runtime

    runtime.configure()
    from data_prep.pages.terminal import python_as_typed
    from gpt_pretrain import settings
    from gpt_pretrain.flags import CLUSTER_START_SECS, START_SECS
    from gpt_pretrain.train.results import RunFailed

    arguments = sys.argv[1:] if argv is None else argv
    command = f"{python_as_typed()} -m gpt_pretrain.counterfactual {shlex.join(arguments)}"
    try:
        _check(args)
        default_secs = CLUSTER_START_SECS if args.coordinator_address is None else START_SECS
        runtime.connect(*several, timeout_secs=args.start_timeout_secs or default_secs, command=command)
        status = _run(args, command)
        if argv is None:
            runtime.end_with(status)
        return status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        has_words = isinstance(error, ValueError | OSError | RunFailed)
        in_words = has_words and not os.environ.get("GPT_PRETRAIN_TRACEBACK")
        if in_words:
            print(f"error: {printable(runtime.in_words(error) or settings.message_of(error))}", file=sys.stderr)
        if argv is None:
            runtime.leave(show_traceback=not in_words)
        if not in_words:
            raise
        return 1


def _check(args: argparse.Namespace) -> None:
    """ValueError for options that do not belong together."""
    is_many = args.each is not None or args.subsets is not None
    asks = args.without or args.insert or args.intervene
    if not is_many and not asks:
        raise ValueError("nothing is asked: expected --without, --insert or --intervene, or --each or --subsets")
    if is_many and (asks or args.control or (args.each is not None) == (args.subsets is not None)):
        raise ValueError("--each FILE or --subsets N, and neither --without, --insert, --intervene nor --control")
    if args.subsets is not None and (args.subsets < 1 or args.fraction is None or not 0 < args.fraction < 1):
        raise ValueError(f"--subsets {args.subsets} --fraction {args.fraction}: expected N >= 1 and 0 < P < 1")
    if args.num_probes < 1:
        raise ValueError(f"--num_probes {args.num_probes}: expected at least 1")


def _run(args: argparse.Namespace, command: str) -> int:
    from gpt_pretrain.counterfactual.question import Asked, claim
    from gpt_pretrain.history.opened_run import OpenedRun
    from gpt_pretrain.train.interventions import chosen_interventions

    run = OpenedRun(args.run)
    until = len(run.ledger) if args.until is None else args.until
    if not 1 <= until <= run.data.num_steps:
        raise ValueError(f"--until {until}: {args.run} has the steps 1 to {run.data.num_steps}")
    if os.path.abspath(args.run) == os.path.abspath(args.save_dir):
        raise ValueError(f"--save_dir {args.save_dir}: is the run itself; expected another directory")
    if args.each is not None or args.subsets is not None:
        return _many(args, run, until, command)
    interventions = tuple(each for text in args.intervene for each in chosen_interventions(text, (), "--intervene"))
    asked = Asked(_ids(args.without), args.mask, tuple(map(_inserted, args.insert)), interventions, until)
    from gpt_pretrain.counterfactual.single import answer

    claim(args.save_dir, run, asked)
    return answer(run, asked, _configure(run, args.gin_param), args, command)


def _many(args: argparse.Namespace, run, until: int, command: str) -> int:
    from gpt_pretrain.counterfactual import many

    return many.answer(run, until, _configure(run, args.gin_param), args, command)


def _configure(run, given: Sequence[str]):
    """(save_dir, bindings, command) -> the run's configuration, with these changes."""
    from gpt_pretrain import settings
    from gpt_pretrain.counterfactual.recorded import recorded_config
    from gpt_pretrain.train.config import TrainConfig

    text = recorded_config(run)

    def config(save_dir: str, bindings: Sequence[str], command: str) -> TrainConfig:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.gin")
            path.write_text(text, encoding="utf-8")
            fixed = [f"train.save_dir = {save_dir!r}", "train.fork = False", "train.work_dir = None"]
            settings.parse([str(path)], [*fixed, *bindings, *given])
            return settings.train_config(command)

    return config


def _ids(given: Sequence[str]) -> tuple[str, ...]:
    """Ids, and those in text files, in order, each once."""
    from gpt_pretrain.text_files import read_text

    found: list[str] = []
    for each in given:
        found += read_text(each).split("\n") if os.path.isfile(each) else [each]
    return tuple(dict.fromkeys(each.strip() for each in found if each.strip()))


def _inserted(given: Sequence[str]):
    """("data/other", "<doc-1>", "3:0,9:2") -> Inserted"""
    from gpt_pretrain.counterfactual.question import Inserted

    directory, document, places = given
    try:
        pairs = tuple((int(step), int(row)) for step, row in (each.split(":") for each in places.split(",")))
    except ValueError:
        raise ValueError(f"--insert ... {places}: expected steps and rows, as 12:0,40:3") from None
    return Inserted(directory, document, pairs)


if __name__ == "__main__":
    sys.exit(main())
