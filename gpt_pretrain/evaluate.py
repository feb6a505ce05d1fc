"""How well does a run's model do at tasks? `python -m gpt_pretrain.evaluate runs/gpt2_124m --tasks=hellaswag,arc_easy`

Tasks are those of lm-evaluation-harness, by name, and files of HellaSwag, which need no harness: llm.c's
hellaswag_val.bin, or the .jsonl. Results are printed, and kept in the run's folder `evaluations`.
"""

import argparse
import sys
import time
from pathlib import Path

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.evaluate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        metavar="RUN_OR_CHECKPOINT",
        help="a save_dir (its newest good checkpoint) or one checkpoint; gs://, s3://",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help="of the harness: tasks, groups, tags, .yaml files; or files of HellaSwag, .bin or .jsonl",
    )
    parser.add_argument("--every", action="store_true", help="all checkpoints of the run, the oldest first")
    parser.add_argument("--include_path", metavar="DIR", help="more tasks of the harness: a folder with .yaml files")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples of each task (default: all)")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="solved examples first (default: the task's)")
    parser.add_argument("--output", metavar="FILE", help="also as the harness's JSON; with --every a file a step")
    parser.add_argument(
        "--end_of_text",
        action=argparse.BooleanOptionalAction,
        help="begin contexts with end-of-text (default: only for models that were trained with the document mask)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the computation (default: of training; on CPUs float32)"
    )
    parser.add_argument(
        "--interventions",
        default="none",
        metavar="WHICH",
        help="none (default); checkpoint: those of its training that are meant for evaluation; a .json file; "
        """or JSON, such as '{"kind": "zero", "sites": ["mlp_out"], "layers": [1]}' or a list of such""",
    )
    parser.add_argument(
        "--tokenizer",
        help="the one that made the data, if it is your own (a file or module:Class), or nobody recorded it (gpt2)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 for a user's mistake or a checkpoint that was passed over, 2 for wrong usage."""
    print_anything()
    args = make_parser().parse_args(argv)

    from gpt_pretrain import runtime

    runtime.configure()
    from gpt_pretrain import checks
    from gpt_pretrain.tasks.suite import check_names
    from gpt_pretrain.train.evaluated import EvaluatedRun

    try:
        for name, least in (("limit", 1), ("num_fewshot", 0)):
            if (value := getattr(args, name)) is not None:
                checks.whole_number(f"--{name}", value, least=least)
        names = check_names("--tasks", [name for each in args.tasks.split(",") if (name := each.strip())])
        if not names:
            raise ValueError(f"--tasks: found {args.tasks!r}, expected names of tasks, such as hellaswag,arc_easy")
        run = EvaluatedRun(
            checks.place("RUN_OR_CHECKPOINT", args.run),
            names,
            every=args.every,
            include_path=args.include_path and checks.path("--include_path", args.include_path),
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            end_of_text_first=args.end_of_text,
            dtype=args.dtype,
            tokenizer_name=args.tokenizer,
            interventions=args.interventions,
            output=args.output and Path(checks.path("--output", args.output)),
        )
        began, num_passed_over = time.monotonic(), 0
        for name in run.checkpoints:
            try:
                found = run.evaluate(name, _say)
            except ValueError as error:
                if len(run.checkpoints) == 1:
                    raise
                print(f"warning: {printable(str(error))} Passed over.", file=sys.stderr, flush=True)
                num_passed_over += 1
                continue
            print(printable(f"{name}: step {found.step:,}\n{found.table}\n"), flush=True)
        written = [*map(str, run.written), *([] if run.written else [run.why_not_written])]
        print(printable(f"Done in {time.monotonic() - began:.1f} s. {'; '.join(written)}"))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {printable(runtime.in_words(error) or str(error))}", file=sys.stderr)
        return 1
    return 1 if num_passed_over else 0


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
