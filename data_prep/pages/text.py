"""Text from anywhere -> text that a page or a terminal may hold.

Every page escapes with the functions of this file, and every command line prints by them what it read.
"""

import html
import json
import re
from typing import Any

# Control characters, C1 ones too (a terminal obeys them), half characters, and those that change the direction of
# what follows, in which a text can show as another than it is.
_BIDIRECTIONAL = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u206a-\u206f"
_NO_CHARACTERS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff"
_UNPRINTABLE = re.compile(f"[{_NO_CHARACTERS}{_BIDIRECTIONAL}]")
_MARKDOWN_SYNTAX = re.compile(r"([\\`*_\[\]|~#$@])")


def printable(text: str) -> str:
    r"""Characters that nothing may be sent become U+FFFD; all ends of line become line feeds.

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
    return _MARKDOWN_SYNTAX.sub(r"\\\1", html.escape(one_line(text), quote=False))


def markdown_code(text: str) -> str:
    """The same in fixed width where Markdown can do so; as other text where it cannot.

    >>> markdown_code("a b"), markdown_code("a|b")
    ('`a b`', 'a\\\\|b')
    """
    line = one_line(text)
    return f"`{line}`" if line.strip() and not re.search(r"[`|]", line) else markdown_line(text)


def markdown_fence(text: str, language: str) -> str:
    """A code block with a fence that is longer than any run of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}\n"


def one_line(text: str) -> str:
    r"""The same without a line's end.

    >>> one_line("a\nb\x1b[2J")
    'a b�[2J'
    """
    return re.sub(r"\s+", " ", printable(text))


def json_line(value: Any) -> str:
    r"""A line of JSON; of text only what nothing may be sent is escaped.

    >>> print(json_line({"é": "\x9b\u202e"}))
    {"é": "\u009b\u202e"}
    """
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def script_json(value: Any) -> str:
    r"""JSON for a `<script type="application/json">`: no text in it can end the element, or begin a comment.

    >>> print(script_json({"a": "</script><!-- \u202e"}))
    {"a":"\u003c/script\u003e\u003c!-- \u202e"}

    Raises ValueError: a number that is not finite, which JSON cannot hold.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
