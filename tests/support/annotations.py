"""Annotations of axes are checked while tests run, and cost nothing otherwise."""

import types
import typing
from collections.abc import Callable

import beartype
import jaxtyping


def check_those_of(package: str) -> None:
    """From here on, every function of the package's modules checks its arrays. Call it before they are imported."""
    jaxtyping.install_import_hook(package, f"{__name__}.checked")


def checked(function: Callable) -> Callable:
    """The function with those of its annotations checked that name axes; the others are pyright's."""
    axes = {name: hint for name, hint in function.__annotations__.items() if _names_axes(hint)}
    if not axes or not isinstance(function, types.FunctionType):
        return function
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    copy.__annotations__ = axes
    return beartype.beartype(copy)


def _names_axes(hint: object) -> bool:
    """Float[Array, "B T"] -> True; tuple[Float[Array, "B T"], int] -> True; Array -> False"""
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(_names_axes(each) for each in typing.get_args(hint))
