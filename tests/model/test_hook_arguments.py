from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import STEPS, Run, build, command
from torch import nn

import esper_triton as esper
from esper_triton.contracts.commands import KasminaCommand
from esper_triton.contracts.system import SystemState
from esper_triton.urza import Urza


@pytest.fixture
def model(adapter_store: Urza) -> esper.MorphableModel:
    return esper.wrap(nn.Sequential(nn.Linear(6, 16)), ["0"], seeds_per_layer=1, urza=adapter_store)


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def nothing_is_left(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    layers = [module for module in model.modules() if isinstance(module, esper.KasminaLayer)]
    return not any(layer._kasmina.observers for layer in layers) and not optimizer._optimizer_step_pre_hooks


class EveryOther:
    """A controller of the user's own, with `step` alone: a seed in epoch 1."""

    def __init__(self, artifact_id: str) -> None:
        self.artifact_id = artifact_id
        self.answers: list[str] = []

    def step(self, state: SystemState) -> list[KasminaCommand]:
        self.answers += [result.status.value for result in state.results]
        assert all(measured is None for measured in state.gradients)  # it did not ask for them
        free = state.seeds.state[0] == "DORMANT"
        wanted = command("request_germination", artifact_id=self.artifact_id)
        return [wanted] if state.epoch == 1 and free else []


def test_a_controller_with_step_alone_goes_through_checkpoints_and_a_resume(
    adapter_store: Urza, adapter_for: Callable[..., str], tmp_path: Path
) -> None:
    def trained(directory: Path | None, epochs: int) -> Run:
        controller = EveryOther(adapter_for(16, 4))
        run = build(adapter_store, checkpoints=directory, controller=controller, control_every=2, measure_every=1)
        for epoch in range(run.hook.resume(), epochs):
            run.epoch(epoch)
        return run

    straight = trained(None, 4)
    assert straight.hook.controller.answers[0] == "applied"
    trained(tmp_path / "run", 2)
    resumed = trained(tmp_path / "run", 4)
    assert resumed.losses == straight.losses[2 * STEPS :]
    mine, others = resumed.everything(), straight.everything()
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    state = resumed.hook.state_dict()
    assert state["controller"] is None
    resumed.hook.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": None}, TypeError, r"optimizer is None; expected a torch\.optim\.Optimizer"),
        ({"schedulers": 0.5}, TypeError, r"schedulers is 0\.5; expected a list of learning rate .* as \[scheduler\]"),
        ({"schedulers": [0.5]}, TypeError, r"schedulers\[0\] is 0\.5; expected a learning rate scheduler"),
        ({"controller": "heuristic"}, TypeError, "controller is 'heuristic'; expected"),
        ({"controller": lambda state: []}, TypeError, "controller is a function; expected"),
        ({"controller": esper.Heuristic}, TypeError, "controller is the class Heuristic; expected"),
        (
            {"divergence": 10.0},
            TypeError,
            r"divergence is 10\.0; expected .* esper\.LossWatch\(factor=10\.0\), or None",
        ),
        ({"divergence": esper.LossWatch}, TypeError, "divergence is the class LossWatch; expected"),
        ({"carry": [torch.Generator()]}, TypeError, r"carry is a list; expected a dict of objects by name"),
        ({"carry": {"x": 1}}, TypeError, r"carry\['x'\] is a int, which has no state_dict"),
        ({"validate": 0.5}, TypeError, r"validate is 0\.5; expected a function of the model"),
        ({"checkpoints": 3}, TypeError, "checkpoints is 3; expected a directory"),
        ({"control_every": None}, TypeError, "control_every is None; expected a whole number, at least 1"),
        ({"measure_every": 1.5}, TypeError, r"measure_every is 1\.5; expected a whole number, at least 0"),
        ({"keep": True}, TypeError, "keep is True; expected a whole number"),
        ({"repeats": "2"}, TypeError, "repeats is '2'; expected a whole number"),
        ({"max_rollbacks": 0}, ValueError, "max_rollbacks must be at least 1, found 0"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named_with_what_was_found_and_expected(
    model: esper.MorphableModel,
    optimizer: torch.optim.Optimizer,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        esper.GrowthHook(**({"model": model, "optimizer": optimizer} | options))
    assert nothing_is_left(model, optimizer)
    esper.GrowthHook(model, optimizer).close()  # and with what it expects it is made


def test_one_scheduler_instead_of_a_list_is_refused(
    model: esper.MorphableModel, optimizer: torch.optim.Optimizer
) -> None:
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(TypeError, match=r"schedulers is a ConstantLR; expected a list .* as \[scheduler\]"):
        esper.GrowthHook(model, optimizer, schedulers=scheduler)  # type: ignore[arg-type]


@pytest.mark.parametrize("attached", [True, False])
def test_a_scheduler_that_is_not_named_is_found(
    model: esper.MorphableModel, optimizer: torch.optim.Optimizer, attached: bool
) -> None:
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    if attached:
        esper.attach(optimizer, model, schedulers=[scheduler])
    with pytest.raises(ValueError, match=r"this SGD has a learning rate scheduler, .*schedulers=\[scheduler\]"):
        esper.GrowthHook(model, optimizer)
    esper.GrowthHook(model, optimizer, schedulers=[scheduler]).close()
    esper.GrowthHook(model, optimizer, schedulers=[]).close()  # it is out of use


@pytest.mark.parametrize("returned", [None, {"loss": 0.5}, torch.ones(2)])
def test_a_validation_that_returns_no_number_is_said_to(
    model: esper.MorphableModel, optimizer: torch.optim.Optimizer, returned: object
) -> None:
    hook = esper.GrowthHook(model, optimizer, validate=lambda model: returned)  # type: ignore[arg-type,return-value]
    kind = "None" if returned is None else f"a {type(returned).__name__}"
    with pytest.raises(TypeError, match=rf"what validate\(model\) returned is {kind}; expected a number"):
        hook.epoch_end(0)
    with pytest.raises(TypeError, match="metric is a dict; expected a number"):
        hook.epoch_end(0, metric={})  # type: ignore[arg-type]
    assert hook.epoch_end(0, metric=torch.tensor(0.5)) is None  # type: ignore[arg-type]
    assert hook.metrics == [0.5]


def test_a_model_or_an_optimizer_has_one_hook_at_a_time(
    adapter_store: Urza, model: esper.MorphableModel, optimizer: torch.optim.Optimizer
) -> None:
    first = esper.GrowthHook(model, optimizer)
    with pytest.raises(ValueError, match=r"this model has a GrowthHook already; close\(\) that one first"):
        esper.GrowthHook(model, optimizer)
    with pytest.raises(ValueError, match="this model has a GrowthHook already"):
        esper.GrowthHook(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other = esper.wrap(nn.Sequential(nn.Linear(6, 16)), ["0"], seeds_per_layer=1, urza=adapter_store)
    optimizer.add_param_group({"params": list(other.parameters())})
    with pytest.raises(ValueError, match="this optimizer has a GrowthHook already"):
        esper.GrowthHook(other, optimizer)
    first.close()
    assert nothing_is_left(model, optimizer)
    second = esper.GrowthHook(model, optimizer)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    second.step()
    assert (second.steps, model.kasmina_layers["0"]._kasmina.step) == (1, 1)


def test_an_optimizer_of_another_model_is_refused(
    adapter_store: Urza, model: esper.MorphableModel, optimizer: torch.optim.Optimizer
) -> None:
    wrapped = esper.wrap(nn.Sequential(nn.Linear(6, 16)), ["0"], seeds_per_layer=1, urza=adapter_store, copy=True)
    with pytest.raises(ValueError, match="this SGD has none of the parameters of this MorphableSequential; build it"):
        esper.GrowthHook(wrapped, optimizer)
    assert nothing_is_left(wrapped, optimizer)
    optimizer.add_param_group({"params": list(wrapped.parameters())})
    with_model = esper.attach(optimizer, model)
    with pytest.raises(ValueError, match=r"this SGD is attached to another model; detach\(\)"):
        esper.GrowthHook(wrapped, optimizer)
    with_model.detach()
    esper.GrowthHook(wrapped, optimizer).close()


def test_a_frozen_host_may_have_an_optimizer_of_other_parameters(model: esper.MorphableModel) -> None:
    model.requires_grad_(False)
    head = nn.Linear(16, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with esper.GrowthHook(model, optimizer) as hook:
        head(model(torch.randn(3, 6))).sum().backward()
        optimizer.step()
        hook.step()
        assert hook.steps == 1
