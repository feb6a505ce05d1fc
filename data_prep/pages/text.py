"""Text from anywhere -> text that a page may hold. Every page escapes with the functions of this file."""

import html
import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_MARKDOWN_SYNTAX = re.compile(r"([\\`*_\[\]|~#$@])")


def printable(text: str) -> str:
    r"""Characters that no page may hold become U+FFFD; all ends of line become line feeds.

    >>> printable("a\r\nb\x00")
    'a\nb�'
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", re.sub("\r\n?", "\n", text))


def html_text(text: str) -> str:
    """HTML that shows just this text, in an element or in a quoted attribute.

    >>> html_text("<b> & 'c'")
    '&lt;b&gt; &amp; &#x27;c&#x27;'
    """
    return html.escape(printable(text))


def markdown_line(text: str) -> str:
    r"""Markdown in one line that shows just this text, also in a cell of a table.

    >>> markdown_line("a_b | <i>\nc")
    'a\\_b \\| &lt;i&gt; c'
    """
    return _MARKDOWN_SYNTAX.sub(r"\\\1", html.escape(_one_line(text), quote=False))


def markdown_code(text: str) -> str:
    """The same in fixed width where Markdown can do so; as other text where it cannot.

    >>> markdown_code("a b"), markdown_code("a|b")
    ('`a b`', 'a\\\\|b')
    """
    line = _one_line(text)
    return f"`{line}`" if line.strip() and not re.search(r"[`|]", line) else markdown_line(text)


def markdown_fence(text: str, language: str) -> str:
    """A code block with a fence that is longer than any run of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}\n"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", printable(text))
