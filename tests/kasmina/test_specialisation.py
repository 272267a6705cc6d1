"""A kernel for other tensors in the place of the one that a seed has: the seed goes on as it is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from seeding import copy_artifact, grow, law_2, linear_with_seeds, own_parameters
from torch import Tensor

from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.kasmina.pending import PendingSpecialisation
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState


def half(layer: KasminaLayer, alpha: float, x: Tensor) -> Tensor:
    """Law 2 in float64, for a layer of one seed."""
    parameters = {name: p.detach().double() for name, p in own_parameters(layer, 0).items()}
    return law_2(layer.default_transform(x).detach().double(), [((0, D), alpha, parameters)])


@pytest.fixture
def layer(adapter_store: Urza, adapter_for: Callable[..., str]) -> KasminaLayer:
    """One seed with a kernel for float32, in a layer that is float16 by now."""
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    return layer.half()


def test_the_seed_contributes_again_from_the_boundary_on_with_its_state_and_its_parameters(
    layer: KasminaLayer, adapter_for: Callable[..., str]
) -> None:
    before, x = own_parameters(layer, 0), torch.randn(7, IN, dtype=torch.float16)
    moves: list[object] = []
    layer.on_transition(moves.append)
    other = adapter_for(D, R, "float16")
    assert PendingSpecialisation.of(layer, 0, other).start().result(30) is None
    host = layer.default_transform(x)
    assert torch.equal(layer(x), host)
    layer.step_boundary()
    out = layer(x)
    assert not torch.equal(out, host)
    # k is of a product of 16 and one of 4 float16 numbers near 1, summed in float32 and rounded twice.
    torch.testing.assert_close(out.double(), half(layer, 0.5, x), rtol=5e-3, atol=5e-3)
    out.float().square().sum().backward()
    assert all(p.grad is not None for p in before.values())
    after = own_parameters(layer, 0)
    assert all(after[name] is p for name, p in before.items())
    stats = layer.get_layer_stats()["seeds"][0]
    assert (stats["state"], stats["alpha"], stats["artifact_id"]) == ("GRAFTING", 0.5, other)
    assert moves == []
    assert layer.state.active_kernel_id[0] == layer._kasmina.seeds[0].kernel_id
    assert KernelCache.process().stats().pinned == 1


def test_a_seed_in_training_learns_on(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    assert layer.load_kernel_sync(0, adapter_for(D, R))
    layer.half()
    x = torch.randn(7, IN, dtype=torch.float16)
    layer(x)
    assert layer.seed_loss() is None
    PendingSpecialisation.of(layer, 0, adapter_for(D, R, "float16")).attempt()
    layer.step_boundary()
    layer(x)
    assert layer.seed_loss() is not None
    assert layer.seed_state(0) is S.TRAINING


@pytest.mark.parametrize("what", ["another design", "not there", "not proven"])
def test_what_is_no_specialisation_leaves_the_seed_as_it_was_and_one_line(
    adapter_store: Urza,
    adapter_for: Callable[..., str],
    store: Urza,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    mine = copy_artifact(adapter_store, store, adapter_for(D, R))
    layer = linear_with_seeds(store, IN, D, 1)
    grow(layer, 0, mine, alpha=0.5)
    layer.half()
    artifact, reason = {
        "another design": lambda: (copy_artifact(adapter_store, store, adapter_for(D, 8, "float16")), "has dims"),
        "not there": lambda: (adapter_for(D, R, "float16"), "no artifact"),
        "not proven": lambda: (
            copy_artifact(adapter_store, store, adapter_for(D, R, "float16"), status=KernelStatus.PENDING_BENCHMARKING),
            "PENDING_BENCHMARKING",
        ),
    }[what]()
    PendingSpecialisation.of(layer, 0, artifact).attempt()
    layer.step_boundary()
    x = torch.randn(7, IN, dtype=torch.float16)
    assert torch.equal(layer(x), layer.default_transform(x))
    stats = layer.get_layer_stats()["seeds"][0]
    assert (stats["state"], stats["artifact_id"], stats["error_count"]) == ("GRAFTING", mine, 0)
    (line,) = [json.loads(r.message) for r in caplog.records if "specialisation_failed" in r.message]
    assert (line["layer"], line["seed"], line["artifact_id"]) == ("fc", 0, artifact)
    assert reason in line["reason"]


def test_a_kernel_that_comes_when_the_layer_is_as_it_was_before_is_not_taken(
    layer: KasminaLayer, adapter_for: Callable[..., str]
) -> None:
    PendingSpecialisation.of(layer, 0, adapter_for(D, R, "float16")).attempt()
    layer.float()
    layer.step_boundary()
    x = torch.randn(7, IN)
    assert layer.get_layer_stats()["seeds"][0]["artifact_id"] == adapter_for(D, R)
    assert not torch.equal(layer(x), layer.default_transform(x))


def test_a_kernel_that_comes_when_the_seed_is_gone_is_let_go(
    layer: KasminaLayer, adapter_for: Callable[..., str]
) -> None:
    PendingSpecialisation.of(layer, 0, adapter_for(D, R, "float16")).attempt()
    layer.unload_kernel(0)
    layer.step_boundary()
    assert layer.seed_state(0) is S.DORMANT
    assert "forward" not in vars(layer)
    assert KernelCache.process().stats().pinned == 0
