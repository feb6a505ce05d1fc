"""python -m gpt_pretrain.main --gin_file=configs/quickstart.gin [--gin_param='model.n_layer=6' ...]"""

import argparse
import os
import shlex
import sys

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.text import printable
from gpt_pretrain.flags import CLUSTER_START_SECS, START_SECS, add_run_flags, bindings_of


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.main",
        description="Trains a GPT. The same command started again continues the run.",
        allow_abbrev=False,
    )
    add_run_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 complete, 1 an error, 2 wrong usage, 128 + signal stopped and saved."""
    args = make_parser().parse_args(argv)
    several = (args.coordinator_address, args.num_processes, args.process_id)
    if any(each is not None for each in several) and None in several:
        print("error: --coordinator_address, --num_processes and --process_id belong together", file=sys.stderr)
        return 2

    # Everything heavy is imported from here on, so that --help and typing errors answer at once.
    from gpt_pretrain import runtime

    runtime.configure()
    from data_prep.pages.terminal import python_as_typed
    from gpt_pretrain import settings
    from gpt_pretrain.train.results import RunFailed

    try:
        settings.parse(args.gin_file, bindings_of(args))
        arguments = sys.argv[1:] if argv is None else argv
        command = f"{python_as_typed()} -m gpt_pretrain.main {shlex.join(arguments)}"
        default_secs = CLUSTER_START_SECS if args.coordinator_address is None else START_SECS
        runtime.connect(*several, timeout_secs=args.start_timeout_secs or default_secs, command=command)
        if argv is not None:  # called by another program
            return settings.run(command=command)
        status = settings.run(command=command, process_began=runtime.process_began())
        runtime.end_with(status)
        return status
    except KeyboardInterrupt:  # before the run looks after signals itself
        return 130
    except Exception as error:
        has_words = isinstance(error, ValueError | OSError | RunFailed)
        in_words = has_words and not os.environ.get("GPT_PRETRAIN_TRACEBACK")
        if in_words:
            print(f"error: {printable(runtime.in_words(error) or settings.message_of(error))}", file=sys.stderr)
        runtime.leave(show_traceback=not in_words)
        if not in_words:
            raise
        return 1


if __name__ == "__main__":
    sys.exit(main())
