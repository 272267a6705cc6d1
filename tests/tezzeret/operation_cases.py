"""One small graph or more for every operation that a blueprint may have, for its tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from esper_triton.contracts.blueprint import Blueprint

__all__ = ["CASES", "DIMS", "Case"]

# Of each dtype its own, so that blocks are filled exactly, in part, and hardly. d is even: heads and reshapes halve it.
DIMS: dict[str, dict[str, int]] = {
    "float32": {"d": 22, "r": 5, "n": 7},
    "float16": {"d": 16, "r": 3, "n": 9},
    "bfloat16": {"d": 70, "r": 16, "n": 4},
}


@dataclass(frozen=True)
class Case:
    """`text` gives k. `positive` inputs are drawn well above 0; `index` ones have rows of a table in their first
    column."""

    text: str
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    index: bool = False

    @property
    def blueprint(self) -> Blueprint:
        words = self.text.replace("(", " ").replace(")", " ").replace(",", " ").split()
        body = {
            "name": "case",
            "input": "".join(name for name in ("x", "h") if name in words) or "h",
            "graph": self.text if "\n" in self.text else f"k = {self.text}",
            "dims": {d: {} for d in ("d", "r", "n") if d == "d" or any(d in s for s in self.parameters.values())},
            "parameters": {name: {"shape": list(self.parameters[name])} for name in self.parameters},
        }
        return Blueprint.validated("case", body)

    def dims(self, dtype: str) -> dict[str, int]:
        return {name: DIMS[dtype][name] for name in self.blueprint.dims}

    def altered(self, dtype: str) -> Callable[[str, Tensor], Tensor]:
        """Drawn inputs as this case needs them."""

        def change(name: str, value: Tensor) -> Tensor:
            if name in self.positive:
                return value.abs() + 0.25
            if self.index and name == "h":
                value = value.clone()
                value[:, 0] = (value[:, 0].float() * 1000).long().remainder(DIMS[dtype]["n"]).to(value.dtype)
            return value

        return change


CASES: tuple[Case, ...] = (
    Case("linear(linear(h, w, b), u, transposed=True)", {"w": ("r", "d"), "b": ("r",), "u": ("r", "d")}),
    Case("h + linear(silu(linear(h, w)), w, b, transposed=True)", {"w": ("r", "d"), "b": ("d",)}),
    Case("linear(linear(x, w), u)", {"w": ("1", "d"), "u": ("d", "1")}),
    Case("pointwise_conv(pointwise_conv(h, w, b), u)", {"w": ("r", "d"), "b": ("r",), "u": ("d", "r")}),
    Case("matmul(h, m)", {"m": ("d", "d")}),
    Case(
        "q = reshape(h, shape=[2, d // 2])\np = reshape(x, shape=[2, d // 2])\n"
        "k = reshape(q @ (transpose(p) @ q), shape=[d])"
    ),
    Case("add(h, x)"),
    Case("sub(h, x)"),
    Case("mul(h, x)"),
    Case("mul(h, b) + x", {"b": ("d",)}),
    Case("div(h, x)", positive=("x",)),
    Case("maximum(h, x)"),
    Case("minimum(h, x)"),
    Case("maximum(h, b) + minimum(x, b)", {"b": ("d",)}),
    Case("scale(h, s)", {"s": ("d",)}),
    Case("scale(h, s)", {"s": ("1",)}),
    Case("bias(x, b)", {"b": ("d",)}),
    Case("neg(h)"),
    Case("abs(h)"),
    Case("exp(h)"),
    Case("log(h)", positive=("h",)),
    Case("sqrt(h)", positive=("h",)),
    Case("rsqrt(h)", positive=("h",)),
    Case("square(h)"),
    Case("reciprocal(h)", positive=("h",)),
    Case("relu(h)"),
    Case("silu(h)"),
    Case("tanh(h)"),
    Case("sigmoid(h)"),
    Case("softplus(h)"),
    Case("erf(h)"),
    Case("identity(x)"),
    Case("gelu(h)"),
    Case("gelu(h, approximate='tanh')"),
    Case("leaky_relu(h, slope=0.2)"),
    Case("elu(h, alpha=0.7)"),
    Case("clamp(h, min=-0.5001, max=0.7501)"),
    Case("clamp(h, max=0.5001) + clamp(x, min=0.1251)"),
    Case("softmax(h)"),
    Case("log_softmax(h)"),
    Case("layernorm(h, w, b)", {"w": ("d",), "b": ("d",)}),
    Case("layernorm(h, eps=0.1) * layernorm(x, w)", {"w": ("d",)}),
    Case("rmsnorm(h, w)", {"w": ("d",)}),
    Case("rmsnorm(h, eps=0.1)"),
    Case("h * sum(x)"),
    Case("h + mean(h)"),
    Case("h * max(x)"),
    Case("h * pool_mean(x)"),
    Case("channel_gate(h, w, b, u, c)", {"w": ("r", "d"), "b": ("r",), "u": ("d", "r"), "c": ("d",)}),
    Case("dropout(h, p=0.25)"),
    Case("depthwise_conv1d(h, w, b)", {"w": ("d", "3"), "b": ("d",)}),
    Case("depthwise_conv2d(h, w, b)", {"w": ("d", "3", "5"), "b": ("d",)}),
    Case("conv3x3(x, w, b)", {"w": ("d", "d", "3", "3"), "b": ("d",)}),
    Case("conv1d(h, w, b)", {"w": ("d", "d", "5"), "b": ("d",)}),
    Case(
         "c = concat(h, x, 2 * h)\nk = slice(c, start=d // 2, stop=d // 2 + d) + slice(c, start=2 * d, stop=3 * d)"),
    Case("reshape(transpose(reshape(h, shape=[2, d // 2])), shape=[d])"),
    Case("attention(h, x, h, heads=2)"),
    Case("attention(h, x, h * x, heads=2, causal=True)"),
    Case("gather(t, slice(h, stop=1)) * x", {"t": ("n", "d")}, index=True),
    Case("where(gt(h, x), h, b)", {"b": ("d",)}),
    Case("where(ge(h, 0.25), x, 2 * h)"),
    Case("where(lt(h, mean(h)), h * x, h)"),
    Case("where(identity(le(h, 2 * x)), x, h)"),
    Case("where(eq(h, max(h)), x, h)"),
)  # fmt: skip
