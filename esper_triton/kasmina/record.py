"""What one adopted layer keeps on the host, beside its device state."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from esper_triton.kasmina.events import Boundary, MissObserver, Observer, SpecialisationMiss
from esper_triton.kasmina.gates import Policy
from esper_triton.kasmina.kinds import Chunking, Kind
from esper_triton.kasmina.sampling import ActivationSampler, SamplingClock
from esper_triton.kasmina.seed import Seed
from esper_triton.kasmina.transitions import TransitionQueue
from esper_triton.kasmina.views import Extents
from esper_triton.urza import Urza

__all__ = ["LayerRecord", "Observed", "make_clock"]


@dataclass(frozen=True)
class Observed:
    """A training call's input (where a seed reads it) and host output, copied and detached: [rows, width] each, of a
    call of these extents."""

    x: Tensor | None
    h: Tensor
    extents: Extents


@dataclass(eq=False)
class LayerRecord:
    """Deep copies share the store and the loaded kernels."""

    name: str
    kind: Kind
    seeds: tuple[Seed, ...]
    chunking: Chunking
    urza: Urza | None
    guard: bool
    telemetry_enabled: bool
    policy: Policy = field(default_factory=Policy)
    auto_advance: bool = False
    epoch: int = 0
    step: int = 0
    packed: bytes = b""  # the state block as it was written last
    crc32: int = 0  # of `packed`
    sampling: bool = False  # whether this step's calls are checked for non-finite values
    forward_calls_active: int = 0
    calls_counted: int = 0  # of `forward_calls_active`, as of the last commit
    warned_of_recording: bool = False
    warned_of_packing: bool = False
    clock: SamplingClock | None = None  # which steps are sampled, for all layers of a model; None for none
    output_mean: Tensor | None = None  # [width], of the step before, for schedules that look at the drift
    # What follows is of this process and this object: neither copied nor pickled.
    queue: TransitionQueue = field(default_factory=TransitionQueue)
    owner: int = field(default_factory=threading.get_ident)  # the thread whose requests may commit at once
    deferred: bool = False  # every request waits for a boundary
    follows: bool = False  # another replica's queue decides, not this one's
    replicas: object | None = None  # what the replicas' boundaries go through (esper_triton.model.distributed)
    boundary: Boundary | None = None  # what stands at the model's boundaries (esper_triton.model.remote)
    observers: list[Observer] = field(default_factory=list)
    miss_observers: list[MissObserver] = field(default_factory=list)
    misses_told: set[SpecialisationMiss] = field(default_factory=set)
    replan: bool = False  # a commit has changed a kernel and no state, and the plan is of the one before
    observed: Observed | None = None
    sampler: ActivationSampler = field(default_factory=ActivationSampler)
    nonfinite: Tensor | None = None  # [num_seeds] bool on the device, while a seed's calls are checked
    output_mean_now: Tensor | None = None
    alphas: tuple[Tensor, tuple[Tensor, ...]] | None = None  # a state block, and its views of each seed's alpha
    prior_forward: Any = None  # an instance `forward` that the host had before a seed became active

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerRecord:
        own = {"seeds": copy.deepcopy(self.seeds, memo), "clock": copy.deepcopy(self.clock, memo)}
        return LayerRecord(**self.__getstate__() | own)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_THIS_OBJECT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the fields that are not kept get their defaults


def make_clock(record: LayerRecord) -> SamplingClock | None:
    """A clock as the layer's policy says; None where there is no telemetry."""
    if not record.telemetry_enabled:
        return None
    return SamplingClock(share=record.policy.statistics_share, every=record.policy.statistics_every)


_OF_THIS_OBJECT = frozenset(
    # `prior_forward` travels in the instance dictionary of the layer.
    {
        "queue",
        "owner",
        "deferred",
        "follows",
        "replicas",
        "boundary",
        "observers",
        "miss_observers",
        "misses_told",
        "replan",
        "observed",
        "sampler",
        "nonfinite",
        "output_mean_now",
        "alphas",
        "prior_forward",
    }
)
