"""What torch computes in one operation, in the steps that a kernel takes for it: each is rounded, and what cancels
between them decides about the error of the whole.

torch has decompositions of its own, which import its compiler, and take seconds for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["steps_of"]

_RSQRT_2, _RSQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


def _softmax(a: Tensor, dim: int, half_to_float: bool) -> Tensor:
    powers = (a - a.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def _log_softmax(a: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = a - a.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _softmax_backward(grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    scaled = grad * out
    return scaled - out * scaled.sum(dim, keepdim=True)


def _log_softmax_backward(grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return grad - out.exp() * grad.sum(dim, keepdim=True)


def _gelu(a: Tensor) -> Tensor:
    return a * (0.5 * (1 + (a * _RSQRT_2).erf()))


def _gelu_backward(grad: Tensor, a: Tensor) -> Tensor:
    phi = 0.5 * (1 + (a * _RSQRT_2).erf())
    return grad * (phi + a * (a.square() * -0.5).exp() * _RSQRT_2PI)


def _silu(a: Tensor) -> Tensor:
    return a * a.sigmoid()


def _silu_backward(grad: Tensor, a: Tensor) -> Tensor:
    gate = a.sigmoid()
    return grad * (gate * (1 + a * (1 - gate)))


def _sigmoid_backward(grad: Tensor, out: Tensor) -> Tensor:
    return grad * ((1 - out) * out)


def _tanh_backward(grad: Tensor, out: Tensor) -> Tensor:
    return grad * (1 - out.square())


def _layer_norm(
    a: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    over = list(range(-len(shape), 0))
    mean = a.mean(over, keepdim=True)
    centred = a - mean
    rstd = (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    out = centred * rstd
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


def _layer_norm_backward(
    grad: Tensor,
    a: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    over, rows = list(range(-len(shape), 0)), list(range(a.dim() - len(shape)))
    normal = (a - mean) * rstd
    scaled = grad if weight is None else grad * weight
    drift, pull = scaled.mean(over, keepdim=True), (scaled * normal).mean(over, keepdim=True)
    to_a = rstd * (scaled - drift - normal * pull)
    to_weight = (grad * normal).sum(rows) if wanted[1] and rows else grad * normal if wanted[1] else None
    to_bias = grad.sum(rows) if wanted[2] and rows else grad if wanted[2] else None
    return to_a if wanted[0] else None, to_weight, to_bias


def _rms_norm(a: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    over = list(range(-len(shape), 0))
    rstd = (a.square().mean(over, keepdim=True) + (torch.finfo(a.dtype).eps if eps is None else eps)).rsqrt()
    out = a * rstd
    return out if weight is None else out * weight, rstd


def _rms_norm_backward(
    grad: Tensor, a: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    over, rows = list(range(-len(shape), 0)), list(range(a.dim() - len(shape)))
    normal = a * rstd
    scaled = grad if weight is None else grad * weight
    to_a = rstd * (scaled - normal * (scaled * normal).mean(over, keepdim=True))
    to_weight = (grad * normal).sum(rows) if wanted[1] and rows else grad * normal if wanted[1] else None
    return to_a if wanted[0] else None, to_weight


@lru_cache(maxsize=1)
def _table() -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    return {
        aten._softmax.default: _softmax,
        aten._log_softmax.default: _log_softmax,
        aten._softmax_backward_data.default: _softmax_backward,
        aten._log_softmax_backward_data.default: _log_softmax_backward,
        aten.gelu.default: _gelu,
        aten.gelu_backward.default: _gelu_backward,
        aten.silu.default: _silu,
        aten.silu_backward.default: _silu_backward,
        aten.sigmoid_backward.default: _sigmoid_backward,
        aten.tanh_backward.default: _tanh_backward,
        aten.native_layer_norm.default: _layer_norm,
        aten.native_layer_norm_backward.default: _layer_norm_backward,
        aten._fused_rms_norm.default: _rms_norm,
        aten._fused_rms_norm_backward.default: _rms_norm_backward,
    }


def steps_of(func: Any, kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """A function of the same arguments that does what an operation of torch does in smaller ones; None where it is as
    small as can be, or is asked for in a way that is not known here."""
    if kwargs.get("approximate", "none") != "none":
        return None
    return _table().get(func)
