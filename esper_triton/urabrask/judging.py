"""Results against what they should be: what is demanded of each element, and by how much it may be missed.

With u the unit roundoff of the layer's dtype, an element may be off by

    3 (s + r + R) + (16 u + 2 sqrt(n) v) m + t,

where s is the most that evaluations of the reference in limited precision were off there: one by torch's own kernels
in the layer's dtype, and some in float64 with drawn rounding errors (`rounding.Rounded`), which know dtype, lengths of
sums and, by what becomes of the errors, the condition of everything that follows; r is the root of the mean square of
s over the line (the last dimension), and R that over the tensor, since a few drawn errors may by chance cancel in one
element, or in a factor that a line has in common, and hardly do in all; m is the size of the terms that are added up
last, in the blend; and t 16 of the smallest numbers that kernels compute with: normal ones of float32, or float16's
own where that is what they store. `docs/urabrask.md` has the derivation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_triton.contracts.report import CaseRecord
from esper_triton.urabrask.draws import dirty_rows
from esper_triton.urabrask.oracle import Answer, K
from esper_triton.urabrask.rounding import accumulated
from esper_triton.urabrask.subject import Outcome

__all__ = ["Expected", "Miss", "expected", "judge", "same_bits"]


@dataclass(frozen=True)
class Miss:
    """How far a result is from what it should be: `ratio` is the error in units of its tolerance, above 1 where it is
    wrong, infinite where there is no tolerance. The rest says where it is worst."""

    name: str
    ratio: float
    index: tuple[int, ...] | None = None
    found: float | None = None
    expected: float | None = None
    tolerance: float | None = None
    says: str = ""

    def __str__(self) -> str:
        if self.says:
            return self.says
        text = f"{self.name} is off by {self.ratio:.3g} times its tolerance"
        if self.index is not None:
            text += f" at {list(self.index)}: {self.found:.6g}, expected {self.expected:.6g}"
        return text


@dataclass(frozen=True)
class Expected:
    """One result: what it should be, and by how much it may be missed, NaN where nothing is demanded and infinite where
    it must be something that is not finite."""

    exact: Tensor
    tolerance: Tensor


def expected(
    answer: Answer, case: CaseRecord, tensors: Mapping[str, Tensor], dtype: torch.dtype, terms_added: int
) -> dict[str, Expected]:
    """What a case's results should be: law 2's blend of the answer with `h`, and its gradients.

    `terms_added`: so many terms at most are added to `h`, or to its gradient, one after the other.
    """
    alpha = float(torch.tensor(case.alpha, dtype=torch.float32))
    dirty = dirty_rows(case)
    limits = torch.finfo(dtype)
    last = 16 * limits.eps / 2 + accumulated(terms_added)
    tiny = 16 * (limits.smallest_normal * limits.eps if dtype is torch.float16 else limits.smallest_normal)
    h, grad = tensors["h"].double(), tensors["grad_out"].double()
    found: dict[str, Expected] = {}
    for name, exact in answer.exact.items():
        spread, narrow = answer.spread[name], answer.narrow[name]
        off = alpha * 3 * (spread + _typical(spread, (-1,)) + _typical(spread, tuple(range(spread.dim()))))
        if name == K:
            value = h + alpha * (exact - h)
            terms = h.abs() + alpha * exact.abs()
            blended = h.to(dtype) + alpha * (narrow.to(dtype) - h.to(dtype))
        elif name == "grad_h":
            value = (1 - alpha) * grad + alpha * exact
            terms = grad.abs() + alpha * exact.abs()
            blended = (alpha * narrow + (1 - alpha) * grad).to(dtype)
        else:
            value, terms, blended = alpha * exact, alpha * exact.abs(), (alpha * narrow).to(dtype)
        tolerance = (off + last * terms + tiny).expand_as(value).clone()
        if name == K and alpha == 1.0:  # either form of the blend: k, and h + (k - h), which differ where h is infinite
            value = torch.where(exact.isfinite() | value.isfinite(), exact, value)
            tolerance[exact.isfinite() & ~h.isfinite()] = torch.nan
            blended = torch.where(h.isfinite(), blended, narrow.to(dtype))
        is_finite = value.isfinite() & blended.isfinite() & tolerance.isfinite()
        tolerance[~is_finite] = torch.nan
        if dirty.any():
            if name in (K, "grad_h", "grad_x"):
                if name != K:
                    tolerance[dirty] = torch.nan
                else:
                    tolerance[~value.isfinite() & ~blended.isfinite() & dirty[:, None]] = torch.inf
            else:  # a sum over all rows
                tolerance.fill_(torch.nan)
        found["out" if name == K else name] = Expected(value, tolerance)
    if "grad_h" not in found:  # k does not read h
        terms = grad.abs()
        found["grad_h"] = Expected((1 - alpha) * grad, last * terms + tiny)
    return found


def judge(outcome: Outcome, wanted: Mapping[str, Expected]) -> Iterator[Miss]:
    """Every result against what it should be."""
    for name, value in outcome.results.items():
        yield compare(name, value, wanted[name])


def compare(name: str, value: Tensor, wanted: Expected) -> Miss:
    """One result against what it should be."""
    if not value.numel():
        return Miss(name, 0.0)
    error = (value.double() - wanted.exact).abs()
    ratio = error / wanted.tolerance
    must_not_be_finite = wanted.tolerance.isinf()
    ratio = torch.where(must_not_be_finite, torch.where(value.isfinite(), torch.inf, 0.0), ratio)
    # Where something finite is demanded and the result is not, the error is NaN or infinite, and so is the ratio.
    ratio = torch.where(wanted.tolerance.isnan(), 0.0, ratio.nan_to_num(nan=torch.inf))
    at = int(ratio.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), ratio.shape))
    return Miss(
        name,
        float(ratio.flatten()[at]),
        index,
        float(value.flatten()[at]),
        float(wanted.exact.flatten()[at]),
        float(wanted.tolerance.flatten()[at]),
    )


def _typical(spread: Tensor, over: tuple[int, ...]) -> Tensor:
    """The root of the mean square over these dimensions, of what is finite there."""
    if not spread.numel():
        return spread
    finite = torch.where(spread.isfinite(), spread, 0.0)
    # Scaled, since the square of a large float64 may be none.
    largest = finite.amax(over, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return largest * (finite / largest).square().mean(over, keepdim=True).sqrt()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise: NaN equals itself and -0.0 is not 0.0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
