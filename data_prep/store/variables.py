"""Numbers that a user may set by variables of the environment."""

import math
import os


def positive_number(name: str, default: float, unit: str, *, most: float = math.inf) -> float:
    """The variable's value, or the default where it is empty or not there.

    Raises ValueError for what is no number above 0, is infinite, or is more than `most`.
    """
    text = os.environ.get(name, "")
    try:
        number = float(text or default)
    except ValueError:
        number = math.nan
    if not (0 < number <= most and number < math.inf):
        limit = "" if most == math.inf else f", at most {most:g}"
        raise ValueError(f"{name}={text!r}; expected a number of {unit} above 0{limit}")
    return number
