"""Tags: how an artifact compares with others for the same target and dims of the same size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.contracts.query import MOST_ANSWERED, KernelMatch
from esper_triton.contracts.record import Figures, ProverTag, Tag
from esper_triton.contracts.report import RowsBenchmark
from esper_triton.urza import Urza

__all__ = ["ENOUGH", "class_of", "figures_of", "in_class", "retag", "tags_of"]

ENOUGH = 8
"""So many measured artifacts of a class, itself among them, and tags are percentiles; until then, fixed thresholds."""
_FAST, _MEDIUM = 0.2, 0.7
_LARGE = 0.75
_STABLE = 1e-6
_FASTER, _AS_FAST = 1.25, 0.8  # of eager PyTorch's speed: what counts as high and as medium while there are few
_MANY_BYTES = 4.0  # of memory for each byte that goes in and out
SPEEDS = ("high_speed", "medium_speed", "low_speed")
_TYPICAL_ROWS = 512


def class_of(dims: Mapping[str, int], dtype: str) -> tuple[str, int]:
    """The class of dims: the dtype, and the product of the dims to the next power of two."""
    return dtype, round(math.log2(max(1, math.prod(dims.values()))))


def figures_of(benchmarks: Sequence[RowsBenchmark], drift: float | None) -> Figures:
    """What the store chooses by: latency of a usual batch, memory of the largest call."""
    if not benchmarks:
        return Figures(drift=drift)
    usual = min(benchmarks, key=lambda one: abs(one.rows - _TYPICAL_ROWS))
    return Figures(
        latency_us=usual.kernel.p50_us, memory_bytes=max(one.tensor_bytes for one in benchmarks), drift=drift
    )


def in_class(store: Urza, manifest: Manifest) -> list[KernelMatch]:
    """The other validated artifacts of its target and class that were measured."""
    wanted = class_of(manifest.dims, manifest.dtype)
    found = store.query(
        target=manifest.target.label, dtype=manifest.dtype, statuses=(KernelStatus.VALIDATED,), limit=MOST_ANSWERED
    )
    return [
        one
        for one in found
        if one.id != manifest.id and class_of(one.dims, one.dtype) == wanted and one.figures.latency_us is not None
    ]


def tags_of(
    figures: Figures,
    others: Iterable[Figures],
    benchmarks: Sequence[RowsBenchmark] = (),
    io_bytes: int | None = None,
) -> tuple[Tag, ...]:
    """Tags by rank among `others` and itself, where these are enough; else by fixed thresholds on `benchmarks` (speed
    against eager PyTorch) and on bytes of memory for each of `io_bytes`.

    Speed: the fastest 20 % are `high_speed`, to 70 % `medium_speed`, the rest `low_speed`. The 25 % that take most
    memory are `high_memory`. A drift below 1e-6 is `numerically_stable`. What was not measured gives no tag.
    """
    tags: list[Tag] = []
    known = [figures, *others]
    latencies = sorted(one.latency_us for one in known if one.latency_us is not None)
    memories = sorted(one.memory_bytes for one in known if one.memory_bytes is not None)
    if figures.latency_us is not None:
        if len(latencies) >= ENOUGH:
            rank = latencies.index(figures.latency_us) / len(latencies)
            tags.append(SPEEDS[0 if rank < _FAST else 1 if rank < _MEDIUM else 2])
        else:
            speedup = _speedup(benchmarks)
            if speedup is not None:
                tags.append(SPEEDS[0 if speedup >= _FASTER else 1 if speedup >= _AS_FAST else 2])
    if figures.memory_bytes is not None:
        if len(memories) >= ENOUGH:
            if memories.index(figures.memory_bytes) / len(memories) >= _LARGE:
                tags.append("high_memory")
        elif io_bytes and figures.memory_bytes > _MANY_BYTES * io_bytes:
            tags.append("high_memory")
    if figures.drift is not None and figures.drift < _STABLE:
        tags.append("numerically_stable")
    return tuple(tags)


def _speedup(benchmarks: Sequence[RowsBenchmark]) -> float | None:
    """The geometric mean, over row counts, of eager PyTorch's median over the kernel's."""
    ratios = [math.log(one.eager.p50_us / one.kernel.p50_us) for one in benchmarks if one.eager and one.kernel.p50_us]
    return math.exp(sum(ratios) / len(ratios)) if ratios else None


def retag(store: Urza, manifest: Manifest) -> list[str]:
    """Gives the others of a class the tags that they have now that there is one more. Returns the ids that changed.

    Where there are too few for percentiles, their tags are what their own thresholds said.
    """
    ours = store.match(manifest.id)
    if ours is None:
        return []
    others = in_class(store, manifest)
    everyone = [one.figures for one in (ours, *others)]
    if len(everyone) < ENOUGH:
        return []
    changed = []
    for one in others:
        rest = list(everyone)
        rest.remove(one.figures)
        mine = tags_of(one.figures, rest)
        kept = tuple(tag for tag in one.tags if tag not in get_args(ProverTag))
        if set(mine) | set(kept) != set(one.tags):
            store.characterize(one.id, tags=(*mine, *kept), figures=one.figures)
            changed.append(one.id)
    return changed
