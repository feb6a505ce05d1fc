"""What a run will need and how fast it can be, before it starts: without its devices and without its data.

    python -m gpt_pretrain.preflight --gin_file=configs/gpt2_1558m.gin --topology=v5e:4x4 [any flag of main]

Compiles the step that the trainer would run for those devices and reads the result: memory, FLOPs, memory traffic, what
the devices send one another. Times are predictions by datasheets: what is possible, not what will be. docs/preflight.md
says how each number comes about.
"""

import argparse
import dataclasses
import json
import os
import sys

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.text import printable
from gpt_pretrain.flags import add_run_flags, bindings_of


def make_parser() -> argparse.ArgumentParser:
    """The flags of `gpt_pretrain.main`, and some more."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.preflight",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="devices to compile for: v5e:4x4, v6e:2x4, v5p:4x4x4, tpu7x:2x2x1, v4, h100:8, h100:8x8 (8 GPUs on each "
        "of 8 hosts), h200:8, ...; without, the devices that are here",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--save_hlo", metavar="FILE", help="write the compiled program's text")
    parser.add_argument("--no_search", action="store_true", help="do not look for the largest batch that fits")
    parser.add_argument("--exact", action="store_true", help="compile for TPUs as a run does; four to ten times slower")
    add_run_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it fits, 1 it does not, 2 wrong usage or a setting that cannot be."""
    args = make_parser().parse_args(argv)
    from gpt_pretrain.forecast.topologies import Topology

    try:
        topology = Topology.parse(args.topology) if args.topology is not None else None
        if topology is not None:
            topology.require_compiler()
            os.environ.update(topology.environment(exact=args.exact))
    except ValueError as error:
        return _refuse(str(error))

    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # how long it takes to compile is part of the answer
    # Everything heavy is imported from here on, so that --help and typing errors answer at once.
    from gpt_pretrain import runtime

    runtime.configure()
    from gpt_pretrain import settings

    try:
        settings.parse(args.gin_file, bindings_of(args))
        return _run(args, topology)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        import jax

        known = isinstance(error, ValueError | OSError | jax.errors.JaxRuntimeError)
        if not known or os.environ.get("GPT_PRETRAIN_TRACEBACK"):
            raise
        return _refuse(runtime.in_words(error) or settings.message_of(error))


def _run(args: argparse.Namespace, topology) -> int:
    from gpt_pretrain import settings
    from gpt_pretrain.forecast import compilation, loading, memory
    from gpt_pretrain.forecast.prediction import predict
    from gpt_pretrain.forecast.report import report, to_json
    from gpt_pretrain.train.opened_data import open_data
    from gpt_pretrain.train.stand_in import random_data
    from gpt_pretrain.train.start import Start

    without = {"sample_prompt": None, "sample_interval": 0, "validation": None, "eval_tasks": ()}
    config = dataclasses.replace(settings.train_config(), **without)
    has_data = loading.is_there(config.data)
    data = open_data(config) if has_data else random_data(config)
    devices = topology.devices() if topology else None
    _say("compiling ...")
    step = compilation.compile_step(config, data, devices)
    if args.save_hlo and step.text is not None:
        with open(args.save_hlo, "w", encoding="utf-8") as file:
            file.write(step.text)
    there = memory.there(step.built.mesh.devices.flat[0])
    largest = None
    if there and not args.no_search:
        largest = compilation.largest_that_fits(step, there, data, devices, _say)
    offered = loading.offered_tokens_per_sec(step.built, Start.anew(data)) if has_data else None
    prediction = predict(step, there, largest, offered)
    effort = ""
    if topology and topology.is_tpu and not args.exact:
        effort = "little effort; --exact for a run's"
    print(report(prediction, name=topology.name if topology else "", effort=effort))
    if args.json:
        print(json.dumps(to_json(prediction)))
    return 0 if prediction.fits else 1


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
