"""Operations where floating point ends: infinities, NaN, zeros, overflow, ties, and what dropout draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emitting import load, source_of
from operation_cases import Case
from torch import Tensor

from esper_triton.tezzeret.reference import reference
from esper_triton.urabrask.philox import uniform

NAN, INF = float("nan"), float("inf")
# float32's smallest, 1e-45 and 1e-38, largest, 1e38, and where e^a leaves its range, 88.7 and -103.9.
# fmt: off
VALUES = torch.tensor([
    NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-20, -1e-20, 1e20, 1e38, 88.0, 89.0, -80.0, -104.0, 1e4, -1e4,
    20.5, -20.5, 0.5, -0.5, 5.0, -5.0, 100.0, -100.0, 1e-4, 0.75, -0.75,
])
# fmt: on
Found = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., Found]:
    """`found(text, h=..., x=..., b=...)`: k and the gradients of its sum by the emitted kernels, each with what torch
    computes in float64, rounded to float32."""

    def run(text: str, probe: Tensor | None = None, **given: Tensor) -> Found:
        shapes = {n: tuple("d" for _ in value.shape) for n, value in given.items() if n not in ("h", "x")}
        blueprint = Case(text, shapes).blueprint
        dims = {"d": given["h"].shape[1]}
        module = load(source_of(blueprint, dims), tmp_path)
        grad_out = torch.ones_like(given["h"]) if probe is None else probe.expand_as(given["h"]).contiguous()
        call = {**given, "alpha": torch.tensor([1.0])}
        out, saved = module.forward(**call)
        grads = module.backward(grad_out=grad_out, saved=saved, **call)
        leaves = {n: value.double().requires_grad_() for n, value in given.items() if n in (*blueprint.inputs, *shapes)}
        k = reference(blueprint, {n: leaves[n] for n in blueprint.inputs}, {n: leaves[n] for n in shapes}, dims=dims)
        exact = torch.autograd.grad(k, list(leaves.values()), grad_out.double(), materialize_grads=True)
        return {"k": (out, k.detach().float())} | {
            f"grad_{n}": (grads[n], value.float()) for n, value in zip(leaves, exact, strict=True)
        }

    return run


def same(results: Found, rtol: float = 4e-6, least: float = 2.0**-126) -> None:
    """Numbers to a few roundings of float32, below its smallest normal one any; NaN and infinities where they are."""
    for name, (value, exact) in results.items():
        assert not (value.isnan() ^ exact.isnan()).any(), name
        torch.testing.assert_close(value, exact, rtol=rtol, atol=least, equal_nan=True)


UNARY = (
    "neg(h)|abs(h)|exp(h)|log(h)|sqrt(h)|rsqrt(h)|square(h)|reciprocal(h)|relu(h)|silu(h)|tanh(h)|sigmoid(h)|softplus(h)|"
    "erf(h)|gelu(h)|gelu(h, approximate='tanh')|leaky_relu(h, slope=0.2)|elu(h, alpha=0.7)|clamp(h, min=-0.6, max=0.6)|"
    "clamp(h, min=-0.6)|where(gt(h, 0.5), h, 2.0)|where(ge(h, 0.5), h, 2.0)|where(lt(h, 0.5), h, 2.0)|"
    "where(le(h, 0.5), h, 2.0)|where(eq(h, 0.5), h, 2.0)|maximum(h, 0.6)|minimum(h, 0.6)"
).split("|")
# 1 - tanh^2 and 1 + erf are differences of numbers about 1: far out all that is left of them is a few roundings of 1.
SATURATING = ("tanh(h)", "sigmoid(h)", "gelu(h)", "gelu(h, approximate='tanh')")
# Where a gradient is compared. What it is at NaN, and elu's at 0, has tests of its own; the cube in the approximation
# of gelu overflows, in torch's float32 too.
WITH_GRADIENT = dict.fromkeys(("relu(h)", "maximum(h, 0.6)", "minimum(h, 0.6)"), ~VALUES.isnan()) | {
    "elu(h, alpha=0.7)": VALUES != 0,
    "gelu(h, approximate='tanh')": ~(VALUES.abs() > 1e12),
}


@pytest.mark.parametrize("text", UNARY)
def test_one_argument(found: Callable[..., Found], text: str):
    results = found(text, h=VALUES.repeat(3, 1))
    least = 4 * 2.0**-23 if text in SATURATING else 2.0**-126
    same({"k": results["k"]}, least=least)
    compared = WITH_GRADIENT.get(text, torch.ones_like(VALUES, dtype=torch.bool))
    results = {name: (value[:, compared], exact[:, compared]) for name, (value, exact) in results.items()}
    same(results, least=least)


@pytest.mark.parametrize("op", "add sub mul div maximum minimum gt ge lt le eq".split())
def test_two_arguments(found: Callable[..., Found], op: str):
    # A quotient by a number below the smallest normal one is 1 / b first, which is infinite.
    values = VALUES[[0, 1, 2, 3, 4, 7, 8, 9, 10, 12, 15, 17]]
    h, x = (side.contiguous() for side in torch.meshgrid(values, values, indexing="ij"))
    results = found(f"where({op}(h, x), h, x)" if len(op) == 2 else f"{op}(h, x)", h=h, x=x)
    same({"k": results["k"]})
    if op in ("maximum", "minimum"):  # of their gradients at NaN another test says more
        known = ~(h.isnan() | x.isnan())
        results = {name: (value[known], exact[known]) for name, (value, exact) in results.items()}
    same(results)


ROWS = torch.tensor(
    [
        [1e4, -1e4, 0.0, 1.0],
        [1e4, 1e4, -1e4, 0.0],
        [-1e4, -1e4, -1e4, -1e4],
        [NAN, 0.0, 1.0, 2.0],
        [5.0, 4.0, 3.0, NAN],
        [INF, 0.0, 1.0, 2.0],
        [-INF, 0.0, 1.0, 2.0],
        [-INF, -INF, -INF, -INF],
        [0.0, 0.0, 0.0, -0.0],
        [1e-30, 2e-30, 0.0, 0.0],
        [88.0, 89.0, 90.0, 3.0],
        [1e18, 2e18, 3.0, 1.0],
    ]
)


@pytest.mark.parametrize(
    "text", ["softmax(h)", "log_softmax(h)", "layernorm(h)", "rmsnorm(h)", "h + sum(h)", "h + mean(h)"]
)
def test_sums_along_a_row(found: Callable[..., Found], text: str):
    # Sums of four terms, in which up to two digits cancel.
    same(found(text, torch.arange(1.0, 5.0), h=ROWS), rtol=1e-4, least=1e-5)


@pytest.mark.parametrize("width", [4, 5])
def test_the_largest_of_a_row_without_nan(found: Callable[..., Found], width: int):
    known = ROWS[~ROWS.isnan().any(dim=1)]
    h = known if width == 4 else torch.cat([torch.full((len(known), 1), -INF), known], dim=1)
    same(found("x * max(h)", torch.arange(1.0, width + 1), h=h, x=torch.ones_like(h)))


def test_the_largest_of_a_row_with_nan_is_nan(found: Callable[..., Found]):
    h = torch.tensor([[NAN, 0.0, 1.0, 2.0], [5.0, 4.0, 3.0, NAN]])
    results = found("x * max(h)", h=h, x=torch.ones_like(h))
    same({"k": results["k"]})


@pytest.mark.parametrize("text", ["relu(h)", "maximum(h, 0.5)", "minimum(h, 0.5)"])
def test_the_gradient_at_nan(found: Callable[..., Found], text: str):
    same(found(text, h=torch.tensor([[NAN, 1.0]])))


@pytest.mark.parametrize(
    ("text", "value"), [("clamp(h, min=-0.5, max=0.5)", 0.5), ("clamp(h, min=-0.5)", -0.5), ("elu(h, alpha=0.7)", 0.0)]
)
def test_the_gradient_at_a_limit_is_that_of_the_inside(found: Callable[..., Found], text: str, value: float):
    same(found(text, h=torch.tensor([[value, 1.0]])))


def test_a_parameter_that_is_only_compared_with_has_the_gradient_0(found: Callable[..., Found]):
    results = found("where(gt(h, b), h, 0.0)", h=torch.randn(6, 5), b=torch.full((5,), 0.1))
    assert not results["grad_b"][0].count_nonzero()


@pytest.mark.parametrize("value", [7.0, -1.0, 1e9])
def test_a_row_that_a_table_does_not_have_is_nan_and_learns_nothing(tmp_path: Path, value: float):
    """torch raises there, which a kernel cannot."""
    case = Case("gather(t, slice(h, stop=1)) * x", {"t": ("n", "d")})
    module = load(source_of(case.blueprint, {"d": 4, "n": 7}), tmp_path)
    h, x, t = torch.full((3, 4), 2.0), torch.ones(3, 4), torch.randn(7, 4)
    h[1, 0] = value
    call = {"h": h, "x": x, "t": t, "alpha": torch.tensor([1.0])}
    out, saved = module.forward(**call)
    grads = module.backward(grad_out=torch.ones(3, 4), saved=saved, **call)
    assert torch.equal(out[[0, 2]], t[[2, 2]])
    assert out[1].isnan().all()
    assert torch.equal(grads["t"][2], torch.full((4,), 2.0))
    assert not grads["t"][[0, 1, 3, 4, 5, 6]].count_nonzero()


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
@pytest.mark.parametrize(("rows", "d"), [(0, 6), (1, 1), (37, 6), (64, 64)])
def test_dropout_drops_what_philox_draws_forward_and_backward(tmp_path: Path, rows: int, d: int, seed: int):
    case = Case("a = dropout(h, p=0.25)\nk = a + 3 * dropout(x, p=0.5)")
    module = load(source_of(case.blueprint, {"d": d}), tmp_path)
    h, x, probe = (torch.randn(rows, d, generator=torch.Generator().manual_seed(i)) for i in range(3))
    call = {"h": h, "x": x, "alpha": torch.tensor([1.0]), "training": 1, "dropout_seed": torch.tensor([seed])}
    out, saved = module.forward(**call)
    grads = module.backward(grad_out=probe, saved=saved, **call)
    offsets = torch.arange(rows * d, dtype=torch.int64).reshape(rows, d)
    masks = [uniform(seed + salt, offsets).ge(p) for salt, p in enumerate((0.25, 0.5))]
    names = [op.name for op in case.blueprint.canonical().ops if op.op == "dropout"]
    assert len(names) == 2
    leaves = {n: value.double().requires_grad_() for n, value in (("h", h), ("x", x))}
    k = leaves["h"] * masks[0] / 0.75 + 3 * leaves["x"] * masks[1] / 0.5
    exact = torch.autograd.grad(k, list(leaves.values()), probe.double())
    torch.testing.assert_close(out, k.detach().float())
    for name, value in zip(leaves, exact, strict=True):
        torch.testing.assert_close(grads[name], value.float())
    assert torch.equal(module.forward(**{**call, "training": 0})[0], h + 3 * x)
