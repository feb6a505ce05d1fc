"""Activations of a batch of a run as a .safetensors file, with where they come from.

python -m gpt_pretrain.capture runs/quickstart out.safetensors --step 57 --rows 0:4 --sites attn_out mlp_out

The file's metadata say run, step, rows with their positions in the global order, fingerprints of the data, checkpoint
and model. Arrays are float32 (rows, seq_len, channels): "layers.1.attn_out"; "tokens" has the ids, one more a row.
"""

import argparse
import sys

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable
from data_prep.store.files import whole_file
from gpt_pretrain import checks
from gpt_pretrain.history.opened_run import OpenedRun, add_data_dir
from gpt_pretrain.history.replayed import check_batch
from gpt_pretrain.history.rows import slice_of_rows


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.capture",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="save_dir of a run; also gs://..., s3://...")
    parser.add_argument("out", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the batch of update N, from 1")
    parser.add_argument("--rows", metavar="A:B", help="of the batch, only rows A to B - 1; or one row, A (default all)")
    parser.add_argument("--sites", nargs="+", default=["block_in"], help="hook sites (default block_in)")
    parser.add_argument("--layers", nargs="+", type=int, metavar="L", help="from 0, or from the end (default all)")
    parser.add_argument("--checkpoint", metavar="DIR", help="by this one (default: the newest good one of RUN)")
    parser.add_argument("--tokenizer", help="the one that made the datasets, if it is your own: a file or module:Class")
    add_data_dir(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for a user's mistake."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        run = OpenedRun(args.run, args.data_dir, args.tokenizer)
        out = checks.path("FILE", args.out)
        step_index = run.index_of(args.step)
        chosen = slice_of_rows(args.rows, run.plan.batch_size(step_index))
        check_batch(run, step_index)
        from gpt_pretrain.history.capture import capture  # loads JAX
        from gpt_pretrain.train.weight_files import safetensors_file

        checkpoint = checks.place("--checkpoint", args.checkpoint or args.run)
        found = capture(run, step_index, chosen, checkpoint=checkpoint, sites=args.sites, layers=args.layers)
        with whole_file(out) as partial:
            safetensors_file.write(partial, found.arrays, found.metadata)
        print(f"{out}: {len(found.arrays)} arrays of {len(found.arrays['tokens'])} rows of update {args.step}")
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
