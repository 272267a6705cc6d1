"""Every blueprint that ships, run by Kasmina inside a model, against torch's own layers and float64 autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from seeding import grow, own_parameters
from shipped import BLUEPRINTS, EQUIVALENTS, SIZES, dims_of, k_of
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.kasmina import KernelCache

D, IN = SIZES["d"], SIZES["d_in"]


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


class Network(nn.Module):
    """`host` between two other layers, which gradients go through."""

    def __init__(self, host: nn.Module, inputs: int, *, is_image: bool) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, inputs, 1) if is_image else nn.Linear(3, inputs)
        self.host = host
        self.after = nn.Conv2d(D, 2, 1) if is_image else nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.before(x))
        if isinstance(self.host, nn.MultiheadAttention):
            return self.after(torch.tanh(self.host(inner, inner, inner, need_weights=False)[0]))
        return self.after(torch.tanh(self.host(inner)))


Made = tuple[Callable[[], nn.Module], int, tuple[int, ...]]
LINEAR: Made = (lambda: nn.Linear(IN, D), IN, (3, 7, 3))
IMAGE: Made = (lambda: nn.Conv2d(IN, D, 3, padding=1), IN, (2, 3, 4, 5))
HOSTS: dict[str, Made] = dict.fromkeys(BLUEPRINTS, LINEAR) | {
    "conv1x1": IMAGE,
    "conv3x3": IMAGE,
    "depthwise_adapter": IMAGE,
    "layernorm": (lambda: nn.LayerNorm(D), D, (3, 7, 3)),
    "rmsnorm": (lambda: nn.RMSNorm(D), D, (3, 7, 3)),
    "multi_head_attention": (lambda: nn.MultiheadAttention(D, 4, batch_first=True), D, (3, 7, 3)),
}
"""By blueprint: a layer that it goes into, the width of that layer's input, and the shape of the model's."""


def replaced(name: str, alpha: float, parameters: dict[str, Tensor], *, is_image: bool) -> Callable[..., Any]:
    """A forward hook that blends k into the host's output; by the equal PyTorch layer where there is one."""
    dims = dims_of(name)

    def features_last(value: Tensor) -> Tensor:
        return value.movedim(1, -1) if is_image else value

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        h, x = features_last(output[0] if isinstance(output, tuple) else output), features_last(args[0])
        if name in EQUIVALENTS:
            equivalent = EQUIVALENTS[name]
            layer = equivalent.make(dims).double()
            own = dict(layer.named_parameters())
            called = {equivalent.names.get(n, n): p.reshape(own[equivalent.names.get(n, n)].shape)
                      for n, p in parameters.items()}  # fmt: skip
            k = equivalent.apply(_Functional(layer, called), x)
        else:
            k = k_of(name, dims, {"h": h, "x": x}, parameters)
        blended = h + alpha * (k - h)
        blended = blended.movedim(-1, 1) if is_image else blended
        return (blended, *output[1:]) if isinstance(output, tuple) else blended

    return hook


class _Functional:
    """A layer with parameters that are given."""

    def __init__(self, layer: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.layer, self.parameters = layer, parameters

    def __call__(self, *args: Tensor, **options: Any) -> Any:
        return torch.func.functional_call(self.layer, self.parameters, args, options)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_in_a_layer_it_is_k_at_alpha_1_and_blended_in_between_and_so_is_the_backward(
    library_store: esper.Urza, library_artifact: Callable[..., str], name: str, alpha: float
) -> None:
    make, inputs, shape = HOSTS[name]
    is_image = len(shape) == 4
    torch.manual_seed(3)
    model = Network(make(), inputs, is_image=is_image)
    plain = copy.deepcopy(model).double()
    esper.wrap(model, ["host"], seeds_per_layer=1, urza=library_store)
    grow(model.kasmina_layers["host"], 0, library_artifact(name), alpha=alpha, draw=7)  # type: ignore[operator, index]
    own = own_parameters(model.kasmina_layers["host"], 0)  # type: ignore[operator, index]
    assert set(own) == set(BLUEPRINTS[name].parameters)

    parameters = {n: p.detach().double().requires_grad_() for n, p in own.items()}
    exact = torch.tensor(alpha).item()
    plain.host.register_forward_hook(replaced(name, exact, parameters, is_image=is_image))
    x = torch.randn(shape)
    given, given64 = x.clone().requires_grad_(), x.double().requires_grad_()
    expected = plain(given64)
    probe = torch.randn(expected.shape)
    learnt64 = dict(plain.named_parameters())
    leaves64 = [given64, *parameters.values(), *learnt64.values()]
    wanted = torch.autograd.grad((expected * probe).sum(), leaves64, allow_unused=True)
    learnt = dict(model.named_parameters())
    for _ in range(2):  # the general way, and the prepared one
        found = model(given)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        leaves = [given, *own.values(), *(learnt[n] for n in learnt64)]
        grads = torch.autograd.grad((found * probe).sum(), leaves, allow_unused=True)
        for grad, grad64 in zip(grads, wanted, strict=True):
            if grad64 is None:  # nothing reads h where alpha is 1, and k only x
                assert grad is None or not grad.count_nonzero()
                continue
            scale = max(1.0, grad64.abs().max().item())
            torch.testing.assert_close(grad.double() / scale, grad64 / scale, rtol=1e-3, atol=1e-5)
    stats = model.kasmina_layers["host"].get_layer_stats()["seeds"][0]  # type: ignore[operator, index]
    assert stats["error_count"] + stats["specialisation_misses"] == 0


@pytest.mark.parametrize("name", ["squeeze_excite", "low_rank_attention"])
def test_what_takes_a_sequence_takes_the_places_of_an_image_too(
    library_store: esper.Urza, library_artifact: Callable[..., str], name: str
) -> None:
    torch.manual_seed(4)
    model = Network(nn.Conv2d(IN, D, 1), IN, is_image=True)
    plain = copy.deepcopy(model).double()
    esper.wrap(model, ["host"], seeds_per_layer=1, urza=library_store)
    layer = model.kasmina_layers["host"]  # type: ignore[operator, index]
    grow(layer, 0, library_artifact(name), alpha=1.0, draw=8)
    parameters = {n: p.detach().double() for n, p in own_parameters(layer, 0).items()}

    def hook(module: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        places = h.flatten(2).mT
        return k_of(name, dims_of(name), {"h": places}, parameters).mT.unflatten(2, h.shape[2:])

    plain.host.register_forward_hook(hook)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(model(x).double(), plain(x.double()), rtol=1e-4, atol=1e-4)
