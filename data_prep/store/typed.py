"""Values of a JSON file -> records, each value of the kind that the record's annotation says."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

LARGEST = 2**53  # a whole number from there on is not one that every reader of JSON takes for itself
_ANY = 2**128
Count = Annotated[int, 0]  # a whole number of at least 0


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a frozen dataclass, tuple, mapping, union, literal, `Count`, int, float, str, bool or None.

    >>> typed(tuple[Count, ...], [1, True], "sizes")
    Traceback (most recent call last):
    ...
    ValueError: sizes[1] is True, expected a whole number of at least 0

    Args:
      where: what the value is called in errors; "" for a file as a whole.

    Raises ValueError that names the value: of another kind, too large, missing, or one that the record does not have.
    """
    if kind is Count:
        return _whole_number(value, 0, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return typed(kind, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {_shown(value)}, expected an object")
        return {name: typed(arguments[1], each, f"{where}.{_name(name)}") for name, each in value.items()}
    if origin is Annotated or kind is int:
        return _whole_number(value, arguments[1] if arguments else -_ANY, where)
    if kind is Any or (origin is Literal and type(value) is str and value in arguments):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)  # which neither NaN nor infinity is below
    if kind in (str, bool) and type(value) is kind:
        return value
    expected = " or ".join(map(repr, arguments)) if origin is Literal else _WORDS[kind]
    raise ValueError(f"{where} is {_shown(value)}, expected {expected}")


_WORDS: dict[Any, str] = {str: "text", bool: "true or false", float: "a number"}


def _whole_number(value: Any, least: int, where: str) -> int:
    most = LARGEST if least > -_ANY else _ANY  # a seed may be anything
    if type(value) is not int or not least <= value < most:
        words = f" of at least {least}" if least > -_ANY else ""
        raise ValueError(f"{where} is {_shown(value)}, expected a whole number{words}")
    return value


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where} is {_shown(value)}, expected a list")
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where} has {len(value)} entries, expected {len(kinds)}")
    return tuple(typed(kind, each, f"{where}[{i}]") for i, (kind, each) in enumerate(zip(kinds, value, strict=True)))


def _record(kind: Any, value: Any, where: str) -> Any:
    if type(value) is kind:  # made already
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, expected an object")
    kinds, required = _kinds_of(kind)
    if value.keys() != kinds.keys():
        if unknown := sorted(value.keys() - kinds.keys()):
            raise ValueError(f"{where or 'it'} has the unknown field {_name(unknown[0])}")
        if missing := sorted(required - value.keys()):
            raise ValueError(f"{where or 'it'} has no field {missing[0]}")
    fields = {}
    for name, each in value.items():
        wanted = kinds[name]
        # Most are of these two kinds: a manifest may have a million.
        is_text = wanted is str and type(each) is str
        is_count = wanted is Count and type(each) is int and 0 <= each < LARGEST
        fields[name] = each if is_text or is_count else typed(wanted, each, f"{where}.{name}".strip("."))
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


@functools.cache
def _kinds_of(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The annotations of a dataclass, and those fields that have no default."""
    no_default = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    required = (each.name for each in fields if each.default is no_default is each.default_factory)
    return typing.get_type_hints(kind, include_extras=True), frozenset(required)


def _name(name: str) -> str:
    """A field's name from a file, as it may stand in a sentence."""
    return name if name.isidentifier() and len(name) < 60 else _shown(name)


def _shown(value: Any) -> str:
    """A value in a sentence: never long, never with a control character."""
    if isinstance(value, Mapping | list | tuple):
        return f"of type {type(value).__name__}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "beyond 64 bits"
    return text if len(text) <= 60 else text[:57] + "..."
