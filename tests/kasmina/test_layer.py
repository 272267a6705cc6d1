from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from seeding import (
    adapter,
    break_launches,
    copy_artifact,
    flip_one_byte,
    grow,
    law_2,
    linear_with_seeds,
    own_parameters,
)
from torch import nn

from esper_triton.contracts.errors import ArtifactRefused, CorruptObject, InvalidTransition, SlotEmbargoed
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.kasmina import loading as loading_module
from esper_triton.kasmina.events import SpecialisationMiss
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState


@pytest.fixture
def layer(adapter_store: Urza) -> KasminaLayer:
    return linear_with_seeds(adapter_store, IN, 2 * D, 2)


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


# ---- adoption


def test_adoption_keeps_the_object_and_gives_it_a_class_made_once(adapter_store: Urza) -> None:
    linear = nn.Linear(3, 8)
    layer = KasminaLayer.adopt(linear, num_seeds=2, urza=adapter_store)
    assert layer is linear
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "KasminaLinear"
    assert type(layer) is type(KasminaLayer.adopt(nn.Linear(2, 4), num_seeds=1))


def test_adopting_twice_is_an_error_that_says_so(layer: KasminaLayer) -> None:
    with pytest.raises(ValueError, match="'fc' is already a KasminaLayer; unwrap it first"):
        KasminaLayer.adopt(layer)


def test_a_class_that_uses_a_name_of_the_layer_is_refused_and_unchanged() -> None:
    class Stateful(nn.Linear):
        state = "mine"

    module = Stateful(3, 8)
    with pytest.raises(TypeError, match="Stateful already has state"):
        KasminaLayer.adopt(module, num_seeds=1)
    assert type(module) is Stateful


def test_constructing_the_adopted_class_makes_a_host_layer(layer: KasminaLayer) -> None:
    other = type(layer)(3, 5, bias=False)
    assert type(other) is nn.Linear
    assert other.bias is None


def test_the_default_transform_is_the_hosts_forward_and_shows_its_attributes(layer: KasminaLayer, small: str) -> None:
    x = torch.randn(3, IN)
    host = nn.functional.linear(x, layer.weight, layer.bias)
    grow(layer, 0, small, alpha=1.0)
    assert torch.equal(layer.default_transform(x), host)
    assert layer.default_transform.weight is layer.weight
    assert not torch.equal(layer(x), host)


def test_an_instance_forward_that_was_there_before_is_what_is_blended_and_what_remains(
    layer: KasminaLayer, small: str
) -> None:
    doubled = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)  # noqa: E731
    layer.forward = doubled
    x = torch.randn(3, IN)
    grow(layer, 0, small, alpha=1.0)
    wanted = law_2(doubled(x), [((0, D), 1.0, own_parameters(layer, 0))])
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    layer.unload_kernel(0)
    assert layer.forward is doubled


def test_the_repr_shows_every_seed_and_its_state(layer: KasminaLayer, small: str) -> None:
    layer.load_kernel_sync(1, small)
    assert "in_features=6" in repr(layer)
    assert "seeds=[DORMANT, TRAINING]" in repr(layer)


@pytest.mark.parametrize(
    ("host", "x"),
    [
        (nn.Linear(3, D), torch.randn(2, 3)),
        (nn.Embedding(5, D), torch.tensor([[0, 4], [1, 1]])),
        (nn.LayerNorm(D), torch.randn(2, 3, D)),
        (nn.RMSNorm(D), torch.randn(4, D)),
        (nn.Identity(), torch.randn(4, D)),
        (nn.Identity(), torch.randn(D, 4).T),
        (nn.Identity(), torch.randn(D)),
    ],
    ids=["Linear", "Embedding", "LayerNorm", "RMSNorm", "Identity", "transposed", "one row"],
)
def test_every_kind_of_host_grows(adapter_store: Urza, small: str, host: nn.Module, x: torch.Tensor) -> None:
    layer = KasminaLayer.adopt(
        host, num_seeds=1, urza=adapter_store, features=D if isinstance(host, nn.Identity) else None
    )
    grow(layer, 0, small, alpha=0.5)
    h = layer.default_transform(x)
    wanted = law_2(h, [((0, D), 0.5, own_parameters(layer, 0))])
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer(x), h)


# ---- loading, and the moves of a seed


def test_a_seed_goes_to_training_and_contributes_only_after_it_is_grafted(layer: KasminaLayer, small: str) -> None:
    x = torch.randn(3, IN)
    host = layer(x)
    assert layer.load_kernel_sync(0, small)
    assert layer.seed_state(0) is S.TRAINING
    assert "forward" not in vars(layer)
    layer.graft(0)
    assert layer.seed_state(0) is S.GRAFTING
    assert torch.equal(layer(x), host)  # alpha starts at 0
    assert layer.state.lifecycle_states.tolist() == [S.GRAFTING, S.DORMANT]
    assert layer.state.active_kernel_id[0] != 0


async def test_loading_runs_off_the_event_loops_thread_while_the_host_path_goes_on(
    layer: KasminaLayer, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go, threads = threading.Event(), threading.Event(), []
    load = loading_module.load

    def slow(*args: object) -> object:
        threads.append(threading.get_ident())
        started.set()
        assert go.wait(timeout=30)
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loading_module, "load", slow)
    x = torch.randn(3, IN)
    host = layer(x)
    task = asyncio.create_task(layer.load_kernel(0, small))
    while not started.is_set():
        await asyncio.sleep(0)
    assert layer.seed_state(0) is S.LOADING
    assert torch.equal(layer(x), host)
    with pytest.raises(InvalidTransition):
        await layer.load_kernel(0, small)
    go.set()
    assert await task
    assert threads == [threads[0]]
    assert threads[0] != threading.get_ident()
    assert layer.seed_state(0) is S.TRAINING


async def test_unloading_while_a_load_is_under_way_makes_its_result_void(
    layer: KasminaLayer, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()
    load = loading_module.load

    def slow(*args: object) -> object:
        started.set()
        assert go.wait(timeout=30)
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loading_module, "load", slow)
    task = asyncio.create_task(layer.load_kernel(0, small))
    while not started.is_set():
        await asyncio.sleep(0)
    assert layer.unload_kernel(0)
    assert await task is False  # at once, while the load goes on
    go.set()
    for thread in [t for t in threading.enumerate() if t.name.startswith("esper-load")]:
        thread.join(timeout=60)
    layer.commit()  # what it has queued is void
    assert layer.seed_state(0) is S.DORMANT
    gc.collect()
    assert KernelCache.process().stats().pinned == 0


async def test_a_cancelled_load_does_not_leave_its_seed_loading(
    layer: KasminaLayer, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(*args: object) -> object:
        started.set()
        assert go.wait(timeout=30)
        raise RuntimeError("nobody waits any more")

    monkeypatch.setattr(loading_module, "load", slow)
    task = asyncio.create_task(layer.load_kernel(0, small))
    while not started.is_set():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    assert layer.seed_state(0) is S.CULLED


def test_a_failed_load_logs_one_line_of_json_and_keeps_the_exception(
    layer: KasminaLayer, store: Urza, adapter_store: Urza, small: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy_artifact(adapter_store, store, small)
    flip_one_byte(store, small)
    layer = linear_with_seeds(store, IN, D, 1)
    with caplog.at_level(logging.DEBUG, logger="esper_triton.kasmina"):
        assert layer.load_kernel_sync(0, small) is False
    (line,) = caplog.records
    fields = json.loads(line.getMessage())
    assert line.levelno == logging.WARNING
    assert {k: fields[k] for k in ("event", "layer", "seed", "artifact_id", "error")} == {
        "event": "load_kernel_failed",
        "layer": "fc",
        "seed": 0,
        "artifact_id": small,
        "error": "CorruptObject",
    }
    assert isinstance(layer.last_error(0), CorruptObject)
    assert fields["reason"] == str(layer.last_error(0))


def test_a_culled_slot_takes_another_artifact_once_it_was_unloaded(layer: KasminaLayer, small: str) -> None:
    assert not layer.load_kernel_sync(0, "000000000000-cpu-standard-000000000000")
    assert layer.seed_state(0) is S.CULLED
    with pytest.raises(SlotEmbargoed, match=r"takes no kernel before epoch 5 \(now 0\)"):
        layer.load_kernel_sync(0, small)
    assert layer.unload_kernel(0)
    assert layer.load_kernel_sync(0, small)
    assert layer.last_error(0) is None


@pytest.mark.parametrize(
    ("width", "num_seeds", "dtype", "message"),
    [
        (D + 1, 1, torch.float32, r"computes 16 features \(d\), seed 0 of layer 'fc' has 17 .*with d=17"),
        (D, 2, torch.float32, r"has 8 \(columns 0 to 7\)"),
        (D, 1, torch.float64, "is for float32, seed 0 of layer 'fc' is float64"),
    ],
)
def test_an_artifact_of_another_width_or_dtype_is_refused_with_what_would_fit(
    adapter_store: Urza, small: str, width: int, num_seeds: int, dtype: torch.dtype, message: str
) -> None:
    layer = linear_with_seeds(adapter_store, IN, width, num_seeds).to(dtype)
    assert layer.load_kernel_sync(0, small) is False
    with pytest.raises(ArtifactRefused, match=message):
        raise layer.last_error(0)  # type: ignore[misc]


def test_a_layer_without_a_store_says_so_and_changes_nothing(small: str) -> None:
    layer = KasminaLayer.adopt(nn.Linear(IN, D), num_seeds=1)
    with pytest.raises(ValueError, match="no Urza to load"):
        layer.load_kernel_sync(0, small)
    assert layer.seed_state(0) is S.DORMANT


@pytest.mark.parametrize("seed", [-1, 2, True, "0"])
def test_a_seed_that_does_not_exist_is_an_index_error(layer: KasminaLayer, seed: int) -> None:
    with pytest.raises(IndexError, match="has seeds 0 to 1"):
        layer.seed_state(seed)


def test_parameters_are_drawn_as_the_blueprint_says_and_the_same_again(adapter_store: Urza, small: str) -> None:
    first, second = (linear_with_seeds(adapter_store, IN, 2 * D, 2) for _ in range(2))
    for layer in (first, second):
        assert layer.load_kernel_sync(0, small)
    a, b = own_parameters(first, 0), own_parameters(second, 0)
    assert all(torch.equal(a[name], b[name]) for name in a)
    bound = (1 / D) ** 0.5  # kaiming_uniform with a = sqrt(5), fan-in 16
    assert 0.5 * bound < a["down_weight"].abs().max() <= bound
    assert not a["up_weight"].any()
    assert first.load_kernel_sync(1, small)
    assert not torch.equal(own_parameters(first, 1)["down_weight"], a["down_weight"])


def test_unloading_frees_everything_and_is_idempotent(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    assert KernelCache.process().stats().pinned == 1
    assert layer.unload_kernel(0) is True
    assert layer.unload_kernel(0) is False
    assert list(layer.seed_parameters()) == []
    assert KernelCache.process().stats().pinned == 0
    assert not layer.state.storage.any()
    assert "forward" not in vars(layer)


def test_two_seeds_of_one_artifact_share_the_loaded_kernel(layer: KasminaLayer, small: str) -> None:
    assert layer.load_kernel_sync(0, small)
    assert layer.load_kernel_sync(1, small)
    cache = layer.get_layer_stats()["cache"]
    assert (cache["misses"], cache["hits"], cache["entries"]) == (1, 1, 1)


def test_a_layer_that_is_dropped_gives_its_pins_back(adapter_store: Urza, small: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, small, alpha=1.0)
    del layer
    gc.collect()
    assert KernelCache.process().stats().pinned == 0


def test_frozen_states_freeze_the_parameters_and_a_fossil_stays(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    trains = {}
    for state in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED):
        layer.request_transition(0, state)
        trains[state] = {p.requires_grad for p in own_parameters(layer, 0).values()}
    assert trains == {S.STABILIZATION: {False}, S.EVALUATING: {False}, S.FINE_TUNING: {True}, S.FOSSILIZED: {False}}
    with pytest.raises(InvalidTransition, match="the state is final"):
        layer.unload_kernel(0)
    with pytest.raises(ValueError, match="is FOSSILIZED"):
        layer.set_alpha(0, 0.5)
    x = torch.randn(2, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in own_parameters(layer, 0).values())


def test_a_move_that_the_table_does_not_have_changes_nothing(layer: KasminaLayer, small: str) -> None:
    assert layer.load_kernel_sync(0, small)
    before = layer.state.storage.clone()
    with pytest.raises(InvalidTransition):
        layer.request_transition(0, S.FOSSILIZED)
    assert layer.seed_state(0) is S.TRAINING
    assert torch.equal(layer.state.storage, before)


def test_states_that_loading_enters_cannot_be_asked_for(layer: KasminaLayer) -> None:
    with pytest.raises(ValueError, match="DORMANT to GERMINATED is made by load_kernel"):
        layer.request_transition(0, S.GERMINATED)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_outside_of_zero_to_one_is_a_value_error(layer: KasminaLayer, small: str, value: float) -> None:
    grow(layer, 0, small, alpha=0.5)
    with pytest.raises(ValueError, match="alpha must be from 0 to 1"):
        layer.set_alpha(0, value)
    assert layer.state.alpha(0) == 0.5


def test_alpha_of_a_seed_that_does_not_contribute_is_a_value_error(layer: KasminaLayer, small: str) -> None:
    assert layer.load_kernel_sync(0, small)
    with pytest.raises(ValueError, match="is TRAINING"):
        layer.set_alpha(0, 0.5)


def test_a_seed_in_recovery_retries_with_what_it_had_learned(
    layer: KasminaLayer, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(layer, 0, small, alpha=1.0)
    x = torch.randn(3, IN)
    grown, learned = layer(x), own_parameters(layer, 0)
    with monkeypatch.context() as patch:
        break_launches(patch, layer, 0)
        layer(x)
    layer.commit()
    assert layer.seed_state(0) is S.ERROR_RECOVERY
    assert isinstance(layer.last_error(0), RuntimeError)
    assert layer.load_kernel_sync(0, small) is False
    assert isinstance(layer.last_error(0), ArtifactRefused)
    assert layer.seed_state(0) is S.ERROR_RECOVERY
    grow(layer, 0, small, alpha=1.0, draw=None, force=True)
    assert own_parameters(layer, 0)["up_weight"] is learned["up_weight"]
    assert torch.equal(layer(x), grown)


# ---- copies, casts and gradients


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_grown_layer_computes_the_same_with_parameters_of_its_own(
    layer: KasminaLayer, small: str, way: Callable[[KasminaLayer], KasminaLayer]
) -> None:
    grow(layer, 1, small, alpha=0.5)
    x = torch.randn(3, IN)
    other = way(layer)
    assert torch.equal(other(x), layer(x))
    before = layer(x)
    other.set_alpha(1, 1.0)
    own_parameters(other, 1)["up_bias"].data.add_(1.0)
    assert torch.equal(layer(x), before)
    assert not torch.equal(other(x), before)
    other.unload_kernel(1)
    assert KernelCache.process().stats().pinned == 1


def test_an_unpickled_layer_whose_store_is_gone_takes_the_hosts_path(
    store: Urza, adapter_store: Urza, small: str
) -> None:
    copy_artifact(adapter_store, store, small)
    layer = linear_with_seeds(store, IN, D, 1)
    grow(layer, 0, small, alpha=1.0)
    stored = pickle.dumps(layer)
    flip_one_byte(store, small)
    other = pickle.loads(stored)
    x = torch.randn(3, IN)
    assert other.seed_state(0) is S.ERROR_RECOVERY
    assert isinstance(other.last_error(0), CorruptObject)
    assert torch.equal(other(x), layer.default_transform(x))


def test_seed_parameters_follow_the_layer_and_stay_the_same_objects(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    x = torch.randn(3, IN)
    grown, parameters = layer(x), own_parameters(layer, 0)
    layer.double()
    assert {p.dtype for p in parameters.values()} == {torch.float64}
    layer.float()
    assert all(own_parameters(layer, 0)[name] is p for name, p in parameters.items())
    assert torch.equal(layer(x), grown)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_gradients_of_a_grafted_layer_match_float64_finite_differences(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=0.7)
    x = torch.randn(3, IN, requires_grad=True)
    direction = torch.randn(3, 2 * D)
    own = own_parameters(layer, 0)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias, **own}
    grads = dict(zip(tensors, torch.autograd.grad((layer(x) * direction).sum(), list(tensors.values())), strict=True))
    values = {name: t.detach().double() for name, t in tensors.items()}

    def loss(name: str, change: torch.Tensor) -> torch.Tensor:
        v = values | {name: values[name] + change}
        h = nn.functional.linear(v["x"], v["weight"], v["bias"])
        return (law_2(h, [((0, D), 0.7, v)]) * direction.double()).sum()

    for name, grad in grads.items():
        step = torch.randn(grad.shape, dtype=torch.float64)
        step /= step.norm()
        eps = 1e-5  # error of the central difference: eps^2, far below float32's own
        slope = (loss(name, eps * step) - loss(name, -eps * step)) / (2 * eps)
        torch.testing.assert_close((grad.double() * step).sum(), slope, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_grafted_layer_match_the_same_adapter_in_eager_torch(layer: KasminaLayer, small: str) -> None:
    grow(layer, 1, small, alpha=0.3)
    x = torch.randn(2, 5, IN, requires_grad=True)
    own = own_parameters(layer, 1)
    leaves = [x, layer.weight, layer.bias, *own.values()]
    h = nn.functional.linear(x, layer.weight, layer.bias)
    k = adapter(h[..., D:], own)
    eager = torch.cat([h[..., :D], torch.lerp(h[..., D:], k, 0.3)], dim=-1)
    for a, b in zip(
        torch.autograd.grad(layer(x).square().sum(), leaves),
        torch.autograd.grad(eager.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_needed_are_given(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    layer.requires_grad_(False)
    own = own_parameters(layer, 0)
    own["down_bias"].requires_grad_(False)
    layer(torch.randn(3, IN)).sum().backward()
    assert layer.weight.grad is None
    assert {name for name, p in own.items() if p.grad is not None} == {"down_weight", "up_weight", "up_bias"}


def test_nothing_is_recorded_when_nothing_needs_a_gradient(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    x = torch.randn(3, IN)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert not layer(x).requires_grad


def test_a_second_derivative_is_a_clear_error(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    x = torch.randn(3, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_expanded_gradient_and_an_output_changed_in_place_are_right(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    x = torch.randn(3, IN, requires_grad=True)
    (plain,) = torch.autograd.grad((layer(x) * torch.ones(3, 2 * D)).sum(), x)
    (expanded,) = torch.autograd.grad(layer(x).sum(), x)
    (in_place,) = torch.autograd.grad(layer(x).add_(1.0).sum(), x)
    assert torch.equal(plain, expanded)
    assert torch.equal(plain, in_place)


def test_stats_are_measured_or_none(layer: KasminaLayer, small: str) -> None:
    assert layer.get_layer_stats()["seeds"][0]["exec_latency_us"] is None
    grow(layer, 0, small, alpha=0.25)
    for _ in range(3):
        layer(torch.randn(2, IN))
    stats = layer.get_layer_stats()
    seed = stats["seeds"][0]
    assert (stats["num_seeds"], stats["active_seeds"], stats["forward_calls_active"]) == (2, 1, 3)
    assert (seed["state"], seed["artifact_id"], seed["alpha"], seed["span"]) == ("GRAFTING", small, 0.25, (0, D))
    assert seed["exec_latency_us"] > 0
    assert seed["parameters"] == 2 * D * R + D + R
    assert stats["seeds"][1]["exec_latency_us"] is None


def test_without_telemetry_no_time_is_taken(adapter_store: Urza, small: str) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1, telemetry_enabled=False)
    grow(layer, 0, small, alpha=1.0)
    layer(torch.randn(2, IN))
    stats = layer.get_layer_stats()
    assert stats["telemetry_enabled"] is False
    assert stats["seeds"][0]["exec_latency_us"] is None


def test_a_missing_specialisation_is_told_once_at_the_boundary_and_the_host_serves_meanwhile(
    layer: KasminaLayer, small: str
) -> None:
    grow(layer, 0, small, alpha=1.0)
    told: list[SpecialisationMiss] = []
    stop = layer.on_specialisation_miss(told.append)
    layer.bfloat16()
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(layer(x), layer.default_transform(x))
        assert len(told) <= 1
        layer.step_boundary()
    assert told == [
        SpecialisationMiss(layer="fc", seed=0, artifact_id=small, dtype="torch.bfloat16", device="cpu"),
    ]
    layer.float()
    assert not torch.equal(layer(x.float()), layer.default_transform(x.float()))
    layer.step_boundary()
    stop()
    layer.double()
    layer(x.double())
    layer.step_boundary()
    assert len(told) == 1
    assert layer.seed_state(0) is S.GRAFTING
