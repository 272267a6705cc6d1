"""The operations that a blueprint's graph is written in: one table of signatures, attributes and shape rules.

The static check, the reader of graph text, the builder, the reference in torch and docs/blueprints.md all follow
`OPERATIONS`. What values are stands in `contracts.values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from esper_triton.contracts import shapes
from esper_triton.contracts.errors import nearest
from esper_triton.contracts.values import Attribute, AttributeValue, Domain

__all__ = ["OPERATIONS", "Operation"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One row of the table.

    Attributes:
        arguments: names of what it takes by position, the last `optional` of which may be left out; `variadic` where it
            takes any number, at least two.
        commutative: whether the order of the two arguments says nothing. takes_mask: whether a mask may be given.
        domain: `row` where a result depends on its own row alone; else what the rows have to be.
        affine: in which arguments the result is linear, or affine, whatever the others are; all of them together for
            `add` and the like (`jointly`).
    """

    name: str
    arguments: tuple[str, ...]
    optional: int
    variadic: bool
    attributes: Mapping[str, Attribute]
    rule: shapes.Rule
    formula: str
    commutative: bool
    takes_mask: bool
    domain: Domain
    affine: tuple[str, ...]
    jointly: bool

    @property
    def signature(self) -> str:
        """As it is written, such as `linear(a, weight[, bias], transposed=False)`."""
        needed = len(self.arguments) - self.optional
        text = ", ".join(self.arguments[:needed]) + (", ..." if self.variadic else "")
        text += "".join(f"[, {name}" for name in self.arguments[needed:]) + "]" * self.optional
        for name, attribute in self.attributes.items():
            default = f'"{attribute.default}"' if attribute.kind == "choice" else str(attribute.default)
            text += f", {name}=" + ("" if attribute.required else default)
        return f"{self.name}({text})"

    def resolve(self, attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
        """Every attribute in its normal form, defaults filled in. Raises ValueError for one that does not fit."""
        return {
            name: spec.normalized(attributes[name]) if name in attributes else spec.default
            for name, spec in self.attributes.items()
        }

    def faults(self, count: int, attributes: Mapping[str, object]) -> list[str]:
        """What is wrong with the number of arguments and with the attributes, before any shape is known."""
        found = []
        least = len(self.arguments) - self.optional
        if count < least or (count > len(self.arguments) and not self.variadic):
            expected = f"at least {least}" if self.variadic else str(least)
            if self.optional:
                expected += f" to {len(self.arguments)}"
            found.append(f"{count} inputs, expected {expected}: {self.signature}")
        for name, value in attributes.items():
            if name not in self.attributes:
                hint = nearest(name, self.attributes) or "; it takes none"
                found.append(f"unknown attribute {name!r}{hint}")
                continue
            try:
                self.attributes[name].normalized(value)
            except ValueError as error:
                found.append(f"attribute {name} is {error}")
        for name, spec in self.attributes.items():
            if spec.required and name not in attributes:
                found.append(f"attribute {name!r} is missing: {self.signature}")
        return found


OPERATIONS: dict[str, Operation] = {}


def _define(
    name: str,
    arguments: str,
    rule: shapes.Rule,
    formula: str,
    *,
    commutative: bool = False,
    takes_mask: bool = False,
    domain: Domain = "row",
    affine: str = "",
    jointly: bool = False,
    **attributes: Attribute,
) -> None:
    words = arguments.split()
    OPERATIONS[name] = Operation(
        name=name,
        arguments=tuple(word.strip("?*") for word in words),
        optional=sum(word.endswith("?") for word in words),
        variadic=words[-1].endswith("*"),
        attributes=attributes,
        rule=rule,
        formula=formula,
        commutative=commutative,
        takes_mask=takes_mask,
        domain=domain,
        affine=tuple(affine.split()),
        jointly=jointly,
    )


def _number(default: float | None = None, **limits: float) -> Attribute:
    return Attribute(kind="number", default=default, **limits)  # type: ignore[arg-type]


_POSITIVE = 5e-324  # the smallest double above 0, as an inclusive lower limit

_define(
    "linear",
    "a weight bias?",
    shapes.linear,
    "a @ weight.T + bias with weight [n, k]; a @ weight + bias with weight [k, n] if transposed",
    affine="a",
    transposed=Attribute(kind="flag", default=False),
)
_define(
    "matmul",
    "a b",
    shapes.matmul,
    "[.., m, k] @ [.., k, n] on inner dims; [k] @ [k, n] where b is a parameter",
    affine="a b",
)
_define("add", "a b", shapes.binary, "a + b", commutative=True, affine="a b", jointly=True)
_define("sub", "a b", shapes.binary, "a - b", affine="a b", jointly=True)
_define("mul", "a b", shapes.binary, "a * b", commutative=True, affine="a b")
_define("div", "a b", shapes.binary, "a / b", affine="a")
_define("maximum", "a b", shapes.binary, "the larger of the two", commutative=True)
_define("minimum", "a b", shapes.binary, "the smaller of the two", commutative=True)
_define("scale", "a s", shapes.binary, "a * s", commutative=True, affine="a s")
_define("bias", "a b", shapes.binary, "a + b", commutative=True, affine="a b", jointly=True)
_define("neg", "a", shapes.same, "-a", affine="a")
_define("abs", "a", shapes.same, "|a|")
_define("exp", "a", shapes.same, "e^a")
_define("log", "a", shapes.same, "the natural logarithm")
_define("sqrt", "a", shapes.same, "the square root")
_define("rsqrt", "a", shapes.same, "1 / sqrt(a)")
_define("square", "a", shapes.same, "a * a")
_define("reciprocal", "a", shapes.same, "1 / a")
_define("relu", "a", shapes.same, "max(a, 0)")
_define("silu", "a", shapes.same, "a * sigmoid(a)")
_define("tanh", "a", shapes.same, "the hyperbolic tangent")
_define("sigmoid", "a", shapes.same, "1 / (1 + e^-a)")
_define("softplus", "a", shapes.same, "log(1 + e^a)")
_define("erf", "a", shapes.same, "the error function")
_define("identity", "a", shapes.same, "a", affine="a", takes_mask=True)
_define(
    "gelu",
    "a",
    shapes.same,
    "a * Phi(a), Phi the normal distribution function, or its tanh approximation",
    approximate=Attribute(kind="choice", default="none", choices=("none", "tanh")),
)
_define("leaky_relu", "a", shapes.same, "a where a > 0, else slope * a", slope=_number(0.01))
_define("elu", "a", shapes.same, "a where a > 0, else alpha * (e^a - 1)", alpha=_number(1.0))
_define("clamp", "a", shapes.clamp, "a within [min, max]; one of the two may be left out", min=_number(), max=_number())
_define("softmax", "a", shapes.last, "e^a / sum(e^a) over the last inner dim")
_define("log_softmax", "a", shapes.last, "a - log(sum(e^a)) over the last inner dim")
_define(
    "layernorm",
    "a weight? bias?",
    shapes.last,
    "(a - mean) / sqrt(variance + eps) * weight + bias over the last inner dim",
    eps=_number(1e-5, low=0.0),
)
_define(
    "rmsnorm",
    "a weight?",
    shapes.last,
    "a / sqrt(mean(a^2) + eps) * weight over the last inner dim",
    eps=_number(1e-6, low=0.0),
)
_define("sum", "a", shapes.reduce, "the sum over the last inner dim, which stays as 1", affine="a")
_define("mean", "a", shapes.reduce, "the mean over the last inner dim, which stays as 1", affine="a")
_define("max", "a", shapes.reduce, "the largest over the last inner dim, which stays as 1")
_define("pool_mean", "a", shapes.pool_mean, "the mean over the batch item's positions", domain="positions", affine="a")
_define(
    "channel_gate",
    "a w1 b1 w2 b2",
    shapes.channel_gate,
    "a * sigmoid(linear(relu(linear(pool_mean(a), w1, b1)), w2, b2)): squeeze-excite",
    domain="positions",
)
_define(
    "dropout",
    "a",
    shapes.same,
    "in training, 0 with probability p, else a / (1 - p); a in evaluation",
    p=Attribute(kind="number", required=True, low=0.0, high=1.0),
)
_define(
    "depthwise_conv1d",
    "a weight bias?",
    shapes.depthwise(1),
    "each channel with its own odd kernel, weight [d, kernel], over the positions of a sequence, zeros beyond its ends",
    domain="sequence",
    affine="a",
)
_define(
    "depthwise_conv2d",
    "a weight bias?",
    shapes.depthwise(2),
    "each channel with its own odd kernel, weight [d, kh, kw], over an image, zeros beyond its edges",
    domain="image",
    affine="a",
)
_define(
    "conv3x3",
    "a weight bias?",
    shapes.convolution("3", "3"),
    "convolution with weight [n, k, 3, 3] over an image, stride 1, zeros beyond its edges",
    domain="image",
    affine="a",
)
_define(
    "conv1d",
    "a weight bias?",
    shapes.convolution("kernel"),
    "convolution with weight [n, k, kernel], odd, over the positions of a sequence, stride 1, zeros beyond its ends",
    domain="sequence",
    affine="a",
)
_define("pointwise_conv", "a weight bias?", shapes.linear, "a @ weight.T + bias with weight [n, k]", affine="a")
_define("concat", "a b*", shapes.concat, "one after the other along the last inner dim", affine="a b", jointly=True)
_define(
    "slice",
    "a",
    shapes.slice_,
    "features start to stop of the last inner dim, stop left out",
    affine="a",
    start=Attribute(kind="extent", default="0"),
    stop=Attribute(kind="extent", required=True),
)
_define(
    "reshape",
    "a",
    shapes.reshape,
    "the same elements in row-major order with other inner dims",
    affine="a",
    shape=Attribute(kind="extents", required=True),
)
_define("transpose", "a", shapes.transpose, "the last two inner dims exchanged", affine="a")
_define(
    "attention",
    "q k v",
    shapes.attention,
    "scaled dot-product attention over the positions of the batch item: softmax(q k^T / sqrt(dk)) v for each head; q "
    "and k [heads * dk], v [heads * dv]; if causal, a position sees itself and earlier ones",
    domain="positions",
    affine="v",
    heads=Attribute(kind="extent", required=True),
    causal=Attribute(kind="flag", default=False),
)
_define(
    "gather",
    "table index",
    shapes.gather,
    "row index of a parameter [n, d]; the index is an activation [.., 1] of whole numbers",
)
_define("gt", "a b", shapes.compare, "a > b, a mask")
_define("ge", "a b", shapes.compare, "a >= b, a mask")
_define("lt", "a b", shapes.compare, "a < b, a mask")
_define("le", "a b", shapes.compare, "a <= b, a mask")
_define("eq", "a b", shapes.compare, "a == b, a mask", commutative=True)
_define("where", "mask a b", shapes.where, "a where mask holds, else b", takes_mask=True, affine="a b", jointly=True)
