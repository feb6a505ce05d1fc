"""Text that UTF-8 can hold."""


def without_surrogates(text: str) -> str:
    """Lone surrogates, which JSON can spell, become U+FFFD: the repair that tiktoken makes.

    >>> without_surrogates("a" + chr(0xD800)) == "a" + chr(0xFFFD)
    True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
