"""Between a host's tensors and the matrices [rows, width] that kernels work on, features last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ROWS",
    "Axes",
    "Extents",
    "add_share",
    "empty_output",
    "extents_of",
    "from_matrix",
    "matches",
    "matrix",
    "settle",
]


class Axes(NamedTuple):
    """Where a host's tensors have what: features in dimension `feature_dim`. With `length_first` the rows of a tensor
    [length, batch, width], as of attention without `batch_first`, are taken item by item; otherwise they are in the
    order of the dimensions."""

    feature_dim: int = -1
    length_first: bool = False


ROWS = Axes()


class Extents(NamedTuple):
    """Sizes of a call: `rows` are `batch` items of `length` positions each. Where these are an image they are
    `image_height` lines of `image_width`; elsewhere both are 0. Without positions every row is an item."""

    rows: int
    batch: int
    length: int
    image_height: int = 0
    image_width: int = 0

    @classmethod
    def of_rows(cls, rows: int) -> Extents:
        """Rows without positions."""
        return cls(rows, rows, 1)


def extents_of(shape: Sequence[int], axes: Axes) -> Extents:
    """The extents of a tensor that has its features where `axes` says, and may have symbolic sizes.

    With features last, [..., length, width]: what has no more than two dimensions is one item. With channels before the
    positions, [..., width, *positions]: an image where there are two dimensions of positions.
    """
    if axes.feature_dim == -1:
        length = shape[-2] if len(shape) > 1 else 1
        batch = math.prod(shape[:-2])
        if axes.length_first and len(shape) == 3:
            length, batch = batch, length
        return Extents(batch * length, batch, length)
    at = axes.feature_dim % len(shape)
    batch, positions = math.prod(shape[:at]), shape[at + 1 :]
    length = math.prod(positions)
    height, width = positions if len(positions) == 2 else (0, 0)
    return Extents(batch * length, batch, length, height, width)


def matrix(tensor: Tensor, axes: Axes = ROWS) -> Tensor:
    """`tensor` as [rows, width], features last and with unit stride; a view wherever that is possible, as for a
    contiguous tensor with features last, or an image in channels_last."""
    tensor = _in_rows(tensor, axes)
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def from_matrix(matrix: Tensor, like: Tensor, axes: Axes = ROWS) -> Tensor:
    """A contiguous [rows, width] as a tensor of the shape of `like`; a view."""
    in_rows = matrix.view(_in_rows(like, axes).shape)
    if axes.length_first and like.dim() == 3:
        return in_rows.transpose(0, 1)
    return in_rows if axes.feature_dim == -1 else in_rows.movedim(-1, axes.feature_dim)


def empty_output(like: Tensor, axes: Axes = ROWS) -> tuple[Tensor, Tensor]:
    """A tensor of the shape of `like`, of its strides too where those leave no holes and no overlap, and the contiguous
    [rows, width] to write it by: a view of its memory where that lies so. `settle` it when all is written.

    The tensor is no view itself, so that one may change it in place under autograd.
    """
    out = torch.empty_like(like)
    width = out.shape[axes.feature_dim]
    rows = out.numel() // width
    in_rows = _in_rows(out, axes)
    if in_rows.is_contiguous():
        return out, in_rows.view(rows, width)
    return out, torch.empty((rows, width), dtype=like.dtype, device=like.device)


def settle(out: Tensor, written: Tensor, axes: Axes = ROWS) -> None:
    """Brings what was written into the second tensor of `empty_output` to the first."""
    in_rows = _in_rows(out, axes)
    if not in_rows.is_contiguous():
        in_rows.copy_(written.view(in_rows.shape))


def _in_rows(tensor: Tensor, axes: Axes) -> Tensor:
    if axes.length_first and tensor.dim() == 3:
        return tensor.transpose(0, 1)
    return tensor if axes.feature_dim == -1 else tensor.movedim(axes.feature_dim, -1)


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
