"""The reference of a graph against formulas written out in numpy, and against torch's own modules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.graph import check, infer, layout_of
from esper_triton.testing.graphs import blueprints, respelled
from esper_triton.tezzeret.reference import reference

slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DIMS = {"d": 3, "r": 2, "d_in": 4}
LEADING = {"rows": (6,), "sequence": (2, 5), "image": (2, 4, 3)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def graph(text: str, parameters: dict[str, list[object]] | None = None, **dims: int) -> Blueprint:
    body = {
        "name": "a",
        "input": "h",
        "graph": text,
        "dims": {name: {} for name in dims},
        "parameters": {name: {"shape": [str(e) for e in shape]} for name, shape in (parameters or {}).items()},
    }
    return Blueprint.validated("blueprint", body)


def evaluated(blueprint: Blueprint, h: Tensor, dims: dict[str, int], **parameters: Tensor) -> np.ndarray:
    return reference(blueprint, {"h": h}, parameters, dims=dims).numpy()


def erf(a: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(a)


def softmax(a: np.ndarray) -> np.ndarray:
    return np.exp(a) / np.exp(a).sum(-1, keepdims=True)


def normalized(a: np.ndarray, eps: float) -> np.ndarray:
    return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + eps)


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "-h": lambda h: -h,
    "h + 2": lambda h: h + 2,
    "2 - h": lambda h: 2 - h,
    "scale(h, 2)": lambda h: h * 2,
    "bias(h, 2)": lambda h: h + 2,
    "identity(h)": lambda h: h,
    "1 / (h * h + 1)": lambda h: 1 / (h * h + 1),
    "maximum(h, 0.5)": lambda h: np.maximum(h, 0.5),
    "minimum(h, 0.5)": lambda h: np.minimum(h, 0.5),
    "abs(h)": np.abs,
    "exp(h)": np.exp,
    "log(abs(h))": lambda h: np.log(np.abs(h)),
    "sqrt(abs(h))": lambda h: np.sqrt(np.abs(h)),
    "rsqrt(abs(h))": lambda h: np.abs(h) ** -0.5,
    "square(h)": lambda h: h**2,
    "reciprocal(h)": lambda h: 1 / h,
    "relu(h)": lambda h: np.where(h > 0, h, 0),
    "silu(h)": lambda h: h / (1 + np.exp(-h)),
    "tanh(h)": np.tanh,
    "sigmoid(h)": lambda h: 1 / (1 + np.exp(-h)),
    "softplus(h)": lambda h: np.log1p(np.exp(h)),
    "erf(h)": erf,
    "gelu(h)": lambda h: h * (1 + erf(h / math.sqrt(2))) / 2,
    "gelu(h, approximate='tanh')": lambda h: h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
    "leaky_relu(h, 0.25)": lambda h: np.where(h > 0, h, 0.25 * h),
    "elu(h, 0.5)": lambda h: np.where(h > 0, h, 0.5 * (np.exp(h) - 1)),
    "clamp(h, min=-0.5, max=0.25)": lambda h: np.clip(h, -0.5, 0.25),
    "clamp(h, max=0.25)": lambda h: np.minimum(h, 0.25),
    "softmax(h)": softmax,
    "log_softmax(h)": lambda h: np.log(softmax(h)),
    "layernorm(h, eps=0.1)": lambda h: normalized(h, 0.1),
    "rmsnorm(h, eps=0.1)": lambda h: h / np.sqrt((h**2).mean(-1, keepdims=True) + 0.1),
    "h + sum(h)": lambda h: h + h.sum(-1, keepdims=True),
    "h + mean(h)": lambda h: h + h.mean(-1, keepdims=True),
    "h + max(h)": lambda h: h + h.max(-1, keepdims=True),
    "where(h > 0.25, h, -1)": lambda h: np.where(h > 0.25, h, -1),
    "where(h >= mean(h), 1, h)": lambda h: np.where(h >= h.mean(-1, keepdims=True), 1, h),
    "where(h < 0, 1, where(h <= max(h), h, 2))": lambda h: np.where(h < 0, 1, h),
    "where(h == max(h), 0, h)": lambda h: np.where(h == h.max(-1, keepdims=True), 0, h),
    "slice(concat(h, 2 * h), start=d - 1, stop=2 * d - 1)": lambda h: np.concatenate(
        [h[..., -1:], 2 * h[..., :-1]], -1
    ),
    "dropout(h, 0.5)": lambda h: h,
    "reshape(transpose(reshape(h, shape=[2, d // 2])), shape=[d])": lambda h: (
        h.reshape(6, 2, 4).swapaxes(1, 2).reshape(6, 8)
    ),
}


@pytest.mark.parametrize("text", FORMULAS)
def test_an_operation_is_its_formula(text: str):
    h = drawn(6, 8)
    found = evaluated(graph(f"k = {text}\n", d=8), h, {"d": 8})
    np.testing.assert_allclose(found, FORMULAS[text](h.numpy()), rtol=1e-12, atol=1e-14)


def test_products_with_parameters():
    h, w, b, t, n = drawn(6, 4), drawn(3, 4, seed=1), drawn(3, seed=2), drawn(3, 4, seed=3), drawn(4, seed=4)
    text = "z = linear(linear(h, w, b), t, transposed=True) + pointwise_conv(h, transpose(w) @ w)\n"
    text += "k = layernorm(z, n, -n) + h @ (transpose(t) @ w)\n"
    blueprint = graph(text, {"w": ["r", "d"], "b": ["r"], "t": ["r", "d"], "n": ["d"]}, d=4, r=3)
    found = evaluated(blueprint, h, {"d": 4, "r": 3}, w=w, b=b, t=t, n=n)
    h, w, b, t, n = (tensor.numpy() for tensor in (h, w, b, t, n))
    inner = (h @ w.T + b) @ t + h @ (w.T @ w).T
    np.testing.assert_allclose(found, normalized(inner, 1e-5) * n - n + h @ (t.T @ w), rtol=1e-11)


def test_products_of_activations_are_of_each_row():
    h = drawn(5, 6)
    blueprint = graph("q = reshape(h, shape=[2, d // 2])\nk = reshape(q @ (transpose(q) @ q), shape=[d])\n", d=6)
    rows = [q @ (q.T @ q) for q in h.numpy().reshape(5, 2, 3)]
    np.testing.assert_allclose(evaluated(blueprint, h, {"d": 6}), np.stack(rows).reshape(5, 6), rtol=1e-12)


def test_a_table_is_read_by_row():
    table = drawn(7, 4)
    h = torch.tensor([[3.0, 1, 1, 1], [0.0, 1, 1, 1], [6.0, 1, 1, 1]], dtype=torch.float64)
    blueprint = graph("k = gather(t, slice(h, stop=1))\n", {"t": ["n", "d"]}, d=4, n=7)
    np.testing.assert_array_equal(evaluated(blueprint, h, {"d": 4, "n": 7}, t=table), table.numpy()[[3, 0, 6]])


def test_pooling_is_over_the_positions_of_each_item():
    for shape in ((2, 5, 4), (2, 3, 2, 4)):
        h = drawn(*shape)
        blueprint = graph(
            "p = pool_mean(h)\nk = concat(slice(h * p, stop=1), slice(p - mean(p), start=1, stop=d))\n", d=4
        )
        layout = "sequence" if len(shape) == 3 else "image"
        found = reference(blueprint, {"h": h}, {}, dims={"d": 4}, layout=layout).numpy()  # type: ignore[arg-type]
        rows = h.numpy().reshape(2, -1, 4)
        pooled = np.broadcast_to(rows.mean(1, keepdims=True), rows.shape)
        expected = pooled - pooled.mean(-1, keepdims=True)
        expected[..., 0] = (rows * pooled)[..., 0]
        np.testing.assert_allclose(found, expected.reshape(shape), rtol=1e-12, atol=1e-14)


def test_squeeze_excite_is_what_its_formula_spells():
    shapes = {"w1": ["r", "d"], "b1": ["r"], "w2": ["d", "r"], "b2": ["d"]}
    gate = graph("k = channel_gate(h, w1, b1, w2, b2)\n", shapes, d=4, r=3)
    spelled = graph("k = h * sigmoid(linear(relu(linear(pool_mean(h), w1, b1)), w2, b2))\n", shapes, d=4, r=3)
    parameters = {"w1": drawn(3, 4), "b1": drawn(3), "w2": drawn(4, 3), "b2": drawn(4)}
    h = drawn(2, 5, 4)
    found = evaluated(gate, h, {"d": 4, "r": 3}, **parameters)
    np.testing.assert_allclose(found, evaluated(spelled, h, {"d": 4, "r": 3}, **parameters), rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_a_softmax_over_positions_for_each_head(causal: bool):
    h = drawn(2, 5, 6)
    text = f"k = attention(h, 2 * h, h + 1, heads=heads, causal={causal})\n"
    found = evaluated(graph(text, d=6, heads=2), h, {"d": 6, "heads": 2})
    expected = np.empty((2, 5, 6))
    for item in range(2):
        for head in range(2):
            q = h.numpy()[item, :, 3 * head : 3 * head + 3]
            scores = q @ (2 * q).T / math.sqrt(3)
            if causal:
                scores = np.where(np.tri(5, dtype=bool), scores, -np.inf)
            expected[item, :, 3 * head : 3 * head + 3] = softmax(scores) @ (q + 1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_convolutions_over_a_sequence_are_sums_of_shifted_rows():
    h, w, f, b = drawn(2, 6, 4), drawn(4, 3, seed=1), drawn(4, 4, 5, seed=2), drawn(4, seed=3)
    text = "k = conv1d(depthwise_conv1d(h, w, b), f, b)\n"
    found = evaluated(graph(text, {"w": ["d", 3], "f": ["d", "d", 5], "b": ["d"]}, d=4), h, {"d": 4}, w=w, f=f, b=b)
    h, w, f, b = (tensor.numpy() for tensor in (h, w, f, b))

    def taps(rows: np.ndarray, count: int) -> np.ndarray:
        """[batch, length, d, taps]"""
        padded = np.pad(rows, ((0, 0), (count // 2, count // 2), (0, 0)))
        return np.stack([padded[:, i : i + rows.shape[1]] for i in range(count)], -1)

    middle = (taps(h, 3) * w).sum(-1) + b
    np.testing.assert_allclose(found, np.einsum("blkt,nkt->bln", taps(middle, 5), f) + b, rtol=1e-11)


def test_convolutions_over_an_image_are_sums_of_shifted_pixels():
    h, w, f, b = drawn(2, 5, 4, 3), drawn(3, 3, 5, seed=1), drawn(3, 3, 3, 3, seed=2), drawn(3, seed=3)
    text = "k = conv3x3(depthwise_conv2d(h, w, b), f, b)\n"
    shapes = {"w": ["d", 3, 5], "f": ["d", "d", 3, 3], "b": ["d"]}
    found = evaluated(graph(text, shapes, d=3), h, {"d": 3}, w=w, f=f, b=b)
    h, w, f, b = (tensor.numpy() for tensor in (h, w, f, b))

    def taps(rows: np.ndarray, high: int, wide: int) -> np.ndarray:
        """[batch, height, width, d, high, wide]"""
        padded = np.pad(rows, ((0, 0), (high // 2,) * 2, (wide // 2,) * 2, (0, 0)))
        shifted = [[padded[:, i : i + rows.shape[1], j : j + rows.shape[2]] for j in range(wide)] for i in range(high)]
        return np.stack([np.stack(row, -1) for row in shifted], -2)

    middle = (taps(h, 3, 5) * w).sum((-1, -2)) + b
    np.testing.assert_allclose(found, np.einsum("bhwkij,nkij->bhwn", taps(middle, 3, 3), f) + b, rtol=1e-11)


def test_dropout_in_training_keeps_what_the_mask_keeps():
    blueprint = graph("u = dropout(h, 0.75)\nk = u + dropout(mean(h), 0.5)\n", d=4)
    h = drawn(3, 4)
    kept = {"u": drawn(3, 4, seed=1) > 0, "k_2": torch.tensor([[True], [False], [True]])}
    found = reference(blueprint, {"h": h}, {}, dims={"d": 4}, training=True, mask=kept)
    expected = torch.where(kept["u"], h * 4, 0) + torch.where(kept["k_2"], h.mean(-1, keepdim=True) * 2, 0)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {}}, "input 'h' is missing"),
        ({"inputs": {"h": drawn(3, 5)}}, r"input 'h' has shape \[3, 5\], expected \[rows, 4\]"),
        ({"inputs": {"h": drawn(2, 3, 4)}}, r"input 'h' has shape \[2, 3, 4\], expected \[rows, 4\]"),
        ({"inputs": {"h": drawn(3, 4), "x": drawn(3, 4)}}, "unknown input 'x'"),
        ({"parameters": {}}, "parameter 'w' is missing"),
        ({"parameters": {"w": drawn(3)}}, r"parameter 'w' has shape \[3\], expected \[4\]"),
        ({"parameters": {"w": drawn(4), "v": drawn(4)}}, "unknown parameter 'v'; did you mean|unknown parameter 'v'"),
        ({"dims": {"d": 4, "r": 1}}, "unknown dim 'r'"),
        ({"training": True}, "mask of dropout 'k' is missing"),
        ({"training": True, "mask": {"k": drawn(3, 4)}}, "expected .* of torch.bool"),
        ({"mask": {"kk": drawn(3, 4) > 0}}, "mask 'kk' is of no dropout; did you mean 'k'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, object], message: str):
    blueprint = graph("k = dropout(h * w, 0.5)\n", {"w": ["d"]}, d=4)
    request: dict[str, object] = {"inputs": {"h": drawn(3, 4)}, "parameters": {"w": drawn(4)}, "dims": {"d": 4}}
    request |= changes
    with pytest.raises(BlueprintError, match=message):
        reference(blueprint, request.pop("inputs"), request.pop("parameters"), **request)  # type: ignore[arg-type]


def test_a_layout_that_the_graph_does_not_take_is_refused():
    blueprint = graph("k = h + pool_mean(h)\n", d=4)
    with pytest.raises(BlueprintError, match="layout is 'rows', its graph takes sequence or image"):
        reference(blueprint, {"h": drawn(3, 4)}, {}, dims={"d": 4}, layout="rows")


@pytest.mark.parametrize("layout", ["rows", "sequence", "image"])
def test_no_rows_give_no_rows(layout: str):
    leading = {"rows": (0,), "sequence": (0, 5), "image": (0, 2, 3)}[layout]
    blueprint = graph("k = h + gelu(h)\n", d=4)
    found = reference(blueprint, {"h": drawn(*leading, 4)}, {}, dims={"d": 4}, layout=layout)  # type: ignore[arg-type]
    assert found.shape == (*leading, 4)


def values_of(blueprint: Blueprint, seed: int = 0) -> tuple[dict[str, int], dict[str, Tensor], dict[str, Tensor]]:
    """Small dims, inputs and parameters for a drawn graph; equal names get equal tensors."""
    dims = {name: DIMS[name] for name in blueprint.dims}
    types = infer(blueprint, dims)
    leading = LEADING[layout_of(blueprint.ops)]
    inputs = {name: drawn(*leading, *types[name].shape, seed=seed) for name in blueprint.inputs}
    parameters = {n: drawn(*types[n].shape, seed=seed + sum(map(ord, n))) for n in blueprint.parameters}
    return dims, inputs, parameters


def result_of(blueprint: Blueprint) -> Tensor:
    dims, inputs, parameters = values_of(blueprint)
    return reference(blueprint, inputs, parameters, dims=dims)


@slow
@given(st.data())
def test_equal_ids_compute_the_same(data: st.DataObject):
    blueprint = data.draw(blueprints())
    expected = result_of(blueprint)
    for other in (data.draw(respelled(blueprint)), blueprint.canonical()):
        assert other.id == blueprint.id
        torch.testing.assert_close(result_of(other), expected, rtol=1e-9, atol=1e-9)


def rewired(blueprint: Blueprint) -> Iterator[Blueprint]:
    """The graph with one input of one op taken from another value before it, where that still fits."""
    for place, op in enumerate(blueprint.ops):
        before = ["h", *(other.name for other in blueprint.ops[:place])]
        for position, name in itertools.product(range(len(op.inputs)), before):
            inputs = (*op.inputs[:position], name, *op.inputs[position + 1 :])
            ops = (*blueprint.ops[:place], op.model_copy(update={"inputs": inputs}), *blueprint.ops[place + 1 :])
            try:
                other = Blueprint.model_validate(blueprint.model_dump(exclude={"affine"}) | {"ops": ops})
            except ValueError:  # shapes no longer fit, or something is unused now
                continue
            if layout_of(ops) == layout_of(blueprint.ops) and not check(other, {n: DIMS[n] for n in other.dims}):
                yield other


@settings(slow, max_examples=25)
@given(blueprints())
def test_what_computes_something_else_has_another_id(blueprint: Blueprint):
    expected = result_of(blueprint)
    for other in itertools.islice(rewired(blueprint), 30):
        if not torch.allclose(result_of(other), expected, rtol=1e-6, atol=1e-9, equal_nan=True):
            assert other.id != blueprint.id


@slow
@given(st.data())
def test_an_affine_graph_is_affine_and_k_keeps_the_shape_of_h(data: st.DataObject):
    blueprint = data.draw(blueprints(layouts=("rows",)))
    dims, inputs, parameters = values_of(blueprint)
    k = reference(blueprint, inputs, parameters, dims=dims)
    assert k.shape == inputs["h"].shape
    if blueprint.affine:
        other = {name: drawn(*tensor.shape, seed=9) for name, tensor in inputs.items()}
        middle = {name: 0.25 * inputs[name] + 0.75 * other[name] for name in inputs}
        ends = 0.25 * k + 0.75 * reference(blueprint, other, parameters, dims=dims)
        torch.testing.assert_close(reference(blueprint, middle, parameters, dims=dims), ends, rtol=1e-9, atol=1e-9)


@slow
@given(st.data())
def test_gradients_agree_with_finite_differences(data: st.DataObject):
    blueprint = data.draw(blueprints())
    dims, inputs, parameters = values_of(blueprint)
    names = [*inputs, *parameters]
    point = [tensor.requires_grad_() for tensor in (*inputs.values(), *parameters.values())]
    direction = [drawn(*tensor.shape, seed=3) for tensor in point]

    def along(step: float) -> Tensor:
        moved = dict(zip(names, (p + step * v for p, v in zip(point, direction, strict=True)), strict=True))
        k = reference(blueprint, {n: moved[n] for n in inputs}, {n: moved[n] for n in parameters}, dims=dims)
        return (k * drawn(*k.shape, seed=4)).sum()

    (derivative,) = [sum((g * v).sum() for g, v in zip(torch.autograd.grad(along(0.0), point), direction, strict=True))]
    with torch.no_grad():
        coarse, fine = ((along(step) - along(-step)) / (2 * step) for step in (1e-5, 5e-6))
    scale = 1 + abs(derivative.item())
    assume(abs(coarse.item() - fine.item()) < 1e-6 * scale)  # else a kink, of relu or max, lies between
    assert abs(fine.item() - derivative.item()) < 1e-5 * scale


def test_attention_is_what_torchs_own_module_computes():
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).eval()
    text = """
q = linear(h, slice_q, b_q)
k_ = linear(h, w_k, b_k)
v = linear(h, w_v, b_v)
k = linear(attention(q, k_, v, heads=2), w_o, b_o)
"""
    shapes: dict[str, list[object]] = {"slice_q": ["d", "d"], "w_k": ["d", "d"], "w_v": ["d", "d"], "w_o": ["d", "d"]}
    shapes |= {name: ["d"] for name in ("b_q", "b_k", "b_v", "b_o")}
    w, b = module.in_proj_weight.detach(), drawn(24)
    with torch.no_grad():
        module.in_proj_bias.copy_(b)
    parameters = dict(zip(("slice_q", "w_k", "w_v"), w.chunk(3), strict=True))
    parameters |= dict(zip(("b_q", "b_k", "b_v"), b.chunk(3), strict=True))
    parameters |= {"w_o": module.out_proj.weight.detach(), "b_o": module.out_proj.bias.detach()}
    h = drawn(3, 5, 8)
    found = reference(graph(text, shapes, d=8), {"h": h}, parameters, dims={"d": 8})
    torch.testing.assert_close(found, module(h, h, h)[0].detach(), rtol=1e-10, atol=1e-12)
