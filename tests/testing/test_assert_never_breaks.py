"""Law 1 in a user's own test: whatever happens to a seed, the model is its host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seeding import grow
from torch import nn

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, KernelCache
from esper_triton.testing import FAULTS, assert_never_breaks
from esper_triton.testing.strategies import inputs, layers
from esper_triton.urza import Urza


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


def grown_model(store: Urza, artifact_id: str) -> nn.Module:
    model = esper.wrap(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16)), [nn.Linear], seeds_per_layer=1, urza=store
    )
    for index, layer in enumerate(model.kasmina_layers.values()):
        grow(layer, 0, artifact_id, alpha=0.5, draw=index)
    return model


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_reaches_a_model(fault: str, adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    model = grown_model(adapter_store, adapter_for(16, 4))
    x = torch.randn(5, 6)
    before = model(x)
    assert_never_breaks(model, x, fault=fault)
    assert torch.equal(model(x), before), "the model is as it was"


def test_every_fault_is_tried_by_default(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    assert_never_breaks(grown_model(adapter_store, adapter_for(16, 4)), torch.randn(5, 6))


def test_a_fault_that_reaches_the_output_is_told(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    @contextlib.contextmanager
    def host_is_changed(layer: KasminaLayer, seed: int) -> Iterator[None]:
        with torch.no_grad():
            next(layer.parameters()).add_(1.0)
        yield

    with pytest.raises(AssertionError, match="host_is_changed: output 0 after 2 step boundaries is not the host"):
        assert_never_breaks(grown_model(adapter_store, adapter_for(16, 4)), torch.randn(5, 6), fault=host_is_changed)


def test_what_is_not_there_is_told(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    model = grown_model(adapter_store, adapter_for(16, 4))
    with pytest.raises(ValueError, match=r"no fault 'launch raise'.*'launch raises'"):
        assert_never_breaks(model, torch.randn(5, 6), fault="launch raise")
    with pytest.raises(ValueError, match="has no active seed that could fail"):
        assert_never_breaks(esper.unwrap(model), torch.randn(5, 6))


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_no_fault_reaches_a_layer_of_any_kind(
    data: st.DataObject, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    KernelCache.process().reset()  # what has failed is not loaded again
    layer = data.draw(layers())
    width = KasminaLayer.adopt(layer, num_seeds=1, urza=adapter_store, name="drawn")._kasmina.kind.width
    x = data.draw(inputs(layer))
    if isinstance(layer, nn.BatchNorm1d) or x.numel() == 0:
        return
    grow(layer, 0, adapter_for(width, 4), alpha=0.5)
    given = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    assert_never_breaks(layer, *given, fault=data.draw(st.sampled_from(["launch raises", "parameters are NaN"])))
