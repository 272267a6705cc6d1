"""Integer expressions over symbols, such as `cdiv(rows, 32)`, as blueprints and manifests carry them.

They are read with Python's own parser and evaluated by walking the tree: never by `eval`, so a stored manifest cannot
run code. Grammar: integer literals, names, `+ - * // %`, parentheses, and the functions `cdiv`, `min`, `max` and
`next_power_of_2`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache

__all__ = ["Expression", "ExpressionError", "evaluate", "symbols"]

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, tuple[int, Callable[..., int]]] = {
    "cdiv": (2, lambda a, b: -(-a // b)),
    "min": (2, min),
    "max": (2, max),
    "next_power_of_2": (1, lambda a: 1 << max(a - 1, 0).bit_length()),
}
_MAX_LENGTH = 200  # longer than any honest grid; bounds the parser's work on a hostile manifest


class ExpressionError(ValueError):
    """The text is not an expression of the grammar above, or names a symbol that has no value."""


@lru_cache(maxsize=1024)  # artifacts repeat the same few
def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_LENGTH:
        raise ExpressionError(f"expression of {len(text)} characters; at most {_MAX_LENGTH} are allowed")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, ValueError) as error:
        raise ExpressionError(f"{text!r} is not an integer expression") from error


def _walk(node: ast.expr, value_of: Callable[[str], int], text: str) -> int:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return value_of(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _walk(left, value_of, text), _walk(right, value_of, text)
            try:
                return _OPERATORS[type(op)](a, b)
            except ZeroDivisionError as error:
                raise ExpressionError(f"{text!r} divides by zero") from error
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            arity, function = _FUNCTIONS[name]
            if len(args) != arity:
                raise ExpressionError(f"{text!r}: {name} takes {arity} arguments, found {len(args)}")
            values = [_walk(a, value_of, text) for a in args]
            try:
                return function(*values)
            except ZeroDivisionError as error:
                raise ExpressionError(f"{text!r} divides by zero") from error
    known = ", ".join(sorted(_FUNCTIONS))
    raise ExpressionError(f"{text!r} is not an integer expression; allowed are integers, names, + - * // % and {known}")


class Expression:
    """An expression parsed once, to be evaluated often."""

    def __init__(self, text: str) -> None:
        """Raises ExpressionError where the text is not of the grammar."""
        self.text = text
        self._tree = _parse(text)
        self.symbols = self._names()

    def __call__(self, values: Mapping[str, int]) -> int:
        """The value for given symbols. Raises ExpressionError for a symbol without a value, or a zero divisor."""

        def value_of(name: str) -> int:
            if name not in values:
                known = ", ".join(sorted(values)) or "nothing"
                raise ExpressionError(f"{self.text!r} names {name!r}; known: {known}")
            return values[name]

        return _walk(self._tree, value_of, self.text)

    def _names(self) -> frozenset[str]:
        found: set[str] = set()

        def value_of(name: str) -> int:
            found.add(name)
            return 1

        _walk(self._tree, value_of, self.text)
        return frozenset(found)


def evaluate(text: str, values: Mapping[str, int]) -> int:
    """The value of `text` with the symbols of `values`. Raises ExpressionError."""
    return Expression(text)(values)


def symbols(text: str) -> frozenset[str]:
    """The names that `text` needs values for. Raises ExpressionError where the text is not of the grammar."""
    return Expression(text).symbols
