from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeding import grow, linear_with_seeds, own_parameters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import esper_triton as esper
from esper_triton.contracts.errors import InvalidTransition, SlotEmbargoed, StateCorruption
from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.kasmina.events import Transition
from esper_triton.kasmina.gates import Policy
from esper_triton.kasmina.lifecycle import ALLOWED_MOVES
from esper_triton.kasmina.schedules import drift_controlled, linear
from esper_triton.kasmina.seed import Seed
from esper_triton.kasmina.transitions import Move, Outlook, TransitionQueue, follow
from esper_triton.model import MorphableModel
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
S = SeedLifecycleState
T = TypeVar("T")


class NoReadBack(TorchDispatchMode):
    """Fails on every operation that brings a tensor's contents to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        aten = torch.ops.aten
        assert func.overloadpacket not in (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def layer(adapter_store: Urza) -> KasminaLayer:
    return linear_with_seeds(adapter_store, IN, 2 * D, 2)


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(D, R)


@pytest.fixture
def model(adapter_store: Urza) -> MorphableModel:
    plain = nn.Sequential(nn.Linear(IN, D), nn.Linear(D, D))
    return esper.wrap(plain, [nn.Linear], seeds_per_layer=1, urza=adapter_store)


def elsewhere(work: Callable[[], T]) -> T:
    """Runs `work` on another thread; what it raises is raised here."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results[0]


# ---- law 7: queued, checked at the call, atomic at the boundary


def test_law_7_a_request_from_another_thread_waits_for_the_boundary(layer: KasminaLayer, small: str) -> None:
    assert layer.load_kernel_sync(0, small)
    elsewhere(lambda: layer.graft(0))
    elsewhere(lambda: layer.set_alpha(0, 0.5))
    assert layer.seed_state(0) is S.TRAINING
    assert layer.state.lifecycle_states[0] == S.TRAINING
    layer.step_boundary()
    assert layer.seed_state(0) is S.GRAFTING
    assert layer.state.alpha(0) == 0.5


def test_law_7_a_request_is_checked_against_the_state_after_those_before_it(layer: KasminaLayer, small: str) -> None:
    def controller() -> bool:
        loaded = layer.load_kernel_sync(0, small)
        layer.graft(0)
        with pytest.raises(InvalidTransition, match="from GRAFTING to EVALUATING; allowed: STABILIZATION"):
            layer.request_transition(0, S.EVALUATING)
        layer.request_transition(0, S.STABILIZATION)
        with pytest.raises(InvalidTransition):
            layer.graft(0)
        return loaded

    assert elsewhere(controller) is True
    assert layer.seed_state(0) is S.DORMANT
    layer.step_boundary()
    assert layer.seed_state(0) is S.STABILIZATION


def test_law_7_every_request_waits_in_a_within_step_and_takes_effect_at_its_end(
    model: MorphableModel, small: str
) -> None:
    for name in ("0", "1"):
        grow(model.kasmina_layers[name], 0, small, alpha=0.5)
    x = torch.randn(3, IN)
    with model.within_step():
        before = model(x)
        model.set_alpha("0", 0, 1.0)
        model.request_transition("1", 0, S.CULLED)
        assert torch.equal(model(x), before)
        states = [layer.seed_state(0) for layer in model.kasmina_layers.values()]
        assert states == [S.GRAFTING, S.GRAFTING]
    assert model.kasmina_layers["0"].state.alpha(0) == 1.0
    assert model.kasmina_layers["1"].seed_state(0) is S.CULLED
    assert not torch.equal(model(x), before)


def test_law_7_a_deferred_model_waits_whoever_asks(model: MorphableModel, small: str) -> None:
    model.defer_transitions()
    assert model.load_kernel_sync("0", 0, small) is True
    model.graft("0", 0)
    assert model.kasmina_layers["0"].seed_state(0) is S.DORMANT
    model.step_boundary()
    assert model.kasmina_layers["0"].seed_state(0) is S.GRAFTING
    model.defer_transitions(False)
    model.set_alpha("0", 0, 0.5)
    assert model.kasmina_layers["0"].state.alpha(0) == 0.5


def test_law_7_a_load_on_another_threads_loop_takes_effect_at_the_boundary(model: MorphableModel, small: str) -> None:
    assert elsewhere(lambda: asyncio.run(model.load_kernel("0", 0, small))) is True
    layer = model.kasmina_layers["0"]
    assert layer.seed_state(0) is S.DORMANT
    told: list[Transition] = []
    layer.on_transition(told.append)
    model.step_boundary()
    assert [event.target for event in told] == [S.GERMINATED, S.LOADING, S.TRAINING]
    assert layer.state.lifecycle_states[0] == S.TRAINING


def test_law_7_a_request_whose_ground_a_fault_takes_away_is_dropped_and_logged(
    layer: KasminaLayer, small: str, caplog: pytest.LogCaptureFixture
) -> None:
    grow(layer, 0, small, alpha=1.0)
    own_parameters(layer, 0)["up_bias"].data = torch.zeros(1)
    elsewhere(lambda: layer.request_transition(0, S.STABILIZATION))
    layer(torch.randn(2, IN))
    layer.step_boundary()
    assert layer.seed_state(0) is S.ERROR_RECOVERY
    assert '"event": "request_dropped"' in caplog.text
    assert "cannot go from ERROR_RECOVERY to STABILIZATION" in caplog.text


def test_an_observer_that_raises_leaves_the_commit_whole_and_the_others_told(layer: KasminaLayer, small: str) -> None:
    told: list[Transition] = []

    def broken(event: Transition) -> None:
        raise RuntimeError(f"cannot hear of {event.target.name}")

    assert layer.load_kernel_sync(0, small)
    layer.on_transition(broken)
    layer.on_transition(told.append)
    with pytest.raises(RuntimeError, match="cannot hear of GRAFTING"):
        layer.graft(0)
    assert [(event.source, event.target) for event in told] == [(S.TRAINING, S.GRAFTING)]
    assert layer.state.lifecycle_states[0] == S.GRAFTING
    assert "forward" in vars(layer)


@given(st.lists(st.sampled_from(list(S)), min_size=1, max_size=12), st.sampled_from(list(S)))
def test_law_7_what_the_queue_lets_pass_is_a_path_of_the_table(targets: list[S], start: S) -> None:
    queue, seed, path = TransitionQueue(), Seed(0, (0, 1), state=start), [start]
    for target in targets:
        request = Move(seed=0, target=target)

        def after(before: Outlook, request: Move = request) -> Outlook:
            return follow("fc", request, before, epoch=9, embargo_epochs=0)

        try:
            queue.put(request, seed, after)
        except (InvalidTransition, ValueError):
            continue
        path.append(target)
    assert all(after in ALLOWED_MOVES[before] for before, after in itertools.pairwise(path))
    assert [waiting.request.target for waiting in queue.take()] == path[1:]  # type: ignore[attr-defined]
    assert seed.state is start


def test_commits_forwards_and_requests_from_many_threads_end_in_a_consistent_layer(
    layer: KasminaLayer, small: str
) -> None:
    x = torch.randn(4, IN)
    stop, errors = threading.Event(), []
    grow(layer, 0, small, alpha=0.5)
    with torch.no_grad():
        host = layer.default_transform(x)

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        return run

    def forward() -> None:
        with torch.no_grad():
            out = layer(x)
        # Seed 1 is a fresh adapter, which equals the host up to the rounding of k, whatever its alpha.
        torch.testing.assert_close(out[:, D:], host[:, D:])

    def ask() -> None:
        try:
            if layer.load_kernel_sync(1, small):
                layer.graft(1)
                layer.set_alpha(1, 1.0)
                layer.unload_kernel(1)
        except (InvalidTransition, ValueError):
            pass  # another thread was first

    work = [*[forward] * 3, *[ask] * 3, layer.commit, layer.step_boundary]
    threads = [threading.Thread(target=guarded(each)) for each in work]
    for thread in threads:
        thread.start()
    stop.wait(timeout=2.0)
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    layer.commit()
    assert layer.state.lifecycle_states.tolist() == [layer.seed_state(0), layer.seed_state(1)]
    assert layer.get_layer_stats()["seeds"][1]["error_count"] == 0


def test_law_3_a_call_does_not_wait_for_a_commit(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=0.5)
    assert layer.load_kernel_sync(1, small)
    x = torch.randn(3, IN)
    before = layer(x)
    with layer._kasmina.queue.lock:  # a commit is under way
        assert torch.equal(elsewhere(lambda: layer(x)), before)


@pytest.mark.parametrize("state", [S.TRAINING, S.GRAFTING, S.EVALUATING], ids=lambda s: s.name)
def test_law_3_a_call_whose_seed_is_trained_watched_or_checked_reads_nothing_back(
    layer: KasminaLayer, small: str, state: S
) -> None:
    assert layer.load_kernel_sync(0, small)
    if state is not S.TRAINING:
        layer.graft(0, drift_controlled(5))
    if state is S.EVALUATING:
        layer.request_transition(0, S.STABILIZATION)
        layer.request_transition(0, S.EVALUATING)
    with NoReadBack():
        out = layer(torch.randn(3, IN))
    assert out.shape == (3, 2 * D)
    assert layer.get_layer_stats()["seeds"][0]["error_count"] == 0, layer.last_error(0)
    own = layer._kasmina
    seen = {S.TRAINING: own.observed, S.GRAFTING: own.output_mean_now, S.EVALUATING: own.nonfinite}
    assert seen[state] is not None


def test_a_seed_that_is_loaded_and_moved_in_inference_mode_trains_all_the_same(layer: KasminaLayer, small: str) -> None:
    with torch.inference_mode():
        grow(layer, 0, small, alpha=0.5)
        layer.request_transition(0, S.STABILIZATION)
        layer.request_transition(0, S.EVALUATING)
    layer(torch.randn(3, IN))
    layer.step_boundary()
    assert layer.seed_state(0) is S.EVALUATING, layer.last_error(0)
    layer.request_transition(0, S.FINE_TUNING)
    layer(torch.randn(3, IN)).square().sum().backward()
    assert all(p.grad is not None for p in own_parameters(layer, 0).values())


def test_a_root_that_is_the_layer_is_spoken_to_as_a_model_or_as_a_layer(adapter_store: Urza, small: str) -> None:
    root = esper.wrap(nn.Linear(IN, D), [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    assert root.load_kernel_sync("", 0, small, force=True)
    root.set_seed_loss("", 0, None)
    root.graft(0, schedule=linear(2))
    root.step_boundary()
    assert root.state.alpha(0) == 0.5
    assert root.is_ready_for_transition("", 0) is root.is_ready_for_transition(0) is False
    root.rollback(0)
    assert root.reset_seed("", 0, force=True)
    assert root.unload_kernel(0) is False


# ---- the slot of a seed that is gone


def test_the_slot_of_a_culled_seed_opens_after_its_embargo(adapter_store: Urza, small: str) -> None:
    model = esper.wrap(
        nn.Sequential(nn.Linear(IN, D)), ["0"], seeds_per_layer=1, urza=adapter_store, policy=Policy(embargo_epochs=2)
    )
    model.epoch_boundary(3)
    assert model.load_kernel_sync("0", 0, small)
    model.request_transition("0", 0, S.CULLED)
    for epoch in (3, 4):
        model.epoch_boundary(epoch)
        for ask in (
            lambda: model.load_kernel_sync("0", 0, small),
            lambda: model.request_transition("0", 0, S.DORMANT),
            lambda: model.reset_seed("0", 0),
        ):
            with pytest.raises(SlotEmbargoed) as caught:
                ask()
            assert caught.value.opens_at == 5
    model.epoch_boundary(5)
    assert model.load_kernel_sync("0", 0, small)


@pytest.mark.parametrize(
    "open_it", [lambda m: m.unload_kernel("0", 0), lambda m: m.reset_seed("0", 0, force=True)], ids=["unload", "reset"]
)
def test_an_embargo_is_lifted_on_purpose(
    model: MorphableModel, small: str, open_it: Callable[[MorphableModel], bool]
) -> None:
    assert model.load_kernel_sync("0", 0, small)
    model.request_transition("0", 0, S.CULLED)
    assert open_it(model) is True
    assert open_it(model) is False
    assert model.load_kernel_sync("0", 0, small)


def test_a_rolled_back_seed_is_locked_until_it_is_reset_by_force(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    x = torch.randn(3, IN)
    layer.rollback(0)
    assert torch.equal(layer(x), layer.default_transform(x))
    for ask in (
        lambda: layer.load_kernel_sync(0, small),
        lambda: layer.unload_kernel(0),
        lambda: layer.reset_seed(0),
        lambda: layer.request_transition(0, S.DORMANT),
    ):
        with pytest.raises(InvalidTransition, match="from ROLLED_BACK"):
            ask()
    assert layer.seed_state(0) is S.ROLLED_BACK
    assert layer.reset_seed(0, force=True)
    assert layer.seed_state(0) is S.DORMANT
    assert layer.load_kernel_sync(0, small)


def test_a_seed_in_use_is_not_reset_even_by_force(layer: KasminaLayer, small: str) -> None:
    grow(layer, 0, small, alpha=1.0)
    with pytest.raises(InvalidTransition, match="from GRAFTING to DORMANT"):
        layer.reset_seed(0, force=True)


# ---- the state arrays and their check


def test_an_epoch_boundary_finds_damage_names_the_arrays_and_offers_a_way_back(
    model: MorphableModel, small: str
) -> None:
    grow(model.kasmina_layers["1"], 0, small, alpha=0.5)
    model.epoch_boundary(1)
    state = model.kasmina_layers["1"].state
    whole = state.storage.clone()
    state.alpha_blend.fill_(0.75)
    state.error_count.fill_(3)
    with pytest.raises(StateCorruption, match=r"layer '1': alpha_blend, error_count\); roll back") as caught:
        model.epoch_boundary(2)
    assert caught.value.layers == {"1": ("alpha_blend", "error_count")}
    model.restore_state()
    assert torch.equal(state.storage, whole)
    model.epoch_boundary(2)


def test_the_state_tells_the_epoch_of_the_last_transition_and_the_share_of_failed_calls(
    model: MorphableModel, small: str
) -> None:
    model.epoch_boundary(7)
    layer = model.kasmina_layers["0"]
    grow(layer, 0, small, alpha=0.5)
    assert layer.state.last_update_epoch.tolist() == [7]
    assert layer.state.health_accumulator.tolist() == [0.0]
    x = torch.randn(2, IN)
    for _ in range(3):
        layer(x)
    own_parameters(layer, 0)["up_bias"].data = torch.zeros(1)
    layer(x)
    model.step_boundary()
    # One of four calls failed, and a step counts for a tenth.
    torch.testing.assert_close(layer.state.health_accumulator, torch.tensor([0.025]))


def test_a_negative_epoch_is_refused(model: MorphableModel) -> None:
    with pytest.raises(ValueError, match="at least 0, found -1"):
        model.epoch_boundary(-1)
