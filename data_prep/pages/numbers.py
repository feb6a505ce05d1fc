"""Numbers as people write and read them."""

import decimal


def short(number: int, signs: str = "kMBT") -> str:
    """Three digits and a sign for each power of a thousand.

    >>> short(1500000), short(999999), short(12)
    ('1.5 M', '1 M', '12')
    """
    for power, sign in reversed(list(enumerate(signs, start=1))):
        if number >= 0.9995 * 1000**power:
            return f"{number / 1000**power:.3g} {sign}"
    return str(number)


def size_text(num_bytes: int) -> str:
    """
    >>> size_text(1500000), size_text(12)
    ('1.5 MB', '12 bytes')
    """
    return f"{short(num_bytes, 'KMGT')}B" if num_bytes >= 1000 else f"{num_bytes} bytes"


def percent(part: int, whole: int) -> str:
    """
    >>> percent(1, 8)
    '12.5 %'
    """
    return f"{100 * part / max(1, whole):.1f} %"


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "file"), plural(2000, "file")
    ('1 file', '2,000 files')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


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


def range_label(start: int, stop: int) -> str:
    """The whole numbers from `start` to `stop - 1`, both ends in words.

    >>> range_label(1024, 2048), range_label(3, 4)
    ('1,024–2,047', '3')
    """
    return f"{start:,}" if stop - start == 1 else f"{start:,}–{stop - 1:,}"


def span_text(start: int, stop: int) -> str:
    """The same as an interval without its end.

    >>> span_text(0, 1025)
    '[0, 1,025)'
    """
    return f"[{start:,}, {stop:,})"
