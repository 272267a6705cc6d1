"""Integer expressions over symbols, such as `cdiv(rows, 32)`, as blueprints and manifests carry them.

They are read by the few lines below and never by `eval`, so a stored manifest cannot run code; nor by Python's own
parser, which in CPython 3.11 fails now and then where two threads use it (gh-106905): manifests are read while a model
trains. Grammar: integer literals, names, `+ - * // %`, parentheses, and the functions `cdiv`, `min`, `max` and
`next_power_of_2`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

__all__ = ["Expression", "ExpressionError", "evaluate", "symbols"]

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
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


_TOKEN = re.compile(
    r"\s*(?:(?P<number>0|[1-9][0-9_]*)(?![\w.])|(?P<name>[A-Za-z_]\w*)|(?P<sign>//|[-+*%(),]))\s*", re.ASCII
)
_LEVELS = (("+", "-"), ("*", "//", "%"))  # what binds more tightly comes later

Tree = int | str | tuple[str, tuple["Tree", ...]]
"""A number, a name, or an operator or function with its arguments."""


class _Reader:
    """A recursive-descent reader of one expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(text):
            found = _TOKEN.match(text, position)
            if found is None or found.lastgroup is None:
                raise self.fault()
            self.tokens.append((found.lastgroup, found[found.lastgroup]))
            position = found.end()
        self.tokens.append(("end", ""))
        self.at = 0

    def fault(self) -> ExpressionError:
        known = ", ".join(sorted(_FUNCTIONS))
        return ExpressionError(
            f"{self.text!r} is not an integer expression; allowed are integers, names, + - * // % and {known}"
        )

    def next(self) -> tuple[str, str]:
        self.at += 1
        return self.tokens[self.at - 1]

    def is_sign(self, *signs: str) -> bool:
        kind, word = self.tokens[self.at]
        return kind == "sign" and word in signs

    def expect(self, sign: str) -> None:
        if not self.is_sign(sign):
            raise self.fault()
        self.at += 1

    def whole(self) -> Tree:
        tree = self.level(0)
        if self.tokens[self.at][0] != "end":
            raise self.fault()
        return tree

    def level(self, depth: int) -> Tree:
        if depth == len(_LEVELS):
            return self.atom()
        tree = self.level(depth + 1)
        while self.is_sign(*_LEVELS[depth]):
            _, sign = self.next()
            tree = (sign, (tree, self.level(depth + 1)))
        return tree

    def atom(self) -> Tree:
        kind, word = self.next()
        if kind == "number":
            return int(word)
        if (kind, word) == ("sign", "("):
            tree = self.level(0)
            self.expect(")")
            return tree
        if kind != "name":
            raise self.fault()
        if not self.is_sign("("):
            return word
        if word not in _FUNCTIONS:
            raise self.fault()
        self.expect("(")
        arguments = [] if self.is_sign(")") else [self.level(0)]
        while self.is_sign(","):
            self.at += 1
            arguments.append(self.level(0))
        self.expect(")")
        arity, _ = _FUNCTIONS[word]
        if len(arguments) != arity:
            raise ExpressionError(f"{self.text!r}: {word} takes {arity} arguments, found {len(arguments)}")
        return word, tuple(arguments)


@lru_cache(maxsize=1024)  # artifacts repeat the same few
def _parse(text: str) -> Tree:
    if len(text) > _MAX_LENGTH:
        raise ExpressionError(f"expression of {len(text)} characters; at most {_MAX_LENGTH} are allowed")
    return _Reader(text).whole()


def _walk(tree: Tree, value_of: Callable[[str], int], text: str) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return value_of(tree)
    name, arguments = tree
    values = [_walk(argument, value_of, text) for argument in arguments]
    function: Callable[..., int] = _OPERATORS[name] if name in _OPERATORS else _FUNCTIONS[name][1]
    try:
        return function(*values)
    except ZeroDivisionError as error:
        raise ExpressionError(f"{text!r} divides by zero") from error


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
