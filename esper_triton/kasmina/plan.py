"""The plan that a layer's calls follow while a seed is active."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from esper_triton.kasmina.kinds import Kind
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.seed import Seed
from esper_triton.kasmina.views import Axes, Extents

if TYPE_CHECKING:
    from esper_triton.kasmina.sampling import ActivationSampler

__all__ = ["ActiveSeed", "Call", "Plan", "axes_for", "draw_dropout_seeds", "make_plan", "spread"]

_MOST = 2**63 - 1


class ActiveSeed(NamedTuple):
    """A seed of a plan. `alpha` is a view of the layer's state on the device; a new value needs no new plan."""

    seed: Seed
    program: KernelProgram
    start: int
    stop: int
    alpha: Tensor
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """Who writes which columns. `gaps` are the columns of no active seed. With `overlapping` spans every seed's own
    blend goes to a temporary and its difference from the host's span is added (law 2's sum)."""

    width: int
    axes: Axes  # of the host's output and of x
    x_name: str
    first_of_tuple: bool
    seeds: tuple[ActiveSeed, ...]
    gaps: tuple[tuple[int, int], ...]
    overlapping: bool
    guard: bool
    timed: bool
    sampler: ActivationSampler | None = None  # of what seeds put out

    @cached_property
    def has_positions(self) -> bool:
        """Whether a seed asks how the rows lie."""
        return any(active.program.layout != "rows" for active in self.seeds)

    @cached_property
    def draws(self) -> bool:
        """Whether a seed takes a dropout seed."""
        return any(active.program.draws for active in self.seeds)

    @cached_property
    def follows_mode(self) -> bool:
        """Whether a seed computes something else in training mode."""
        return any(active.program.follows_mode for active in self.seeds)


class Call(NamedTuple):
    """What a call has beside its matrices. `extents` where a seed asks for them; `dropout_seeds`, int64 with one for
    each seed of the plan, in training mode where a seed draws."""

    extents: Extents | None
    training: bool
    dropout_seeds: Tensor | None


def make_plan(record: LayerRecord, alphas: Sequence[Tensor], device: torch.device) -> Plan | None:
    """The plan of a layer's active seeds, or None where every one is silent."""
    seeds = tuple(
        ActiveSeed(seed, seed.kernel.program, *seed.span, alphas[seed.index], seed.parameters)
        for seed in record.seeds
        if seed.state.is_active and seed.kernel is not None
    )
    if not seeds:
        return None
    gaps, overlapping = spread([(active.start, active.stop) for active in seeds], record.kind.width)
    return Plan(
        width=record.kind.width,
        axes=axes_for(record.kind, (active.program for active in seeds)),
        x_name=record.kind.x_name,
        first_of_tuple=record.kind.first_of_tuple,
        seeds=seeds,
        gaps=gaps,
        overlapping=overlapping,
        guard=record.guard,
        # On another device a launch returns before it has run, and its end cannot be read without a sync.
        timed=record.telemetry_enabled and device.type == "cpu",
        sampler=record.sampler,
    )


def axes_for(kind: Kind, programs: Iterable[KernelProgram]) -> Axes:
    """Where the tensors of such a host have what. The order of rows costs a copy where the length comes first, so it is
    as the programs need it."""
    return Axes(kind.feature_dim, kind.length_first and any(program.layout != "rows" for program in programs))


def draw_dropout_seeds(count: int, device: torch.device) -> Tensor:
    """int64 [count], from torch's default generator of the device, as nn.Dropout draws there."""
    return torch.randint(_MOST, (count,), dtype=torch.int64, device=device)


def spread(spans: Sequence[tuple[int, int]], width: int) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The columns, of `width`, that are in no span, and whether spans overlap."""
    gaps, end = [], 0
    ordered = sorted(spans)
    for start, stop in [*ordered, (width, width)]:
        if start > end:
            gaps.append((end, start))
        end = max(end, stop)
    return tuple(gaps), any(after[0] < before[1] for before, after in itertools.pairwise(ordered))
