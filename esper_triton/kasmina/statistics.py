"""Statistics of a seed's own output k, [rows, features], over many calls, on the device.

Every function here takes and gives tensors alone, and reads none of them back to the host (law 3): what depends on
values is selected on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ActivationStatistics", "Moments", "chosen_features", "merged", "moments_of", "statistics_of", "thinned"]

_MOST_VALUES = 2**16  # of a call, so that a sample of a large layer takes less than a millisecond on a CPU
_FEWEST_ROWS = 64
_MOST_FEATURES = 64  # whose correlations are looked at: a matrix of them is kept


class ActivationStatistics(NamedTuple):
    """Of the rows of k that were sampled in an epoch. None where they do not say: fewer than two rows say nothing.

    Attributes:
        variance: over rows, with n - 1 below the sum of squares as in `torch.var`, and the mean of that over features.
        dead_ratio: share of the features that had one value, zero or another, in every row.
        correlation: mean of |r| over pairs of features, r being Pearson's. Of at most 64 features, always the same;
            dead ones have none, and are left out. Of independent features it is about sqrt(2 / (pi * rows)), not 0.
    """

    variance: float | None
    dead_ratio: float | None
    correlation: float | None

    @classmethod
    def of(cls, values: list[float]) -> ActivationStatistics:
        """From what `statistics_of` gives, on the host."""
        return cls(*(value if math.isfinite(value) else None for value in values))


class Moments(NamedTuple):
    """Of rows of d features, all float64: their number, 0-d; their mean, sums of squared deviations from it, least and
    greatest values, each [d]; and of m chosen features the sums of the products of their deviations, [m, m]."""

    rows: Tensor
    mean: Tensor
    squares: Tensor
    least: Tensor
    greatest: Tensor
    products: Tensor


def chosen_features(width: int, device: torch.device) -> Tensor | None:
    """Which features of `width` correlations are of, int64 [64] in ascending order; None for all, where those are no
    more. Drawn from a generator of its own, the same for the same width."""
    if width <= _MOST_FEATURES:
        return None
    generator = torch.Generator("cpu").manual_seed(width)
    drawn = torch.randperm(width, generator=generator, device="cpu")[:_MOST_FEATURES]
    return drawn.sort().values.to(device, non_blocking=True)


def thinned(k: Tensor) -> Tensor:
    """A view of rows of k at equal distances, all of them where that is little."""
    most = max(_FEWEST_ROWS, _MOST_VALUES // max(k.shape[1], 1))
    return k[:: max(1, -(-k.shape[0] // most))]


def moments_of(k: Tensor, chosen: Tensor | None) -> Moments:
    """Of one call's k, [rows, d] with at least one row, by two passes in float64. A k that is not finite throughout
    counts as no row at all."""
    k = k.double()
    mean, least, greatest = k.mean(0), k.amin(0), k.amax(0)  # torch.aminmax over rows takes eight times as long
    finite = (least.isfinite() & greatest.isfinite()).all()
    deviations = k - mean
    few = deviations if chosen is None else deviations.index_select(1, chosen)
    return Moments(
        rows=finite.double() * k.shape[0],
        mean=torch.where(finite, mean, 0.0),
        squares=torch.where(finite, deviations.square().sum(0), 0.0),
        least=torch.where(finite, least, math.inf),
        greatest=torch.where(finite, greatest, -math.inf),
        products=torch.where(finite, few.T @ few, 0.0),
    )


def merged(a: Moments, b: Moments, chosen: Tensor | None) -> Moments:
    """Of the rows of both: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979), and the same for products."""
    rows = a.rows + b.rows
    of_b = b.rows / rows.clamp_min(1.0)
    apart = b.mean - a.mean
    weight = a.rows * of_b
    few = apart if chosen is None else apart.index_select(0, chosen)
    return Moments(
        rows=rows,
        mean=a.mean + apart * of_b,
        squares=a.squares + b.squares + apart.square() * weight,
        least=torch.minimum(a.least, b.least),
        greatest=torch.maximum(a.greatest, b.greatest),
        products=a.products + b.products + torch.outer(few, few) * weight,
    )


def statistics_of(moments: Moments, chosen: Tensor | None) -> Tensor:
    """float64 [3]: variance, dead_ratio and correlation as in `ActivationStatistics`, NaN for None."""
    alive = moments.least < moments.greatest
    variance = (moments.squares / (moments.rows - 1.0).clamp_min(1.0)).mean()
    dead_ratio = (~alive).double().mean()
    few = alive if chosen is None else alive.index_select(0, chosen)
    norms = moments.products.diagonal().sqrt()
    pairs = torch.outer(few, few).triu(1)
    r = torch.where(pairs, moments.products / torch.outer(norms, norms), 0.0)
    correlation = r.abs().clamp_max(1.0).sum() / pairs.sum()  # 0 / 0, a NaN, where there is no pair
    return torch.where(moments.rows >= 2.0, torch.stack((variance, dead_ratio, correlation)), math.nan)
