"""The plan that a layer's calls follow while a seed is active."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.seed import Seed

__all__ = ["ActiveSeed", "Contribution", "Plan", "make_plan", "spread"]


class ActiveSeed(NamedTuple):
    """A seed of a plan. `alpha` is a view of the layer's state on the device; a new value needs no new plan. Where
    `nonfinite` is given, a 0-d bool on the device, calls set it once the seed's output is not finite where the host's
    is; a step boundary reads it."""

    seed: Seed
    program: KernelProgram
    start: int
    stop: int
    alpha: Tensor
    parameters: dict[str, nn.Parameter]
    nonfinite: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Who writes which columns. `gaps` are the columns of no active seed. With `overlapping` spans every seed's own
    blend goes to a temporary and its difference from the host's span is added (law 2's sum)."""

    width: int
    feature_dim: int  # of the host's output and of x, as in `Kind`
    x_name: str
    first_of_tuple: bool
    seeds: tuple[ActiveSeed, ...]
    gaps: tuple[tuple[int, int], ...]
    overlapping: bool
    guard: bool
    timed: bool


@dataclass(frozen=True)
class Contribution:
    """What a seed that ran leaves for backward. `rejected` is a 0-d bool on the device under guard: the call's output
    was not finite where the host's was, and was selected away."""

    active: ActiveSeed
    saved: dict[str, Tensor]
    rejected: Tensor | None


def make_plan(record: LayerRecord, alphas: Sequence[Tensor], device: torch.device) -> Plan | None:
    """The plan of a layer's active seeds, or None where every one is silent."""
    seeds = tuple(
        ActiveSeed(seed, seed.kernel.program, *seed.span, alphas[seed.index], seed.parameters, seed.nonfinite_flag)
        for seed in record.seeds
        if seed.state.is_active and seed.kernel is not None
    )
    if not seeds:
        return None
    gaps, overlapping = spread([(active.start, active.stop) for active in seeds], record.kind.width)
    return Plan(
        width=record.kind.width,
        feature_dim=record.kind.feature_dim,
        x_name=record.kind.x_name,
        first_of_tuple=record.kind.first_of_tuple,
        seeds=seeds,
        gaps=gaps,
        overlapping=overlapping,
        guard=record.guard,
        # On another device a launch returns before it has run, and its end cannot be read without a sync.
        timed=record.telemetry_enabled and device.type == "cpu",
    )


def spread(spans: Sequence[tuple[int, int]], width: int) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The columns, of `width`, that are in no span, and whether spans overlap."""
    gaps, end = [], 0
    ordered = sorted(spans)
    for start, stop in [*ordered, (width, width)]:
        if start > end:
            gaps.append((end, start))
        end = max(end, stop)
    return tuple(gaps), any(after[0] < before[1] for before, after in itertools.pairwise(ordered))
