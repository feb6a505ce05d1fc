"""Types of arguments that the command lines share."""

from data_prep.pages.numbers import parse_count


def count(text: str) -> int:
    """100000, 100_000 or 1e5. Its name is in argparse's error: "invalid count value: 'many'"."""
    return parse_count(text)
