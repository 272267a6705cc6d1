"""What a graph means: evaluated op by op in torch, with torch's own functions.

This is what emitted kernels are proven against, so it shares nothing with the emitter: no decomposition, no fusion, no
derivative of its own. Gradients are torch's autograd. It computes in the dtype that it is given, float64 where it is
the measure of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.dims import filled_dims
from esper_triton.contracts.errors import BlueprintError, nearest
from esper_triton.contracts.expressions import evaluate
from esper_triton.contracts.graph import Layout, Op, ValueType, attributes, infer, layout_of, layouts_of

__all__ = ["reference"]

# Dimensions of an input before its features.
LEADING = {"rows": ("rows",), "sequence": ("batch", "length"), "image": ("batch", "height", "width")}


def reference(
    blueprint: Blueprint,
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    *,
    dims: Mapping[str, int],
    training: bool = False,
    mask: Mapping[str, Tensor] | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """k for the graph's inputs and parameters, differentiable in all of them.

    Args:
        inputs: `h` and `x` as the blueprint reads them: [rows, d]; [batch, length, d] for a sequence; [batch, height,
            width, d] for an image, where d is the width of each. parameters: all of them, by name.
        dims: an integer for each of the blueprint's dims that has no default, or is to be another.
        training: whether dropout drops. Then `mask` has, for each dropout, by the name of its value, a tensor that is
            true where an element is kept: of the value's shape, which is [*leading, *inner] for one value a row and
            [batch, *inner] for one a batch item.
        layout: how the inputs' rows lie; without it as the graph needs it (`layout_of`). A graph of rows alone takes
        any.

    Returns a tensor of the shape of `h`. Raises BlueprintError with every fault of dims, inputs and parameters.
    """
    layout = layout_of(blueprint.ops) if layout is None else layout
    dims = filled_dims(blueprint.dims, dims)
    types = infer(blueprint, dims)
    masks = mask or {}
    _check(blueprint, types, inputs, parameters, masks, layout, training=training)
    leading = next(iter(inputs.values())).shape[:-1]
    frame = _Frame(leading=leading, dims=dims, training=training, masks=masks)
    values: dict[str, _Value] = {
        name: _Value(tensor, types[name]) for name, tensor in (*inputs.items(), *parameters.items())
    }
    like = next(iter(inputs.values()))
    for op in blueprint.ops:
        operands = [
            values[item] if isinstance(item, str) else _Value(like.new_tensor(item), ValueType(None, ()))
            for item in op.inputs
        ]
        result = _EVALUATORS[op.op](frame, op, operands)
        values[op.name] = _Value(result, types[op.name])
    return values[blueprint.output].tensor


@dataclass(frozen=True)
class _Value:
    """`tensor` has the leading dimensions of its level before the inner ones."""

    tensor: Tensor
    kind: ValueType


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What is common to all ops of one evaluation."""

    leading: torch.Size
    dims: Mapping[str, int]
    training: bool
    masks: Mapping[str, Tensor]

    def extent(self, value: object) -> int:
        return evaluate(str(value), self.dims)

    def together(self, *operands: _Value) -> list[Tensor]:
        """Operands that broadcast in torch as the graph says that they do."""
        rank = max(len(value.kind.shape) for value in operands)
        levels = {value.kind.level for value in operands}
        own = len(self.leading) if "rows" in levels else 1 if "batch" in levels else 0
        found = []
        for value in operands:
            outer = {"rows": self.leading, "batch": self.leading[:1], None: ()}[value.kind.level]
            inner = value.kind.shape
            shape = (*outer, *(1,) * (own - len(outer)), *(1,) * (rank - len(inner)), *inner)
            found.append(value.tensor.reshape(shape))
        return found

    def positions(self, value: _Value) -> Tensor:
        """[batch, positions, *inner]"""
        return value.tensor.reshape(self.leading[0], self.leading[1:].numel(), *value.kind.shape)


Evaluator = Callable[[_Frame, Op, list[_Value]], Tensor]


def _unary(function: Callable[..., Tensor]) -> Evaluator:
    return lambda frame, op, operands: function(operands[0].tensor, **attributes(op))


def _joint(function: Callable[..., Tensor]) -> Evaluator:
    return lambda frame, op, operands: function(*frame.together(*operands))


def _linear(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    a, weight, *bias = (value.tensor for value in operands)
    return F.linear(a, weight.T if attributes(op).get("transposed") else weight, *bias)


def _matmul(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    a, b = operands
    if len(a.kind.shape) == 1:
        return a.tensor @ b.tensor
    left, right = frame.together(a, b)
    return left @ right


def _norm(function: Callable[..., Tensor]) -> Evaluator:
    def evaluator(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
        a, *weights = (value.tensor for value in operands)
        return function(a, a.shape[-1:], *weights, eps=attributes(op)["eps"])

    return evaluator


def _pool_mean(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    return frame.positions(operands[0]).mean(dim=1)


def _channel_gate(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    a, *weights = operands
    w1, b1, w2, b2 = (value.tensor for value in weights)
    gate = torch.sigmoid(F.linear(F.relu(F.linear(_pool_mean(frame, op, [a]), w1, b1)), w2, b2))
    return a.tensor * gate.reshape(gate.shape[0], *(1,) * (len(frame.leading) - 1), *gate.shape[1:])


def _dropout(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    a = operands[0].tensor
    p = cast(float, attributes(op)["p"])
    if not frame.training:
        return a
    return torch.where(frame.masks[op.name], a / (1 - p), torch.zeros_like(a))


def _convolution(function: Callable[..., Tensor], *, depthwise: bool) -> Evaluator:
    def evaluator(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
        a, weight, *bias = (value.tensor for value in operands)
        if depthwise:
            weight = weight[:, None]
        groups = a.shape[-1] if depthwise else 1
        padding = tuple(taps // 2 for taps in weight.shape[2:])
        return function(a.movedim(-1, 1), weight, *bias, padding=padding, groups=groups).movedim(1, -1)

    return evaluator


def _concat(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    tensors = frame.together(*operands)
    leading = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))  # type: ignore[no-untyped-call]
    return torch.cat([tensor.expand(*leading, tensor.shape[-1]) for tensor in tensors], dim=-1)


def _slice(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    attrs = attributes(op)
    return operands[0].tensor[..., frame.extent(attrs["start"]) : frame.extent(attrs["stop"])]


def _reshape(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    a = operands[0]
    shape = [frame.extent(item) for item in cast(tuple[str, ...], attributes(op)["shape"])]
    own = a.tensor.dim() - len(a.kind.shape)
    return a.tensor.reshape((*a.tensor.shape[:own], *shape))


def _attention(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    attrs = attributes(op)
    heads = frame.extent(attrs["heads"])
    q, k, v = (_split(frame.positions(value), heads) for value in operands)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=bool(attrs["causal"]))
    return out.transpose(1, 2).reshape(*frame.leading, *operands[2].kind.shape)


def _split(tensor: Tensor, heads: int) -> Tensor:
    """[batch, heads, positions, width of a head]"""
    return tensor.reshape(*tensor.shape[:-1], heads, tensor.shape[-1] // heads).transpose(1, 2)


def _gather(frame: _Frame, op: Op, operands: list[_Value]) -> Tensor:
    table, index = operands
    return F.embedding(index.tensor[..., 0].long(), table.tensor)


_EVALUATORS: dict[str, Evaluator] = {
    "linear": _linear,
    "matmul": _matmul,
    "add": _joint(torch.add),
    "sub": _joint(torch.sub),
    "mul": _joint(torch.mul),
    "div": _joint(torch.div),
    "maximum": _joint(torch.maximum),
    "minimum": _joint(torch.minimum),
    "scale": _joint(torch.mul),
    "bias": _joint(torch.add),
    "neg": _unary(torch.neg),
    "abs": _unary(torch.abs),
    "exp": _unary(torch.exp),
    "log": _unary(torch.log),
    "sqrt": _unary(torch.sqrt),
    "rsqrt": _unary(torch.rsqrt),
    "square": _unary(torch.square),
    "reciprocal": _unary(torch.reciprocal),
    "relu": _unary(F.relu),
    "silu": _unary(F.silu),
    "tanh": _unary(torch.tanh),
    "sigmoid": _unary(torch.sigmoid),
    "softplus": _unary(F.softplus),
    "erf": _unary(torch.erf),
    "identity": _unary(lambda a: a),
    "gelu": _unary(F.gelu),
    "leaky_relu": _unary(lambda a, slope: F.leaky_relu(a, slope)),
    "elu": _unary(F.elu),
    "clamp": _unary(torch.clamp),
    "softmax": _unary(lambda a: F.softmax(a, dim=-1)),
    "log_softmax": _unary(lambda a: F.log_softmax(a, dim=-1)),
    "layernorm": _norm(F.layer_norm),
    "rmsnorm": _norm(F.rms_norm),
    "sum": _unary(lambda a: a.sum(dim=-1, keepdim=True)),
    "mean": _unary(lambda a: a.mean(dim=-1, keepdim=True)),
    "max": _unary(lambda a: a.amax(dim=-1, keepdim=True)),
    "pool_mean": _pool_mean,
    "channel_gate": _channel_gate,
    "dropout": _dropout,
    "depthwise_conv1d": _convolution(F.conv1d, depthwise=True),
    "depthwise_conv2d": _convolution(F.conv2d, depthwise=True),
    "conv3x3": _convolution(F.conv2d, depthwise=False),
    "conv1d": _convolution(F.conv1d, depthwise=False),
    "pointwise_conv": _linear,
    "concat": _concat,
    "slice": _slice,
    "reshape": _reshape,
    "transpose": _unary(lambda a: a.transpose(-1, -2)),
    "attention": _attention,
    "gather": _gather,
    "gt": _joint(torch.gt),
    "ge": _joint(torch.ge),
    "lt": _joint(torch.lt),
    "le": _joint(torch.le),
    "eq": _joint(torch.eq),
    "where": _joint(torch.where),
}


def _check(
    blueprint: Blueprint,
    types: Mapping[str, ValueType],
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    layout: Layout,
    *,
    training: bool,
) -> None:
    faults: list[str] = []
    fitting = layouts_of(blueprint.ops)
    if layout not in fitting:
        raise BlueprintError(
            f"blueprint {blueprint.name!r}: layout is {layout!r}, its graph takes {' or '.join(fitting)}"
        )
    leading: Any = None
    for name in blueprint.inputs:
        width = types[name].shape[0]
        expected = f"[{', '.join((*LEADING[layout], str(width)))}]"
        if name not in inputs:
            faults.append(f"input {name!r} is missing")
        elif inputs[name].dim() != len(LEADING[layout]) + 1 or inputs[name].shape[-1] != width:
            faults.append(f"input {name!r} has shape {list(inputs[name].shape)}, expected {expected}")
        elif leading is not None and inputs[name].shape[:-1] != leading:
            faults.append(f"input {name!r} has shape {list(inputs[name].shape)}, expected {[*leading, width]}")
        else:
            leading = inputs[name].shape[:-1]
    for name in blueprint.parameters:
        shape = list(types[name].shape)
        if name not in parameters:
            faults.append(f"parameter {name!r} is missing")
        elif list(parameters[name].shape) != shape:
            faults.append(f"parameter {name!r} has shape {list(parameters[name].shape)}, expected {shape}")
    for kind, given, known in (("input", inputs, blueprint.inputs), ("parameter", parameters, blueprint.parameters)):
        faults += [f"unknown {kind} {name!r}{nearest(name, known)}" for name in given if name not in known]
    dropouts = [op.name for op in blueprint.ops if op.op == "dropout"]
    if training:
        faults += [f"mask of dropout {name!r} is missing" for name in dropouts if name not in masks]
    faults += [f"mask {name!r} is of no dropout{nearest(name, dropouts)}" for name in masks if name not in dropouts]
    for name in set(masks) & set(dropouts) if leading is not None else ():
        outer = {"rows": leading, "batch": leading[:1], None: ()}[types[name].level]
        if masks[name].dtype != torch.bool or list(masks[name].shape) != [*outer, *types[name].shape]:
            found = f"{list(masks[name].shape)} of {masks[name].dtype}"
            faults.append(f"mask of dropout {name!r} is {found}, expected {[*outer, *types[name].shape]} of torch.bool")
    if faults:
        raise BlueprintError(f"blueprint {blueprint.name!r}: " + "; ".join(faults))
