"""What is demanded of an element, and by how much it may be missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from esper_triton.contracts.report import CaseRecord
from esper_triton.kasmina.views import Extents
from esper_triton.urabrask.judging import Expected, compare, expected, judge
from esper_triton.urabrask.oracle import K, LocalOracle, Question
from esper_triton.urabrask.rounding import Rounded
from esper_triton.urabrask.steps import _table, steps_of
from esper_triton.urabrask.subject import Outcome

U32, U16, UB16 = 2.0**-24, 2.0**-11, 2.0**-8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def question(a: Tensor, w: Tensor, grad: Tensor, seed: int = 0, *, of: str = "h") -> Question:
    return Question(extents=Extents.of_rows(len(a)), inputs={of: a}, parameters={"w": w}, grad_k=grad, seed=seed)


def linear(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


@pytest.mark.parametrize("shape", [(50, 8), (3, 70_001)])  # the second is of more elements than there are drawn signs
@pytest.mark.parametrize(("dtype", "u"), [(torch.float32, U32), (torch.float16, U16), (torch.bfloat16, UB16)])
def test_the_spread_of_one_multiplication_is_some_roundings_of_it(
    dtype: torch.dtype, u: float, shape: tuple[int, int]
) -> None:
    h = torch.randn(shape, generator=generator(0)).to(dtype)
    w = torch.randn(shape[1], generator=generator(1)).to(dtype)
    answer = LocalOracle(lambda h, w: h * w, "rows", dtype).answer(question(h, w, torch.ones_like(h)))
    exact = h.double() * w.double()
    assert torch.equal(answer.exact[K], exact)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # by which what is below may be off
    assert (answer.spread[K] <= 1.001 * u * exact.abs() + least).all()
    assert (answer.spread[K] >= 0.999 * u * exact.abs()).all()  # one of the drawn signs is in every element


def test_errors_are_drawn_for_operands_and_results_of_a_large_product_and_nothing_else_is_changed() -> None:
    x, w = torch.randn(40, 300, generator=generator(0)), torch.randn(300, 400, generator=generator(1)).t()
    x, w = x.double(), w.double()
    before = x.clone(), w.clone()
    exact = x @ w.t()
    with Rounded(1e-3, generator(2)):
        once = torch.mm(x, w.t())
        again = torch.mm(x, w.t())
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])
    terms = x.abs() @ w.abs().t()
    for found in (once, again):
        error = (found - exact).abs()
        assert (error <= 3.01e-3 * terms + 1e-3 * exact.abs()).all()
        assert error.median() > 1e-3 * exact.abs().median()
    assert not torch.equal(once, again)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    alpha=st.sampled_from([1.0, 0.3]),
    at=st.tuples(st.integers(0, 299), st.integers(0, 399)),
    off=st.sampled_from([0.5, 3.0, float("nan")]),
)
def test_a_large_gradient_in_pieces_is_found_as_wrong_as_it_is_as_a_whole(
    seed: int, alpha: float, at: tuple[int, int], off: float
) -> None:
    x, w = torch.randn(6, 300, generator=generator(seed)), torch.randn(300, 400, generator=generator(seed + 1))
    grad = torch.randn(6, 400, generator=generator(seed + 2))
    answer = LocalOracle(linear, "rows", torch.float32).answer(question(x, w, grad, seed, of="x"))
    case = CaseRecord(rows=6, batch=6, length=1, values="normal", seed=seed, alpha=alpha)
    tensors = {"h": torch.zeros(6, 400), "x": x, "grad_out": grad}
    wanted = expected(answer, case, tensors, torch.float32, 1)
    found = (float(torch.tensor(alpha)) * answer.exact["grad_w"]).float()
    found[at] += off * wanted["grad_w"].tolerance[at]
    (miss,) = judge(Outcome({"grad_w": found}, None), answer, case, tensors, torch.float32, 1)
    whole = compare("grad_w", found, wanted["grad_w"])
    assert (miss.ratio, miss.index) == (whole.ratio, whole.index)
    assert miss.tolerance == pytest.approx(whole.tolerance, rel=1e-12)
    assert (miss.ratio <= 1) == (off < 1)
    assert miss.index == at


@settings(max_examples=20, deadline=None)
@given(terms=st.integers(1, 2000), seed=st.integers(0, 2**32))
def test_a_sum_in_float32_in_any_order_is_within_the_tolerance(terms: int, seed: int) -> None:
    h = torch.randn(4, terms, generator=generator(seed))
    w = torch.randn(terms, 3, generator=generator(seed + 1))
    grad = torch.randn(4, 3, generator=generator(seed + 2))
    answer = LocalOracle(linear, "rows", torch.float32).answer(question(h, w, grad, seed, of="x"))
    case = CaseRecord(rows=4, batch=4, length=1, values="normal", seed=seed, alpha=1.0)
    wanted = expected(answer, case, {"h": torch.zeros(4, 3), "grad_out": grad}, torch.float32, 1)["out"]
    order = torch.randperm(terms, generator=generator(seed + 3))
    one_by_one = torch.zeros(4, 3)
    for k in order.tolist():
        one_by_one = one_by_one + h[:, k, None] * w[k]
    assert compare("out", one_by_one, wanted).ratio <= 1
    # All the terms of one size and sign, whose errors are alike.
    ones = torch.full((4, terms), 1.1)
    alike = torch.full((terms, 3), 0.7)
    answer = LocalOracle(linear, "rows", torch.float32).answer(question(ones, alike, grad, seed, of="x"))
    wanted = expected(answer, case, {"h": torch.zeros(4, 3), "grad_out": grad}, torch.float32, 1)["out"]
    total = torch.zeros(4, 3)
    for _ in range(terms):
        total = total + torch.tensor(1.1) * torch.tensor(0.7)
    assert compare("out", total, wanted).ratio <= 1


def test_a_sum_that_is_kept_in_half_precision_is_not_within_that_of_float32() -> None:
    h, w = torch.randn(8, 200, generator=generator(0)), torch.randn(200, 8, generator=generator(1))
    grad = torch.randn(8, 8, generator=generator(2))
    answer = LocalOracle(linear, "rows", torch.float32).answer(question(h, w, grad, of="x"))
    case = CaseRecord(rows=8, batch=8, length=1, values="normal", seed=0, alpha=1.0)
    wanted = expected(answer, case, {"h": torch.zeros(8, 8), "grad_out": grad}, torch.float32, 1)["out"]
    assert compare("out", (h.half() @ w.half()).float(), wanted).ratio > 10
    assert compare("out", h @ w, wanted).ratio < 0.5


def test_what_cancels_may_be_off_by_the_roundings_of_what_it_is_the_difference_of() -> None:
    h = torch.randn(20, 4, generator=generator(0)) + 1000
    w = torch.full((4,), 1000.0)

    def difference(h: Tensor, w: Tensor) -> Tensor:
        return (h * w - w * w) / w

    answer = LocalOracle(difference, "rows", torch.float32).answer(question(h, w, torch.ones_like(h)))
    case = CaseRecord(rows=20, batch=20, length=1, values="normal", seed=0, alpha=1.0)
    tensors = {"h": torch.zeros(20, 4), "grad_out": torch.ones(20, 4)}
    wanted = expected(answer, case, tensors, torch.float32, 1)["out"]
    # The products are 1e6, and the difference about 1: off by 1e3 u, where it could be known to u.
    assert (wanted.tolerance > 500 * U32).all()
    assert (wanted.tolerance < 1e5 * U32).all()


def test_where_something_not_finite_goes_in_its_row_may_not_hide_it_and_the_other_rows_are_as_ever() -> None:
    h, w = torch.randn(4, 3, generator=generator(0)), torch.ones(3)
    h[0, 1] = torch.nan  # item 0 is the one that draws say is not clean
    grad = torch.ones(4, 3)
    answer = LocalOracle(lambda h, w: h * w, "rows", torch.float32).answer(question(h, w, grad))
    case = CaseRecord(rows=2, batch=2, length=1, values="nan", seed=0, alpha=1.0)
    case = case.model_copy(update={"rows": 4, "batch": 4})
    wanted = expected(answer, case, {"h": h, "grad_out": grad}, torch.float32, 1)
    right = h * w
    assert compare("out", right, wanted["out"]).ratio <= 1
    swallowed = right.nan_to_num(nan=0.0)
    assert compare("out", swallowed, wanted["out"]).index == (0, 1)
    leaked = right.clone()
    leaked[1, 1] = torch.nan
    assert compare("out", leaked, wanted["out"]).ratio == float("inf")


@settings(max_examples=20, deadline=None)
@given(alpha=st.sampled_from([1e-3, 0.3, 1.0]), seed=st.integers(0, 2**32), reads_h=st.booleans())
def test_what_is_expected_is_the_blend_and_its_gradients_by_autograd_and_by_finite_differences(
    alpha: float, seed: int, reads_h: bool
) -> None:
    drawn = [torch.randn(5, 4, generator=generator(seed + k)) for k in range(3)]
    h, x, grad = drawn
    w = torch.randn(4, generator=generator(seed + 3))
    inputs = {"h": h, "x": x} if reads_h else {"x": x}

    def k_of(w: Tensor, x: Tensor, h: Tensor | None = None) -> Tensor:
        return torch.tanh(x * w) if h is None else torch.tanh(x * w) * h

    asked = Question(extents=Extents.of_rows(5), inputs=inputs, parameters={"w": w}, grad_k=grad, seed=seed)
    reference = k_of if reads_h else lambda w, x: k_of(w, x)
    answer = LocalOracle(reference, "rows", torch.float32).answer(asked)
    case = CaseRecord(rows=5, batch=5, length=1, values="normal", seed=seed, alpha=alpha)
    wanted = expected(answer, case, {"h": h, "x": x, "grad_out": grad}, torch.float32, 1)

    a = float(torch.tensor(alpha, dtype=torch.float32))
    leaves = {name: value.double().requires_grad_() for name, value in {"h": h, "x": x, "w": w}.items()}

    def blend(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return h + a * (k_of(w, x, h if reads_h else None) - h)

    out = blend(**leaves)
    torch.testing.assert_close(wanted["out"].exact, out.detach(), rtol=1e-12, atol=1e-12)
    grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad.double()), strict=True))
    plain = {name: value.detach() for name, value in leaves.items()}
    for name, value in plain.items():
        torch.testing.assert_close(wanted[f"grad_{name}"].exact, grads[name], rtol=1e-12, atol=1e-12)
        step = 1e-5 * torch.randn(value.shape, generator=generator(seed + 4), dtype=torch.float64)
        ahead, behind = (blend(**(plain | {name: value + sign * step})) for sign in (1, -1))
        slope = float(((ahead - behind) * grad).sum() / 2)
        assert slope == pytest.approx(float((wanted[f"grad_{name}"].exact * step).sum()), rel=1e-4, abs=1e-9)


def test_an_infinite_error_of_a_finite_element_is_found_wherever_it_is() -> None:
    wanted = Expected(torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64))
    for bad in (torch.nan, torch.inf, -torch.inf, 1.5):
        value = torch.zeros(3, 3)
        value[2, 1] = bad
        miss = compare("out", value, wanted)
        assert (miss.ratio > 1, miss.index) == (True, (2, 1))


# Each operation that is taken apart, as torch does it in one.
WHOLE: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda a: F.softmax(a, -1),
    "log_softmax": lambda a: F.log_softmax(a, -1),
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "layer_norm": lambda a: F.layer_norm(a, a.shape[-1:], torch.arange(1.0, 6, dtype=a.dtype), a[0] * 0, 1e-5),
    "bare_layer_norm": lambda a: F.layer_norm(a, a.shape[-1:]),
    "rms_norm": lambda a: F.rms_norm(a, a.shape[-1:], torch.arange(1.0, 6, dtype=a.dtype), 1e-6),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_operation_that_is_taken_apart_comes_to_the_same(name: str) -> None:
    drawn = torch.randn(3, 5, generator=generator(3), dtype=torch.float64)
    grad = torch.randn(3, 5, generator=generator(4), dtype=torch.float64)
    found = []
    for mode in (None, Rounded(0.0, generator(5))):
        a = drawn.clone().requires_grad_()
        if mode is None:
            out = WHOLE[name](a)
            found.append((out.detach(), *torch.autograd.grad(out, a, grad)))
        else:
            with mode:
                out = WHOLE[name](a)
                found.append((out.detach(), *torch.autograd.grad(out, a, grad)))
    # Sums are off by n 2^-24 on purpose.
    for whole, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-5)


def test_a_form_of_an_operation_that_is_not_known_is_left_whole() -> None:
    assert steps_of(torch.ops.aten.gelu.default, {"approximate": "tanh"}) is None
    assert steps_of(torch.ops.aten.gelu.default, {}) is _table()[torch.ops.aten.gelu.default]
    assert steps_of(torch.ops.aten.add.Tensor, {}) is None
