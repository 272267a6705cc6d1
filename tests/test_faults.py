"""Each fault of the error policy, in every state of the lifecycle: what it does at once, and what comes after."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from seeding import break_every_launch, copy_artifact, flip_one_byte, linear_with_seeds, own_parameters
from torch import nn

import esper_triton as esper
from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    EsperError,
    InvalidTransition,
    LoadDeadlineExceeded,
    NonFiniteOutput,
)
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.kasmina import loading as loading_module
from esper_triton.kasmina.gates import Policy
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState
MISSING = "000000000000-cpu-standard-000000000000"

# The states that a seed can be seen in at a boundary; GERMINATED and LOADING pass within a load.
WITHOUT_KERNEL = [S.DORMANT, S.CULLED, S.CANCELLED, S.ROLLED_BACK, S.ERROR_RECOVERY]
ACTIVE = [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]
SETTLED = [*WITHOUT_KERNEL, S.TRAINING, *ACTIVE]
PATH = [S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


@pytest.fixture
def own_store(store: Urza, adapter_store: Urza, small: str) -> Urza:
    """A store with the adapter in it, to be damaged."""
    copy_artifact(adapter_store, store, small)
    return store


def raise_at_launch(*_: object, **__: object) -> None:
    raise RuntimeError("the launch failed")


def layer_in(state: S, store: Urza, artifact_id: str) -> KasminaLayer:
    """A layer whose seed 0 is in `state` and has learned something where it has a kernel, by the ordinary way there."""
    layer = linear_with_seeds(store, IN, D, 1, policy=Policy(embargo_epochs=0, sample_every=1))
    if state is S.DORMANT:
        return layer
    assert layer.load_kernel_sync(0, artifact_id)
    generator = torch.Generator().manual_seed(3)
    for parameter in own_parameters(layer, 0).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    if state in (S.CULLED, S.CANCELLED):
        layer.request_transition(0, state)
    if state in (S.TRAINING, S.CULLED, S.CANCELLED):
        return layer
    layer.graft(0)
    layer.set_alpha(0, 0.5)
    if state is S.ROLLED_BACK:
        layer.rollback(0)
    elif state is S.ERROR_RECOVERY:
        with pytest.MonkeyPatch.context() as patch:
            break_every_launch(patch, raise_at_launch)
            layer(torch.zeros(1, IN))
        layer.commit()
        KernelCache.process().reset()  # or the artifact would not be loaded again without force
    elif state is not S.GRAFTING:
        for target in PATH[: PATH.index(state) + 1]:
            layer.request_transition(0, target)
    assert layer.seed_state(0) is state
    layer.step_boundary()  # from here on calls are checked for non-finite values
    return layer


def consistent(layer: KasminaLayer) -> None:
    """Host records, device arrays and dispatch belong together."""
    (stats,) = layer.get_layer_stats()["seeds"]
    state, seed_state = layer.state, layer.seed_state(0)
    assert state.lifecycle_states.tolist() == [seed_state]
    assert state.alpha_blend.tolist() == [pytest.approx(stats["alpha"])]
    assert state.fallback_active.tolist() == [seed_state is S.ERROR_RECOVERY]
    assert state.error_count.tolist() == [stats["error_count"]]
    assert (state.active_kernel_id[0] != 0) == (seed_state is S.TRAINING or seed_state.is_active)
    assert ("forward" in vars(layer)) == seed_state.is_active
    assert state.crc32() == layer._kasmina.crc32


# ---- artifacts that cannot be loaded


def missing(store: Urza, source: Urza, artifact_id: str) -> str:
    return MISSING


def corrupt(store: Urza, source: Urza, artifact_id: str) -> str:
    flip_one_byte(store, artifact_id)
    return artifact_id


def not_validated(store: Urza, source: Urza, artifact_id: str) -> str:
    store.set_status(artifact_id, KernelStatus.REJECTED)
    return artifact_id


def wrong_target(store: Urza, source: Urza, artifact_id: str) -> str:
    manifest = source.get(artifact_id).manifest
    target = manifest.target.model_copy(update={"features": ("a-feature-of-no-machine",)})
    shutil.rmtree(store.root)  # an id is of one target
    return copy_artifact(source, store, artifact_id, target=target)


def gone(store: Urza, source: Urza, artifact_id: str) -> str:
    shutil.rmtree(store.root)
    return artifact_id


CANNOT_LOAD = {
    missing: ArtifactNotFound,
    corrupt: CorruptObject,
    not_validated: ArtifactRefused,
    wrong_target: ArtifactRefused,
    gone: EsperError,
}


@pytest.mark.parametrize("state", SETTLED, ids=lambda s: s.name)
@pytest.mark.parametrize("damage", CANNOT_LOAD, ids=lambda f: f.__name__)
def test_an_artifact_that_cannot_be_loaded_culls_a_free_slot_and_leaves_one_in_use_alone(
    own_store: Urza, adapter_store: Urza, small: str, state: S, damage: Callable[..., str]
) -> None:
    layer = layer_in(state, own_store, small)
    x = torch.randn(3, IN)
    before = layer(x)
    asked_for = damage(own_store, adapter_store, small)
    if state in (S.DORMANT, S.CULLED, S.CANCELLED, S.ERROR_RECOVERY):
        assert layer.load_kernel_sync(0, asked_for) is False
        assert layer.seed_state(0) is S.CULLED
        assert isinstance(layer.last_error(0), CANNOT_LOAD[damage])
        assert not own_parameters(layer, 0)
    else:
        with pytest.raises(InvalidTransition):
            layer.load_kernel_sync(0, asked_for)
        assert layer.seed_state(0) is state
    layer.step_boundary()
    assert torch.equal(layer(x), before)
    consistent(layer)


# ---- kernels that fail


def launch_raises(layer: KasminaLayer, patch: pytest.MonkeyPatch) -> None:
    break_every_launch(patch, raise_at_launch)


def not_finite(layer: KasminaLayer, patch: pytest.MonkeyPatch) -> None:
    for parameter in own_parameters(layer, 0).values():
        parameter.data.fill_(float("nan"))


FAILS = {launch_raises: RuntimeError, not_finite: NonFiniteOutput}


@pytest.mark.parametrize("state", SETTLED, ids=lambda s: s.name)
@pytest.mark.parametrize("fault", FAILS, ids=lambda f: f.__name__)
def test_a_kernel_that_fails_takes_its_seed_out_at_the_next_boundary(
    adapter_store: Urza, small: str, monkeypatch: pytest.MonkeyPatch, state: S, fault: Callable[..., None]
) -> None:
    layer = layer_in(state, adapter_store, small)
    fault(layer, monkeypatch)
    x = torch.randn(3, IN)
    host = layer.default_transform(x)
    out = layer(x)
    if fault is launch_raises or not state.is_active:
        assert torch.equal(out, host)
    layer.seed_loss()
    assert layer.seed_state(0) is state  # nothing changes before the boundary
    errors = layer.get_layer_stats()["seeds"][0]["error_count"]
    layer.step_boundary()
    if state.is_active:
        assert layer.seed_state(0) is S.ERROR_RECOVERY
        assert isinstance(layer.last_error(0), FAILS[fault])
        assert layer.state.error_count[0] == 1
    elif state is S.TRAINING:
        assert layer.seed_state(0) is S.CULLED
        assert isinstance(layer.last_error(0), FAILS[fault])
    else:
        assert layer.seed_state(0) is state
        assert layer.state.error_count[0] == errors
    assert torch.equal(layer(x), host)
    consistent(layer)


def test_a_kernel_that_failed_is_loaded_again_only_by_force(
    adapter_store: Urza, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_in(S.GRAFTING, adapter_store, small)
    learned = own_parameters(layer, 0)
    with monkeypatch.context() as patch:
        break_every_launch(patch, raise_at_launch)
        layer(torch.randn(2, IN))
    layer.step_boundary()
    assert layer.load_kernel_sync(0, small) is False
    assert layer.seed_state(0) is S.ERROR_RECOVERY  # still with what it has learned
    other = linear_with_seeds(adapter_store, IN, D, 1)
    assert other.load_kernel_sync(0, small) is False
    assert isinstance(other.last_error(0), ArtifactRefused)
    assert other.seed_state(0) is S.CULLED
    assert layer.load_kernel_sync(0, small, force=True)
    assert layer.seed_state(0) is S.TRAINING
    assert all(own_parameters(layer, 0)[name] is p for name, p in learned.items())


def test_more_than_a_tenth_of_failed_calls_culls_the_seed(
    adapter_store: Urza, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_in(S.GRAFTING, adapter_store, small)
    x = torch.randn(2, IN)
    states = []
    for _ in range(3):
        with monkeypatch.context() as patch:
            break_every_launch(patch, raise_at_launch)
            layer(x)
        layer.step_boundary()
        states.append(layer.seed_state(0))
        if layer.seed_state(0) is S.ERROR_RECOVERY:
            assert layer.load_kernel_sync(0, small, force=True)
            layer.graft(0)
    # One and two failures of what counts as 20 calls are not more than a tenth; three are.
    assert states == [S.ERROR_RECOVERY, S.ERROR_RECOVERY, S.CULLED]
    assert torch.equal(layer(x), layer.default_transform(x))


def test_after_a_ban_one_load_is_tried_and_thirty_quiet_seconds_end_it() -> None:
    now = [0.0]
    cache = KernelCache(clock=lambda: now[0])
    for layer in range(3):
        cache.record_failure("a", layer)
    with pytest.raises(ArtifactRefused, match="banned in this process for another 30 s"):
        cache.check_not_banned("a")
    now[0] = 30.0
    cache.check_not_banned("a")
    with pytest.raises(ArtifactRefused, match="on trial in this process for another 30 s"):
        cache.check_not_banned("a")
    now[0] = 60.0
    cache.check_not_banned("a")
    cache.record_failure("a", 7)  # counts from the start again
    cache.check_not_banned("a")


def test_a_fossil_that_fails_often_is_kept_for_a_retry(
    adapter_store: Urza, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_in(S.FOSSILIZED, adapter_store, small)
    break_every_launch(monkeypatch, raise_at_launch)
    for _ in range(9):
        layer(torch.randn(2, IN))
    layer.step_boundary()
    assert layer.seed_state(0) is S.ERROR_RECOVERY
    assert own_parameters(layer, 0)


def test_non_finite_outputs_are_looked_for_on_sampled_steps_and_always_in_evaluating(
    adapter_store: Urza, small: str
) -> None:
    x = torch.randn(2, IN)
    model = esper.wrap(
        nn.Sequential(nn.Linear(IN, D), nn.Linear(D, D)),
        [nn.Linear],
        seeds_per_layer=1,
        urza=adapter_store,
        policy=Policy(sample_every=3),
    )
    for name, layer in model.kasmina_layers.items():
        assert model.load_kernel_sync(name, 0, small)
        model.graft(name, 0)
        model.set_alpha(name, 0, 0.5)
        own_parameters(layer, 0)["up_bias"].data[0] = float("inf")
    first, second = model.kasmina_layers.values()
    for state in (S.STABILIZATION, S.EVALUATING):
        second.request_transition(0, state)
    states = []
    for _ in range(4):
        first(x)
        second(torch.randn(2, D))
        model.step_boundary()
        states.append((first.seed_state(0), second.seed_state(0)))
    seen_at_once, seen_when_sampled = S.ERROR_RECOVERY, S.ERROR_RECOVERY
    # Every third boundary makes the step after it a sampled one.
    assert [b for _, b in states] == [seen_at_once] * 4
    assert [a for a, _ in states] == [S.GRAFTING] * 3 + [seen_when_sampled]


def test_where_the_host_is_not_finite_the_seed_is_not_to_blame(adapter_store: Urza, small: str) -> None:
    x = torch.full((2, IN), float("nan"))
    for state in (S.TRAINING, S.EVALUATING):
        layer = layer_in(state, adapter_store, small)
        layer(x)
        layer.seed_loss()
        layer.step_boundary()
        assert layer.seed_state(0) is state


# ---- slow loads, eviction, a store that goes away


@pytest.fixture
def held_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Loads wait until the event is set; it is, at the latest, when the test ends."""
    go, load = threading.Event(), loading_module.load

    def slow(*args: object) -> object:
        assert go.wait(timeout=60)
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loading_module, "load", slow)
    yield go
    go.set()


async def test_a_load_that_misses_its_deadline_culls_the_seed_and_its_late_result_is_void(
    adapter_store: Urza, small: str, held_load: threading.Event
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    x = torch.randn(3, IN)
    assert await layer.load_kernel(0, small, deadline_s=0.05) is False
    assert layer.seed_state(0) is S.CULLED
    assert isinstance(layer.last_error(0), LoadDeadlineExceeded)
    held_load.set()
    for thread in [t for t in threading.enumerate() if t.name == "esper-load"]:
        thread.join(timeout=60)
    layer.step_boundary()
    assert layer.seed_state(0) is S.CULLED
    assert torch.equal(layer(x), layer.default_transform(x))
    assert layer.unload_kernel(0)
    assert await layer.load_kernel(0, small)


async def test_a_late_load_whose_layer_waits_for_a_boundary_is_ended_by_it(
    adapter_store: Urza, small: str, held_load: threading.Event
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    layer._kasmina.deferred = True
    task = asyncio.create_task(layer.load_kernel(0, small, deadline_s=0.5))
    await asyncio.sleep(0)
    layer.step_boundary()
    assert layer.seed_state(0) is S.LOADING
    assert await task is False
    assert layer.seed_state(0) is S.LOADING
    layer.step_boundary()
    assert layer.seed_state(0) is S.CULLED
    assert isinstance(layer.last_error(0), LoadDeadlineExceeded)


async def test_loads_that_hang_do_not_keep_others_waiting(
    adapter_store: Urza, small: str, held_load: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [linear_with_seeds(adapter_store, IN, D, 1) for _ in range(4)]
    hung = [layer.load_kernel(0, small, deadline_s=0.05) for layer in layers]
    assert await asyncio.gather(*hung) == [False] * 4
    monkeypatch.undo()
    assert await linear_with_seeds(adapter_store, IN, D, 1).load_kernel(0, small) is True


@pytest.mark.parametrize("state", SETTLED, ids=lambda s: s.name)
def test_a_kernel_that_is_evicted_while_it_is_in_use_stays_in_use(adapter_store: Urza, small: str, state: S) -> None:
    layer = layer_in(state, adapter_store, small)
    x = torch.randn(3, IN)
    before = layer(x)
    KernelCache.process().reset()
    assert torch.equal(layer(x), before)
    layer.step_boundary()
    assert layer.seed_state(0) is state
    assert torch.equal(layer(x), before)
    consistent(layer)


@pytest.mark.parametrize("state", SETTLED, ids=lambda s: s.name)
def test_a_store_that_goes_away_is_missed_by_nobody_who_has_loaded(own_store: Urza, small: str, state: S) -> None:
    layer = layer_in(state, own_store, small)
    x = torch.randn(3, IN)
    before = layer(x)
    shutil.rmtree(own_store.root)
    layer.step_boundary()
    assert torch.equal(layer(x), before)
    assert layer.seed_state(0) is state
    consistent(layer)
