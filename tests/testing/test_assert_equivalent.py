"""A kernel is proven against a layer of torch in a user's own test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shipped import BLUEPRINTS, EQUIVALENTS, SIZES
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer
from esper_triton.testing import assert_equivalent
from esper_triton.urza import Urza

Compiled = Callable[[str], esper.Artifact]


@pytest.fixture
def store(library_store: Urza) -> Urza:
    """Of the whole run, so that each blueprint is compiled and proven once."""
    return library_store


@pytest.fixture
def compiled(library_store: Urza, library_artifact: Callable[..., str]) -> Compiled:
    """`compiled(name)`: the artifact, in `store`."""
    return lambda name: library_store.get(library_artifact(name))


@pytest.mark.parametrize("name", EQUIVALENTS)
def test_what_ships_as_equal_to_a_layer_is(name: str, compiled: Compiled, store: Urza) -> None:
    layer = EQUIVALENTS[name].make(SIZES)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    assert_equivalent(layer, compiled(name), urza=store, names=EQUIVALENTS[name].names, seed=5, groups=12)
    assert all(torch.equal(before[n], p) for n, p in layer.named_parameters())


@pytest.mark.parametrize("name", EQUIVALENTS)
def test_a_layer_with_its_kernel_at_alpha_1_is_its_host(name: str, compiled: Compiled, store: Urza) -> None:
    artifact = compiled(name)
    host = EQUIVALENTS[name].make(SIZES)
    layer = KasminaLayer.adopt(host, num_seeds=1, chunking="whole", urza=store, name="host")
    assert layer.load_kernel_sync(0, artifact.id), layer.last_error(0)
    for parameter, value in EQUIVALENTS[name].parameters(layer, name).items():
        own = layer._kasmina.seeds[0].parameters[parameter].data
        own.copy_(value.detach().reshape(own.shape))  # a 1x1 convolution's is a matrix
    layer.graft(0)
    layer.set_alpha(0, 1.0)
    layout = "image" if isinstance(host, nn.Conv2d) else BLUEPRINTS[name].layout
    shape = {"rows": (9,), "sequence": (3, 7), "image": (2, 5, 4)}[layout]
    x = torch.randn(*shape, SIZES.get("d_in", SIZES["d"]) if "d_in" in BLUEPRINTS[name].dims else SIZES["d"])
    apply = EQUIVALENTS[name].apply
    found = apply(layer, x)
    expected = apply(esper.unwrap(layer).double(), x.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


class Wrong(nn.Module):
    """Almost a linear layer."""

    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d, d_in))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, 1.001 * self.bias)


def test_what_is_not_equal_is_told_with_the_simplest_call(compiled: Compiled, store: Urza) -> None:
    artifact = compiled("linear")
    with pytest.raises(AssertionError, match=r"is not equivalent to Wrong \(seed 3\)") as caught:
        assert_equivalent(Wrong(SIZES["d_in"], SIZES["d"]), artifact, urza=store, seed=3)
    assert "simplest call: rows=1 " in str(caught.value)
    assert "out is off by" in str(caught.value)


def test_a_kernel_is_proven_against_the_host_of_a_layer_with_seeds(compiled: Compiled, store: Urza) -> None:
    artifact = compiled("linear")
    layer = KasminaLayer.adopt(nn.Linear(SIZES["d_in"], SIZES["d"]), num_seeds=1, urza=store, name="fc")
    assert_equivalent(layer, artifact.id, urza=store, groups=8)


def test_parameters_without_a_counterpart_are_named(compiled: Compiled, store: Urza) -> None:
    artifact = compiled("linear")
    with pytest.raises(ValueError, match=r"parameter 'bias' of artifact .* is none of Linear"):
        assert_equivalent(nn.Linear(SIZES["d_in"], SIZES["d"], bias=False), artifact, urza=store)
    with pytest.raises(ValueError, match=r"parameter 'weight' of Linear is \(24, 3\), artifact .* has \(24, 20\)"):
        assert_equivalent(nn.Linear(3, SIZES["d"]), artifact, urza=store)
    norm = compiled("rmsnorm")
    with pytest.raises(ValueError, match="has no counterpart of LayerNorm's 'bias'"):
        assert_equivalent(nn.LayerNorm(SIZES["d"]), norm, urza=store)


def test_a_module_of_ones_own_is_proven_as_it_was_taken(store: Urza) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, h: Tensor) -> Tensor:
            return h * torch.sigmoid(self.inner(h))

    artifact = esper.compile(Gate(), example_inputs=(torch.randn(3, 12),), pipeline="fast", urza=store)[0]
    assert_equivalent(Gate(), artifact, urza=store, groups=8)
