"""Requests that wait for a step boundary, and what each would make of a seed (law 7).

A request is checked when it is made, against the state that the seed will have after those queued before it, and is
refused then or not at all. A fault that comes in between (a kernel fails, a load is late) can still take its ground
away: it is dropped at the boundary, with a line in the log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from esper_triton.contracts.errors import SlotEmbargoed
from esper_triton.kasmina.lifecycle import SeedLifecycleState, check_transition
from esper_triton.kasmina.schedules import Schedule
from esper_triton.kasmina.seed import LoadedKernel, LoadTicket, Seed

__all__ = [
    "Assign",
    "LoadFailed",
    "Loaded",
    "Move",
    "Outlook",
    "Request",
    "Reset",
    "SetAlpha",
    "Specialised",
    "TransitionQueue",
    "Unload",
    "Waiting",
    "follow",
]

_S = SeedLifecycleState
_REOPENED = (_S.CULLED, _S.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Asks something of one seed of a layer."""

    seed: int


@dataclass(frozen=True, kw_only=True)
class Assign(Request):
    """An artifact for the seed, whose load has `ticket`: to LOADING."""

    artifact_id: str
    ticket: LoadTicket


@dataclass(frozen=True, kw_only=True)
class Loaded(Request):
    """The load of `ticket` is done: to TRAINING, or GRAFTING where there is nothing to train."""

    ticket: LoadTicket
    kernel: LoadedKernel
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class LoadFailed(Request):
    """The load of `ticket` has failed: to CULLED."""

    ticket: LoadTicket
    error: BaseException


@dataclass(frozen=True, kw_only=True)
class Move(Request):
    """A move of the table."""

    target: SeedLifecycleState
    schedule: Schedule | None = None


@dataclass(frozen=True, kw_only=True)
class SetAlpha(Request):
    """A new alpha; ends a schedule."""

    value: float


@dataclass(frozen=True, kw_only=True)
class Specialised(Request):
    """A kernel of the same design as `instead_of`, which it takes the place of if the seed still has that one. The seed
    keeps its state and its parameters. `holder` pins the kernel until then."""

    instead_of: LoadedKernel
    kernel: LoadedKernel
    holder: object


@dataclass(frozen=True, kw_only=True)
class Unload(Request):
    """To DORMANT from wherever the seed is, and its slot open."""


@dataclass(frozen=True, kw_only=True)
class Reset(Request):
    """A slot whose seed is gone to DORMANT; by force during its embargo too, and from ROLLED_BACK."""

    force: bool


class Outlook(NamedTuple):
    """What a request is checked against: a seed as it is, or as it will be."""

    state: SeedLifecycleState
    ticket: LoadTicket | None
    opens_at: int  # the epoch until which the slot is embargoed

    @classmethod
    def of(cls, seed: Seed) -> Outlook:
        return cls(seed.state, seed.ticket, seed.opens_at)


def follow(layer: str, request: Request, before: Outlook, *, epoch: int, embargo_epochs: int) -> Outlook:
    """What the seed is after `request`. Raises InvalidTransition, SlotEmbargoed or ValueError where it cannot be."""
    seed, state = request.seed, before.state

    def check_open() -> None:
        if state is _S.CULLED and epoch < before.opens_at:
            raise SlotEmbargoed(layer, seed, epoch, before.opens_at)

    def culled() -> Outlook:
        return Outlook(_S.CULLED, None, epoch + embargo_epochs)

    match request:
        case Assign(ticket=ticket):
            check_open()
            if state is not _S.ERROR_RECOVERY:
                check_transition(layer, seed, _S.DORMANT if state in _REOPENED else state, _S.GERMINATED)
            return Outlook(_S.LOADING, ticket, 0)
        case Loaded(ticket=ticket, parameters=parameters):
            if before.ticket is not ticket:
                return before
            return Outlook(_S.TRAINING if parameters else _S.GRAFTING, None, 0)
        case LoadFailed(ticket=ticket):
            return culled() if before.ticket is ticket else before
        case Move(target=target):
            check_transition(layer, seed, state, target)
            if target is _S.DORMANT:
                check_open()
            if target in _LOADS_ONLY or (state is _S.LOADING and target is not _S.CULLED):
                raise ValueError(
                    f"seed {seed} of layer {layer!r}: {state.name} to {target.name} is made by load_kernel, "
                    "not by request"
                )
            return culled() if target is _S.CULLED else Outlook(target, None, 0)
        case SetAlpha():
            if not state.is_active or state is _S.FOSSILIZED:
                raise ValueError(
                    f"seed {seed} of layer {layer!r} is {state.name}: alpha is set from GRAFTING to FINE_TUNING"
                )
            return before
        case Specialised():
            return before
        case Unload():
            if state is not _S.DORMANT and state not in _REOPENED:
                way_out = _S.CANCELLED if state in (_S.GERMINATED, _S.TRAINING) else _S.CULLED
                check_transition(layer, seed, state, way_out)
            return Outlook(_S.DORMANT, None, 0)
        case Reset(force=force):
            if state is _S.DORMANT or (force and (state is _S.ROLLED_BACK or state in _REOPENED)):
                return Outlook(_S.DORMANT, None, 0)
            check_transition(layer, seed, state, _S.DORMANT)
            check_open()
            return Outlook(_S.DORMANT, None, 0)
        case _:
            raise TypeError(f"unknown request {request!r}")


_LOADS_ONLY = (_S.GERMINATED, _S.LOADING, _S.TRAINING)


class Waiting(NamedTuple):
    """A request, and what its seed was to be before and after it; None where that was not looked at."""

    request: Request
    before: Outlook | None
    after: Outlook | None


class TransitionQueue:
    """The requests of one layer that wait for its next boundary.

    Any thread may put; whoever commits holds `lock` for as long as it takes what is here and changes the seeds, so that
    a request is never checked against a half-made commit. `forward` does not come here (law 3).
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._waiting: list[Waiting] = []
        self._outlooks: dict[int, Outlook] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def outlook(self, seed: Seed) -> Outlook:
        """The seed as it will be after everything that waits."""
        with self.lock:
            return self._outlooks.get(seed.index) or Outlook.of(seed)

    def put(self, request: Request, seed: Seed, after: Callable[[Outlook], Outlook]) -> Outlook:
        """Queues a request of `seed` and returns what the seed was to be before it. What `after` raises passes through,
        and nothing is queued."""
        with self.lock:
            before = self.outlook(seed)
            self._outlooks[seed.index] = to = after(before)
            self._waiting.append(Waiting(request, before, to))
            return before

    def order(self, request: Request) -> None:
        """Queues a request that is checked at the boundary alone."""
        with self.lock:
            self._outlooks.pop(request.seed, None)
            self._waiting.append(Waiting(request, None, None))

    def put_back(self, held: list[Waiting]) -> None:
        """Queues again, before everything else, what was taken and could not be applied yet. Call it with `lock` held
        since `take`."""
        self._waiting[:0] = held
        for waiting in held:
            if waiting.after is not None:
                self._outlooks[waiting.request.seed] = waiting.after

    def take(self) -> list[Waiting]:
        """Empties the queue, in the order in which requests were made. Call it with `lock` held."""
        waiting, self._waiting = self._waiting, []
        self._outlooks.clear()
        return waiting
