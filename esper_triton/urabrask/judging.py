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

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esper_triton.contracts.report import CaseRecord
from esper_triton.urabrask.arena import equal_bytes
from esper_triton.urabrask.draws import dirty_rows
from esper_triton.urabrask.oracle import PIECE, Answer, K, all_finite
from esper_triton.urabrask.rounding import accumulated
from esper_triton.urabrask.subject import Outcome

__all__ = ["Expected", "Miss", "expected", "judge", "same_bits"]

_BY_ROW = (K, "out", "grad_h", "grad_x")


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
    answer: Answer,
    case: CaseRecord,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    terms_added: int,
    *,
    without: Collection[str] = (),
) -> dict[str, Expected]:
    """What a case's results should be: law 2's blend of the answer with `h`, and its gradients.

    `terms_added`: so many terms at most are added to `h`, or to its gradient, one after the other. `without`: results
    that are not asked for.
    """
    alpha, last, tiny = _alpha(case), _last(dtype, terms_added), _tiny(dtype)
    dirty = dirty_rows(case)
    h, grad = tensors["h"].double(), tensors["grad_out"].double()
    found: dict[str, Expected] = {}
    for name, exact in answer.exact.items():
        if name in without:
            continue
        narrow, off = answer.narrow[name], answer.allowance(name).mul_(alpha)
        if name == K:
            value = h + alpha * (exact - h)
            terms = h.abs() + alpha * exact.abs()
            blended = h.to(dtype) + alpha * (narrow.to(dtype) - h.to(dtype))
        elif name == "grad_h":
            value = (1 - alpha) * grad + alpha * exact
            terms = grad.abs() + alpha * exact.abs()
            blended = (alpha * narrow + (1 - alpha) * grad).to(dtype)
        else:
            found[name] = _of_a_sum(exact, narrow, answer.allowance(name), alpha, last, tiny, dtype)
            if dirty.any():  # a sum over all rows
                found[name].tolerance[dirty if name in _BY_ROW else ...] = torch.nan
            continue
        tolerance = off.add_(terms, alpha=last).add_(tiny)
        if name == K and alpha == 1.0:  # either form of the blend: k, and h + (k - h), which differ where h is infinite
            value = torch.where(exact.isfinite() | value.isfinite(), exact, value)
            tolerance[exact.isfinite() & ~h.isfinite()] = torch.nan
            blended = torch.where(h.isfinite(), blended, narrow.to(dtype))
        _demand_only_finite(value, blended, tolerance)
        if dirty.any():
            if name != K:
                tolerance[dirty] = torch.nan
            else:
                tolerance[~value.isfinite() & ~blended.isfinite() & dirty[:, None]] = torch.inf
        found["out" if name == K else name] = Expected(value, tolerance)
    if "grad_h" not in found:  # k does not read h
        terms = grad.abs()
        found["grad_h"] = Expected((1 - alpha) * grad, last * terms + tiny)
    return found


def judge(
    outcome: Outcome,
    answer: Answer,
    case: CaseRecord,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    terms_added: int,
) -> Iterator[Miss]:
    """Every result against what is `expected`. Large gradients of parameters are compared in pieces, which stay in the
    processor's cache."""
    large = {name for name, v in outcome.results.items() if name not in _BY_ROW and v.numel() > PIECE}
    is_dirty = bool(dirty_rows(case).any())
    wanted = expected(answer, case, tensors, dtype, terms_added, without=large)
    last, tiny = _last(dtype, terms_added), _tiny(dtype)

    def of_lines(name: str, value: Tensor, start: int, stop: int) -> Miss:
        lines = slice(start, stop)
        exact, narrow, allowance = answer.exact[name][lines], answer.narrow[name][lines], answer.allowance(name, lines)
        piece = _of_a_sum(exact, narrow, allowance, _alpha(case), last, tiny, dtype)
        found = compare(name, value[lines], piece)
        return found if found.index is None else replace(found, index=(found.index[0] + start, *found.index[1:]))

    for name, value in outcome.results.items():
        if name not in large:
            yield compare(name, value, wanted[name])
            continue
        if is_dirty:  # nothing is demanded of a sum over all rows
            yield Miss(name, 0.0)
            continue
        step = max(1, PIECE * len(value) // value.numel())
        yield max((of_lines(name, value, at, at + step) for at in range(0, len(value), step)), key=lambda m: m.ratio)


def _of_a_sum(
    exact: Tensor, narrow: Tensor, allowance: Tensor, alpha: float, last: float, tiny: float, dtype: torch.dtype
) -> Expected:
    """Of a gradient at what the blend has no part in."""
    value = alpha * exact
    tolerance = allowance.mul_(alpha).add_(value.abs(), alpha=last).add_(tiny)
    _demand_only_finite(value, (alpha * narrow).to(dtype), tolerance)
    return Expected(value, tolerance)


def _demand_only_finite(value: Tensor, narrow: Tensor, tolerance: Tensor) -> None:
    if not (all_finite(value) and all_finite(narrow) and all_finite(tolerance)):
        tolerance[~(value.isfinite() & narrow.isfinite() & tolerance.isfinite())] = torch.nan


def _alpha(case: CaseRecord) -> float:
    return float(torch.tensor(case.alpha, dtype=torch.float32))


def _last(dtype: torch.dtype, terms_added: int) -> float:
    return 16 * torch.finfo(dtype).eps / 2 + accumulated(terms_added)


def _tiny(dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    return 16 * (limits.smallest_normal * limits.eps if dtype is torch.float16 else limits.smallest_normal)


def compare(name: str, value: Tensor, wanted: Expected) -> Miss:
    """One result against what it should be."""
    if not value.numel():
        return Miss(name, 0.0)
    ratio = (value.double() - wanted.exact).abs_().div_(wanted.tolerance)
    if not (all_finite(ratio) and all_finite(wanted.tolerance)):
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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise: NaN equals itself and -0.0 is not 0.0."""
    return a.shape == b.shape and equal_bytes(_bytes(a), _bytes(b))


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)
