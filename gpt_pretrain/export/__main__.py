"""Writes a checkpoint's weights as transformers or llm.c read them.

python -m gpt_pretrain.export runs/gpt2_124m exported --to=hf
"""

import argparse
import sys
import time
from pathlib import Path

from data_prep.pages.command_line import ArgumentParser
from data_prep.pages.numbers import size_text
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable
from data_prep.store.tokenizers import recorded_tokenizer
from gpt_pretrain import checks
from gpt_pretrain.export.checkpoint import Checkpoint
from gpt_pretrain.export.llmc_model import write_model
from gpt_pretrain.export.transformers_folder import write_folder
from gpt_pretrain.train.room import size_of


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.export",
        allow_abbrev=False,
        description="Writes a checkpoint's weights as transformers or llm.c read them.",
    )
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", help="a save_dir (its newest good one) or a checkpoint"
    )
    parser.add_argument("out", metavar="OUT", help="the folder (hf) or file (llmc) to be made; not there yet")
    parser.add_argument(
        "--to", required=True, choices=("hf", "llmc"), help="transformers' folder, or llm.c's model file"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights (float32)")
    parser.add_argument(
        "--tokenizer",
        help="the one that made the data, if it is your own (a file or module:Class), or nobody recorded it (gpt2)",
    )
    parser.add_argument(
        "--drop_document_mask",
        action="store_true",
        help="export a model trained with data.document_mask as one without: the same for one document at a time",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 for a user's mistake, or a full disk."""
    print_anything()
    args = make_parser().parse_args(argv)
    began = time.monotonic()
    try:
        out = Path(checks.path("OUT", args.out)).absolute()
        directory = checks.path("RUN_OR_CHECKPOINT", args.checkpoint)
        checkpoint = Checkpoint.open(directory, drop_document_mask=args.drop_document_mask)
        if args.to == "llmc":
            write_model(checkpoint, out, dtype=args.dtype)
        else:
            metadata = checkpoint.metadata
            name = metadata.tokenizer or "gpt2"
            tokenizer = recorded_tokenizer(name, metadata.tokenizer_digest, users=args.tokenizer)
            write_folder(checkpoint, out, dtype=args.dtype, tokenizer=tokenizer)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    num_bytes = size_of(out) if out.is_dir() else out.stat().st_size
    secs = time.monotonic() - began
    print(
        f"{printable(str(out))}: step {checkpoint.metadata.step}, {args.dtype}, {size_text(num_bytes)} in {secs:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
