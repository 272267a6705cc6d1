"""Evaluation with drawn rounding errors: what a computation of limited precision may come to (D. S. Parker, "Monte
Carlo Arithmetic", 1997)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper_triton.urabrask.steps import steps_of

__all__ = ["Rounded", "accumulated"]

_ACCUMULATED = 2.0**-24  # unit roundoff of float32, in which kernels add up whatever the layer's dtype is
_SIGNS = 1 << 16
# Operations that add up products; all others with several terms are known by `norm`, `softmax` and their first two.
_CONTRACTIONS = frozenset(
    "mm addmm bmm baddbmm mv addmv dot convolution convolution_backward embedding_dense_backward sum mean "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward".split()
)
_ALONG_A_LINE = ("norm", "softmax", "logsumexp")


class Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, what torch computes in float64 is off as if it had been computed in a narrower format.

    The result of every operation is multiplied by 1 + e with |e| = u, the unit roundoff of that format. Of one that
    adds up n terms, the operands are too, with |e| = u + 2 sqrt(n) v (n v for n below 4), v = 2^-24, and so is the
    result: factors of products may be rounded when they meet, and a sum in float32 in any order is the exact sum of
    products that are each off by no more than about n v (N. Higham, "Accuracy and Stability of Numerical Algorithms",
    2002, section 3.1), and of hardly more than sqrt(n) v, since roundings are of both signs (N. Higham, T. Mary, "A New
    Approach to Probabilistic Rounding Error Analysis", 2019). Signs are drawn for each element; `together`, all results
    of an operation get the same sign, since errors of like numbers are alike.

    Attributes:
        largest: the absolute value of the largest number that was computed, where `watched`.
    """

    def __init__(
        self, roundoff: float, generator: torch.Generator, *, together: bool = False, watched: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest, self._watched = 0.0, watched
        self._roundoff, self._together = roundoff, together
        self._signs = torch.randint(0, 2, (_SIGNS,), generator=generator).double().mul_(2).sub_(1)
        self._at = 0
        self._operands: dict[int, Tensor] = {}  # memory of large ones, by their places; its first touch takes longest

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, since nothing is compiled within it: to skip TorchDynamo, torch would import it, which takes seconds,
        and wrap every call."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        terms = 0
        given = dict(kwargs or {})
        steps = steps_of(func, given)
        if steps is not None:
            given.pop("approximate", None)
            with self:
                return steps(*args, **given)
        is_new, name = _what(func)
        if is_new and _adds_up(name):
            operands = [a for a in _tensors(args) if a.is_floating_point() and a.numel()]
            terms = _terms(name, operands)
            spread = self._roundoff + accumulated(terms)
            args = tuple(
                self._off(a, spread, operand=place)
                if isinstance(a, Tensor) and a.is_floating_point() and a.numel()
                else a
                for place, a in enumerate(args)
            )
        result = func(*args, **given)
        if not is_new:
            return result
        off = self._roundoff + accumulated(terms)
        if isinstance(result, Tensor):
            return self._off(result, off, together=self._together) if result.is_floating_point() else result
        if isinstance(result, tuple):
            return tuple(
                self._off(r, off, together=self._together) if isinstance(r, Tensor) and r.is_floating_point() else r
                for r in result
            )
        return result

    def _off(self, value: Tensor, by: float, *, together: bool = False, operand: int | None = None) -> Tensor:
        """A result, which may be changed, or a copy of the operand in that place, which is good for one operation."""
        if together and not self._watched:
            self._at = (self._at + 1) % _SIGNS
            return value * (1 + by * float(self._signs[self._at]))
        count = value.numel()
        if self._watched and count:
            low, high = value.detach().aminmax()
            self.largest = max(self.largest, -float(low), float(high))
        if count > _SIGNS:
            # From another place each time, so that not the same errors meet again.
            self._at = (self._at + 977) % _SIGNS
            return self._times(value, self._signs.roll(self._at).mul_(by).add_(1), operand)
        if self._at + count > _SIGNS:
            self._at = (self._at + count) % 977
            if self._at + count > _SIGNS:
                self._at = 0
        signs = self._signs[self._at : self._at + count].view(value.shape)
        self._at += count
        return value * signs.mul(by).add_(1)

    def _times(self, value: Tensor, factors: Tensor, operand: int | None) -> Tensor:
        """Each element times one of the factors, which are taken again and again, in one pass over memory."""
        if not torch.ops.aten.is_non_overlapping_and_dense(value):
            value = value.contiguous()
        count, whole = value.numel(), value.numel() // len(factors) * len(factors)
        flat = into = value.as_strided((count,), (1,))
        if operand is not None:
            kept = self._operands.get(operand)
            if kept is None or len(kept) < count or kept.dtype is not value.dtype:
                kept = self._operands[operand] = torch.empty(count, dtype=value.dtype)
            into = kept[:count]
        torch.mul(flat[:whole].view(-1, len(factors)), factors, out=into[:whole].view(-1, len(factors)))
        torch.mul(flat[whole:], factors[: count - whole], out=into[whole:])
        return into.as_strided(value.shape, value.stride())


@lru_cache(maxsize=1024)
def _what(func: Any) -> tuple[bool, str]:
    """Whether its results are numbers that it has computed, and its name."""
    schema = func._schema
    is_new = not any(r.alias_info is not None for r in schema.returns) and not func.is_view
    name = func._overloadpacket.__name__
    return is_new and name not in _MOVING, name


# What gives numbers as they were, or as they are meant to be.
_MOVING = frozenset(
    "clone copy _to_copy cat stack where embedding index index_select gather zeros ones zeros_like ones_like full "
    "full_like new_zeros new_full new_empty empty empty_like empty_strided neg abs relu maximum minimum clamp amax max "
    "threshold_backward slice_backward select_backward constant_pad_nd arange scalar_tensor lift_fresh "
    "_unsafe_view unsafe_split repeat pad roll flip masked_fill bernoulli rand randn".split()
)


def accumulated(terms: int) -> float:
    """By how much of itself each term may be off when `terms` are added up in float32."""
    return min(terms, 2.0 * math.sqrt(terms)) * _ACCUMULATED


def _adds_up(name: str) -> bool:
    return name in _CONTRACTIONS or any(part in name for part in _ALONG_A_LINE)


def _terms(name: str, operands: Sequence[Tensor]) -> int:
    """How many products, or terms, an element of the result is made of, or somewhat more."""
    if not operands:
        return 0
    if name in ("mm", "bmm", "mv", "dot"):
        return operands[0].shape[-1]
    if name in ("addmm", "baddbmm", "addmv"):
        return operands[1].shape[-1] + 1
    if name == "convolution":
        return math.prod(operands[1].shape[1:]) + 1
    if name in ("sum", "mean"):
        return operands[0].numel() if operands[0].dim() else 1
    if name == "convolution_backward":
        grad, _, weight = operands[:3]
        return max(grad.numel() // grad.shape[1], weight.numel() // weight.shape[1])
    return max(max(a.shape, default=1) for a in operands)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
