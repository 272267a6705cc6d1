"""Pipelines: which of the ways to write a request is built, and how that is remembered.

`fast` builds what compiles fastest. `standard` builds what the cost model says; where the target is this machine it
measures a few neighbours of that, too. `aggressive` searches on from the best for as long as it may; where the target
is not this machine its candidates are compiled and judged by what their binaries say.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import CompileError
from esper_triton.contracts.manifest import ArtifactId, Digest, TargetSpec
from esper_triton.tezzeret.forge import Forged, TooLarge, forge
from esper_triton.tezzeret.plan import Plan, plan_build
from esper_triton.tezzeret.request import Request
from esper_triton.tezzeret.rows import Tiles
from esper_triton.tezzeret.tuning import measure, static_cost
from esper_triton.tezzeret.writing import Choice, first_choice

if TYPE_CHECKING:
    import torch

__all__ = ["Announce", "BuildRecord", "device_of", "make", "neighbours", "plan_of"]

Announce = Callable[[str, float], None]
"""Told the stage of a request in words, and the part of its work that is done, from 0 to 1."""

_LIGHT = 4  # candidates of `standard` beside the first
_LIGHT_S = 0.6  # to measure them in
_ROUND_S = 1.0  # of `aggressive`, for each round of candidates
_BETTER = 0.97  # of the time before; what is closer may be noise
_LARGEST = 1 << 16  # of a block's extents
_WARPS = (1, 2, 4, 8)
# Elements of a result that a thread of a GPU holds at most, in blocks at least so wide: a compiler that has to spill
# most of a block takes minutes to find out.
_HELD_A_THREAD = 128
_HELD_COLUMNS = 256
_STAGES = (1, 2, 3, 4)
_LEAST_HELD = 16 * 256
# For each knob its limits; a neighbour has twice or half of it.
_LIMITS = {
    "rows": (16, 256),
    "cols": (16, 512),
    "depth": (16, 512),
    "sums_rows": (1, 32),
    "sum_depth": (16, 256),
    "full": (1024, 16384),
}
# The first four that change the kernels are what `standard` tries.
_STEPS = (
    ("rows", 0.5),
    ("sum_depth", 4.0),
    ("sums_rows", 4.0),
    ("depth", 0.5),
    ("rows", 2.0),
    ("cols", 0.5),
    ("cols", 2.0),
    ("depth", 2.0),
    ("sum_depth", 2.0),
    ("sum_depth", 0.5),
    ("sums_rows", 2.0),
    ("sums_rows", 0.5),
    ("full", 0.5),
    ("full", 2.0),
)


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Value):
    """One way to write a request. `cost` is its time as a part of that of the best one before it, as `tuning.Measured`
    has it, or what `static_cost` says. None where nothing was to choose."""

    tiles: Tiles
    num_warps: int
    num_stages: int
    cost: float | None = None
    rows_us: dict[int, float] = {}


class BuildRecord(_Value):
    """What a request was built as, and what else was tried. Kept in the store by the request's digest, unsigned."""

    schema_version: str = "1.0"
    request: Digest
    artifact_id: ArtifactId
    chosen: Candidate
    tried: tuple[Candidate, ...] = ()

    @property
    def choice(self) -> Choice:
        """To build it again."""
        chosen = self.chosen
        return Choice(tiles=chosen.tiles, num_warps=chosen.num_warps, num_stages=chosen.num_stages)

    @classmethod
    def read(cls, content: bytes | None, request: Request) -> BuildRecord | None:
        """None where nothing is remembered, or nothing that can be read."""
        if content is None:
            return None
        try:
            record = cls.model_validate_json(content)
        except ValidationError:
            return None
        extents = [getattr(record.chosen.tiles, knob) for knob in _LIMITS]
        sound = all(0 < extent <= _LARGEST and extent & (extent - 1) == 0 for extent in extents)
        return record if sound and record.request == request.digest else None


def device_of(target: TargetSpec) -> torch.device | None:
    """Where binaries for the target can run in this process; None where they cannot."""
    import torch

    from esper_triton.kasmina.gpu import find_gpu
    from esper_triton.tezzeret.targets import runs_on_this_cpu

    if target.backend != "cpu":
        return find_gpu(target)
    return torch.device("cpu") if runs_on_this_cpu(target) else None


def plan_of(request: Request, choice: Choice | None = None) -> Plan:
    """`plan_build` of a request, with its pipeline's first choice without one."""
    return plan_build(request.blueprint, request.dims, request.dtype, request.target, request.pipeline, choice=choice)


def neighbours(choice: Choice, target: TargetSpec, blueprint: Blueprint) -> Iterator[Choice]:
    """What differs from `choice` in one knob, by one step, and fits a GPU's registers as far as one can tell before."""
    for other in _steps_from(choice, target, blueprint):
        threads = 32 * other.num_warps
        block = other.tiles.rows * max(other.tiles.cols, _HELD_COLUMNS)
        if target.backend == "cpu" or not blueprint.ops or block <= _HELD_A_THREAD * threads:
            yield other


def _steps_from(choice: Choice, target: TargetSpec, blueprint: Blueprint) -> Iterator[Choice]:
    if blueprint.ops:
        for knob, step in _STEPS:
            low, high = _LIMITS[knob]
            value = int(getattr(choice.tiles, knob) * step)
            if low <= value <= high:
                changed: dict[str, Any] = {knob: value}
                yield dataclasses.replace(choice, tiles=dataclasses.replace(choice.tiles, **changed))
        separate = not choice.tiles.separate  # another fusion plan
        yield dataclasses.replace(choice, tiles=dataclasses.replace(choice.tiles, separate=separate))
    if target.backend != "cpu":
        for warps in _WARPS:
            if warps in (choice.num_warps // 2, choice.num_warps * 2):
                yield dataclasses.replace(choice, num_warps=warps)
        for stages in _STAGES:
            if abs(stages - choice.num_stages) == 1:
                yield dataclasses.replace(choice, num_stages=stages)


def make(request: Request, record: BuildRecord | None, announce: Announce) -> tuple[Forged, BuildRecord]:
    """Compiles a request: as it was built before, where that is known, and as its pipeline decides where not.

    Raises BlueprintError and CompileError.
    """
    if record is not None:
        plan = plan_of(request, record.choice)
        if plan.artifact_id == record.artifact_id:
            return forge(plan), record
    announce("compiling", 0.1)
    if request.pipeline == "fast":
        first = _first(request)
        return first.forged, _record(request, first.plan, first.choice)
    return _Search(request, announce).run()


def _candidate(choice: Choice, cost: float | None = None, rows_us: dict[int, float] | None = None) -> Candidate:
    return Candidate(
        tiles=choice.tiles,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
        cost=cost,
        rows_us=rows_us or {},
    )


def _record(
    request: Request, plan: Plan, choice: Choice, cost: float | None = None, tried: Sequence[Candidate] = ()
) -> BuildRecord:
    return BuildRecord(
        request=request.digest,
        artifact_id=plan.artifact_id,
        chosen=_candidate(choice, cost),
        tried=tuple(tried),
    )


@dataclasses.dataclass
class _Built:
    choice: Choice
    plan: Plan
    forged: Forged


def _first(request: Request) -> _Built:
    """The pipeline's first choice, with smaller blocks where a target's shared memory is too small for it.

    Raises CompileError; TooLarge where the smallest blocks are too large.
    """
    choice: Choice = first_choice(request.blueprint, request.target, request.pipeline)
    while True:
        plan = plan_of(request, choice)
        try:
            return _Built(choice, plan, forge(plan))
        except TooLarge:
            smaller = _smaller(choice)
            if smaller == choice or not request.blueprint.ops:  # a source that is written has its own blocks
                raise
            choice = smaller


def _smaller(choice: Choice) -> Choice:
    tiles = choice.tiles
    halved = dataclasses.replace(
        tiles,
        held=max(tiles.held // 2, _LEAST_HELD),
        cols=max(tiles.cols // 2, _LIMITS["cols"][0]),
        depth=max(tiles.depth // 2, _LIMITS["depth"][0]),
    )
    return dataclasses.replace(choice, tiles=halved)


class _Search:
    """From the first choice to better ones next to it."""

    def __init__(self, request: Request, announce: Announce) -> None:
        self.request, self.announce = request, announce
        self.device = device_of(request.target)
        self.seen: set[str] = set()
        self.tried: list[Candidate] = []
        self.is_thorough = request.pipeline == "aggressive"

    def run(self) -> tuple[Forged, BuildRecord]:
        """Raises CompileError where no candidate compiles: that of the first."""
        started = time.perf_counter()
        end = started + (self.request.budget_s if self.is_thorough else math.inf)
        best = _first(self.request)
        self.seen.add(best.plan.artifact_id)
        if not self.is_thorough and self.device is None:
            return best.forged, _record(self.request, best.plan, best.choice)
        cost: float | None = None
        while (plans := self._around(best.choice)) and time.perf_counter() < end:
            spent = (time.perf_counter() - started) / self.request.budget_s if self.is_thorough else 0.3
            self.announce(f"trying {len(self.seen)} ways", min(0.8, 0.1 + 0.7 * spent))
            best, cost = self._round([best, *self._compiled(plans, end)])
            if not self.is_thorough:
                break
        return best.forged, _record(self.request, best.plan, best.choice, cost, self.tried)

    def _around(self, choice: Choice) -> list[tuple[Choice, Plan]]:
        """Neighbours whose kernels are others than all that have been seen."""
        found: list[tuple[Choice, Plan]] = []
        for other in neighbours(choice, self.request.target, self.request.blueprint):
            if len(found) >= _LIGHT:
                break
            plan = plan_of(self.request, other)
            if plan.artifact_id not in self.seen:
                self.seen.add(plan.artifact_id)
                found.append((other, plan))
        return found

    def _compiled(self, plans: Sequence[tuple[Choice, Plan]], end: float) -> list[_Built]:
        built = []
        for choice, plan in plans:
            if time.perf_counter() > end:
                break
            try:
                built.append(_Built(choice, plan, forge(plan)))
            except CompileError:  # too large a block for this target: the search goes elsewhere
                continue
        return built

    def _round(self, candidates: Sequence[_Built]) -> tuple[_Built, float]:
        """The best of these, the first of which is the best so far."""
        rows: list[dict[int, float]] = [{} for _ in candidates]
        if self.device is None:
            costs = [static_cost(one.forged, one.choice) for one in candidates]
        else:
            seconds = _ROUND_S if self.is_thorough else _LIGHT_S
            measured = measure([one.forged for one in candidates], self.device, seconds)
            rows, costs = [one.rows_us for one in measured], [one.ratio for one in measured]
        self.tried += [
            _candidate(one.choice, cost, times) for one, cost, times in zip(candidates, costs, rows, strict=True)
        ]
        least = min(range(len(costs)), key=costs.__getitem__)
        chosen = least if costs[least] < _BETTER * costs[0] else 0
        return candidates[chosen], costs[chosen]
