"""ATen operations as ops of a graph, one handler each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from esper_triton.contracts.values import normalize_extent
from esper_triton.tezzeret.import_axes import Group, Refused, Tracked, inner_of, size_of, viewed
from esper_triton.tezzeret.import_graph import Growing

__all__ = ["HANDLERS", "Arguments"]

Result = Tracked | tuple[Tracked, ...]
Handler = Callable[[Growing, "Arguments"], Result]


class Arguments:
    """An ATen call's arguments by their names in its schema, defaults filled in. `shape` and `shapes` are those of its
    result, or of each of them; `same_dtype` whether they have that of the first argument."""

    def __init__(self, values: Mapping[str, Any], shapes: Sequence[Sequence[int]], *, same_dtype: bool) -> None:
        self.values = values
        self.shapes = shapes
        self.same_dtype = same_dtype

    @property
    def shape(self) -> Sequence[int]:
        return self.shapes[0]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def tensor(self, name: str) -> Tracked:
        """A tensor, or a number as one of no axes."""
        return _operand(self.values[name])

    def only(self, **expected: Any) -> None:
        """Raises Refused where an argument has another value than the graph's operations mean."""
        for name, value in expected.items():
            if name in self.values and self.values[name] != value:
                raise Refused(f"{name} is {self.values[name]!r}, only {value!r} is taken")


def _operand(value: Any) -> Tracked:
    if isinstance(value, Tracked):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Tracked(name=float(value), level=None, inner=(), axes=())
    raise Refused(f"{value!r} is neither a tensor nor a finite number")


def _first(arguments: Arguments) -> Tracked:
    return _operand(next(iter(arguments.values.values())))


def _unary(op: str, attrs: Mapping[str, str] | None = None, **only: Any) -> Handler:
    """`attrs`: the ATen argument of each attribute. `only`: what else has to be so."""

    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        arguments.only(**only)
        return graph.unary(_first(arguments), op, **{name: arguments[given] for name, given in (attrs or {}).items()})

    return handler


def _binary(op: str) -> Handler:
    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        arguments.only(rounding_mode=None)
        a, b = (_operand(value) for value in list(arguments.values.values())[:2])
        alpha = arguments.get("alpha")
        if alpha is not None and alpha != 1:
            b = graph.joint("mul", b, _operand(alpha))
        return graph.joint(op, a, b)

    return handler


def _rsub(graph: Growing, arguments: Arguments) -> Tracked:
    arguments.only(alpha=1)
    a, b = (_operand(value) for value in list(arguments.values.values())[:2])
    return graph.joint("sub", b, a)


def _pow(graph: Growing, arguments: Arguments) -> Tracked:
    a, exponent = arguments.tensor("self"), arguments["exponent"]
    simple = {1: "identity", 2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if exponent in simple:
        return graph.unary(a, simple[exponent])
    if exponent == 3:
        return graph.joint("mul", graph.unary(a, "square"), a)
    raise Refused(f"exponent is {exponent!r}, only {', '.join(map(str, simple))} and 3 are taken")


def _clamp(low: str, high: str) -> Handler:
    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        bounds = {"min": arguments.get(low), "max": arguments.get(high)}
        if any(isinstance(bound, Tracked) for bound in bounds.values()):
            raise Refused("its bounds are tensors; use torch.maximum and torch.minimum")
        return graph.unary(_first(arguments), "clamp", **bounds)

    return handler


def _relu6(graph: Growing, arguments: Arguments) -> Tracked:
    return graph.unary(_first(arguments), "clamp", min=0.0, max=6.0)


def _mish(graph: Growing, arguments: Arguments) -> Tracked:
    a = _first(arguments)
    return graph.joint("mul", a, graph.unary(graph.unary(a, "softplus"), "tanh"))


def _elu(graph: Growing, arguments: Arguments) -> Tracked:
    arguments.only(input_scale=1)
    activated = graph.unary(_first(arguments), "elu", alpha=arguments["alpha"])
    scale = arguments["scale"]
    return activated if scale == 1 else graph.joint("mul", activated, _operand(scale))


def _celu(graph: Growing, arguments: Arguments) -> Tracked:
    alpha = _operand(arguments["alpha"])
    return graph.joint("mul", graph.unary(graph.joint("div", _first(arguments), alpha), "elu"), alpha)


def _log_sigmoid(graph: Growing, arguments: Arguments) -> Tracked:
    return graph.unary(graph.unary(graph.unary(_first(arguments), "neg"), "softplus"), "neg")


def _full(name: str | float) -> Handler:
    """A constant: the argument of that name, or the number itself."""

    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        return _operand(arguments[name] if isinstance(name, str) else name)

    return handler


def _same(graph: Growing, arguments: Arguments) -> Tracked:
    return _first(arguments)


def _cast(graph: Growing, arguments: Arguments) -> Tracked:
    if not arguments.same_dtype:
        raise Refused("it changes the dtype; a kernel computes in the layer's own")
    return _first(arguments)


def _detach(graph: Growing, arguments: Arguments) -> Tracked:
    raise Refused("it stops gradients, which no operation of a graph does")


def _view(graph: Growing, arguments: Arguments) -> Tracked:
    return viewed(_first(arguments), arguments.shape, graph.sizes)


def _expand(graph: Growing, arguments: Arguments) -> Tracked:
    value = _first(arguments)
    groups: list[Group] = [()] * (len(arguments.shape) - len(value.axes)) + list(value.axes)
    for i, (size, group) in enumerate(zip(arguments.shape, groups, strict=True)):
        if size != size_of(group):
            groups[i] = tuple(atom for atom in graph.leading if atom.size == size)
            if not groups[i]:
                raise Refused("it repeats features; leave that to broadcasting")
    return replace(value, axes=tuple(groups))


def _permuted(value: Tracked, order: Sequence[int]) -> Tracked:
    return replace(value, axes=tuple(value.axes[value.axis(index)] for index in order))


def _permute(graph: Growing, arguments: Arguments) -> Tracked:
    return _permuted(_first(arguments), arguments["dims"])


def _transpose(graph: Growing, arguments: Arguments) -> Tracked:
    value, first, second = list(arguments.values.values())[:3]
    order = list(range(len(value.axes)))
    first, second = value.axis(first), value.axis(second)
    order[first], order[second] = second, first
    return _permuted(value, order)


def _t(graph: Growing, arguments: Arguments) -> Tracked:
    value = _first(arguments)
    return _permuted(value, list(range(len(value.axes)))[::-1])


def _select(graph: Growing, arguments: Arguments) -> Tracked:
    value = arguments.tensor("self")
    axis = value.axis(arguments["dim"])
    index = arguments["index"] % size_of(value.axes[axis])
    one = graph.sliced(value, axis, index, index + 1)
    return replace(one, axes=(*one.axes[:axis], *one.axes[axis + 1 :]))


def _slice(graph: Growing, arguments: Arguments) -> Tracked:
    arguments.only(step=1)
    value = arguments.tensor("self")
    axis = value.axis(arguments["dim"])
    size = size_of(value.axes[axis])
    start, stop = arguments["start"] or 0, arguments["end"]
    start = max(start + size, 0) if start < 0 else min(start, size)
    stop = size if stop is None else max(stop + size, 0) if stop < 0 else min(stop, size)
    if start >= stop:
        raise Refused("it takes nothing")
    return graph.sliced(value, axis, start, stop)


def _split(graph: Growing, arguments: Arguments) -> tuple[Tracked, ...]:
    """Of whatever kind: the shapes of the results say where it cuts."""
    value = _first(arguments)
    axis = value.axis(arguments["dim"])
    parts, start = [], 0
    for shape in arguments.shapes:
        parts.append(graph.sliced(value, axis, start, start + shape[axis]))
        start += shape[axis]
    return tuple(parts)


def _unbind(graph: Growing, arguments: Arguments) -> tuple[Tracked, ...]:
    value = _first(arguments)
    axis = value.axis(arguments["dim"])
    ones = [graph.sliced(value, axis, i, i + 1) for i in range(size_of(value.axes[axis]))]
    return tuple(replace(one, axes=(*one.axes[:axis], *one.axes[axis + 1 :])) for one in ones)


def _cat(graph: Growing, arguments: Arguments) -> Tracked:
    values = [_operand(value) for value in arguments["tensors"]]
    axis = values[0].axis(arguments["dim"])
    lasts = [graph.last(value, axis) for value in values]
    first = lasts[0]
    size = 0
    text = []
    for value in lasts:
        others = [(a, b) for i, (a, b) in enumerate(zip(first.axes, value.axes, strict=True)) if i != axis]
        if any(size_of(a) != size_of(b) for a, b in others):
            raise Refused("it joins values whose other axes differ")
        text.append(graph.text(value.axes[axis]))
        size += size_of(value.axes[axis])
    level = graph.level(lasts)
    joined = graph.atom(size, graph.sizes.known(size) or normalize_extent(" + ".join(text)))
    axes = tuple(joined if i == axis else other for i, other in enumerate(first.axes))
    name = graph.add("concat", *(value.name for value in lasts))
    return Tracked(name=name, level=level, inner=(*first.inner[:-1], joined), axes=axes)


def _linear(graph: Growing, arguments: Arguments) -> Tracked:
    value, weight, bias = arguments.tensor("input"), arguments.tensor("weight"), arguments.get("bias")
    return _product(graph, value, weight, bias)


def _product(graph: Growing, value: Tracked, weight: Tracked, bias: Any = None, axis: int = -1) -> Tracked:
    """Along one axis of features, with weight [n, k]."""
    if weight.level is not None or len(weight.axes) != 2:
        raise Refused("its weight is not a matrix of parameters alone")
    axis = value.axis(axis)
    last = graph.last(value, axis)
    names = [last.name]
    attrs: dict[str, bool] = {}
    if _swapped(weight):
        names.append(graph.arranged(weight, weight.axes[::-1]))
        attrs["transposed"] = True
    else:
        names.append(graph.arranged(weight, weight.axes))
    if bias is not None:
        names.append(graph.arranged(bias, bias.axes))
    new = graph.fresh(weight.axes[0])
    axes = tuple(new if i == axis else group for i, group in enumerate(value.axes))
    return replace(last, name=graph.add("linear", *names, **attrs), inner=(*last.inner[:-1], new), axes=axes)


def _swapped(weight: Tracked) -> bool:
    one, other = weight.axes
    flat = [*other, *one]
    return bool(one and other) and all(a is b for a, b in zip(weight.atoms, flat, strict=True))


def _matmul(graph: Growing, arguments: Arguments) -> Tracked:
    a, b = (_operand(value) for value in list(arguments.values.values())[:2])
    if (
        b.level is None and len(a.axes) >= len(b.axes) >= 2 and not any(b.axes[:-2])
    ):  # einsum puts a batch of 1 before it
        return _product(graph, a, replace(b, axes=b.axes[:-3:-1]))
    if len(a.axes) < 2 or len(b.axes) < 2:
        raise Refused("it multiplies with a vector; use a product and a sum")
    if any(atom.leading for value in (a, b) for group in value.axes[-2:] for atom in group):
        raise Refused("it multiplies over positions; use F.scaled_dot_product_attention for attention")
    batch = [g for g in a.axes[:-2] if inner_of(g)], [g for g in b.axes[:-2] if inner_of(g)]
    if [size_of(g) for g in batch[0]] != [size_of(g) for g in batch[1]]:
        raise Refused("its factors have other axes besides the two that meet")
    left = graph.arranged(a, (*map(inner_of, batch[0]), *a.axes[-2:]), exact=True)
    right = graph.arranged(b, (*map(inner_of, batch[1]), *b.axes[-2:]), exact=True)
    m, n = a.axes[-2], graph.fresh(b.axes[-1])
    inner = (*map(inner_of, batch[0]), m, n)
    axes = (*max(a.axes[:-2], b.axes[:-2], key=len), m, n)
    return Tracked(name=graph.add("matmul", left, right), level=graph.level([a, b]), inner=inner, axes=axes)


def _softmax(op: str) -> Handler:
    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        arguments.only(dtype=None, half_to_float=False)
        last = graph.last(_first(arguments), _first(arguments).axis(arguments["dim"]))
        return graph.unary(last, op)

    return handler


def _norm(op: str, weights: Sequence[str]) -> Handler:
    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        if len(arguments["normalized_shape"]) != 1:
            raise Refused("it normalizes over several axes; only the last one is taken")
        value = arguments.tensor("input")
        last = graph.last(value, len(value.axes) - 1)
        given = [arguments.get(name) for name in weights]
        while given and given[-1] is None:
            given.pop()
        if None in given:
            raise Refused("it has a bias and no weight")
        names = [graph.arranged(weight, weight.axes) for weight in given]
        eps = arguments["eps"]
        if eps is None:
            raise Refused("eps is None, which means another number for each dtype; give one")
        return replace(last, name=graph.add(op, last.name, *names, eps=eps))

    return handler


def _reduce(op: str) -> Handler:
    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        arguments.only(dtype=None)
        value = _first(arguments)
        dims = arguments.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(len(value.axes)))
        return _reduced(graph, value, op, [value.axis(d) for d in dims], keep=bool(arguments.get("keepdim")))

    return handler


def _max(graph: Growing, arguments: Arguments) -> tuple[Tracked, ...]:
    """The values; the indices are what nobody may ask for."""
    value = arguments.tensor("self")
    return (_reduced(graph, value, "max", [value.axis(arguments["dim"])], keep=arguments["keepdim"]),)


def _reduced(graph: Growing, value: Tracked, op: str, dims: Sequence[int], *, keep: bool) -> Tracked:
    reduced = [atom for d in dims for atom in value.axes[d]]
    axes = tuple(() if i in dims else group for i, group in enumerate(value.axes) if keep or i not in dims)
    if reduced and all(atom.leading == "position" for atom in reduced):
        positions = [atom for group in value.axes for atom in group if atom.leading == "position"]
        if op != "mean" or len(positions) != len(reduced) or value.level != "rows":
            raise Refused(f"it takes the {op} over positions; only the mean over all of them is taken")
        return Tracked(name=graph.add("pool_mean", value.name), level="batch", inner=value.inner, axes=axes)
    if any(atom.leading for atom in reduced):
        raise Refused("it reduces the batch, or positions together with features")
    result = value
    for d in dims:
        last = graph.last(result, d)
        inner = (*last.inner[:-1], ())
        result = replace(
            last,
            name=graph.add(op, last.name),
            inner=inner,
            axes=tuple(() if i == d else group for i, group in enumerate(last.axes)),
        )
    return replace(result, axes=axes)


def _logsumexp(graph: Growing, arguments: Arguments) -> Tracked:
    value = _first(arguments)
    dims = [value.axis(d) for d in arguments["dim"]]
    largest = _reduced(graph, value, "max", dims, keep=True)
    total = _reduced(graph, graph.unary(graph.joint("sub", value, largest), "exp"), "sum", dims, keep=True)
    result = graph.joint("add", graph.unary(total, "log"), largest)
    axes = tuple(group for i, group in enumerate(result.axes) if arguments["keepdim"] or i not in dims)
    return replace(result, axes=axes)


def _var(graph: Growing, arguments: Arguments) -> Tracked:
    value = _first(arguments)
    if arguments["correction"] not in (0, 0.0):
        raise Refused("its divisor is n - 1, for one n alone; var(..., correction=0) divides by any")
    dims = [value.axis(d) for d in (arguments["dim"] or range(len(value.axes)))]
    deviation = graph.joint("sub", value, _reduced(graph, value, "mean", dims, keep=True))
    return _reduced(graph, graph.unary(deviation, "square"), "mean", dims, keep=bool(arguments["keepdim"]))


def _addmm(graph: Growing, arguments: Arguments) -> Tracked:
    arguments.only(beta=1, alpha=1)
    product = _matmul(
        graph, Arguments({"a": arguments["mat1"], "b": arguments["mat2"]}, arguments.shapes, same_dtype=True)
    )
    return graph.joint("add", product, arguments.tensor("self"))


def _pool(graph: Growing, arguments: Arguments) -> Tracked:
    size = arguments["output_size"]
    size = [size] if isinstance(size, int) else list(size)
    if any(extent != 1 for extent in size):
        raise Refused(f"output_size is {size}, only 1 is taken")
    value = _first(arguments)
    rank = len(value.axes)
    return _reduced(graph, value, "mean", list(range(rank - len(size), rank)), keep=True)


def _dropout(graph: Growing, arguments: Arguments) -> Tracked:
    value, p = _operand(next(iter(arguments.values.values()))), arguments["p"]
    if p == 0:
        return value
    return graph.unary(value, "dropout", p=p)


def _native_dropout(graph: Growing, arguments: Arguments) -> tuple[Tracked, ...]:
    return (_dropout(graph, arguments),)


def _convolution(axes: int) -> Handler:
    def handler(graph: Growing, arguments: Arguments) -> Tracked:
        value, weight, bias = arguments.tensor("input"), arguments.tensor("weight"), arguments.get("bias")
        rank = len(value.axes)
        if rank != axes + 2:
            raise Refused("its input has no batch")
        kernel = [size_of(group) for group in weight.axes[2:]]
        padding = arguments["padding"]
        if isinstance(padding, str):
            padding = [k // 2 if padding == "same" else 0 for k in kernel]
        for name, expected in (("stride", 1), ("dilation", 1)):
            if any(given != expected for given in arguments[name]):
                raise Refused(f"{name} is {list(arguments[name])}, only {expected} is taken")
        padding = [padding[0]] * axes if len(padding) == 1 else list(padding)
        if any(k % 2 == 0 for k in kernel) or padding != [k // 2 for k in kernel]:
            raise Refused(f"kernel {kernel} with padding {padding}: odd kernels with half of them as padding are taken")
        if any(inner_of(group) for group in value.axes[2:]):
            raise Refused(
                "it runs over features; from_module(..., feature_axis=1) says that channels are the second axis"
            )
        channels, groups = size_of(value.axes[1]), arguments["groups"]
        if all(k == 1 for k in kernel) and groups == 1:
            return _product(graph, value, replace(weight, axes=weight.axes[:2]), bias, axis=1)
        last = graph.last(value, 1)
        if value.level != "rows":
            raise Refused("its input is pooled")
        names = [last.name]
        if groups == channels and size_of(weight.axes[0]) == channels:
            op = f"depthwise_conv{axes}d"
            new = value.axes[1]
            wanted = (weight.axes[0], *weight.axes[2:])
        elif groups == 1 and (axes == 1 or kernel == [3, 3]):
            op = "conv1d" if axes == 1 else "conv3x3"
            new = graph.fresh(weight.axes[0])
            wanted = weight.axes
        else:
            raise Refused(
                f"kernel {kernel} with groups={groups}: 3 x 3 or 1 x 1 with one group, or depthwise, is taken"
            )
        names.append(graph.arranged(weight, wanted))
        if bias is not None:
            names.append(graph.arranged(bias, bias.axes))
        return replace(
            last,
            name=graph.add(op, *names),
            inner=(new,),
            axes=tuple(new if i == 1 else group for i, group in enumerate(value.axes)),
        )

    return handler


def _attention(graph: Growing, arguments: Arguments) -> Tracked:
    arguments.only(attn_mask=None, dropout_p=0.0, enable_gqa=False)
    q, k, v = (arguments.tensor(name) for name in ("query", "key", "value"))
    width = size_of(q.axes[-1])
    scale = arguments["scale"]
    if scale is not None and not math.isclose(scale, width**-0.5):
        raise Refused(f"scale is {scale}, only 1 / sqrt(width of a head) is taken")
    names: list[str | float] = []
    heads: Group = ()
    for value in (q, k, v):
        *outer, positions, last = value.axes
        found = [atom for group in value.axes for atom in group if atom.leading == "position"]
        if value.level != "rows" or list(positions) != found or inner_of(last) != last:
            raise Refused("its last two axes are not all positions and features of them")
        heads = tuple(atom for group in outer for atom in inner_of(group))
        names.append(graph.arranged(value, ((*heads, *last),)))
    count = graph.text(heads) if heads else "1"
    name = graph.add("attention", *names, heads=count, causal=bool(arguments["is_causal"]))
    inner = ((*heads, *v.axes[-1]),)  # of v, the last one
    return Tracked(name=name, level="rows", inner=inner, axes=v.axes)


def _where(graph: Growing, arguments: Arguments) -> Tracked:
    return graph.joint("where", *(_operand(value) for value in list(arguments.values.values())[:3]))


HANDLERS: dict[str, Handler] = {
    **{name: _unary(name) for name in ("abs", "erf", "exp", "log", "neg", "reciprocal", "relu", "rsqrt", "sigmoid")},
    **{name: _unary(name) for name in ("silu", "sqrt", "square", "tanh")},
    "gelu": _unary("gelu", {"approximate": "approximate"}),
    "leaky_relu": _unary("leaky_relu", {"slope": "negative_slope"}),
    "elu": _elu,
    "celu": _celu,
    "log_sigmoid": _log_sigmoid,
    "full": _full("fill_value"),
    "full_like": _full("fill_value"),
    "zeros_like": _full(0.0),
    "ones_like": _full(1.0),
    "logsumexp": _logsumexp,
    "var.correction": _var,
    "addmm": _addmm,
    "softplus": _unary("softplus", beta=1, threshold=20),
    "clamp": _clamp("min", "max"),
    "clamp_min": _clamp("min", ""),
    "clamp_max": _clamp("", "max"),
    "hardtanh": _clamp("min_val", "max_val"),
    "relu6": _relu6,
    "mish": _mish,
    "pow": _pow,
    **{name: _binary(name) for name in ("add", "sub", "mul", "div", "maximum", "minimum")},
    **{name: _binary(name) for name in ("gt", "ge", "lt", "le", "eq")},
    "true_divide": _binary("div"),
    "rsub": _rsub,
    "where": _where,
    **dict.fromkeys(("contiguous", "clone", "alias", "positive", "lift_fresh_copy"), _same),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "detach": _detach,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten"), _view),
    "expand": _expand,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "t": _t,
    "numpy_T": _t,
    "select": _select,
    "slice": _slice,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split"), _split),
    "unbind": _unbind,
    "cat": _cat,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "softmax": _softmax("softmax"),
    "_softmax": _softmax("softmax"),
    "log_softmax": _softmax("log_softmax"),
    "_log_softmax": _softmax("log_softmax"),
    "layer_norm": _norm("layernorm", ("weight", "bias")),
    "rms_norm": _norm("rmsnorm", ("weight",)),
    "sum": _reduce("sum"),
    "mean": _reduce("mean"),
    "amax": _reduce("max"),
    "max.dim": _max,
    "max.other": _binary("maximum"),
    "min.other": _binary("minimum"),
    "adaptive_avg_pool1d": _pool,
    "adaptive_avg_pool2d": _pool,
    "dropout": _dropout,
    "native_dropout": _native_dropout,
    "conv1d": _convolution(1),
    "conv2d": _convolution(2),
    "scaled_dot_product_attention": _attention,
}
