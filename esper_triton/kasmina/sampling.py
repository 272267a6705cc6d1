"""When activations are sampled, and the samples of one layer.

A step is chosen at the boundary before it. In a chosen step the first call of each seed that gradients are enabled in
leaves statistics on the device; the boundary after it asks for a copy on the host, and a later one finds it there.
Nothing waits for a device (laws 3 and 9). What a model computes does not depend on which steps these are: a sampled
call goes the way that it goes anyway, draws nothing, and a sample that fails is no fault of the seed.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.statistics import (
    ActivationStatistics,
    Moments,
    chosen_features,
    merged,
    moments_of,
    statistics_of,
    thinned,
)
from esper_triton.kasmina.views import Extents

if TYPE_CHECKING:
    from esper_triton.kasmina.plan import ActiveSeed
    from esper_triton.kasmina.seed import LoadedKernel, Seed

__all__ = ["ActivationSampler", "SamplingClock"]

_FIRST_GUESS = 0.05  # of a step's time, for what the first sample will take: it comes in the tenth step or so
_PAUSE = 2.0  # times what a step takes
_WEIGHT = 0.1  # of the last step in what a step takes
_log = logging.getLogger("esper_triton.kasmina")


class SamplingClock:
    """Says for all layers of a model which steps are sampled.

    With `every`, those whose number it divides; none for 0. Without it, as many as cost `share` of the time that steps
    take: each step earns that part of its own time, each sample is charged with what it has taken, as measured, and the
    next one comes when what has been earned since covers what the last one took. Nothing is earned in a pause: a step
    counts for no more than twice what steps take, so that validation or a checkpoint between two buys no sample.

    Attributes:
        samples: steps chosen so far. spent_ns, passed_ns: what samples have taken, and steps, from the first boundary
            to the last and without pauses, of this process.
    """

    def __init__(self, *, share: float, every: int | None) -> None:
        self.share, self.every = share, every
        self.samples, self.spent_ns, self.passed_ns = 0, 0, 0
        self._step: int | None = None
        self._chosen = False
        self._boundary_ns: int | None = None
        self._charged_ns = 0  # of `spent_ns`
        self._earned_ns = 0.0
        self._step_ns: float | None = None  # what a step takes, without samples: a moving average
        self._last_cost_ns: float | None = None  # of the last sample, so far

    def spend(self, ns: int) -> None:
        """Samples have taken so much time. Any thread."""
        self.spent_ns += ns

    def chooses(self, step: int) -> bool:
        """Whether step number `step`, which begins now, is sampled; the same however often it is asked."""
        if step != self._step:
            self._step, self._chosen = step, self._decide(step)
            self.samples += self._chosen
        return self._chosen

    def _decide(self, step: int) -> bool:
        now, before = time.perf_counter_ns(), self._boundary_ns
        self._boundary_ns = now
        spent = self.spent_ns - self._charged_ns
        self._charged_ns += spent
        took = 0 if before is None else self._took(now - before - spent)
        self.passed_ns += took + spent
        if self.every is not None:
            return self.every > 0 and step % self.every == 0
        if self._last_cost_ns is not None:
            self._last_cost_ns += spent
        needed = _FIRST_GUESS * took if self._last_cost_ns is None else self._last_cost_ns
        self._earned_ns = min(self._earned_ns + self.share * took - spent, needed)
        if took == 0 or self.share <= 0.0 or self._earned_ns < needed:
            return False
        self._last_cost_ns = 0.0
        return True

    def _took(self, ns: int) -> int:
        """What counts of the time between two boundaries."""
        if self._step_ns is None:
            self._step_ns = float(max(ns, 0))
        counted = min(max(ns, 0), int(_PAUSE * self._step_ns) + 1)
        self._step_ns += _WEIGHT * (counted - self._step_ns)
        return counted

    def __getstate__(self) -> dict[str, Any]:
        # What was measured is of this process and these layers. A copy of a model shares one copy among its layers.
        return {"share": self.share, "every": self.every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Mark(NamedTuple):
    """A sample on a device that runs by itself: events before it, after the launch of the kernel (None for no launch),
    and at its end."""

    seed: Seed
    start: torch.cuda.Event
    launched: torch.cuda.Event | None
    end: torch.cuda.Event


class _Reading(NamedTuple):
    """Statistics on their way to the host: float64 [seeds, 3], there when `arrived` has happened (None: already)."""

    seeds: tuple[tuple[Seed, LoadedKernel], ...]
    values: Tensor
    arrived: torch.cuda.Event | None
    marks: tuple[_Mark, ...]


class ActivationSampler:
    """The samples of one layer's seeds. Of one process and one layer: it is not copied with it.

    `due` has the seeds whose next call is sampled; a call that finds it empty has nothing else to do. Boundaries call
    `begin` and `end`, on the training thread. Calls may be on any, and each seed is taken by one of them.
    """

    def __init__(self) -> None:
        self.due: set[int] = set()
        self.spent_ns = 0
        self._moments: dict[int, tuple[LoadedKernel, Moments]] = {}  # since the epoch began, by seed
        self._taken: list[Seed] = []  # in this step
        self._marks: list[_Mark] = []
        self._readings: deque[_Reading] = deque()
        self._one: Tensor | None = None
        self._chosen: dict[int, Tensor | None] = {}  # by width, on the device of `_one`
        self._told = False

    # ---- boundaries

    def begin(self, seeds: Iterable[Seed], device: torch.device) -> None:
        """The step that begins is sampled."""
        try:
            self._prepare(seeds, device)
        except Exception as error:  # no room on the device, say: training goes on
            self._tell(None, error)

    def _prepare(self, seeds: Iterable[Seed], device: torch.device) -> None:
        running = [seed for seed in seeds if seed.kernel is not None and _runs(seed.state)]
        if self._one is None or self._one.device != device:
            with torch.inference_mode(False):
                self._one, self._chosen = torch.ones((), dtype=torch.float32, device=device), {}
            self._moments.clear()
        for width in {seed.span[1] - seed.span[0] for seed in running} - self._chosen.keys():
            self._chosen[width] = chosen_features(width, device)
        self.due = {seed.index for seed in running}

    def end(self) -> int:
        """A step has ended: asks for a copy of what it has left, and gives the seeds what has arrived. Returns the
        nanoseconds that samples have taken since the last time."""
        self.due = set()
        if self._taken:
            began = time.perf_counter_ns()
            try:
                self._ask()
            except Exception as error:
                self._tell(None, error)
            self.spent_ns += time.perf_counter_ns() - began
        while self._readings and self._give(self._readings[0]):
            self._readings.popleft()
        spent, self.spent_ns = self.spent_ns, 0
        return spent

    def begin_epoch(self) -> None:
        """What is sampled from now on is of another epoch. Seeds keep what they have until there is something newer."""
        self._moments.clear()

    def _ask(self) -> None:
        taken, self._taken = self._taken, []
        rows, seeds = [], []
        for seed in taken:
            kernel, moments = self._moments.get(seed.index, (None, None))
            if kernel is not None and moments is not None and kernel is seed.kernel:
                rows.append(statistics_of(moments, self._chosen[moments.mean.shape[0]]))
                seeds.append((seed, kernel))
        marks, self._marks = tuple(self._marks), []
        if not rows:
            return
        values, arrived = torch.stack(rows), None
        if values.is_cuda:
            copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            copy.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not annotate it
            arrived.record(torch.cuda.current_stream(values.device))
            values = copy
        self._readings.append(_Reading(tuple(seeds), values, arrived, marks))

    def _give(self, reading: _Reading) -> bool:
        """Whether the reading had arrived."""
        events = [reading.arrived, *(mark.end for mark in reading.marks)]
        if not all(event is None or event.query() for event in events):  # type: ignore[no-untyped-call]
            return False
        kernels = {seed.index: kernel for seed, kernel in reading.seeds}
        for mark in reading.marks:
            self.spent_ns += int(mark.start.elapsed_time(mark.end) * 1e6)
            # What a call's own clock cannot tell there.
            if mark.launched is not None and mark.seed.kernel is kernels.get(mark.seed.index):
                mark.seed.latency_ns += int(mark.start.elapsed_time(mark.launched) * 1e6)
                mark.seed.timed_calls += 1
        for (seed, kernel), values in zip(reading.seeds, reading.values.tolist(), strict=True):
            if seed.kernel is kernel:
                seed.activations = ActivationStatistics.of(values)
        return True

    # ---- calls

    def sample(
        self,
        active: ActiveSeed,
        x: Tensor | None,
        h: Tensor,
        extents: Extents | None,
        training: bool,
        dropout_seed: Tensor | None,
    ) -> None:
        """Takes a call in, if its seed is due. `h`, [rows, span], and `x`, [rows, width], are what the seed's kernel
        was given. That has written a blend, so it is run once more, at alpha 1, for what is k alone (law 2)."""
        if not self._takes(active.seed, h):
            return
        began, start, launched = time.perf_counter_ns(), _event(h), None
        try:
            with torch.no_grad():
                assert self._one is not None
                k = torch.empty(h.shape, dtype=h.dtype, device=h.device)
                active.program.forward(
                    {"h": h} if x is None else {"h": h, "x": x},
                    active.parameters,
                    self._one,
                    k,
                    extents=extents,
                    training=training,
                    dropout_seed=dropout_seed,
                )
                launched = _event(h)
                self._keep(active.seed, k)
        except Exception as error:  # of a measurement: the call itself has been right
            self._tell(active.seed, error)
        self._spend(active.seed, began, start, launched, h)

    def sample_output(self, seed: Seed, k: Tensor) -> None:
        """Takes k itself in, [rows, span], if the seed is due."""
        if not self._takes(seed, k):
            return
        began, start = time.perf_counter_ns(), _event(k)
        try:
            with torch.no_grad():
                self._keep(seed, k)
        except Exception as error:
            self._tell(seed, error)
        self._spend(seed, began, start, None, k)

    def _takes(self, seed: Seed, like: Tensor) -> bool:
        if seed.index not in self.due or not like.shape[0]:
            return False
        if like.is_cuda and torch.cuda.is_current_stream_capturing():  # what is captured would run again and again
            return False
        try:
            self.due.remove(seed.index)  # by one thread
        except KeyError:
            return False
        return True

    def _keep(self, seed: Seed, k: Tensor) -> None:
        assert seed.kernel is not None
        chosen = self._chosen[k.shape[1]]
        moments = moments_of(thinned(k), chosen)
        kernel, before = self._moments.get(seed.index, (None, None))
        if before is not None and kernel is seed.kernel:
            moments = merged(before, moments, chosen)
        self._moments[seed.index] = seed.kernel, moments
        self._taken.append(seed)

    def _spend(
        self,
        seed: Seed,
        began: int,
        start: torch.cuda.Event | None,
        launched: torch.cuda.Event | None,
        like: Tensor,
    ) -> None:
        end = _event(like)
        if start is not None and end is not None:
            self._marks.append(_Mark(seed, start, launched, end))
        self.spent_ns += time.perf_counter_ns() - began

    def _tell(self, seed: Seed | None, error: Exception) -> None:
        """One line of JSON, once."""
        if not self._told:
            self._told = True
            reason = f"{type(error).__name__}: {error}"
            index = None if seed is None else seed.index
            _log.warning("%s", json.dumps({"event": "sample_failed", "seed": index, "reason": reason[:500]}))


def _runs(state: SeedLifecycleState) -> bool:
    return state.is_active or state is SeedLifecycleState.TRAINING


def _event(like: Tensor) -> torch.cuda.Event | None:
    """An event of the device's current stream; None where a call has run when it returns."""
    if not like.is_cuda:
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch does not annotate it
    event.record(torch.cuda.current_stream(like.device))
    return event
