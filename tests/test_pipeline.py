"""The whole road with a real kernel from a real store: compiled, stored, proven, loaded, grafted, trained, and
refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from seeding import adapter, copy_artifact, flip_one_byte, own_parameters
from torch import nn

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactNotFound, CorruptObject
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KernelCache, SeedLifecycleState
from esper_triton.urza import Urza


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


def narrow_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


def test_full_pipeline_integration(store: Urza, adapter_path: Path) -> None:
    artifact = esper.compile(adapter_path, dims={"d": 64, "r": 16}, dtype=torch.float32, targets=["cpu"], urza=store)
    assert store.get(artifact.id).status is KernelStatus.VALIDATED

    model = esper.wrap(narrow_model(), ["2"], seeds_per_layer=1, urza=store)
    x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert asyncio.run(model.load_kernel("2", 0, artifact.id))
    model.graft("2", 0)
    optimizer.add_param_group({"params": list(esper.seed_parameters(model))})
    fresh = {name: p.detach().clone() for name, p in own_parameters(model[2], 0).items()}
    losses = []
    for step in range(30):
        model.set_alpha("2", 0, min(1.0, (step + 1) / 20))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        model.step_boundary()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    learned = own_parameters(model[2], 0)
    assert all(not torch.equal(learned[name], fresh[name]) for name in fresh)

    # What the trained model computes is the host plus the trained adapter, in float64 too.
    h = model[2].default_transform(model[1](model[0](x))).double()
    k = adapter(h, {name: p.double() for name, p in learned.items()})
    wanted = nn.functional.linear(k.relu(), model[4].weight.double(), model[4].bias.double())
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-4, atol=1e-4)
    assert model.get_model_stats()["error_count"] == 0


def test_model_wrapping(adapter_store: Urza, adapter_id: str) -> None:
    model = narrow_model()
    x = torch.randn(3, 20)
    host, keys, parameters = model(x), list(model.state_dict()), list(model.parameters())
    wrapped = esper.wrap(model, target_layers=[nn.Linear], seeds_per_layer=1, urza=adapter_store)
    assert wrapped is model
    assert list(model.kasmina_layers) == ["0", "2", "4"]
    assert torch.equal(model(x), host)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.load_kernel_sync("0", 0, adapter_id)
    model.graft("0", 0)
    model.set_alpha("0", 0, 1.0)
    own_parameters(model[0], 0)["up_bias"].data.fill_(0.5)
    h = model[0].default_transform(x)
    torch.testing.assert_close(model[0](x), h + 0.5)
    assert model.unload_kernel("0", 0)
    esper.unwrap(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(model(x), host)


def test_telemetry_collection(adapter_store: Urza, adapter_id: str) -> None:
    model = esper.wrap(narrow_model(), ["0", "2"], seeds_per_layer=1, urza=adapter_store)
    idle = model.kasmina_layers["2"].get_layer_stats()
    assert (idle["active_seeds"], idle["forward_calls_active"]) == (0, 0)
    assert idle["seeds"][0]["exec_latency_us"] is None
    for name in ("0", "2"):
        assert model.load_kernel_sync(name, 0, adapter_id)
        model.graft(name, 0)
    model.set_alpha("2", 0, 0.75)
    for _ in range(4):
        model(torch.randn(8, 20))
    stats = model.kasmina_layers["2"].get_layer_stats()
    (seed,) = stats["seeds"]
    assert (stats["active_seeds"], stats["forward_calls_active"]) == (1, 4)
    assert (seed["state"], seed["artifact_id"], seed["alpha"], seed["span"]) == ("GRAFTING", adapter_id, 0.75, (0, 64))
    assert seed["exec_latency_us"] > 0
    assert (seed["error_count"], seed["specialisation_misses"]) == (0, 0)
    assert stats["cache"]["misses"] == 1
    assert stats["cache"]["hits"] == 1  # the second layer found what the first had loaded
    assert stats["cache"]["bytes"] > 0


def test_error_handling(store: Urza, adapter_store: Urza, adapter_id: str) -> None:
    copy_artifact(adapter_store, store, adapter_id)
    model = esper.wrap(narrow_model(), ["0", "2"], seeds_per_layer=1, urza=store)
    x = torch.randn(3, 20)
    host = model(x)
    assert model.load_kernel_sync("0", 0, adapter_id)
    model.graft("0", 0)
    model.set_alpha("0", 0, 1.0)

    flip_one_byte(store, adapter_id)
    assert asyncio.run(model.load_kernel("2", 0, adapter_id)) is False
    second = model.kasmina_layers["2"]
    assert isinstance(second.last_error(0), CorruptObject)
    assert second.seed_state(0) is SeedLifecycleState.CULLED
    assert model.unload_kernel("2", 0)  # or the slot of a culled seed is embargoed
    assert model.load_kernel_sync("2", 0, "000000000000-cpu-standard-000000000000") is False
    assert isinstance(second.last_error(0), ArtifactNotFound)
    assert torch.equal(model(x), host)  # a fresh adapter equals the host, and the refused one contributes nothing

    first = model.kasmina_layers["0"]
    own_parameters(first, 0)["up_weight"].data = torch.zeros(2, 2)  # a fault at launch
    out = model(x)
    assert torch.equal(out, host)
    out.sum().backward()
    assert model[0].weight.grad is not None
    model.step_boundary()
    assert first.seed_state(0) is SeedLifecycleState.ERROR_RECOVERY
    assert first.get_layer_stats()["seeds"][0]["error_count"] == 1
    with pytest.raises(ValueError, match="no wrapped layer '3'"):
        model.unload_kernel("3", 0)
