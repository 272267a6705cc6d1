"""Eight threads on one model for a while: calls, backward passes, loads, unloads, moves, commits, evictions."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from seeding import own_parameters
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.contracts.errors import InvalidTransition, SlotEmbargoed
from esper_triton.kasmina import KernelCache, SeedLifecycleState
from esper_triton.urza import Urza

D, R, IN, LAYERS = 16, 4, 16, 4
SECONDS = float(os.environ.get("ESPER_THREAD_TEST_SECONDS", "20"))
S = SeedLifecycleState


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


@pytest.mark.timeout(SECONDS + 120)
def test_eight_threads_leave_a_model_that_is_consistent_and_computes_what_it_should(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    artifacts = [adapter_for(D, r) for r in (R, 5, 8)]
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(*(nn.Linear(IN, D) for _ in range(LAYERS))), [nn.Linear], seeds_per_layer=1,
                       urza=adapter_store)  # fmt: skip
    x = torch.randn(6, IN)
    # Fresh adapters equal their host whatever their alpha, so every call has one right answer.
    expected = x
    with torch.no_grad():
        for layer in model.kasmina_layers.values():
            expected = layer.default_transform(expected)
    stop, errors = threading.Event(), []
    counts = dict.fromkeys(["calls", "gradients", "loads", "moves", "commits"], 0)

    def calls(_: random.Random) -> None:
        with torch.no_grad():
            check(model(x))
        counts["calls"] += 1

    def gradients(_: random.Random) -> None:
        given = x.clone().requires_grad_()
        out: Tensor = model(given)
        check(out.detach())
        (grad,) = torch.autograd.grad(out.sum(), given)
        assert bool(grad.isfinite().all())
        counts["gradients"] += 1

    def check(out: Tensor) -> None:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    def loads(draw: random.Random) -> None:
        name, artifact = str(draw.randrange(LAYERS)), draw.choice(artifacts)
        with ignoring_who_was_first():
            counts["loads"] += bool(model.load_kernel_sync(name, 0, artifact))
        with ignoring_who_was_first():
            model.graft(name, 0)
            model.set_alpha(name, 0, draw.random())

    def moves(draw: random.Random) -> None:
        name = str(draw.randrange(LAYERS))
        with ignoring_who_was_first():
            if draw.random() < 0.5:
                model.unload_kernel(name, 0)
            else:
                model.request_transition(name, 0, draw.choice([S.STABILIZATION, S.CULLED, S.GRAFTING]))
            counts["moves"] += 1

    def commits(draw: random.Random) -> None:
        model.step_boundary()
        if draw.random() < 0.05:
            KernelCache.process().reset()  # evicts what is in use, which the plans hold
        counts["commits"] += 1

    def ignoring_who_was_first():  # type: ignore[no-untyped-def]
        return contextlib.suppress(InvalidTransition, SlotEmbargoed, ValueError)

    def thread(work: Callable[[random.Random], None], seed: int) -> threading.Thread:
        draw = random.Random(seed)

        def run() -> None:
            try:
                while not stop.is_set():
                    work(draw)
            except BaseException as error:
                errors.append(error)
                stop.set()

        return threading.Thread(target=run)

    works = [calls, calls, gradients, gradients, loads, loads, moves, commits]
    threads = [thread(work, seed) for seed, work in enumerate(works)]
    for one in threads:
        one.start()
    stop.wait(SECONDS)
    stop.set()
    for one in threads:
        one.join(timeout=60)
        assert not one.is_alive()
    assert not errors, errors
    assert all(counts.values()), counts

    model.step_boundary()
    check(model(x).detach())
    for layer in model.kasmina_layers.values():
        assert layer.state.lifecycle_states.tolist() == [layer.seed_state(0)]
        assert ("forward" in vars(layer)) is layer.seed_state(0).is_active
        assert layer.get_layer_stats()["seeds"][0]["error_count"] == 0
        assert bool(own_parameters(layer, 0)) is (layer.seed_state(0) not in (S.DORMANT, S.CULLED, S.CANCELLED))
    esper.unwrap(model)
    assert KernelCache.process().stats().pinned == 0
