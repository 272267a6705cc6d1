"""What a controller is, and the one that does what it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from esper_triton.contracts.arguments import found, refuse
from esper_triton.contracts.commands import CommandResult, KasminaCommand
from esper_triton.contracts.system import SystemState

__all__ = [
    "Controller",
    "Manual",
    "StatefulController",
    "check_controller",
    "commands_of",
    "load_state_into",
    "measures_gradients",
    "state_of",
]


class Controller(Protocol):
    """What `GrowthHook(controller=...)` takes: anything with this method.

    What a controller may have besides it: `needs_gradients`, whether `SystemState.gradients` has to be measured now
    (without it they never are), which is read before every step of training and may change, as measuring takes as long
    as some steps do; and what it takes to be in checkpoints (see `StatefulController`).
    """

    def step(self, state: SystemState) -> list[KasminaCommand]:
        """The commands that take effect now, between two steps of training; their `reason` says why. The answers are in
        the next state. Called on the training thread, so it should not take long."""


@runtime_checkable
class StatefulController(Controller, Protocol):
    """A controller whose knowledge is kept in checkpoints. Any other begins anew with each process."""

    def state_dict(self) -> dict[str, Any]:
        """What it knows, in plain values, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another has been."""


def check_controller(controller: object) -> None:
    """Raises TypeError for what is no controller, and for one that could be saved and not restored, or the reverse."""
    if isinstance(controller, type) or not callable(getattr(controller, "step", None)):
        expected = "an object with a method step(state), such as esper.Manual() or esper.Heuristic(urza)"
        raise refuse("controller", controller, expected)
    methods = ("state_dict", "load_state_dict")
    has = [method for method in methods if hasattr(controller, method)]
    if len(has) == 1:
        (lacks,) = set(methods) - set(has)
        raise TypeError(f"controller, {found(controller)}, has {has[0]} and no {lacks}; expected both, or neither")


def measures_gradients(controller: Controller | None) -> bool:
    """Whether it asks for `SystemState.gradients` now."""
    return bool(getattr(controller, "needs_gradients", False))


def commands_of(controller: Controller, state: SystemState) -> list[KasminaCommand]:
    """What it wants done. Raises TypeError where that is no list of commands."""
    what, answer = f"what {type(controller).__name__}.step returned", controller.step(state)
    if not isinstance(answer, Iterable):
        raise refuse(what, answer, "a list of KasminaCommand, [] for none")
    commands = list(answer)
    for command in commands:
        if not isinstance(command, KasminaCommand):
            raise TypeError(f"{what} has {found(command)} in it; expected KasminaCommand")
    return commands


def state_of(controller: Controller | None) -> dict[str, Any] | None:
    """Its part of a checkpoint; None where it keeps nothing."""
    return controller.state_dict() if isinstance(controller, StatefulController) else None


def load_state_into(controller: Controller | None, state: Mapping[str, Any] | None) -> None:
    """Gives a controller its part of a checkpoint, where there is one and it wants it."""
    if state is not None and isinstance(controller, StatefulController):
        controller.load_state_dict(state)


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
        """Queues a command. Raises TypeError for what is none."""
        if not isinstance(command, KasminaCommand):
            raise refuse("command", command, "an esper_triton.contracts.commands.KasminaCommand")
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
