"""Between a host's tensors and the matrices [rows, width] that kernels work on, features last."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["empty_output", "from_matrix", "matches", "matrix", "settle"]


def matrix(tensor: Tensor, feature_dim: int = -1) -> Tensor:
    """`tensor` as [rows, width], features (dimension `feature_dim`) last and with unit stride; a view wherever that is
    possible, as for a contiguous tensor with features last, or an image in channels_last."""
    if feature_dim != -1:
        tensor = tensor.movedim(feature_dim, -1)
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def from_matrix(matrix: Tensor, like: Tensor, feature_dim: int = -1) -> Tensor:
    """A contiguous [rows, width] as a tensor of the shape of `like`; a view."""
    if feature_dim == -1:
        return matrix.view(like.shape)
    return matrix.view(like.movedim(feature_dim, -1).shape).movedim(-1, feature_dim)


def empty_output(like: Tensor, feature_dim: int = -1) -> tuple[Tensor, Tensor]:
    """A tensor of the shape of `like`, of its strides too where those leave no holes and no overlap, and the contiguous
    [rows, width] to write it by: a view of its memory where that lies so. `settle` it when all is written.

    The tensor is no view itself, so that one may change it in place under autograd.
    """
    out = torch.empty_like(like)
    features_last = out if feature_dim == -1 else out.movedim(feature_dim, -1)
    width = features_last.shape[-1]
    if features_last.is_contiguous():
        return out, features_last.view(out.numel() // width, width)
    return out, torch.empty((out.numel() // width, width), dtype=like.dtype, device=like.device)


def settle(out: Tensor, written: Tensor, feature_dim: int = -1) -> None:
    """Brings what was written into the second tensor of `empty_output` to the first."""
    if written._base is not out:
        out.copy_(from_matrix(written, out, feature_dim))


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
