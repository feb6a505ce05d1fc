"""What all command lines share: errors of one line, and numbers as people write them."""

import argparse
import math
import sys
from typing import NoReturn

from data_prep.pages.numbers import parse_count

MAX_COUNT = 2**63 - 1


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage is left to --help."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; `{self.prog} --help` lists the options", file=sys.stderr)
        sys.exit(2)


def count(text: str) -> int:
    """100000, 100_000 or 1e5."""
    try:
        value = parse_count(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected a whole number, such as 100000, 100_000 or 1e5"
        ) from None
    if abs(value) > MAX_COUNT:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at most 2^63 - 1 (9.2e18)")
    return value


def number(text: str) -> float:
    """A number that is not nan or infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number")
    return value
