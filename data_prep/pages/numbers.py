"""Numbers as people write and read them."""

import decimal


def parse_count(text: str) -> int:
    """A whole number as people type it. ValueError for anything else.

    >>> parse_count("100_000"), parse_count("1e5"), parse_count("9007199254740993")
    (100000, 100000, 9007199254740993)
    """
    try:
        value = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise ValueError(f"{text!r}: expected a whole number") from None
    if not value.is_finite() or value.adjusted() > 30 or value != value.to_integral_value():
        raise ValueError(f"{text!r}: expected a whole number")
    return int(value)


def duration(seconds: float) -> str:
    """
    >>> duration(3725), duration(83)
    ('1:02:05', '1:23')
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
