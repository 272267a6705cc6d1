"""What a caller gives, looked at before anything is changed: errors name the argument, what was found and what was
expected, where Python's own would name an operator deep inside."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral

__all__ = ["check_at_least", "check_names", "found", "number", "refuse"]


def found(value: object) -> str:
    """A value as a message names it: a class as such, plain values themselves, of anything else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, bool, int, float)):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def refuse(argument: str, value: object, expected: str) -> TypeError:
    """The error for a value of the wrong kind."""
    return TypeError(f"{argument} is {found(value)}; expected {expected}")


def check_at_least(bounds: Mapping[str, int], values: Mapping[str, object]) -> None:
    """Raises TypeError for what is no whole number, ValueError for one below its bound."""
    for name, least in bounds.items():
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise refuse(name, value, f"a whole number, at least {least}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")


def check_names(argument: str, value: object) -> None:
    """Raises TypeError for what is no collection of strings: a single one would be taken for its letters."""
    if isinstance(value, str) or not isinstance(value, Collection):
        listed = repr([value]) if isinstance(value, str) else "[]"
        raise refuse(argument, value, f"a list of names, as {listed}")
    for name in value:
        if not isinstance(name, str):
            raise TypeError(f"{argument} has {found(name)} in it; expected names")


def number(what: str, value: object) -> float:
    """As a float; raises TypeError for what is no number, such as a tensor of more than one element."""
    try:
        return float(value)  # type: ignore[arg-type]  # what cannot be converted is what is looked for
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse(what, value, "a number") from error
