"""Laws 1, 2, 3 and 9 of the house, of a model that runs. Each test is named after the law that it would see broken.

More tests of laws 1 and 7 stand with the faults and with the transitions; the others are in test_laws_of_artifacts.py
and test_laws_of_wrapping.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import adapter, grow, law_2, linear_with_seeds, own_parameters
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
PACKAGE = Path(esper.__file__).parent
drawn = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
leading_shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


def _raise_after_writing(
    program: KernelProgram, inputs: object, parameters: object, alpha: object, out: Tensor, **call: object
) -> None:
    out.fill_(float("nan"))
    raise RuntimeError("the launch failed half-way")


def _wrong_shape(layer: KasminaLayer, seed: int) -> None:
    own_parameters(layer, seed)["down_weight"].data = torch.zeros(1, 1)


def _wrong_dtype(layer: KasminaLayer, seed: int) -> None:
    own_parameters(layer, seed)["up_bias"].data = torch.zeros(D, dtype=torch.float64)


def _not_contiguous(layer: KasminaLayer, seed: int) -> None:
    own_parameters(layer, seed)["up_weight"].data = torch.zeros(R, D).T


# ---- Law 1: the host never breaks


@drawn
@given(
    lead=leading_shapes,
    num_seeds=st.integers(1, 4),
    faulty=st.integers(0, 3),
    alpha=st.floats(0, 1),
    break_it=st.sampled_from([_wrong_shape, _wrong_dtype, _not_contiguous]),
)
def test_law_1_a_faulty_seed_contributes_nothing_and_the_others_are_as_they_were(
    adapter_store: Urza,
    adapter_for: Callable[..., str],
    lead: tuple[int, ...],
    num_seeds: int,
    faulty: int,
    alpha: float,
    break_it: Callable[[KasminaLayer, int], None],
) -> None:
    KernelCache.process().reset()  # or the circuit breaker would refuse the artifact after three examples
    faulty %= num_seeds
    layer = linear_with_seeds(adapter_store, IN, D * num_seeds, num_seeds)
    for seed in range(num_seeds):
        grow(layer, seed, adapter_for(D, R), alpha=alpha, draw=seed)
    x = torch.randn(*lead, IN)
    host, whole = layer.default_transform(x), layer(x)
    break_it(layer, faulty)
    out = layer(x)
    start, stop = layer.seed_span(faulty)
    assert torch.equal(out[..., start:stop], host[..., start:stop])
    assert torch.equal(out[..., :start], whole[..., :start])
    assert torch.equal(out[..., stop:], whole[..., stop:])
    layer.commit()
    assert layer.seed_state(faulty) is SeedLifecycleState.ERROR_RECOVERY
    assert layer.state.error_count[faulty] == 1
    assert layer.state.fallback_active.tolist() == [seed == faulty for seed in range(num_seeds)]


@pytest.mark.parametrize("chunking", ["features", "whole"])
def test_law_1_with_no_seed_left_the_output_is_the_hosts_bit_by_bit(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch, chunking: str
) -> None:
    num_seeds = 2
    width = D if chunking == "whole" else D * num_seeds
    layer = linear_with_seeds(adapter_store, IN, width, num_seeds, chunking=chunking)
    for seed in range(num_seeds):
        grow(layer, seed, adapter_for(D, R), alpha=0.7)
    monkeypatch.setattr(KernelProgram, "forward", _raise_after_writing)
    x = torch.randn(3, IN, requires_grad=True)
    out = layer(x)
    host = layer.default_transform(x)
    assert torch.equal(out, host)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, host)))
    assert [s["error_count"] for s in layer.get_layer_stats()["seeds"]] == [1, 1]
    layer.commit()
    assert "forward" not in vars(layer)
    assert isinstance(layer.last_error(0), RuntimeError)


def test_law_1_a_failing_backward_lets_the_hosts_gradient_through(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=0.7)

    def broken(*args: object) -> None:
        raise RuntimeError("no gradient today")

    monkeypatch.setattr(KernelProgram, "backward", broken)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    weight, at_x = layer.weight.grad, x.grad
    wanted = torch.autograd.grad(layer.default_transform(x).sum(), [layer.weight, x])
    assert torch.equal(weight, wanted[0])
    assert torch.equal(at_x, wanted[1])
    assert all(p.grad is None for p in own_parameters(layer, 0).values())
    layer.commit()
    assert layer.seed_state(0) is SeedLifecycleState.ERROR_RECOVERY


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_law_1_guard_selects_away_a_non_finite_seed_and_its_gradients(
    adapter_store: Urza, adapter_for: Callable[..., str], poison: float
) -> None:
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2, guard=True)
    for seed in range(2):
        grow(layer, seed, adapter_for(D, R), alpha=0.5, draw=seed)
    x = torch.randn(3, IN, requires_grad=True)
    whole = layer(x)
    own_parameters(layer, 1)["up_bias"].data[0] = poison
    out, host = layer(x), layer.default_transform(x)
    assert torch.equal(out[:, D:], host[:, D:])
    assert torch.equal(out[:, :D], whole[:, :D])
    poisoned = list(own_parameters(layer, 1).values())
    grads = torch.autograd.grad(out[:, D:].square().sum(), [x, *poisoned])
    assert torch.equal(grads[0], torch.autograd.grad(host[:, D:].square().sum(), x)[0])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[1:])


def test_law_1_shapes_and_dtypes_it_was_not_compiled_for_take_the_hosts_path_and_are_no_error(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=1.0)
    layer.double()
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(layer(x), layer.default_transform(x))
    stats = layer.get_layer_stats()["seeds"][0]
    assert (stats["specialisation_misses"], stats["error_count"]) == (1, 0)


# ---- Law 2: blending


@drawn
@given(lead=leading_shapes, alphas=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), draw=st.integers(0, 99))
def test_law_2_the_output_is_the_host_plus_each_seeds_share(
    adapter_store: Urza, adapter_for: Callable[..., str], lead: tuple[int, ...], alphas: list[float], draw: int
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D * len(alphas), len(alphas))
    for seed, alpha in enumerate(alphas):
        grow(layer, seed, adapter_for(D, R), alpha=alpha, draw=draw + seed)
    x = torch.randn(*lead, IN)
    seeds = [
        (layer.seed_span(seed), alpha, {n: p.double() for n, p in own_parameters(layer, seed).items()})
        for seed, alpha in enumerate(alphas)
    ]
    # h itself is float32 and exact for both sides; sums of at most 16 terms near 1 are off by some 16 * 2^-24.
    torch.testing.assert_close(
        layer(x).double(), law_2(layer.default_transform(x).double(), seeds), rtol=1e-5, atol=1e-5
    )


def test_law_2_seeds_over_the_whole_width_add_up(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 3, chunking="whole")
    alphas = [0.25, 0.5, 1.0]
    for seed, alpha in enumerate(alphas):
        grow(layer, seed, adapter_for(D, R), alpha=alpha, draw=seed)
    x = torch.randn(5, IN, requires_grad=True)
    parameters = [own_parameters(layer, seed) for seed in range(3)]
    out = layer(x)
    x64 = x.detach().double().requires_grad_()
    p64 = [{n: p.detach().double().requires_grad_() for n, p in own.items()} for own in parameters]
    h64 = nn.functional.linear(x64, layer.weight.double(), layer.bias.double())
    wanted = law_2(h64, [((0, D), a, p) for a, p in zip(alphas, p64, strict=True)])
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), [x, *(p for own in parameters for p in own.values())])
    grads64 = torch.autograd.grad(wanted.square().sum(), [x64, *(p for own in p64 for p in own.values())])
    for grad, grad64 in zip(grads, grads64, strict=True):
        torch.testing.assert_close(grad.double(), grad64, rtol=1e-4, atol=1e-4)


@drawn
@given(lead=leading_shapes, poison=st.sampled_from([None, float("nan"), float("inf")]))
@pytest.mark.parametrize("chunking", ["features", "whole"])
def test_law_2_alpha_zero_is_the_host_bit_by_bit_whatever_the_seed_computes(
    adapter_store: Urza, adapter_for: Callable[..., str], chunking: str, lead: tuple[int, ...], poison: float | None
) -> None:
    width = D if chunking == "whole" else 2 * D
    layer = KasminaLayer.adopt(nn.Embedding(9, width), num_seeds=2, urza=adapter_store, chunking=chunking)
    for seed in range(2):
        grow(layer, seed, adapter_for(D, R), alpha=0.0)
        if poison is not None:
            own_parameters(layer, seed)["up_weight"].data.fill_(poison)
    with torch.no_grad():
        layer.weight[:, ::3] = -0.0  # adding zero to it would lose the sign
    x = torch.randint(0, 9, lead)
    host = layer.default_transform(x)
    assert not host.numel() or host.signbit()[..., ::3].all()
    assert torch.equal(layer(x).view(torch.int32), host.view(torch.int32))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_law_1_checkpointing_activations_is_no_fault_of_a_seed(
    adapter_store: Urza, adapter_for: Callable[..., str], use_reentrant: bool
) -> None:
    # The non-reentrant variant ends its recomputation by an exception raised where autograd saves a tensor.
    layers = [linear_with_seeds(adapter_store, D, D, 1) for _ in range(3)]
    for layer in layers:
        grow(layer, 0, adapter_for(D, R), alpha=0.5)
    x = torch.randn(4, D, requires_grad=True)
    parameters = [p for layer in layers for p in (layer.weight, *own_parameters(layer, 0).values())]
    plain = x
    for layer in layers:
        plain = layer(plain)
    wanted = torch.autograd.grad(plain.square().sum(), [x, *parameters])
    out = x
    for layer in layers:
        out = checkpoint(layer, out, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for tensor, grad in zip([x, *parameters], wanted, strict=True):
        assert torch.equal(tensor.grad, grad)
    for layer in layers:
        layer.commit()
        assert layer.seed_state(0) is SeedLifecycleState.GRAFTING
        assert layer.get_layer_stats()["seeds"][0]["error_count"] == 0


def _export(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(nn.Sequential(layer), (x,)).module()(x)


RECORDERS = {
    "jit.trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
    "make_fx": lambda layer, x: make_fx(layer)(x)(x),
    "export": _export,
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "functional grad": lambda layer, x: torch.func.grad(lambda y: layer(y).sum())(x) @ layer.weight.T,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of jit.trace
@pytest.mark.parametrize("name", RECORDERS)
def test_law_1_what_a_kernel_cannot_take_part_in_gets_the_host_alone(
    adapter_store: Urza, adapter_for: Callable[..., str], name: str
) -> None:
    layer = linear_with_seeds(adapter_store, D, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=0.5)
    x = torch.randn(4, D)
    host = nn.Linear(D, D)
    host.load_state_dict(layer.state_dict())
    torch.testing.assert_close(RECORDERS[name](layer, x), RECORDERS[name](host, x))
    stats = layer.get_layer_stats()["seeds"][0]
    assert stats["error_count"] == 0
    assert stats["specialisation_misses"] > 0
    assert not torch.equal(layer(x), host(x))


def test_law_2_one_whole_span_seed_at_alpha_one_gives_k(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=1.0)
    x = torch.randn(7, IN)
    k = adapter(layer.default_transform(x).double(), {n: p.double() for n, p in own_parameters(layer, 0).items()})
    torch.testing.assert_close(layer(x).double(), k, rtol=1e-5, atol=1e-5)


def test_law_2_a_seed_that_equals_the_host_changes_nothing_at_any_alpha(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=0.37, draw=None)  # a fresh adapter: its up-projection is zero
    x = torch.randn(7, IN)
    assert torch.equal(layer(x), layer.default_transform(x))


# ---- Law 3: forward is pure execution

_watched = threading.local()
_FORBIDDEN = ("open", "socket", "os.", "subprocess", "compile", "exec", "import", "ctypes.dlopen", "shutil", "tempfile")


def _audit(event: str, _args: object) -> None:
    if getattr(_watched, "on", False) and event.startswith(_FORBIDDEN):
        _watched.seen.append(event)


sys.addaudithook(_audit)


class _NoReadBack(TorchDispatchMode):
    """Fails on every operation that brings a tensor's contents to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
            torch.ops.aten._to_copy,
        ), f"{func} reads a tensor back"
        return func(*args, **(kwargs or {}))


class _NoWaiting:
    """A lock that nobody may wait for."""

    def __enter__(self) -> None:
        raise AssertionError("forward waits for a lock")

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("chunking", ["features", "whole"])
def test_law_3_forward_touches_no_disk_no_network_no_lock_and_reads_nothing_back(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch, guard: bool, chunking: str
) -> None:
    layer = linear_with_seeds(adapter_store, IN, D if chunking == "whole" else 2 * D, 2, chunking=chunking, guard=guard)
    for seed in range(2):
        grow(layer, seed, adapter_for(D, R), alpha=0.5, draw=seed)
    x = torch.randn(100, IN, requires_grad=True)  # several programs a launch, so that threads are used

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("forward reads a tensor back")

    wanted = layer.default_transform(x)
    with monkeypatch.context() as patch:
        patch.setattr(KernelCache.process(), "_lock", _NoWaiting())
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, forbidden)
        _watched.seen = []
        _watched.on = True
        try:
            out = layer(x)
            with torch.no_grad():
                quiet = layer(x)
        finally:
            _watched.on = False
        with _NoReadBack():
            layer(x)
    assert _watched.seen == []
    assert [s["error_count"] for s in layer.get_layer_stats()["seeds"]] == [0, 0], layer.last_error(0)
    assert torch.equal(out, quiet)
    assert not torch.equal(out, wanted)


def test_law_3_the_first_forward_of_a_process_is_as_pure_as_the_next(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    script = """
import sys
import torch
from esper_triton.urza import Urza
from seeding import grow, linear_with_seeds

events, on, forbidden = [], False, tuple(sys.argv[3:])
sys.addaudithook(lambda event, args: events.append((event, args[:1])) if on and event.startswith(forbidden) else None)
layer = linear_with_seeds(Urza(sys.argv[1]), 6, 16, 1)
grow(layer, 0, sys.argv[2], alpha=0.5)
x = torch.randn(100, 6, requires_grad=True)
on = True
out = layer(x)
out.sum().backward()
on = False
print(events, layer.last_error(0))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(adapter_store.root), adapter_for(D, R), *_FORBIDDEN],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        cwd=PACKAGE.parent,
    )
    assert done.stdout.strip() == "[] None"


def test_law_3_an_alpha_ramp_needs_no_new_plan(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = linear_with_seeds(adapter_store, IN, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=0.0)
    x = torch.randn(4, IN)
    h, dispatch, address = layer.default_transform(x), layer.forward, layer.state.alpha(0).data_ptr()
    full = adapter(h, own_parameters(layer, 0)) - h
    for alpha in (0.25, 0.5, 1.0):
        layer.set_alpha(0, alpha)
        torch.testing.assert_close(layer(x), h + alpha * full, rtol=1e-5, atol=1e-5)
    assert layer.forward is dispatch
    assert layer.state.alpha(0).data_ptr() == address


# ---- Law 9: telemetry never costs training


def test_law_9_measuring_changes_no_bit_and_can_be_read_at_any_time(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    x = torch.randn(7, IN)
    results = {}
    for telemetry in (False, True):
        layer = linear_with_seeds(adapter_store, IN, D, 1, telemetry_enabled=telemetry)
        grow(layer, 0, adapter_for(D, R), alpha=0.5)
        stop, errors = threading.Event(), []

        def read(layer: KasminaLayer = layer, stop: threading.Event = stop, errors: list[object] = errors) -> None:
            try:
                while not stop.is_set():
                    layer.get_layer_stats()
            except BaseException as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        outs = [layer(x) for _ in range(50)]
        (grad,) = torch.autograd.grad(outs[-1].square().sum(), layer.weight)
        stop.set()
        reader.join()
        assert not errors
        results[telemetry] = [*outs, grad]
        latency = layer.get_layer_stats()["seeds"][0]["exec_latency_us"]
        assert (latency is not None and latency > 0) is telemetry
    for measured, plain in zip(results[True], results[False], strict=True):
        assert torch.equal(measured, plain)


class _Unpublishable:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError("nothing can be had of this")


@pytest.mark.parametrize("address", [None, "ws://127.0.0.1:9"])  # nothing listens at that port
def test_law_9_publishing_raises_nothing_waits_for_nothing_and_counts_what_it_drops(
    tmp_path: Path, address: str | None
) -> None:
    bound, count = 20, 500
    telemetry, audit = "telemetry.seed.health", "audit.lifecycle"
    with esper.Oona(address, journal=tmp_path, telemetry_bound=bound) as bus:
        subscription = bus.subscribe("*", window=1) if address is None else None
        strange: list[object] = [_Unpublishable(), object(), 7, None]
        for payload in strange:
            assert bus.publish(audit, payload) is True
        for topic in ("no.topic", "", None, 7, [], _Unpublishable):
            assert bus.publish(topic, {}) is False
        # No lock of the bus is free: whoever waited for one would not come back.
        held = [bus._starting, *(lane.dropped._lock for lane in bus._lanes.values())]
        held += [] if subscription is None else [subscription._changed, bus._transport._lock]
        got = [lock.acquire(blocking=lock is not bus._starting) for lock in held]
        try:
            for k in range(count):
                assert bus.publish(telemetry, {"k": k}) is True
                assert bus.publish(audit, {"k": k}) is True
                assert len(bus._lanes[telemetry].buffer) <= bound
        finally:
            for lock, was_free in zip(held, got, strict=True):
                if was_free:
                    lock.release()
        bus.close(0.2)
    stats = bus.stats()
    assert stats["unknown_topic"] == 6
    assert stats["sent"][audit]["dropped"] == 0
    assert stats["sent"][audit]["refused"] == len(strange)
    # Everything is accounted for.
    assert stats["sent"][audit]["sent"] + bus._pump.spilled == count
    of = stats["sent"][telemetry]
    assert of["sent"] + of["dropped"] == count


def test_law_9_a_model_on_a_bus_computes_the_same_bits_whatever_becomes_of_the_bus(
    adapter_store: Urza, adapter_for: Callable[..., str], tmp_path: Path
) -> None:
    artifact, results = adapter_for(D, R), {}
    for address in (None, "ws://127.0.0.1:9", "none at all"):
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(IN, D), nn.Linear(D, D))
        model = esper.wrap(host, ["0"], seeds_per_layer=1, urza=adapter_store)
        grow(model.kasmina_layers["0"], 0, artifact, alpha=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bus = None if address == "none at all" else esper.Oona(address, journal=tmp_path)
        remote = None if bus is None else esper.connect(model, bus, health_every=1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(3, IN)).square().sum().backward()
            optimizer.step()
            model.step_boundary()
        model.epoch_boundary(1)
        if remote is not None and bus is not None:
            remote.close()
            bus.close(0.2)
        results[address] = [parameter.detach().clone() for parameter in model.parameters()]
    for address in (None, "ws://127.0.0.1:9"):
        for with_bus, without in zip(results[address], results["none at all"], strict=True):
            assert torch.equal(with_bus, without)
