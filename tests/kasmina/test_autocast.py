"""Layers with an active seed under autocast, and their gradients through a GradScaler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seeding import grow, law_2, linear_with_seeds, own_parameters
from torch import nn

from esper_triton.kasmina import KasminaLayer
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def layer(adapter_store: Urza, adapter_for: Callable[..., str]) -> KasminaLayer:
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2)
    grow(layer, 1, adapter_for(D, R), alpha=0.5)
    return layer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_seed_computes_in_its_own_type_on_the_output_of_an_autocast_host(
    layer: KasminaLayer, dtype: torch.dtype, compiled: bool
) -> None:
    x = torch.randn(5, IN)
    call: nn.Module = nn.Sequential(layer)
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")  # type: ignore[assignment]
    with torch.autocast("cpu", dtype):
        out, host = call(x), layer.default_transform(x)
    assert out.dtype == host.dtype == dtype
    assert torch.equal(out[:, :D], host[:, :D])
    parameters = {name: p.detach().double() for name, p in own_parameters(layer, 1).items()}
    wanted = law_2(host.double(), [((D, 2 * D), 0.5, parameters)])
    # float32 is exact beside one rounding to the narrow type.
    torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)
    stats = layer.get_layer_stats()
    assert stats["seeds"][1]["specialisation_misses"] == 0
    assert stats["forward_calls_active"] == (0 if compiled else 1)


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_under_autocast_are_those_of_the_same_layer_written_in_torch(
    layer: KasminaLayer, dtype: torch.dtype
) -> None:
    x = torch.randn(5, IN, requires_grad=True)
    own = own_parameters(layer, 1)
    leaves = [x, layer.weight, *own.values()]
    weights = torch.randn(5, 2 * D)
    with torch.autocast("cpu", dtype):
        out = layer(x)
        host = layer.default_transform(x)
    ours = torch.autograd.grad((out.float() * weights).sum(), leaves)
    reference = law_2(host.float(), [((D, 2 * D), 0.5, own)]).to(dtype)
    wanted = torch.autograd.grad((reference.float() * weights).sum(), leaves)
    for gradient, expected in zip(ours, wanted, strict=True):
        assert gradient.dtype == torch.float32
        bound = 4 * torch.finfo(dtype).eps * float(expected.abs().max())  # the narrow type's, of the host's products
        torch.testing.assert_close(gradient, expected, rtol=0, atol=bound)


def test_a_grad_scaler_steps_and_skips_a_step_that_overflows(layer: KasminaLayer) -> None:
    own = list(own_parameters(layer, 1).values())
    optimizer = torch.optim.SGD([*layer.parameters(), *own], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(5, IN)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = layer(x).square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = [p.detach().clone() for p in own]
    step(1.0)
    after = [p.detach().clone() for p in own]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scaler.get_scale() == 2.0**10
    step(float("inf"))
    assert all(torch.equal(a, p) for a, p in zip(after, own, strict=True))
    assert scaler.get_scale() == 2.0**9
