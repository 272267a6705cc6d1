from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seeding import adapter, grow, linear_with_seeds, own_parameters
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.kasmina.gates import Policy, ReconstructionGate
from esper_triton.kasmina.training import relative_reconstruction_error
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


def two_layers(store: Urza) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, 2 * D), nn.ReLU(inplace=True), nn.Linear(2 * D, D))
    return esper.wrap(plain, ["0", "2"], seeds_per_layer=1, chunking="whole", urza=store)


def randomise(layer: KasminaLayer, seed: int, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in own_parameters(layer, seed).values():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def test_in_training_neither_side_sees_the_other_bit_by_bit(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    x = torch.randn(5, IN)
    plain = two_layers(adapter_store)
    wanted = plain(x)
    wanted.square().sum().backward()
    host_grads = [p.grad for p in plain.parameters()]

    model = two_layers(adapter_store)
    for name, width in (("0", 2 * D), ("2", D)):
        assert model.load_kernel_sync(name, 0, adapter_for(width, R))
        randomise(model.kasmina_layers[name], 0)
    seeds = list(esper.seed_parameters(model))
    out = model(x)
    assert torch.equal(out, wanted)
    (out.square().sum()).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), host_grads, strict=True))
    assert all(p.grad is None for p in seeds)
    loss = model.train_seeds()
    assert loss is not None
    assert loss > 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), host_grads, strict=True))
    alone = [p.grad.clone() for p in seeds if p.grad is not None]
    assert len(alone) == len(seeds)

    # Added to the main loss, both sides get the same bits.
    model.zero_grad()
    out = model(x)
    (out.square().sum() + model.seed_loss()).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), host_grads, strict=True))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(seeds, alone, strict=True))


def test_the_loss_and_its_gradients_are_those_of_float64(adapter_store: Urza, small: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2)
    assert layer.load_kernel_sync(1, small)
    randomise(layer, 1)
    x = torch.randn(4, IN)
    own = own_parameters(layer, 1)
    h = layer(x).detach()[:, D:].double()
    leaves = {name: p.detach().double().requires_grad_() for name, p in own.items()}
    wanted = (adapter(h, leaves) - h).square().sum() / h.square().sum()
    loss = layer.seed_loss()
    assert loss is not None
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(loss, list(own.values()))
    grads64 = torch.autograd.grad(wanted, list(leaves.values()))
    for grad, grad64 in zip(grads, grads64, strict=True):
        torch.testing.assert_close(grad.double(), grad64, rtol=1e-4, atol=1e-5)
    assert layer.seed_loss() is None  # the call is used up
    layer.step_boundary()
    (_, stats) = layer.get_layer_stats()["seeds"]
    assert stats["reconstruction_error"] == pytest.approx(wanted.sqrt().item(), rel=1e-4)


def test_a_seed_learns_its_own_loss_from_what_the_host_computes(adapter_store: Urza, small: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    assert layer.load_kernel_sync(0, small)
    layer.set_seed_loss(0, lambda k, h: (k - h.tanh()).square().mean())
    optimizer = torch.optim.Adam(own_parameters(layer, 0).values(), lr=1e-2)
    x = torch.randn(64, IN)
    losses = []
    for _ in range(60):
        layer(x)
        loss = layer.seed_loss()
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_seed_beside_an_active_one_learns_from_the_hosts_output_and_not_from_the_blend(
    adapter_store: Urza, small: str
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 2, chunking="whole")
    grow(layer, 0, small, alpha=1.0)
    assert layer.load_kernel_sync(1, small)
    seen: list[Tensor] = []

    def look(k: Tensor, h: Tensor) -> Tensor:
        seen.append(h)
        return relative_reconstruction_error(k, h)

    layer.set_seed_loss(1, look)
    x = torch.randn(3, IN)
    out = layer(x)
    assert layer.seed_loss() is not None
    assert torch.equal(seen[0], layer.default_transform(x))
    assert not torch.equal(seen[0], out)


def test_what_is_changed_in_place_after_the_call_does_not_reach_the_seed(adapter_store: Urza, small: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    assert layer.load_kernel_sync(0, small)
    seen: list[Tensor] = []
    layer.set_seed_loss(0, lambda k, h: seen.append(h) or k.sum())  # type: ignore[func-returns-value]
    x = torch.randn(3, IN)
    out = layer(x)
    host = out.detach().clone()
    out.add_(7.0)
    layer.seed_loss()
    assert torch.equal(seen[0], host)


@pytest.mark.parametrize("quiet", ["eval", "no_grad"])
def test_calls_that_train_nothing_leave_nothing(adapter_store: Urza, small: str, quiet: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    assert layer.load_kernel_sync(0, small)
    layer.train(quiet != "eval")
    with torch.set_grad_enabled(quiet != "no_grad"):
        layer(torch.randn(3, IN))
    assert layer.seed_loss() is None


def test_a_layer_without_a_seed_in_training_has_nothing_in_its_call(adapter_store: Urza, small: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    assert layer.load_kernel_sync(0, small)
    layer(torch.randn(3, IN))
    assert layer._forward_hooks
    layer.unload_kernel(0)
    assert not layer._forward_hooks
    assert not layer._forward_hooks_with_kwargs
    assert "forward" not in vars(layer)
    assert layer.seed_loss() is None


def test_a_seed_is_ready_once_it_reconstructs_the_host_or_its_steps_are_spent(adapter_store: Urza, small: str) -> None:
    gate = ReconstructionGate(max_error=0.01, max_steps=3)
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2, policy=Policy(to_grafting=gate))
    for seed in range(2):
        assert layer.load_kernel_sync(seed, small)
    randomise(layer, 1)
    layer.step_boundary()
    assert [layer.is_ready_for_transition(seed) for seed in range(2)] == [False, False]  # nothing was measured
    layer(torch.randn(3, IN))
    layer.seed_loss()
    layer.step_boundary()
    assert [layer.is_ready_for_transition(seed) for seed in range(2)] == [True, False]
    layer.step_boundary()
    assert [layer.is_ready_for_transition(seed) for seed in range(2)] == [True, True]


def test_a_seed_that_fails_in_training_is_culled_and_the_others_learn(adapter_store: Urza, small: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, 3 * D, 3)
    for seed in range(3):
        assert layer.load_kernel_sync(seed, small)
        randomise(layer, seed)
    own_parameters(layer, 0)["down_weight"].data = torch.zeros(1, 1)  # the launch fails
    own_parameters(layer, 1)["up_bias"].data.fill_(float("nan"))
    x = torch.randn(3, IN)
    out = layer(x)
    assert torch.equal(out, layer.default_transform(x))
    layer.seed_loss()
    layer.step_boundary()
    assert [layer.seed_state(seed) for seed in range(3)] == [S.CULLED, S.CULLED, S.TRAINING]
    assert isinstance(layer.last_error(1), ArithmeticError)
