"""The host side of a layer's seeds: what the device state mirrors and the dispatch plan is made from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from esper_triton.contracts.manifest import Manifest
from esper_triton.kasmina.cache import CacheKey
from esper_triton.kasmina.events import Observer
from esper_triton.kasmina.kinds import Chunking, Kind
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.urza import Urza

__all__ = ["LayerRecord", "LoadTicket", "LoadedKernel", "Seed"]

_ERROR_COUNT_MAX = 2**15 - 1  # error_count is int16 on the device


@dataclass(frozen=True)
class LoadedKernel:
    """An artifact that may run here, loaded, and the key under which the process's cache keeps it."""

    manifest: Manifest
    digest: str
    program: KernelProgram
    key: CacheKey


class LoadTicket:
    """Identity of one load under way. While it lives it pins what that load brought into the cache."""


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
    latency_ns: int = 0
    timed_calls: int = 0
    ticket: LoadTicket | None = None  # of the load under way; another one, or None, makes a late load's result void

    def fault(self, error: BaseException) -> None:
        """Notes that the seed's kernel failed in this call; it takes effect at the next commit."""
        self.last_error = error.with_traceback(None)  # its frames would keep the call's activations alive
        self.pending_faults += 1

    def count_faults(self) -> None:
        """Moves the pending faults into the error count."""
        self.error_count = min(self.error_count + self.pending_faults, _ERROR_COUNT_MAX)
        self.pending_faults = 0

    def reset_counters(self) -> None:
        """What a new occupant of the slot starts from."""
        self.error_count = self.pending_faults = self.specialisation_misses = 0
        self.latency_ns = self.timed_calls = 0

    @property
    def kernel_id(self) -> int:
        """First 8 bytes of the manifest's SHA-256 as a signed integer; 0 without a kernel."""
        if self.kernel is None:
            return 0
        return int.from_bytes(bytes.fromhex(self.kernel.digest)[:8], "big", signed=True)

    @property
    def exec_latency_us(self) -> float | None:
        """Mean time of the forward launches in microseconds, or None before the first measured call."""
        return self.latency_ns / self.timed_calls / 1000 if self.timed_calls else None

    def _without_load(self) -> dict[str, Any]:
        fields = dict(vars(self), ticket=None)
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


@dataclass(eq=False)
class LayerRecord:
    """What one adopted layer keeps beside its device state. Deep copies share the store and the loaded kernels."""

    name: str
    kind: Kind
    seeds: tuple[Seed, ...]
    chunking: Chunking
    urza: Urza | None
    guard: bool
    telemetry_enabled: bool
    forward_calls_active: int = 0
    warned_of_recording: bool = False
    warned_of_packing: bool = False
    observers: list[Observer] = field(default_factory=list)  # of this process: neither copied nor pickled
    prior_forward: Any = None  # an instance `forward` that the host had before a seed became active

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerRecord:
        fields = dict(vars(self))
        fields["seeds"] = copy.deepcopy(self.seeds, memo)
        fields |= {"prior_forward": None, "observers": []}  # the first travels in the instance dictionary
        return LayerRecord(**fields)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"prior_forward": None, "observers": []}
