"""What each part of a model does for its loss: `python -m gpt_pretrain.ablate --checkpoint runs/quickstart`.

One site of one layer after the other is ablated, or disturbed by noise, and the loss on validation data is computed
again; one program is compiled for all of them. The table says by how much the loss rises.
"""

import argparse
import sys
from pathlib import Path

from data_prep.pages.command_line import ArgumentParser, count, number
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import json_line, printable
from data_prep.store.files import whole_file
from gpt_pretrain import checks
from gpt_pretrain.history.opened_run import OpenedRun, add_data_dir

_KINDS = ("zero", "mean", "noise", "relative_noise")


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.ablate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="save_dir of a run, or one checkpoint in it; gs://, s3://"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=_KINDS,
        default=["zero", "mean"],
        help="zero; mean: the mean over these tokens; noise, relative_noise (default zero mean)",
    )
    parser.add_argument(
        "--sites",
        nargs="+",
        default=["attn_out", "mlp_out"],
        help="hook sites, as docs/training.md lists them (default attn_out mlp_out)",
    )
    parser.add_argument("--dose", type=number, default=1.0, help="strength of noise (default 1)")
    parser.add_argument("--tokens", type=count, default=16_384, help="of the validation split (default 16,384)")
    parser.add_argument("--html", metavar="FILE", help="write the tables as a page; it opens in any browser, offline")
    parser.add_argument("--png", metavar="FILE", help="write a picture: layers down, sites across, a panel a kind")
    parser.add_argument("--jsonl", action="store_true", help="a JSON line a place instead of tables")
    add_data_dir(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for a user's mistake."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        from gpt_pretrain.history import ablation, ablation_page  # loads JAX

        checkpoint = checks.place("--checkpoint", args.checkpoint)
        if args.tokens < 1:
            raise ValueError(f"--tokens: found {args.tokens}, expected at least 1")
        found = ablation.ablate(
            OpenedRun(ablation.run_of(checkpoint), args.data_dir),
            checkpoint,
            kinds=args.kinds,
            sites=args.sites,
            dose=args.dose,
            num_tokens=args.tokens,
            progress=_show if sys.stderr.isatty() else lambda done, of: None,
        )
        if args.html:
            command = ablation_page.command_of(sys.argv[1:] if argv is None else argv)
            with whole_file(args.html) as partial:
                text = ablation_page.render_ablations(found, command)
                partial.write_text(text, encoding="utf-8", newline="\n")
        if args.png:
            with whole_file(args.png) as partial:
                Path(partial).write_bytes(ablation_page.picture(found))
        if not args.jsonl:
            print(printable(ablation_page.as_text(found)))
            print(f"\n{found.losses.size + 1} passes in {found.run_secs:.1f} s, compiled in {found.compile_secs:.1f} s")
            return 0
        for kind, losses_LS in zip(found.kinds, found.losses, strict=True):
            for layer, losses_S in enumerate(losses_LS.tolist()):
                for site, loss in zip(found.sites, losses_S, strict=True):
                    rise = loss - found.loss
                    print(json_line({"kind": kind, "layer": layer, "site": site, "loss": loss, "rise": rise}))
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _show(done: int, of: int) -> None:
    print(f"\rpass {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
