"""Epochs that end inside of a window of accumulated gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Run, build
from seeding import copy_artifact
from torch import Tensor

import esper_triton as esper
from esper_triton.contracts.errors import CheckpointError
from esper_triton.kasmina import KernelCache
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.model.checkpoints import checkpoints_in
from esper_triton.urza import Urza

BATCHES, WINDOW, EPOCHS = 13, 3, 12  # one batch is left over: its gradient goes into the next epoch's first window


def accumulating(store: Urza, checkpoints: Path | None, **options: Any) -> Run:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=EPOCHS * (BATCHES // WINDOW) + 1)

    return build(store, checkpoints=checkpoints, schedule=schedule, **options)


def backward(run: Run) -> Tensor:
    x, y = run.batch()
    loss = (run.model(x) - y).square().mean()
    (loss / WINDOW).backward()
    run.losses.append(float(loss.detach()))
    return loss


def train(run: Run, epochs: int, *, each_backward: bool) -> list[Any]:
    """Returns what was measured of the layers' gradients, epoch by epoch."""
    measured = []
    for epoch in range(run.hook.resume(), epochs):
        for batch in range(BATCHES):
            loss = backward(run)
            ends = (batch + 1) % WINDOW == 0
            if ends:
                run.optimizer.step()
                run.optimizer.zero_grad()
                run.scheduler.step()
            if ends or each_backward:
                run.hook.step(loss)
        run.hook.epoch_end(epoch)
        measured.append(run.hook.system_state().gradients)
    return measured


def gradients(run: Run) -> dict[str, Tensor]:
    seeds = {f"{n}.{p}": t for n, layer in run.model.kasmina_layers.items() for p, t in layer.seed_parameters()}
    every = dict(run.model.named_parameters()) | seeds
    return {name: parameter.grad.clone() for name, parameter in every.items() if parameter.grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def adapter(adapter_store: Urza, adapter_for: Callable[..., str], store: Urza) -> str:
    """The only kernel in `store`."""
    return copy_artifact(adapter_store, store, adapter_for(16, 4))


@pytest.mark.parametrize("each_backward", [True, False])
def test_a_run_whose_epochs_end_inside_of_a_window_is_resumed_bit_for_bit(
    store: Urza, adapter: str, tmp_path: Path, each_backward: bool
) -> None:
    def run(directory: Path | None, epochs: int) -> tuple[Run, list[Any]]:
        KernelCache.process().reset()
        controller = esper.Heuristic(store, warmup_epochs=1, plateau_epochs=0)
        found = accumulating(store, directory, controller=controller, measure_every=4, control_every=2)
        return found, train(found, epochs, each_backward=each_backward)

    straight, measured = run(None, EPOCHS)
    of_seeds = 0
    for half in (1, 3, 4, 5):
        stopped, _ = run(tmp_path / f"{half}", half)
        left = gradients(stopped)
        assert "0.weight" in left
        of_seeds += any(name.startswith(("0.0.", "3.0.")) for name in left)
        backward(stopped)  # after the checkpoint, and lost
        torch.manual_seed(99)
        resumed, measured_later = run(tmp_path / f"{half}", EPOCHS)
        assert resumed.losses == straight.losses[half * BATCHES :]
        assert equal(resumed.everything(), straight.everything())
        assert equal(gradients(resumed), gradients(straight))
        assert resumed.hook.metrics == straight.hook.metrics
        own, other = resumed.hook.state_dict(), straight.hook.state_dict()
        assert own["watch"] == other["watch"]
        assert own["losses"] == other["losses"]
        assert len(own["losses"]) == each_backward
        assert measured_later == measured[half:]
        assert own["controller"] == other["controller"]
    assert any(any(of_layers) for of_layers in measured)
    assert of_seeds  # some of these windows had gradients of a seed in them
    seeds = esper.seed_parameters(straight.model, SeedLifecycleState.FOSSILIZED)
    assert len(list(seeds)) >= 4


def test_after_going_back_a_window_begins_without_the_gradients_and_losses_that_there_were(
    store: Urza, tmp_path: Path
) -> None:
    run = accumulating(store, None)
    train(run, 1, each_backward=True)
    assert gradients(run)
    for _ in range(2):
        run.hook.step(backward(run))
    run.hook.step(float("nan"))  # of a window that has not been stepped on
    assert run.hook.epoch_end(1, metric=float("nan")) is not None
    assert gradients(run) == {}
    assert run.hook.state_dict()["losses"] == []
    for _ in range(WINDOW):
        loss = backward(run)
    run.optimizer.step()
    assert run.hook.step(loss) is None  # the loss that was not finite went with the rest of its window


def test_the_checkpoint_before_the_first_step_has_nothing_of_the_window_that_the_step_ends(
    store: Urza, tmp_path: Path
) -> None:
    run = accumulating(store, tmp_path / "run", controller=esper.Heuristic(store), measure_every=1)
    for _ in range(WINDOW):
        run.hook.step(backward(run))
    run.optimizer.step()  # takes the checkpoint, since nobody has called resume()
    other = accumulating(store, tmp_path / "run", controller=esper.Heuristic(store), measure_every=1)
    assert other.hook.resume() == 0
    assert gradients(other) == {}
    state = other.hook.state_dict()
    assert (state["losses"], state["gradients"]["seen"]) == ([], {})


def test_parameters_of_the_optimizer_that_are_not_the_models_have_their_gradients_back_too(
    store: Urza, tmp_path: Path
) -> None:
    def build_one() -> tuple[Run, torch.nn.Parameter]:
        run = build(store)
        temperature = torch.nn.Parameter(torch.ones(2))
        run.hook.close()
        optimizer = torch.optim.SGD([{"params": run.model.parameters()}, {"params": [temperature]}], lr=0.1)
        run.hook = esper.GrowthHook(run.model, optimizer, checkpoints=tmp_path / "run")
        return run, temperature

    run, temperature = build_one()
    (run.model(run.batch()[0]).mean() * temperature.prod()).backward()
    gradient = temperature.grad
    assert gradient is not None
    assert run.hook.checkpoint()
    other, others_temperature = build_one()
    others_temperature.grad = torch.full((2,), 7.0)
    other.hook.resume()
    assert others_temperature.grad is not None
    assert torch.equal(others_temperature.grad, gradient)
    assert equal(gradients(other), gradients(run))


def test_a_checkpoint_of_the_release_before_is_read_as_one_without_gradients(store: Urza, tmp_path: Path) -> None:
    run = accumulating(store, tmp_path / "run")
    train(run, 1, each_backward=True)
    other = accumulating(store, tmp_path / "run")
    read = other.hook._store.newest

    def as_before(at_most: int | None = None) -> dict[str, Any] | None:
        state = read(at_most)
        assert state is not None
        assert state.pop("gradients")
        assert state["growth"].pop("losses")
        del state["growth"]["gradients"]["seen"]
        return state | {"schema_version": "1.0", "growth": state["growth"] | {"schema_version": "1.0"}}

    other.hook._store.newest = as_before  # type: ignore[method-assign]
    backward(other)
    assert other.hook.resume() == 1
    assert gradients(other) == {}
    assert torch.equal(other.model.state_dict()["0.weight"], run.model.state_dict()["0.weight"])


def test_gradients_that_do_not_fit_are_refused_with_nothing_changed(store: Urza, tmp_path: Path) -> None:
    run = accumulating(store, tmp_path / "run")
    train(run, 1, each_backward=True)
    assert len(checkpoints_in(tmp_path / "run")) == 2
    run.hook.close()
    parameters = list(run.model.parameters())
    turned = torch.optim.AdamW([parameters[1], parameters[0], *parameters[2:]])
    hook = esper.GrowthHook(
        run.model, turned, schedulers=[run.scheduler.__class__(turned, 0.1, total_steps=9)],
        checkpoints=tmp_path / "run", carry={"batches": run.batches},
    )  # fmt: skip
    before = run.model.state_dict()["0.weight"].clone()
    with torch.no_grad():
        run.model.get_parameter("0.weight").add_(1)
    with pytest.raises(CheckpointError, match=r"a gradient \(16, 6\) of parameter 0 of group 0, which is \(16,\)"):
        hook.resume()
    assert torch.equal(run.model.state_dict()["0.weight"], before + 1)
