"""Which document is where: `python -m data_prep.documents DIR --token 123456789`."""

import argparse
import sys
from dataclasses import asdict

from data_prep.arguments import directory
from data_prep.pages.command_line import ArgumentParser, count
from data_prep.pages.terminal import print_anything
from data_prep.pages.text import json_line, printable
from data_prep.store.documents import Document, DocumentTables
from data_prep.store.manifest import Manifest, load
from data_prep.store.streams import read_tokens
from data_prep.store.tokenizers import dataset_tokenizer


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m data_prep.documents", description=__doc__, allow_abbrev=False)
    parser.add_argument("directory", metavar="DIR", help="a prepared dataset: a directory, gs://... or s3://...")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--token", type=count, metavar="N", help="a position in the split's stream")
    what.add_argument("--id", nargs="+", metavar="ID", help="ids, as '<urn:uuid:...>'")
    what.add_argument("--url", nargs="+", metavar="URL", help="urls")
    parser.add_argument("--split", help="train or val (default: train for --token, both for --id and --url)")
    parser.add_argument("--text", action="store_true", help="print the text as well, as stored")
    parser.add_argument(
        "--tokenizer", help="for --text, where the dataset was made by one of your own: a file or module:Class"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints a JSON line a document. Exit status 1 if there is none, or for a user's mistake."""
    print_anything()
    args = make_parser().parse_args(argv)
    try:
        args.directory = directory("DIR", args.directory)
        manifest = load(args.directory)
        default = ["train"] if args.token is not None else list(manifest.splits)
        splits = [args.split] if args.split else default
        tables = [DocumentTables(args.directory, split, manifest) for split in splits]
        if args.token is not None:
            found = [tables[0].at(args.token)]
        else:
            column, values = ("id", args.id) if args.id else ("url", args.url)
            found = [d for value in values for each in tables for d in each.find(column, value)]
            if missing := set(values) - {getattr(document, column) for document in found}:
                raise ValueError(f"{args.directory}: no document has the {column} {min(missing)}")
        for document in found:
            fields = asdict(document)
            if args.text:
                fields["text"] = _text(args.directory, manifest, document, args.tokenizer)
            print(json_line(fields))
    except (ValueError, IndexError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _text(directory: str, manifest: Manifest, document: Document, tokenizer: str | None) -> str:
    end = document.start + document.length
    ids = read_tokens(directory, manifest, document.split, document.start, end)
    start = int(len(ids) > 0 and ids[0] == manifest.spec.end_of_text)
    return dataset_tokenizer(manifest.spec, directory, tokenizer).decode(ids[start:])


if __name__ == "__main__":
    sys.exit(main())
