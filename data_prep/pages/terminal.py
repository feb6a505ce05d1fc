"""Printing to a terminal: what it cannot show, and commands that work as printed."""

import os
import shlex
import shutil
import sys


def print_anything() -> None:
    """From here on, what standard output and error cannot encode is shown as \\xe9 or \\u6f22 instead of an error.

    For the beginning of command lines: a print must not end work of hours under PYTHONIOENCODING=ascii, in a Latin-1
    locale, or for a file whose name is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def python_as_typed() -> str:
    """How to call this interpreter from here: ".venv/bin/python", or "python" where the PATH finds the same."""
    found = shutil.which("python")
    if found and os.path.samefile(os.path.dirname(found), os.path.dirname(sys.executable)):
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith("..") else relative)
