"""What is typed after --input -> one pattern for each name: commas, braces, backslashes, ~."""

import os
import re
from collections.abc import Callable, Iterator

_ESCAPED = re.compile(r"\\([,{}\\])")


def split_names(text: str, is_there: Callable[[str], bool]) -> list[str]:
    r"""The names between commas. A file that is there wins over the comma in its name; `\,` is never between names.

    >>> split_names(r"a,{b,c}.txt,d\,e,f,g", lambda name: name == "f,g")
    ['a', '{b,c}.txt', 'd\\,e', 'f,g']
    """
    pieces = _at_commas(text)
    names: list[str] = []
    first = 0
    while first < len(pieces):
        ends = range(len(pieces), first + 1, -1)  # the longest first
        end = next((end for end in ends if is_there(",".join(pieces[first:end]).strip())), first + 1)
        names.append(",".join(pieces[first:end]).strip())
        first = end
    return names


def expand_braces(pattern: str) -> Iterator[str]:
    r"""The alternatives in braces, as a shell has them, also {00..12}; then without backslashes.

    >>> list(expand_braces("{a,b{1..2}}.txt")), list(expand_braces("x{08..10}")), list(expand_braces(r"{c}\,\{d"))
    (['a.txt', 'b1.txt', 'b2.txt'], ['x08', 'x09', 'x10'], ['{c},{d'])
    """
    for start, stop in _groups(pattern):
        inside = pattern[start + 1 : stop]
        alternatives = _range(inside) or _at_commas(inside)
        if len(alternatives) > 1:
            for each in alternatives:
                yield from expand_braces(pattern[:start] + each + pattern[stop + 1 :])
            return
    yield _ESCAPED.sub(r"\1", pattern)


def at_home(path: str) -> str:
    """~/a -> /home/me/a; others as they are. ValueError where there is no such home."""
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(path):
        raise ValueError(f"{path}: there is no such user's home")
    return found


def _at_commas(text: str) -> list[str]:
    """Cut at commas that are neither in braces nor after a backslash."""
    stops = {start: stop for start, stop in _groups(text)}
    pieces, begin, place = [], 0, 0
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif place in stops:
            place = stops[place]
        elif text[place] == ",":
            pieces.append(text[begin:place])
            begin = place + 1
        place += 1
    return [*pieces, text[begin:]]


def _groups(text: str) -> list[tuple[int, int]]:
    """Where outermost braces open and close; one without its other is ordinary."""
    opened: list[int] = []
    groups: list[tuple[int, int]] = []
    place = 0
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == "{":
            opened.append(place)
        elif text[place] == "}" and opened:
            start = opened.pop()
            groups = [each for each in groups if each[0] < start] + [(start, place)]
        place += 1
    return groups


def _range(inside: str) -> list[str]:
    """00..02 -> 00, 01, 02; nothing for what is no range."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not match:
        return []
    width = max(map(len, match.groups())) if any(each.startswith("0") for each in match.groups()) else 0
    first, last = int(match[1]), int(match[2])
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
