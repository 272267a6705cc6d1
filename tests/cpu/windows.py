"""What a block sees of a tensor that it may reach beyond."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def window(x: torch.Tensor, corner: Sequence[int], extents: Sequence[int], beyond: float) -> torch.Tensor:
    """The block of `extents` at `corner` of x, which may begin before x and end after it; outside of x is `beyond`."""
    block = torch.full(tuple(extents), beyond, dtype=x.dtype)
    inside = [(max(at, 0), min(at + extent, size)) for at, extent, size in zip(corner, extents, x.shape, strict=True)]
    if all(first < last for first, last in inside):
        there = tuple(slice(first - at, last - at) for at, (first, last) in zip(corner, inside, strict=True))
        block[there] = x[tuple(slice(first, last) for first, last in inside)]
    return block
