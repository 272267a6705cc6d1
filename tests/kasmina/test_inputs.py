"""Seeds that read the layer's input: which argument it is, and where its rows are those of the output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seeding import grow, own_parameters
from torch import Tensor, nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer
from esper_triton.urza import Urza

BRANCH = Path(__file__).resolve().parent / "blueprints" / "linear_branch.toml"
W, IN, ALPHA = 16, 6, 0.75


class Renamed(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


Call = Callable[[nn.Module, Tensor], Any]
# A host, its input, the dimension of the features, and how it is called.
READERS: dict[str, tuple[Callable[[], nn.Module], Tensor, int, Call]] = {
    "Linear": (lambda: nn.Linear(IN, W), torch.randn(2, 3, IN), -1, lambda m, x: m(x)),
    "Linear, keyword": (lambda: nn.Linear(IN, W), torch.randn(3, IN), -1, lambda m, x: m(input=x)),
    "Linear, one row": (lambda: nn.Linear(IN, W), torch.randn(IN), -1, lambda m, x: m(x)),
    "Linear, transposed": (lambda: nn.Linear(IN, W), torch.randn(IN, 3).T, -1, lambda m, x: m(x)),
    "Linear, expanded": (lambda: nn.Linear(IN, W), torch.randn(1, IN).expand(4, IN), -1, lambda m, x: m(x)),
    "subclass, keyword": (lambda: Renamed(IN, W), torch.randn(3, IN), -1, lambda m, x: m(tokens=x)),
    "Conv1d": (lambda: nn.Conv1d(IN, W, 3, padding=1), torch.randn(2, IN, 5), -2, lambda m, x: m(x)),
    "Conv2d": (lambda: nn.Conv2d(IN, W, 1), torch.randn(2, IN, 3, 4), -3, lambda m, x: m(x)),
    "Conv2d, unbatched": (lambda: nn.Conv2d(IN, W, 1), torch.randn(IN, 3, 4), -3, lambda m, x: m(x)),
    "Conv2d, channels_last": (
        lambda: nn.Conv2d(IN, W, 3, padding="same"),
        torch.randn(2, IN, 3, 4).contiguous(memory_format=torch.channels_last),
        -3,
        lambda m, x: m(x),
    ),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(IN, W, 3, padding=1), torch.randn(2, IN, 5), -2, lambda m, x: m(x)),
    "LayerNorm": (lambda: nn.LayerNorm(W), torch.randn(2, 3, W), -1, lambda m, x: m(x)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(W), torch.randn(2, W, 3, 4), 1, lambda m, x: m(x)),
    "GroupNorm": (lambda: nn.GroupNorm(4, W), torch.randn(2, W, 3), 1, lambda m, x: m(input=x)),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(W, 2),
        torch.randn(3, 2, W),
        -1,
        lambda m, x: m(x, x[:2] + 1, x[:2] - 1)[0],
    ),
    "MultiheadAttention, keywords": (
        lambda: nn.MultiheadAttention(W, 2, kdim=IN, vdim=IN, batch_first=True),
        torch.randn(3, 2, W),
        -1,
        lambda m, x: m(value=x[..., :IN] - 1, key=x[..., :IN] + 1, query=x)[0],
    ),
}


def branch_for(store: Urza, d_in: int) -> str:
    return esper.compile(BRANCH, dims={"d": W, "d_in": d_in}, dtype=torch.float32, targets=["cpu"], urza=store).id


@pytest.mark.parametrize("name", READERS)
def test_a_seed_that_reads_the_input_is_given_the_rows_of_the_output_and_gradients_flow_back_through_both(
    adapter_store: Urza, name: str
) -> None:
    make, x, feature_dim, call = READERS[name]
    torch.manual_seed(3)
    bare = make().double()
    layer = KasminaLayer.adopt(copy.deepcopy(bare).float(), num_seeds=1, urza=adapter_store)
    grow(layer, 0, branch_for(adapter_store, x.shape[feature_dim]), alpha=ALPHA)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    own = own_parameters(layer, 0)
    own64 = {n: p.detach().double().requires_grad_() for n, p in own.items()}
    h = call(bare, x64).movedim(feature_dim, -1)
    k = F.linear(x64.movedim(feature_dim, -1), own64["weight"])
    wanted = (h + ALPHA * (k - h)).movedim(-1, feature_dim)
    out = call(layer, x)
    assert [s["specialisation_misses"] + s["error_count"] for s in layer.get_layer_stats()["seeds"]] == [0]
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), [x, *own.values(), *layer.parameters()])
    wanted_grads = torch.autograd.grad(wanted.square().sum(), [x64, *own64.values(), *bare.parameters()])
    for grad, expected in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "host",
    [
        nn.Embedding(9, W),
        nn.Bilinear(IN, IN, W),
        nn.Conv1d(IN, W, 3),
        nn.Conv2d(IN, W, 1, stride=2),
        nn.ConvTranspose2d(IN, W, 2, stride=2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_seed_that_reads_the_input_is_refused_where_that_has_other_rows(adapter_store: Urza, host: nn.Module) -> None:
    layer = KasminaLayer.adopt(host, num_seeds=1, urza=adapter_store, name="fc")
    assert layer.load_kernel_sync(0, branch_for(adapter_store, IN)) is False
    assert "reads the layer's input; that of seed 0 of layer 'fc' does not fit" in str(layer.last_error(0))


def test_an_input_under_a_name_that_nobody_knows_is_a_miss_and_no_fault(adapter_store: Urza) -> None:
    class Odd(nn.Linear):
        def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
            return super().forward(parts[0] if parts else named["late"])

    layer = KasminaLayer.adopt(Odd(IN, W), num_seeds=1, urza=adapter_store)
    grow(layer, 0, branch_for(adapter_store, IN), alpha=ALPHA)
    x = torch.randn(2, IN)
    assert torch.equal(layer(late=x), layer.default_transform(x))
    assert not torch.equal(layer(x), layer.default_transform(x))
    seed = layer.get_layer_stats()["seeds"][0]
    assert (seed["specialisation_misses"], seed["error_count"]) == (1, 0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_each_sequence_of_a_pack_is_blended_with_its_own_input(adapter_store: Urza) -> None:
    layer: Any = KasminaLayer.adopt(nn.Linear(IN, W), num_seeds=1, urza=adapter_store)
    grow(layer, 0, branch_for(adapter_store, IN), alpha=ALPHA)
    sequences = [torch.randn(length, IN) for length in (3, 1, 4)]
    for found, sequence in zip(layer(torch.nested.nested_tensor(sequences)).unbind(), sequences, strict=True):
        torch.testing.assert_close(found, layer(sequence), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, layer.default_transform(sequence))
