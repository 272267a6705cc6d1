from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from systems import system

import esper_triton as esper
from esper_triton.contracts.commands import CommandKind, KasminaCommand
from esper_triton.contracts.system import SystemState
from esper_triton.tamiyo import controller as module


class Bare:
    def __init__(self, answer: Any = ()) -> None:
        self.answer = answer

    def step(self, state: SystemState) -> Any:
        return self.answer


class Saved(Bare):
    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}


class Remembering(Saved):
    needs_gradients = True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.answer = state


def test_a_controller_needs_no_method_but_step() -> None:
    bare = Bare()
    module.check_controller(bare)
    assert not module.measures_gradients(bare)
    assert module.state_of(bare) is None
    module.load_state_into(bare, {"n": 1})  # of a controller that was another: nobody wants it
    assert module.commands_of(bare, system([])) == []


def test_what_a_controller_has_besides_is_used() -> None:
    own = Remembering()
    module.check_controller(own)
    assert module.measures_gradients(own)
    assert module.state_of(own) == {"n": 1}
    module.load_state_into(own, None)
    assert own.answer == ()
    module.load_state_into(own, {"n": 2})
    assert own.answer == {"n": 2}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("heuristic", "controller is 'heuristic'; expected an object with a method step"),
        (lambda state: [], "controller is a function; expected"),
        (esper.Heuristic, "controller is the class Heuristic; expected .* such as .*esper.Heuristic\\(urza\\)"),
        (object(), "controller is an object; expected"),
        (Saved(), "controller, a Saved, has state_dict and no load_state_dict; expected both, or neither"),
    ],
)
def test_what_is_no_controller_is_refused_by_what_it_is(given: object, found: str) -> None:
    with pytest.raises(TypeError, match=found):
        module.check_controller(given)


def test_what_a_step_returns_must_be_commands() -> None:
    command = KasminaCommand(command_id="1", layer="0", seed=0, command=CommandKind.CULL)
    assert module.commands_of(Bare((command,)), system([])) == [command]
    for answer, message in (
        (None, r"what Bare\.step returned is None; expected a list of KasminaCommand, \[\] for none"),
        (command.command, r"what Bare\.step returned has 'c' in it; expected KasminaCommand"),
        ([command, {"layer": "0"}], r"what Bare\.step returned has a dict in it; expected KasminaCommand"),
    ):
        with pytest.raises(TypeError, match=message):
            module.commands_of(Bare(answer), system([]))


def test_what_is_no_command_is_refused_when_it_is_submitted() -> None:
    manual = esper.Manual()
    with pytest.raises(TypeError, match=r"command is a dict; expected an esper_triton\..*KasminaCommand"):
        manual.submit({"command": "cull", "layer": "0", "seed": 0})  # type: ignore[arg-type]
    assert manual.step(system([])) == []
