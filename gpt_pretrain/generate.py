"""Samples text from a checkpoint.

python -m gpt_pretrain.generate --checkpoint=runs/quickstart --prompt="Once upon a time"
"""

import argparse
import sys

import numpy as np

from data_prep.pages.command_line import ArgumentParser, number
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import printable
from data_prep.store.tokenizers import recorded_tokenizer
from gpt_pretrain import checks
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.train.interventions import chosen_interventions, said
from gpt_pretrain.train.pretrained import load


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gpt_pretrain.generate", allow_abbrev=False, description="Samples text from a checkpoint."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run's save_dir (newest good checkpoint) or one checkpoint; also gs://, s3://",
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--num_tokens", type=int, default=200, help="at most so many new tokens (default 200)")
    parser.add_argument("--num_samples", type=int, default=1, help="how many continuations (default 1)")
    parser.add_argument("--temperature", type=number, default=0.8, help="0 for the most likely token (default 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="only among the k most likely; 0 for all (default 50)")
    parser.add_argument(
        "--top_p",
        type=number,
        default=1.0,
        help="nucleus: only among the likeliest that hold this much probability (default 1.0)",
    )
    parser.add_argument("--seed", type=int, default=0)
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
    """Exit status 1 for a user's mistake."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        if not args.temperature >= 0.0 or not 0.0 < args.top_p <= 1.0 or args.top_k < 0:
            raise ValueError(
                f"found temperature {args.temperature}, top_p {args.top_p}, top_k {args.top_k}; expected "
                "temperature >= 0, 0 < top_p <= 1, top_k >= 0"
            )
        params, metadata = load(checks.place("--checkpoint", args.checkpoint), with_interventions=True)
        recorded = metadata.model.interventions
        interventions = chosen_interventions(args.interventions, recorded, "--interventions")
        if line := said(interventions, recorded, "sampled"):
            print(line, file=sys.stderr)
        tokenizer = recorded_tokenizer(metadata.tokenizer or "gpt2", metadata.tokenizer_digest, users=args.tokenizer)
        prompt = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(args.prompt)])
        for index in range(args.num_samples):
            new = sample(
                params,
                metadata.model,
                prompt,
                seq_len=metadata.seq_len,
                num_tokens=args.num_tokens,
                seed=args.seed + index,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                stop=tokenizer.end_of_text,
                interventions=interventions,
                step=metadata.step,
            )
            print(printable(args.prompt + tokenizer.decode(new)), flush=True)
            if index + 1 < args.num_samples:
                print("-" * 40)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
