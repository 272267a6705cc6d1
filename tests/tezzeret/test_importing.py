"""A blueprint that was taken from a module computes what the module computes, gradients too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.graph import layout_of
from esper_triton.tezzeret.importing import module_parameters
from esper_triton.tezzeret.reference import reference


class Bottleneck(nn.Module):
    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(F.gelu(self.down(h)))


class SwiGLU(nn.Module):
    def __init__(self, d: int, r: int, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.w1 = nn.Linear(d, 2 * r if packed else r, bias=False)
        self.w3 = nn.Linear(d, r, bias=False)
        self.w2 = nn.Linear(r, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w1(x).chunk(2, dim=-1) if self.packed else (self.w1(x), self.w3(x))
        return self.w2(F.silu(gate) * value)


class SqueezeExcite(nn.Module):
    """Of an image, as torchvision has it, or of a sequence."""

    def __init__(self, d: int, r: int, *, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.fc1 = nn.Linear(d, r) if linear else nn.Conv2d(d, r, 1)
        self.fc2 = nn.Linear(r, d) if linear else nn.Conv2d(r, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3)) if self.linear else F.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))
        return x * (gate[:, :, None, None] if self.linear else gate)


class DepthwiseBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(d, d, 5, padding=2, groups=d)
        self.norm = nn.LayerNorm(d)
        self.pointwise = nn.Conv2d(d, 2 * d, 1)
        self.back = nn.Conv2d(2 * d, d, 3, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.back(F.gelu(self.pointwise(z), approximate="tanh"))


class Attention(nn.Module):
    """As nanoGPT writes it, packed and causal."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, d // self.heads).transpose(1, 2) for t in self.qkv(x).split(d, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, d))


class FeedForward(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.fc = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * d, d))
        self.scale = nn.Parameter(torch.full((d,), 0.5))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.scale * self.fc(self.norm(h))


class Mixer(nn.Module):
    """Two inputs, and odds and ends."""

    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d, bias=False)
        self.gain = nn.Parameter(torch.randn(d))
        self.register_buffer("two", torch.tensor(2.0))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z = self.proj(x).clamp(-1, 1)
        z = torch.where(z > 0, z, z * z / self.two)
        z -= h.mean(-1, keepdim=True).tanh()
        return torch.cat([z, 1 - h], dim=-1)[..., : h.shape[-1]] @ (self.gain[:, None] * self.gain) + 3 * h.pow(2)


def agree(module: nn.Module, *examples: Tensor, **options: Any) -> Blueprint:
    """Takes the module, and compares k and all gradients in float64, on inputs of another batch."""
    blueprint = Blueprint.from_module(module, examples, **options)
    module = module.double().eval()
    axis = options.get("feature_axis") or (1 if examples[0].dim() == 4 else -1)
    different = list({id(e): e for e in examples}.values())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():  # none is at a value where gradients vanish
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    inputs = [
        torch.randn(3, *e.shape[1:], dtype=torch.float64, generator=generator, requires_grad=True) for e in different
    ]
    by_id = dict(zip(map(id, different), inputs, strict=True))
    expected = module(*(by_id[id(e)] for e in examples), **_call_options(module, options))
    expected = expected[0] if isinstance(expected, tuple) else expected
    names = blueprint.inputs
    dims = {name: dim.default for name, dim in blueprint.dims.items()}
    layout = {2: "rows", 3: "sequence", 4: "image"}[examples[0].dim()]
    assert layout == layout_of(blueprint.ops) or layout_of(blueprint.ops) == "rows" or layout == "image"
    parameters = module_parameters(module, blueprint)
    moved = {name: value.movedim(axis, -1) for name, value in zip(names, inputs, strict=True)}
    found = reference(blueprint, moved, parameters, dims=dims, layout=layout).movedim(-1, axis)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    wrt = [*inputs, *module.parameters()]
    ours = torch.autograd.grad((found * weight).sum(), wrt, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), wrt, allow_unused=True)
    for mine, own in zip(ours, theirs, strict=True):
        assert (mine is None) == (own is None)
        if own is not None:
            torch.testing.assert_close(mine, own, rtol=1e-8, atol=1e-9)
    return blueprint


def _call_options(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    return {"need_weights": False} if isinstance(module, nn.MultiheadAttention) else options.get("kwargs", {})


def ops_of(blueprint: Blueprint) -> list[str]:
    return [op.op for op in blueprint.canonical().ops]


def test_a_linear_layer():
    blueprint = agree(nn.Linear(6, 4), torch.ones(2, 6))
    assert ops_of(blueprint) == ["linear"]
    assert blueprint.parameters["weight"].shape == ("d", "d_in")
    assert blueprint.parameters["weight"].init == "kaiming_uniform"
    assert blueprint.parameters["bias"].init == "kaiming_uniform:d_in"
    assert (blueprint.name, blueprint.equivalent_to, blueprint.affine) == ("linear", "torch.nn.Linear", True)
    assert {name: dim.default for name, dim in blueprint.dims.items()} == {"d": 4, "d_in": 6}


def test_a_bottleneck_is_the_design_that_is_written_by_hand():
    blueprint = agree(Bottleneck(8, 3), torch.ones(2, 8), input="h", name="bottleneck", description="taken")
    by_hand = Blueprint.from_text("""
name = "by_hand"
input = "h"
graph = "k = h + linear(gelu(linear(h, down_weight, down_bias)), up_weight, up_bias)"
[dims]
d = {}
d_down = {}
[parameters]
down_weight = { shape = ["d_down", "d"], init = "kaiming_uniform" }
down_bias = { shape = ["d_down"], init = "kaiming_uniform:d" }
up_weight = { shape = ["d", "d_down"], init = "kaiming_uniform" }
up_bias = { shape = ["d"], init = "kaiming_uniform:d_down" }
""")
    assert blueprint.id == by_hand.id
    assert (blueprint.name, blueprint.description) == ("bottleneck", "taken")


def test_names_of_a_sequential_have_a_letter_in_front():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Softmax(dim=-1), nn.Linear(7, 6))
    blueprint = agree(model, torch.ones(2, 3, 6))
    assert sorted(blueprint.parameters) == [
        "p_0_bias",
        "p_0_weight",
        "p_2_bias",
        "p_2_weight",
        "p_4_bias",
        "p_4_weight",
    ]
    assert set(blueprint.dims) == {"d", "d_p_0", "d_p_2"}


def test_names_that_are_reserved_or_too_long_or_the_same_get_others():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.randn(6))
            self.Norm_weight = nn.Parameter(torch.randn(6))
            self.norm_weight = nn.Parameter(torch.randn(6))
            self.Not = nn.Parameter(torch.randn(6))
            self.register_parameter("w" * 80, nn.Parameter(torch.randn(6)))

        def forward(self, h: Tensor) -> Tensor:
            return h * self.alpha + self.Norm_weight * self.norm_weight + self.Not * getattr(self, "w" * 80)

    names = agree(Named(), torch.ones(2, 6), input="h").parameters
    assert list(names) == ["p_alpha", "norm_weight", "norm_weight_2", "p_not", "w" * 58]


@pytest.mark.parametrize("packed", [False, True])
def test_swiglu(packed: bool):
    module = SwiGLU(6, 5, packed=packed)
    if packed:
        del module.w3
    blueprint = agree(module, torch.ones(2, 6), input="h")
    assert ("slice" in ops_of(blueprint)) is packed
    assert blueprint.dims["d"].max == 65536


@pytest.mark.parametrize("linear", [False, True])
def test_squeeze_excite_is_a_channel_gate(linear: bool):
    blueprint = agree(SqueezeExcite(6, 3, linear=linear), torch.ones(2, 6, 4, 5), input="h")
    shapes = {"fc1_weight": ["r", "d"], "fc1_bias": ["r"], "fc2_weight": ["d", "r"], "fc2_bias": ["d"]}
    body = {
        "name": "a",
        "input": "h",
        "dims": {"d": {}, "r": {}},
        "graph": "k = channel_gate(h, fc1_weight, fc1_bias, fc2_weight, fc2_bias)",
        "parameters": {name: {"shape": shape} for name, shape in shapes.items()},
    }
    gate = Blueprint.validated("a", body)
    assert blueprint.canonical().ops == gate.canonical().ops


def test_a_depthwise_block_over_an_image():
    blueprint = agree(DepthwiseBlock(6), torch.ones(2, 6, 4, 5), input="h")
    assert ops_of(blueprint) == ["depthwise_conv2d", "layernorm", "linear", "gelu", "conv3x3", "add"]
    assert blueprint.parameters["depthwise_weight"].shape == ("d", "5", "5")
    assert blueprint.parameters["depthwise_bias"].init == "kaiming_uniform:25"
    assert blueprint.parameters["pointwise_weight"].shape == ("d_pointwise", "d")


def test_convolutions_over_a_sequence():
    block = nn.Sequential(
        nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.SiLU(), nn.Conv1d(6, 8, 1), nn.Conv1d(8, 6, 5, padding=2)
    )
    blueprint = agree(block, torch.ones(2, 6, 7), feature_axis=1)
    assert ops_of(blueprint) == ["depthwise_conv1d", "silu", "linear", "conv1d"]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_torchs_multi_head_attention(heads: int):
    x = torch.ones(2, 5, 8)
    blueprint = agree(nn.MultiheadAttention(8, heads, batch_first=True).eval(), x, x, x, input="h")
    assert "attention" in ops_of(blueprint)
    assert blueprint.parameters["in_proj_weight"].shape == ("3 * d", "d")
    assert blueprint.parameters["in_proj_weight"].init == "xavier_uniform"
    assert blueprint.parameters["in_proj_bias"].init == "zeros"


def test_causal_attention_as_people_write_it():
    blueprint = agree(Attention(12, 3), torch.ones(2, 5, 12), input="h")
    (attention,) = (op for op in blueprint.ops if op.op == "attention")
    assert attention.attrs == {"heads": "3", "causal": True}


def test_a_feed_forward_block_with_its_dropout():
    module = FeedForward(6)
    blueprint = agree(module, torch.ones(2, 3, 6), input="h")
    assert [op.attrs["p"] for op in blueprint.ops if op.op == "dropout"] == [0.1]
    assert blueprint.parameters["scale"].init == "constant:0.5"
    assert blueprint.parameters["norm_weight"].init == "ones"
    assert module.fc[2].training is False


def test_two_inputs_and_odds_and_ends():
    blueprint = agree(Mixer(5, 4), torch.ones(2, 5), torch.ones(2, 4), input="xh")
    assert blueprint.inputs == ("x", "h")


def test_a_tensor_that_has_two_names_is_one_parameter():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert sorted(agree(model, torch.ones(2, 6)).parameters) == ["p_0_bias", "p_0_weight", "p_2_bias"]


def test_extents_that_fit_no_general_dims_are_fixed():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 7))

        def forward(self, h: Tensor) -> Tensor:
            return h[..., 1:6] @ self.w + h

    blueprint = agree(Fixed(), torch.ones(2, 7), input="h")
    assert {name: (dim.min, dim.max) for name, dim in blueprint.dims.items()}["d"] == (7, 7)


class Written(nn.Module):
    """A function of the input and of parameters."""

    def __init__(self, function: Callable[..., Tensor], **parameters: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


def _packed_by_head(m: Any, h: Tensor) -> Tensor:
    parts = F.linear(h, m.w).unflatten(-1, (2, 3, 3))
    q, k, v = (parts[..., i, :].transpose(1, 2) for i in range(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


ROWS, SEQUENCE, IMAGE = (4, 6), (2, 5, 6), (2, 6, 4, 3)
WRITTEN: dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]], Callable[..., Tensor]]] = {
    "flat rows": (SEQUENCE, {"w": (6, 6)}, lambda m, h: F.linear(h.view(-1, 6), m.w).view(h.shape)),
    "a norm of each head": (
        SEQUENCE,
        {"w": (3,), "b": (3,)},
        lambda m, h: F.layer_norm(h.unflatten(-1, (2, 3)), (3,), m.w, m.b).flatten(-2),
    ),
    "a shuffle of features": (SEQUENCE, {}, lambda m, h: h.unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2).tanh()),
    "heads against their mean": (
        ROWS,
        {},
        lambda m, h: (h.unflatten(-1, (2, 3)) + h.unflatten(-1, (2, 3)).mean(-2, keepdim=True)).flatten(-2),
    ),
    "a softmax over heads": (ROWS, {}, lambda m, h: h.unflatten(-1, (2, 3)).softmax(-2).flatten(-2)),
    "heads in reverse": (ROWS, {}, lambda m, h: torch.cat(h.unflatten(-1, (3, 2)).unbind(-2)[::-1], -1)),
    "halves interleaved": (ROWS, {}, lambda m, h: torch.stack(h.chunk(2, -1), -1).flatten(-2)),
    "rotated halves": (ROWS, {"w": (6,)}, lambda m, h: torch.cat([-h[..., 3:], h[..., :3]], -1) * m.w + h),
    "an outer product": (ROWS, {}, lambda m, h: (h.unsqueeze(-1) @ h.unsqueeze(-2)).mean(-2)),
    "low rank": (SEQUENCE, {"a": (3, 6), "b": (6, 3)}, lambda m, h: h + 0.5 * (h @ m.a.T @ m.b.T)),
    "a product of weights": (SEQUENCE, {"a": (3, 6), "b": (6, 3)}, lambda m, h: F.linear(h, m.b @ m.a)),
    "einsum": (SEQUENCE, {"w": (6, 6)}, lambda m, h: torch.einsum("blk,nk->bln", h, m.w)),
    "addmm": (ROWS, {"w": (6, 6), "b": (6,)}, lambda m, h: torch.addmm(m.b, h, m.w)),
    "variance": (ROWS, {}, lambda m, h: h / (h.var(-1, correction=0, keepdim=True) + 1)),
    "logsumexp": (ROWS, {}, lambda m, h: h - h.logsumexp(-1, keepdim=True)),
    "the largest": (ROWS, {}, lambda m, h: h * h.max(-1, keepdim=True).values - torch.max(h, -h)),
    "constants": (ROWS, {}, lambda m, h: h + torch.full((6,), 2.0) * torch.ones_like(h) + torch.tensor(1.5)),
    "parameters of one element": (ROWS, {"a": (), "b": (1, 1)}, lambda m, h: h * m.a + m.b),
    "a gate of parameters": (ROWS, {"g": (6,)}, lambda m, h: h * torch.sigmoid(m.g) + F.softmax(m.g, 0)),
    "in place": (ROWS, {}, lambda m, h: (h + 0).mul_(2).add_(h).relu_()),
    "one hidden unit": (ROWS, {"w": (1, 6), "v": (6, 1)}, lambda m, h: F.linear(F.linear(h, m.w).sigmoid(), m.v)),
    "one feature": ((4, 1), {"w": (1,)}, lambda m, h: h * m.w + h.tanh()),
    "activations": (
        ROWS,
        {"a": (6,)},
        lambda m, h: F.selu(h) + F.celu(h, 0.5) + F.logsigmoid(h) + F.prelu(h, m.a) + F.relu6(h) + F.tanhshrink(h),
    ),
    "pooled and back": (
        SEQUENCE,
        {"w": (6, 6)},
        lambda m, h: h * F.linear(h.mean(1), m.w).sigmoid().unsqueeze(1).expand_as(h),
    ),
    "response normalization": (
        IMAGE,
        {"g": (6, 1, 1)},
        lambda m, h: h + h * m.g * (n := h.square().mean((2, 3), keepdim=True)) / (n.mean(1, keepdim=True) + 1),
    ),
    "a kernel of one's own": (
        IMAGE,
        {"w": (6, 6, 3, 3)},
        lambda m, h: F.conv2d(F.layer_norm(h.movedim(1, -1), (6,)).movedim(-1, 1), m.w, padding=1),
    ),
    "attention over an image": (
        IMAGE,
        {},
        lambda m, h: (
            F.scaled_dot_product_attention(*[h.flatten(2).transpose(1, 2)] * 3).transpose(1, 2).reshape(h.shape)
        ),
    ),
    "attention of other widths": (
        SEQUENCE,
        {"q": (4, 6), "k": (4, 6)},
        lambda m, h: F.scaled_dot_product_attention(F.linear(h, m.q), F.linear(h, m.k), h),
    ),
    "attention packed by head": (SEQUENCE, {"w": (18, 6)}, _packed_by_head),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_people_write(case: str):
    shape, parameters, function = WRITTEN[case]
    torch.manual_seed(0)
    blueprint = agree(Written(function, **parameters), torch.ones(shape), input="h")
    if "feature" not in case:
        assert blueprint.dims["d"].min == 1, "the width is not general"


class LlamaNorm(nn.Module):
    """RMS norm as it is written out."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(x.dtype)
        return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def test_a_cast_to_the_dtype_that_there_is_is_nothing():
    blueprint = agree(LlamaNorm(6), torch.ones(2, 3, 6), input="h")
    assert ops_of(blueprint) == ["square", "mean", "add", "rsqrt", "mul", "mul"]


class Foreign(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Buffer(torch.arange(6.0))

    def forward(self, h: Tensor) -> Tensor:
        if self.kind == "unknown":
            return torch.fft.fft(h).real  # the line
        if self.kind == "positions":
            return h.softmax(dim=1)  # the line
        if self.kind == "scores":
            return (h @ h.transpose(1, 2)).softmax(-1) @ h  # the line
        if self.kind == "buffer":
            return h * self.table  # the line
        if self.kind == "batch":
            return h - h.mean()  # the line
        if self.kind == "detach":
            return h + h.detach()  # the line
        if self.kind == "dtype":
            return h.double().float()  # the line
        if self.kind == "control":
            return h if h.sum() > 0 else -h
        if self.kind == "several":
            return h, h + 1
        if self.kind == "pooled":
            return h.mean(dim=1)
        return h[..., :4]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "unknown",
            r"no operation of a graph says aten\._fft.* at .*test_importing\.py:\d+ `.*# the line`.*Known are: abs",
        ),
        ("positions", r"softmax.* is refused: it works along the batch or its positions; at .*test_importing\.py:\d+ "),
        ("scores", r"it multiplies over positions; use F\.scaled_dot_product_attention .*; at .*# the line"),
        ("buffer", r"buffer 'table' is no single number.* at .*# the line"),
        ("batch", r"it reduces the batch, or positions together with features; at .*# the line"),
        ("detach", r"it stops gradients.*; at .*# the line"),
        ("dtype", r"it changes the dtype.*; at .*# the line"),
        ("control", "torch.export cannot trace it"),
        ("several", "returns 2 tensors, expected one"),
        ("pooled", "does not lie as its input does|gives 0 features"),
        ("narrow", "gives 4 features for h of 6; k has the width of h"),
    ],
)
def test_what_a_graph_cannot_say_is_refused_with_the_modules_own_line(kind: str, message: str):
    with pytest.raises(BlueprintError) as caught:
        Blueprint.from_module(Foreign(kind), torch.ones(2, 3, 6), input="h")
    assert str(caught.value).startswith("module Foreign: ")
    assert re.search(message, str(caught.value)), str(caught.value)


def test_example_inputs_that_do_not_fit_are_refused():
    with pytest.raises(BlueprintError, match="1 different example inputs for input='xh', expected 2"):
        Blueprint.from_module(nn.Linear(3, 3), torch.ones(2, 3), input="xh")
    with pytest.raises(BlueprintError, match="expected one rank, of 2, 3 or 4"):
        Blueprint.from_module(nn.Linear(3, 3), torch.ones(3))
    with pytest.raises(BlueprintError, match="feature_axis is 2, expected 1 to 1"):
        Blueprint.from_module(nn.Linear(3, 3), torch.ones(2, 3), feature_axis=2)


@st.composite
def modules(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A chain of layers from 6 features to 6."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers: list[nn.Module] = []
    width = 6
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from("linear act norm softmax swiglu bottleneck attention dropout".split()))
        match kind:
            case "linear":
                new = draw(st.sampled_from([1, 5, 6, 12]))
                layers.append(nn.Linear(width, new, bias=draw(st.booleans())))
                width = new
            case "act":
                acts = [nn.ReLU(), nn.GELU(), nn.ELU(0.5), nn.LeakyReLU(0.2), nn.Softplus(), nn.Hardswish(), nn.Mish()]
                layers.append(draw(st.sampled_from([*acts, nn.SiLU(), nn.Hardtanh(), nn.LogSigmoid(), nn.Softsign()])))
            case "norm":
                layers.append(draw(st.sampled_from([nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-5)])))
            case "softmax":
                layers.append(draw(st.sampled_from([nn.Softmax(-1), nn.LogSoftmax(-1)])))
            case "swiglu":
                module = SwiGLU(width, 5, packed=True)
                del module.w3
                layers.append(module)
            case "bottleneck":
                layers.append(Bottleneck(width, 4))
            case "attention":
                if width % 3 == 0:
                    layers.append(Attention(width, 3))
            case "dropout":
                layers.append(nn.Dropout(0.2))
    layers.append(nn.Linear(width, 6))
    return nn.Sequential(*layers), 6


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(modules())
def test_any_chain_of_layers(drawn: tuple[nn.Module, int]):
    module, width = drawn
    agree(module, torch.ones(2, 4, width), input="h")
