"""The process-wide cache of loaded kernels."""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina.launcher import KernelProgram

__all__ = ["CacheKey", "CacheStats", "KernelCache"]

_BAN_AFTER_LAYERS = 3
_BAN_SECONDS = 30.0


class CacheKey(NamedTuple):
    """What a loaded kernel depends on. The digest is of the manifest, so a change of status or of one byte is a new
    key."""

    digest: str
    specialisation: str
    device: str


class CacheStats(NamedTuple):
    """Counters since the last reset, and what the cache holds now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    pinned: int


@dataclass(eq=False)
class _Entry:
    program: KernelProgram
    # Weak, so that a layer that is dropped without being unwrapped gives its pins back.
    holders: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)


@dataclass
class _Failures:
    layers: set[int] = field(default_factory=set)
    banned_until: float | None = None
    tried_until: float | None = None  # one load was let through after the ban
    raised: bool = False


class KernelCache:
    """Least-recently-used cache of `KernelProgram`, shared by every layer of the process.

    An entry is pinned while a holder (a seed that uses it) is alive and has not let go of it; pinned entries are never
    evicted, so the bounds may be exceeded by what is in use. `forward` never comes here: a dispatch plan holds its
    programs directly.

    Every method may be called from any thread. Two threads that miss the same key at once both load; the first to
    finish is kept and both get that one.

    Args:
        max_entries, max_bytes: bounds on what is kept (bytes of machine code).
        clock: seconds, monotonic; for the circuit breaker.
    """

    _process: KernelCache | None = None
    _process_lock = threading.Lock()

    def __init__(
        self,
        max_entries: int = 128,
        max_bytes: int = 256 * 1024 * 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[CacheKey, _Entry] = OrderedDict()
        self._failures: dict[str, _Failures] = {}
        self._hits = self._misses = self._evictions = 0

    @classmethod
    def process(cls) -> KernelCache:
        """The one cache of this process."""
        with cls._process_lock:
            if cls._process is None:
                cls._process = cls()
            return cls._process

    def load(self, key: CacheKey, loader: Callable[[], KernelProgram], holder: object) -> KernelProgram:
        """The program of `key`, from `loader()` on a miss, pinned for `holder`. What `loader` raises passes through."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._hits += 1
                self._entries.move_to_end(key)
                entry.holders.add(holder)
                return entry.program
            self._misses += 1
        program = loader()  # outside the lock: a load takes milliseconds and must not hold up other layers
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(program))
            entry.holders.add(holder)
            self._entries.move_to_end(key)
            self._evict()
            return entry.program

    def pin(self, key: CacheKey, program: KernelProgram, holder: object) -> None:
        """`holder` uses `program`, which it has already: neither a hit nor a miss."""
        with self._lock:
            self._entries.setdefault(key, _Entry(program)).holders.add(holder)

    def unpin(self, key: CacheKey, holder: object) -> None:
        """`holder` no longer uses `key`. The entry stays until it is evicted."""
        with self._lock:
            if key in self._entries:
                self._entries[key].holders.discard(holder)
                self._evict()

    def discard(self, key: CacheKey) -> None:
        """Forgets an entry whatever pins it, so that the next load starts from the stored bytes. Plans keep theirs."""
        with self._lock:
            if self._entries.pop(key, None) is not None:
                self._evictions += 1

    def _evict(self) -> None:
        bytes_held = sum(entry.program.code_bytes for entry in self._entries.values())
        for key in list(self._entries):
            if len(self._entries) <= self.max_entries and bytes_held <= self.max_bytes:
                return
            if not len(self._entries[key].holders):
                bytes_held -= self._entries.pop(key).program.code_bytes
                self._evictions += 1

    def record_failure(self, artifact_id: str, layer: int, *, raised: bool = False) -> None:
        """A kernel of `artifact_id` failed to load or to run in `layer` (any number that tells layers apart). The third
        layer bans it. One that `raised` while it ran is not loaded again unless forced."""
        with self._lock:
            failures = self._failures.setdefault(artifact_id, _Failures())
            failures.layers.add(layer)
            failures.raised |= raised
            if len(failures.layers) >= _BAN_AFTER_LAYERS:
                failures.banned_until, failures.tried_until = self._clock() + _BAN_SECONDS, None

    def check_not_failed(self, artifact_id: str) -> None:
        """Raises ArtifactRefused for a kernel that has failed while it ran in this process."""
        with self._lock:
            failures = self._failures.get(artifact_id)
        if failures is not None and failures.raised:
            raise ArtifactRefused(
                f"artifact {artifact_id} failed while it ran in this process and is not loaded again; load another "
                "artifact, or this one with force=True"
            )

    def check_not_banned(self, artifact_id: str) -> None:
        """Raises ArtifactRefused while a ban holds. After 30 s one load is let through (half-open): one more failure
        renews the ban, and 30 s without one end it."""
        with self._lock:
            failures = self._failures.get(artifact_id)
            if failures is None or failures.banned_until is None:
                return
            now = self._clock()
            if failures.tried_until is None and now >= failures.banned_until:
                failures.tried_until = now + _BAN_SECONDS
                return
            if failures.tried_until is not None and now >= failures.tried_until:
                failures.layers.clear()
                failures.banned_until = failures.tried_until = None
                return
            left = (failures.tried_until or failures.banned_until) - now
            state = "banned" if failures.tried_until is None else "on trial"
        raise ArtifactRefused(
            f"artifact {artifact_id} is {state} in this process for another {left:.0f} s: it failed in "
            f"{_BAN_AFTER_LAYERS} different layers; load another artifact, or try again then"
        )

    def stats(self) -> CacheStats:
        """Counters and contents now."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                entries=len(self._entries),
                bytes=sum(entry.program.code_bytes for entry in self._entries.values()),
                pinned=sum(1 for entry in self._entries.values() if len(entry.holders)),
            )

    def reset(self) -> None:
        """Empties the cache, its counters and its bans (for tests). Layers that hold a program keep it."""
        with self._lock:
            self._entries.clear()
            self._failures.clear()
            self._hits = self._misses = self._evictions = 0
