"""What a parameter starts as, in one short text that blueprints and manifests carry, such as `normal:0.02`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.expressions import ExpressionError, evaluate, symbols

__all__ = ["Init", "fill_init", "init_symbols", "normalize_init"]

Kind = Literal["zeros", "ones", "constant", "normal", "uniform", "kaiming_uniform", "xavier_uniform"]
_WITH_NUMBER = ("constant", "normal", "uniform")


@dataclass(frozen=True)
class Init:
    """A distribution, or a constant. In text:

    - `zeros`, `ones`, `constant:VALUE`;
    - `normal:STD`: mean 0; `uniform:BOUND`: within +-BOUND;
    - `kaiming_uniform`: within +-sqrt(1 / fan_in), as `nn.Linear` and the convolutions draw their weights (He et al.
      2015 with a = sqrt(5)). fan_in is the product of all dimensions but the first, or the only one;
      `kaiming_uniform:FAN_IN` gives it, as an expression over dims: biases and transposed weights need it;
    - `xavier_uniform`: within +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010), fan_out being the first
      dimension times the kernel's.
    """

    kind: Kind
    argument: str = ""

    @classmethod
    def parse(cls, text: str) -> Init:
        """Raises ValueError that names what there is."""
        kind, colon, argument = text.partition(":")
        if kind not in get_args(Kind):
            raise ValueError(f"unknown init {text!r}{nearest(kind, get_args(Kind))}")
        found: Kind = kind  # type: ignore[assignment]
        if kind in _WITH_NUMBER:
            try:
                number = float(argument)
            except ValueError:
                number = math.nan
            if not math.isfinite(number) or (number < 0 and kind != "constant"):
                sign = "" if kind == "constant" else " that is not negative"
                raise ValueError(f"init {text!r}: expected {kind}:NUMBER with a finite number{sign}")
            return cls(found, repr(number))
        if colon and kind != "kaiming_uniform":
            raise ValueError(f"init {text!r}: {kind} takes no argument")
        if colon:
            try:
                symbols(argument)
            except ExpressionError as error:
                raise ValueError(f"init {text!r}: {error}") from error
        return cls(found, argument.strip())

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind

    @property
    def number(self) -> float:
        """Value, standard deviation or bound. Only where there is one."""
        return float(self.argument)

    def bound(self, shape: Sequence[int]) -> float:
        """Half the width of the interval that a uniform one is drawn from, for a tensor of this shape."""
        if self.kind == "uniform":
            return self.number
        kernel = math.prod(shape[2:])
        fan_in = shape[1] * kernel if len(shape) > 1 else math.prod(shape)
        if self.kind == "kaiming_uniform":
            return math.sqrt(1.0 / (int(self.argument) if self.argument else fan_in))
        return math.sqrt(6.0 / (fan_in + math.prod(shape[:1]) * kernel))


def normalize_init(text: str) -> str:
    """The text in one spelling. Raises ValueError."""
    return str(Init.parse(text))


def init_symbols(text: str) -> frozenset[str]:
    """The dims that it names."""
    init = Init.parse(text)
    return symbols(init.argument) if init.kind == "kaiming_uniform" and init.argument else frozenset()


def fill_init(text: str, dims: Mapping[str, int]) -> str:
    """With numbers for the dims, as a manifest has it. Raises ExpressionError."""
    init = Init.parse(text)
    if init.kind == "kaiming_uniform" and init.argument:
        fan_in = evaluate(init.argument, dims)
        if fan_in < 1:
            raise ExpressionError(f"init {text!r}: fan-in is {fan_in}, expected at least 1")
        return f"kaiming_uniform:{fan_in}"
    return text
