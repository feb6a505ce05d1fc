"""Printing to a terminal or file that cannot show every character."""

import sys


def print_anything() -> None:
    """From here on, what standard output and error cannot encode is shown as \\xe9 or \\u6f22 instead of an error.

    For the beginning of command lines: a print must not end work of hours under PYTHONIOENCODING=ascii, in a Latin-1
    locale, or for a file whose name is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
