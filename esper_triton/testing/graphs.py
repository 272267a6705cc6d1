"""hypothesis strategies for graphs: drawn ones, and other spellings of a graph that mean the same."""

from __future__ import annotations

from typing import Any, Literal

from hypothesis import strategies as st

from esper_triton.contracts.blueprint import Blueprint, Op
from esper_triton.contracts.building import GraphBuilder, Value

LAYOUTS = ("rows", "sequence", "image")
_INPUTS: tuple[Literal["h", "xh"], ...] = ("h", "xh")
UNARY = ["neg", "abs", "square", "relu", "silu", "tanh", "sigmoid", "softplus", "erf", "gelu", "leaky_relu", "elu"]
BINARY = ["add", "sub", "mul", "maximum", "minimum"]


def width_of(b: GraphBuilder, value: Value) -> str:
    """The expression of the last inner dim."""
    return b.type_of(value).shape[-1].text


def _linear(draw: st.DrawFn, b: GraphBuilder, a: Value, index: int) -> Value:
    k, n = width_of(b, a), draw(st.sampled_from(["d", "r"]))
    transposed = draw(st.booleans())
    weight = b.parameter(f"w{index}", (k, n) if transposed else (n, k), init="normal:0.5")
    bias = [b.parameter(f"b{index}", (n,), init="uniform:0.5")] if draw(st.booleans()) else []
    return b.linear(a, weight, *bias, transposed=transposed)


def _row_op(draw: st.DrawFn, b: GraphBuilder, values: list[Value], index: int) -> Value:
    a = draw(st.sampled_from(values))
    same = [value for value in values if width_of(b, value) in (width_of(b, a), "1")]
    kind = draw(st.sampled_from("unary binary number linear norm softmax reduce concat slice where outer safe".split()))
    match kind:
        case "unary":
            return b.op(draw(st.sampled_from(UNARY)), a)
        case "binary":
            return b.op(draw(st.sampled_from(BINARY)), a, draw(st.sampled_from(same)))
        case "number":
            number = draw(st.floats(0.25, 2.0, width=16))
            match draw(st.integers(0, 3)):
                case 0:
                    return a * number
                case 1:
                    return number - a
                case 2:
                    return a / number
            return b.clamp(a, min=-number, max=2 * number)
        case "norm":
            weight = b.parameter(f"w{index}", (width_of(b, a),), init="ones")
            return b.op(draw(st.sampled_from(["layernorm", "rmsnorm"])), a, weight, eps=0.5)
        case "softmax":
            return b.op(draw(st.sampled_from(["softmax", "log_softmax"])), a)
        case "reduce":
            return b.op(draw(st.sampled_from(["sum", "mean", "max"])), a)
        case "concat":
            other = draw(st.sampled_from(values))
            both = b.concat(a, other)
            return b.slice(both, start=width_of(b, a), stop=f"{width_of(b, a)} + {width_of(b, other)}")
        case "slice":
            return b.slice(b.concat(a, a), stop=width_of(b, a))
        case "where":
            mask = b.op(draw(st.sampled_from(["gt", "ge", "lt", "le"])), a, 0.125)
            return b.where(mask, a, draw(st.sampled_from(same)))
        case "outer":
            column = b.reshape(a, shape=[width_of(b, a), 1])
            square = b.matmul(column, b.transpose(column))
            return b.reshape(b.mean(square), shape=[width_of(b, a)])
        case "safe":
            positive = b.square(a) + 1.0
            op = draw(st.sampled_from(["log", "sqrt", "rsqrt", "reciprocal"]))
            return b.op(op, positive) + b.exp(b.tanh(a))
    return _linear(draw, b, a, index)


def _position_op(draw: st.DrawFn, b: GraphBuilder, values: list[Value], index: int, layout: str) -> Value:
    rows = [value for value in values if b.type_of(value).level == "rows"]
    a = draw(st.sampled_from(rows))
    width = width_of(b, a)
    kinds = {"sequence": ["pool", "gate", "attention", "depthwise1", "conv1"], "image": ["pool", "depthwise2", "conv2"]}
    match draw(st.sampled_from(kinds[layout])):
        case "pool":
            return b.pool_mean(a)
        case "gate":
            parameters = [
                b.parameter(f"{name}{index}", shape, init="normal:0.5")
                for name, shape in (("w", ("r", width)), ("b", ("r",)), ("u", (width, "r")), ("c", (width,)))
            ]
            return b.channel_gate(a, *parameters)
        case "attention":
            return b.attention(a, a, draw(st.sampled_from(rows)), heads=1, causal=draw(st.booleans()))
        case "depthwise1":
            return b.depthwise_conv1d(a, b.parameter(f"w{index}", (width, 3), init="normal:0.5"))
        case "conv1":
            weight = b.parameter(f"w{index}", ("r", width, 5), init="normal:0.25")
            return b.conv1d(a, weight, b.parameter(f"b{index}", ("r",), init="constant:0.5"))
        case "depthwise2":
            return b.depthwise_conv2d(a, b.parameter(f"w{index}", (width, 3, 5), init="normal:0.5"))
    return b.conv3x3(a, b.parameter(f"w{index}", ("r", width, 3, 3), init="normal:0.25"))


@st.composite
def blueprints(
    draw: st.DrawFn, layouts: tuple[str, ...] = ("rows", "sequence", "image"), dropout: bool = True
) -> Blueprint:
    """A graph of a few ops over h, or x and h, all of whose values count."""
    layout = draw(st.sampled_from(layouts))
    input = draw(st.sampled_from(_INPUTS))
    dims: dict[str, Any] = {"d": {}, "r": (1, 64)} | ({"d_in": {}} if input == "xh" else {})
    b = Blueprint.build("drawn", input=input, dims=dims)
    values = [b.h]
    if input == "xh":
        values.append(b.linear(b.x, b.parameter("w_in", ("d", "d_in"), init="kaiming_uniform")))
    values.append(b.linear(b.h, b.parameter("w_r", ("r", "d"), init="kaiming_uniform")))
    used = {"h", "x"}
    for index in range(draw(st.integers(1, 7))):
        if layout != "rows" and draw(st.booleans()):
            values.append(_position_op(draw, b, values, index, layout))
        elif dropout and draw(st.integers(0, 4)) == 0:
            values.append(b.dropout(draw(st.sampled_from(values)), 0.25))
        else:
            values.append(_row_op(draw, b, values, index))
    used |= {name for op in b.ops for name in op.names}
    total = b.h
    for value in values:
        if value.name not in used:
            total = total + (value if width_of(b, value) == "d" else b.mean(value))
    return b.output(total if total is not b.h else b.identity(b.h))


@st.composite
def respelled(draw: st.DrawFn, blueprint: Blueprint) -> Blueprint:
    """The same design with other names, another order, sugar, detours and repetitions."""
    ops = [_sugared(draw, op) for op in blueprint.ops]
    ops = _with_identities(draw, ops)
    ops = _with_repetitions(draw, ops)
    ops = _reordered(draw, ops)
    names = draw(st.permutations([f"n{i}" for i in range(len(ops))]))
    new = dict(zip((op.name for op in ops), names, strict=True))
    renamed = [
        op.model_copy(
            update={
                "name": new[op.name],
                "inputs": tuple(new.get(item, item) if isinstance(item, str) else item for item in op.inputs),
            }
        )
        for op in ops
    ]
    changes = {"ops": tuple(renamed), "output": new[blueprint.output], "name": "another", "description": "as before"}
    return Blueprint.model_validate(blueprint.model_dump(exclude={"affine"}) | changes)


def _sugared(draw: st.DrawFn, op: Op) -> Op:
    sugar = {"add": ["bias"], "mul": ["scale"], "linear": ["pointwise_conv"]}.get(op.op, [])
    if op.attrs.get("transposed"):
        sugar = []
    changes: dict[str, object] = {"op": draw(st.sampled_from([op.op, *sugar]))}
    if op.op in ("add", "mul", "maximum", "minimum") and draw(st.booleans()):
        changes["inputs"] = op.inputs[::-1]
    if changes["op"] == "pointwise_conv":
        changes["attrs"] = {}
    elif op.op == "gelu" and draw(st.booleans()):
        changes["attrs"] = {"approximate": "none"}
    return op.model_copy(update=changes)


def _with_identities(draw: st.DrawFn, ops: list[Op]) -> list[Op]:
    found: list[Op] = []
    for op in ops:
        inputs = list(op.inputs)
        for position, item in enumerate(inputs):
            if isinstance(item, str) and draw(st.integers(0, 7)) == 0:
                detour = f"detour{len(found)}"
                found.append(Op(name=detour, op="identity", inputs=(item,)))
                inputs[position] = detour
        found.append(op.model_copy(update={"inputs": tuple(inputs)}))
    return found


def _with_repetitions(draw: st.DrawFn, ops: list[Op]) -> list[Op]:
    """One op twice, the second time for one of its later uses."""
    index = draw(st.integers(0, len(ops) - 1))
    op = ops[index]
    users = [i for i, other in enumerate(ops) if op.name in other.names]
    if op.op == "dropout" or len(users) < 2:
        return ops
    again = op.model_copy(update={"name": "again"})
    user = ops[users[-1]]
    changed = user.model_copy(update={"inputs": tuple("again" if i == op.name else i for i in user.inputs)})
    return [*ops[: index + 1], again, *(changed if other is user else other for other in ops[index + 1 :])]


def _reordered(draw: st.DrawFn, ops: list[Op]) -> list[Op]:
    """Another order in which every op still comes after its inputs."""
    left = list(ops)
    found: list[Op] = []
    names = {op.name for op in ops}
    done: set[str] = set()
    while left:
        ready = [op for op in left if not (set(op.names) & names) - done]
        op = draw(st.sampled_from(ready))
        left.remove(op)
        found.append(op)
        done.add(op.name)
    return found
