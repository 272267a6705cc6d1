"""Between a host's tensors and the matrices [rows, width] that kernels work on, features last."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_share", "empty_output", "from_matrix", "matches", "matrix", "settle"]


def matrix(tensor: Tensor, feature_dim: int = -1) -> Tensor:
    """`tensor` as [rows, width], features (dimension `feature_dim`) last and with unit stride; a view wherever that is
    possible, as for a contiguous tensor with features last, or an image in channels_last."""
    tensor = _features_last(tensor, feature_dim)
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def from_matrix(matrix: Tensor, like: Tensor, feature_dim: int = -1) -> Tensor:
    """A contiguous [rows, width] as a tensor of the shape of `like`; a view."""
    features_last = matrix.view(_features_last(like, feature_dim).shape)
    return features_last if feature_dim == -1 else features_last.movedim(-1, feature_dim)


def empty_output(like: Tensor, feature_dim: int = -1) -> tuple[Tensor, Tensor]:
    """A tensor of the shape of `like`, of its strides too where those leave no holes and no overlap, and the contiguous
    [rows, width] to write it by: a view of its memory where that lies so. `settle` it when all is written.

    The tensor is no view itself, so that one may change it in place under autograd.
    """
    out = torch.empty_like(like)
    width = out.shape[feature_dim]
    rows = out.numel() // width
    features_last = _features_last(out, feature_dim)
    if features_last.is_contiguous():
        return out, features_last.view(rows, width)
    return out, torch.empty((rows, width), dtype=like.dtype, device=like.device)


def settle(out: Tensor, written: Tensor, feature_dim: int = -1) -> None:
    """Brings what was written into the second tensor of `empty_output` to the first."""
    features_last = _features_last(out, feature_dim)
    if not features_last.is_contiguous():
        features_last.copy_(written.view(features_last.shape))


def _features_last(tensor: Tensor, feature_dim: int) -> Tensor:
    return tensor if feature_dim == -1 else tensor.movedim(feature_dim, -1)


def matches(tensor: Tensor, width: int, feature_dim: int, like: Tensor | None = None) -> bool:
    """Whether `tensor` has `width` features in dimension `feature_dim`, and otherwise the shape of `like`."""
    dims = tensor.dim()
    if not -dims <= feature_dim < dims or tensor.shape[feature_dim] != width:
        return False
    if like is None:
        return True
    at = feature_dim % dims
    return (
        like.dim() == dims and tensor.shape[:at] == like.shape[:at] and tensor.shape[at + 1 :] == like.shape[at + 1 :]
    )


def add_share(out: Tensor, blended: Tensor, h: Tensor) -> None:
    """Adds what a seed's own blend differs from `h` by to `out`, which other seeds share (law 2's sum)."""
    difference = blended - h
    # Selected, not only added: -0.0 + 0.0 is 0.0, and a silent seed must leave every bit of the host's output.
    out.copy_(torch.where(difference == 0, out, out + difference))
