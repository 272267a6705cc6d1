"""What a controller is, and the one that does what it is told."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from esper_triton.contracts.commands import CommandResult, KasminaCommand
from esper_triton.contracts.system import SystemState

__all__ = ["Controller", "Manual"]


class Controller(Protocol):
    """What `GrowthHook(controller=...)` takes.

    Attributes:
        needs_gradients: whether `SystemState.gradients` has to be measured now. It is read before every step of
            training and may change; measuring costs as much as some steps do.
    """

    @property
    def needs_gradients(self) -> bool: ...

    def step(self, state: SystemState) -> list[KasminaCommand]:
        """The commands that take effect now, between two steps of training; their `reason` says why. The answers are in
        the next state. Called on the training thread, so it should not take long."""

    def state_dict(self) -> dict[str, Any]:
        """What it knows, in plain values, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another has been."""


class Manual:
    """Passes on the commands that it is given, by any thread; decides nothing.

    A model that is on a bus takes the commands of the bus and of its page by itself (`esper_triton.connect`): this one
    is for code that holds no bus.

    Attributes:
        results: the answers so far, by command_id.
    """

    needs_gradients: ClassVar[bool] = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[KasminaCommand] = []
        self.results: dict[str, CommandResult] = {}

    def submit(self, command: KasminaCommand) -> None:
        """Queues a command."""
        with self._lock:
            self._waiting.append(command)

    def step(self, state: SystemState) -> list[KasminaCommand]:
        """Everything that was queued, in order."""
        self.results.update({result.command_id: result for result in state.results})
        with self._lock:
            commands, self._waiting = self._waiting, []
        return commands

    def state_dict(self) -> dict[str, Any]:
        """The commands that wait."""
        with self._lock:
            return {"waiting": [command.model_dump(mode="json") for command in self._waiting]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Queues them in place of what waits here."""
        with self._lock:
            self._waiting = [KasminaCommand.model_validate(command) for command in state["waiting"]]
