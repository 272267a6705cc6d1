"""The host side of one seed: what the device state mirrors and the dispatch plan is made from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from esper_triton.contracts.manifest import Manifest
from esper_triton.kasmina.cache import CacheKey
from esper_triton.kasmina.gates import Evaluation
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.schedules import Schedule
from esper_triton.kasmina.statistics import ActivationStatistics

__all__ = ["LoadTicket", "LoadedKernel", "Seed", "SeedLoss"]

_ERROR_COUNT_MAX = 2**15 - 1  # error_count is int16 on the device
_HEALTH_DECAY = 0.9

SeedLoss = Callable[[Tensor, Tensor], Tensor]
"""A 0-d loss of the seed's output k and the host's h, both [..., span], for a seed in TRAINING."""


@dataclass(frozen=True)
class LoadedKernel:
    """An artifact that may run here, loaded, and the key under which the process's cache keeps it. `load_latency_us`:
    from the request to the program, with everything that was checked."""

    manifest: Manifest
    digest: str
    program: KernelProgram
    key: CacheKey
    load_latency_us: float

    @functools.cached_property
    def number(self) -> int:
        """First 8 bytes of the manifest's SHA-256 as a signed integer."""
        return int.from_bytes(bytes.fromhex(self.digest)[:8], "big", signed=True)


@dataclass(eq=False)
class LoadTicket:
    """Identity of one load under way. While it lives it pins what that load brought into the cache.

    `arrived` tells that a kernel is in the queue; `took_effect` is None until a boundary has taken the result. `lost`:
    it runs in another process, whose fork this one is. `give_up` is called when nobody waits for the result any more.
    """

    lost: bool = False
    arrived: bool = False
    took_effect: bool | None = None
    give_up: Callable[[], None] | None = None


@dataclass(eq=False)
class Seed:
    """One seed. Forward only adds to `pending_faults`, `specialisation_misses` and the timing; commits do the rest."""

    index: int
    span: tuple[int, int]
    state: SeedLifecycleState = SeedLifecycleState.DORMANT
    alpha: float = 0.0
    artifact_id: str | None = None
    kernel: LoadedKernel | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    last_error: BaseException | None = None
    error_count: int = 0
    pending_faults: int = 0
    specialisation_misses: int = 0
    wanted: tuple[str, str] | None = None  # dtype and device of the last miss, until the boundary tells
    latency_ns: int = 0
    timed_calls: int = 0
    calls: int = 0  # in which the seed was active
    load_latency_us: float | None = None  # of its last load
    activations: ActivationStatistics | None = None  # as sampled last
    health: float = 0.0
    last_update_epoch: int = 0
    opens_at: int = 0  # the epoch until which the slot of a CULLED seed is embargoed
    stage_steps: int = 0  # boundaries since the last transition
    schedule: Schedule | None = None
    progress: int = 0  # of the schedule
    loss: SeedLoss | None = None  # of the slot, in TRAINING; None is the reconstruction of the host's output
    reconstruction_error: float | None = None  # in TRAINING, as of the last boundary
    evaluation: Evaluation | None = None
    is_ready: bool = False
    permanent_since_step: int | None = None  # of the layer, when it became FOSSILIZED
    permanent_evaluation: Evaluation | None = None  # what it was FOSSILIZED on, where that was measured
    ticket: LoadTicket | None = None  # of the load under way; another one, or None, makes a late load's result void
    measured_error: Tensor | None = None  # 0-d, on the device, until the boundary reads it
    # 0-d bool on the device, a view of the layer's, where calls are checked: they set it once the seed's output is not
    # finite where the host's is, and a boundary reads it. No part of a plan, or checking a step would compile it anew.
    nonfinite_flag: Tensor | None = None

    def fault(self, error: BaseException) -> None:
        """Notes that the seed's kernel failed in this call; it takes effect at the next commit."""
        self.last_error = error.with_traceback(None)  # its frames would keep the call's activations alive
        self.pending_faults += 1

    def miss(self, dtype: object, device: object) -> None:
        """Notes that a call's tensors were not what the seed's kernel is for."""
        self.specialisation_misses += 1
        self.wanted = (str(dtype), str(device))

    def count_faults(self) -> None:
        """Moves the pending faults into the error count."""
        self.error_count = min(self.error_count + self.pending_faults, _ERROR_COUNT_MAX)
        self.pending_faults = 0

    def count_calls(self, calls: int) -> None:
        """Takes note of `calls` calls since the last time, `pending_faults` of which failed."""
        self.calls += calls
        failed = min(self.pending_faults / calls, 1.0)
        self.health = _HEALTH_DECAY * self.health + (1.0 - _HEALTH_DECAY) * failed

    def enter(self, state: SeedLifecycleState, epoch: int) -> None:
        """The state, and what belongs to a stage alone as it is at its start."""
        self.state, self.stage_steps, self.last_update_epoch = state, 0, epoch
        self.schedule, self.progress = None, 0
        self.reconstruction_error, self.measured_error = None, None
        self.evaluation, self.is_ready, self.nonfinite_flag = None, False, None

    def reset(self) -> None:
        """What a new occupant of the slot starts from."""
        self.error_count = self.pending_faults = self.specialisation_misses = 0
        self.wanted = None
        self.latency_ns = self.timed_calls = self.calls = 0
        self.load_latency_us = None
        self.health, self.last_update_epoch, self.opens_at = 0.0, 0, 0
        self.permanent_since_step, self.permanent_evaluation = None, None

    @property
    def kernel_id(self) -> int:
        """First 8 bytes of the manifest's SHA-256 as a signed integer; 0 without a kernel."""
        return 0 if self.kernel is None else self.kernel.number

    @property
    def exec_latency_us(self) -> float | None:
        """Mean time of the forward launches in microseconds, or None before the first measured call."""
        return self.latency_ns / self.timed_calls / 1000 if self.timed_calls else None

    def _without_load(self) -> dict[str, Any]:
        fields = dict(vars(self), ticket=None, measured_error=None, nonfinite_flag=None, wanted=None)
        if self.state in (SeedLifecycleState.GERMINATED, SeedLifecycleState.LOADING):
            # The load under way belongs to the original; nobody would finish it here.
            fields |= {"state": SeedLifecycleState.DORMANT, "artifact_id": None}
        return fields

    def __deepcopy__(self, memo: dict[int, Any]) -> Seed:
        fields = self._without_load()
        fields["parameters"] = copy.deepcopy(self.parameters, memo)
        return Seed(**fields)

    def __getstate__(self) -> dict[str, Any]:
        # Machine code is not pickled: it is loaded again from the store, and verified again (law 4).
        return self._without_load() | {"kernel": None, "last_error": None}
