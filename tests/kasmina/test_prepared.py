"""Calls with everything bound beforehand give what the general way gives, and step aside for what is not as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import break_launches, grow, law_2, linear_with_seeds, own_parameters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.kasmina.dispatch import Dispatch
from esper_triton.kasmina.prepared import Prepared
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6


def _grown(store: Urza, artifact: str, seeds: list[int], of: int) -> KasminaLayer:
    layer = linear_with_seeds(store, IN, D * of, of)
    for seed in seeds:
        grow(layer, seed, artifact, alpha=0.25 * (seed + 1), draw=seed)
    return layer


def _prepared(layer: KasminaLayer) -> Prepared | None:
    dispatch = vars(layer)["forward"]
    assert isinstance(dispatch, Dispatch)
    return dispatch._prepared


def _gradients(layer: KasminaLayer, x: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    parameters = [layer.weight, layer.bias, *(p for _, p in layer.seed_parameters())]
    out = layer(x)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), [x, *parameters]))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple),
    of=st.integers(1, 3),
    seeds=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
)
def test_the_second_call_gives_what_the_first_gave_bit_by_bit(
    adapter_store: Urza, adapter_for: Callable[..., str], lead: tuple[int, ...], of: int, seeds: list[int]
) -> None:
    seeds = sorted({seed % of for seed in seeds})
    layer = _grown(adapter_store, adapter_for(D, R), seeds, of)
    x, weights = torch.randn(*lead, IN), torch.randn(*lead, D * of)
    general = _gradients(layer, x, weights)
    assert _prepared(layer) is not None
    ready = _gradients(layer, x, weights)
    assert torch.equal(general[0], ready[0])
    for one, other in zip(general[1], ready[1], strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(layer(x), general[0])
        assert torch.equal(layer(x), general[0])  # in memory that the call before has written to
    wide = layer.default_transform(x).detach().double()
    spans = [
        (
            layer.seed_span(seed),
            0.25 * (seed + 1),
            {n: p.detach().double() for n, p in own_parameters(layer, seed).items()},
        )
        for seed in seeds
    ]
    torch.testing.assert_close(ready[0].double(), law_2(wide, spans), rtol=1e-5, atol=1e-5)


def test_a_parameter_whose_memory_was_exchanged_is_read_where_it_is_now(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), [0], 1)
    x = torch.randn(3, IN)
    before = layer(x)
    assert _prepared(layer) is not None
    weight = own_parameters(layer, 0)["up_weight"]
    weight.data = weight.data * 2
    changed = layer(x)
    assert not torch.equal(changed, before)
    weight.data = weight.data.double()  # for which there is no kernel
    assert torch.equal(layer(x), layer.default_transform(x))
    layer.commit()
    assert layer.seed_state(0) is SeedLifecycleState.ERROR_RECOVERY


def test_a_parameter_that_is_updated_in_place_needs_nothing_new(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), [0], 1)
    x = torch.randn(3, IN)
    layer(x)
    ready = _prepared(layer)
    with torch.no_grad():
        own_parameters(layer, 0)["up_weight"].mul_(2)
    out = layer(x)
    assert _prepared(layer) is ready
    vars(layer)["forward"]._prepared = None
    assert torch.equal(layer(x), out)


def test_other_shapes_and_strides_go_the_general_way_and_are_prepared_in_turn(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), [0], 1)
    for shape in ((3, IN), (5, IN), (2, 3, IN), (3, IN), (0, IN), (4, IN)):
        x = torch.randn(shape)
        with torch.no_grad():
            first, second = layer(x), layer(x)
        assert torch.equal(first, second)
        assert first.shape == (*shape[:-1], D)


class _Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def test_under_a_mode_that_watches_operations_the_general_way_is_gone(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), [0], 1)
    x = torch.randn(3, IN)
    wanted = layer(x)
    monkeypatch.setattr(Prepared, "__call__", lambda *_: pytest.fail("went the prepared way"))
    with _Seen():
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_launch_that_fails_leaves_its_span_to_the_host_and_the_other_as_it_was(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch, seeds: list[int]
) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), seeds, 2)
    other = _grown(adapter_store, adapter_for(D, 8), [1], 2)  # another kernel, which is not broken
    x = torch.randn(3, IN)
    with monkeypatch.context() as patch:
        break_launches(patch, layer, 0)
        layer(x)
        ready = _prepared(layer)
        assert ready is not None
        out = layer(x)  # prepared, and failing
    host = layer.default_transform(x)
    assert torch.equal(out[:, :D], host[:, :D])
    assert torch.equal(out[:, D:], host[:, D:])  # one kernel serves both seeds
    assert [s["error_count"] for s in layer.get_layer_stats()["seeds"]] == [2, 2 if 1 in seeds else 0]
    assert torch.equal(other(x), other(x))
    layer.commit()
    assert layer.seed_state(0) is SeedLifecycleState.ERROR_RECOVERY


def test_a_backward_that_fails_lets_the_hosts_gradient_through(
    adapter_store: Urza, adapter_for: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), [0], 1)
    break_launches(monkeypatch, layer, 0, forward=False)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x)
    assert _prepared(layer) is not None
    layer(x).sum().backward()
    wanted = torch.autograd.grad(layer.default_transform(x).sum(), [layer.weight, x])
    assert torch.equal(layer.weight.grad, wanted[0])
    assert torch.equal(x.grad, wanted[1])
    assert all(p.grad is None for p in own_parameters(layer, 0).values())


def test_what_is_saved_for_a_backward_is_not_written_over(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), [0], 1)
    x, y = torch.randn(3, IN), torch.randn(3, IN)
    down = own_parameters(layer, 0)["down_weight"]
    wanted = torch.autograd.grad(layer(x).square().sum(), down)[0]
    layer(x)
    first = layer(x)
    with torch.no_grad():
        layer(y)
        layer(y)
    second = layer(y)
    assert torch.equal(torch.autograd.grad(first.square().sum(), down)[0], wanted)
    assert not torch.equal(torch.autograd.grad(second.square().sum(), down)[0], wanted)


def test_a_second_derivative_is_a_clear_error_this_way_too(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = _grown(adapter_store, adapter_for(D, R), [0], 1)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
