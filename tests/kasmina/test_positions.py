"""Seeds whose kernels look at other rows: which rows are those of one item, in what order, in every kind of host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import adapter, grow, own_parameters
from torch import Tensor, nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.kasmina.dispatch import Dispatch
from esper_triton.kasmina.views import Axes, Extents, extents_of
from esper_triton.urza import Urza

BLUEPRINTS = Path(__file__).resolve().parent / "blueprints"
D, IN = 8, 6
W = 2 * D  # the width of every host here: two seeds
ALPHAS = (0.75, 0.4)
S = SeedLifecycleState
# torch's own, of its compiler's parts.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(adapter_store: Urza) -> Callable[..., str]:
    """`compiled(layout, d=D)`: id of the convolution over a sequence or an image."""

    def made(layout: str, d: int = D) -> str:
        return esper.compile(BLUEPRINTS / f"depthwise_{layout}.toml", dims={"d": d}, urza=adapter_store).id

    return made


def over_sequence(h: Tensor, weight: Tensor) -> Tensor:
    """k for h [batch, length, d]."""
    padded = F.pad(h, (0, 0, 1, 1))
    return sum((padded[:, j : j + h.shape[1]] * weight[:, j] for j in range(3)), torch.zeros_like(h))


def over_image(h: Tensor, weight: Tensor) -> Tensor:
    """k for h [batch, height, width, d]."""
    padded = F.pad(h, (0, 0, 1, 1, 1, 1))
    places = [padded[:, i : i + h.shape[1], j : j + h.shape[2]] * weight[:, i, j] for i in range(3) for j in range(3)]
    return sum(places, torch.zeros_like(h))


CONVOLVED = {"sequence": over_sequence, "image": over_image}


class Turned(nn.Linear):
    """A host whose output is no contiguous tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)


class Holes(nn.Linear):
    """A host whose output has other memory between its rows, and every second position of it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, 3))[:, ::2, :-3]


def itself(h: Tensor) -> Tensor:
    return h


@dataclass(frozen=True)
class Host:
    """A module of W features. `items` gives its output as [batch, length, W], or [batch, height, width, W]; `back`
    undoes that."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    items: Callable[[Tensor], Tensor] = itself
    back: Callable[[Tensor], Tensor] = itself
    layout: str = "sequence"
    inputs: int = 1
    channels_last: bool = False

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        result = module(*[x] * self.inputs)
        return result[0] if isinstance(result, tuple) else result


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(W, 4, **options)


def add_item(h: Tensor) -> Tensor:
    return h[None]


def drop_item(k: Tensor) -> Tensor:
    return k[0]


def turn(h: Tensor) -> Tensor:
    return h.transpose(0, 1)


def features_last(h: Tensor) -> Tensor:
    return h.movedim(1, -1)


def features_back(k: Tensor) -> Tensor:
    return k.movedim(-1, 1)


HOSTS = {
    "Linear": Host(lambda: nn.Linear(IN, W), (3, 5, IN)),
    "Linear, one item": Host(lambda: nn.Linear(IN, W), (5, IN), add_item, drop_item),
    "Linear, one position": Host(lambda: nn.Linear(IN, W), (IN,), lambda h: h[None, None], lambda k: k[0, 0]),
    "Linear, rank 4": Host(
        lambda: nn.Linear(IN, W), (2, 3, 4, IN), lambda h: h.flatten(0, 1), lambda k: k.unflatten(0, (2, 3))
    ),
    "Linear, transposed": Host(lambda: Turned(IN, W), (3, 5, IN)),
    "Linear, with holes": Host(lambda: Holes(IN, W), (3, 5, IN)),
    "LayerNorm": Host(lambda: nn.LayerNorm(W), (2, 3, W)),
    "Attention": Host(attention(), (5, 2, W), turn, turn, inputs=3),
    "Attention, unbatched": Host(attention(), (5, W), add_item, drop_item, inputs=3),
    "Attention, batch first": Host(attention(batch_first=True), (2, 5, W), inputs=3),
    "Conv1d": Host(lambda: nn.Conv1d(4, W, 3), (2, 4, 7), features_last, features_back),
    "Conv1d, unbatched": Host(lambda: nn.Conv1d(4, W, 3), (4, 7), lambda h: h.mT[None], lambda k: k[0].mT),
    "BatchNorm1d": Host(lambda: nn.BatchNorm1d(W), (3, W, 5), features_last, features_back),
    "BatchNorm1d, no positions": Host(lambda: nn.BatchNorm1d(W), (5, W), lambda h: h[:, None], lambda k: k[:, 0]),
    "Conv2d as a sequence": Host(
        lambda: nn.Conv2d(4, W, 1), (2, 4, 3, 5), lambda h: h.flatten(2).mT, lambda k: k.mT.unflatten(2, (3, 5))
    ),
    "Conv2d": Host(lambda: nn.Conv2d(4, W, 3), (2, 4, 6, 5), features_last, features_back, "image"),
    "Conv2d, unbatched": Host(
        lambda: nn.Conv2d(4, W, 1), (4, 3, 5), lambda h: h.movedim(0, -1)[None], lambda k: k[0].movedim(-1, 0), "image"
    ),
    "Conv2d, channels last": Host(
        lambda: nn.Conv2d(4, W, 3), (2, 4, 6, 5), features_last, features_back, "image", channels_last=True
    ),
    "BatchNorm2d": Host(lambda: nn.BatchNorm2d(W), (2, W, 3, 5), features_last, features_back, "image"),
    "GroupNorm": Host(lambda: nn.GroupNorm(4, W), (2, W, 3, 5), features_last, features_back, "image"),
}


def blended(host: Host, h: Tensor, weights: list[Tensor]) -> Tensor:
    """Law 2 with both seeds."""
    items = host.items(h)
    spans = [items[..., :D], items[..., D:]]
    parts = [
        own + alpha * (CONVOLVED[host.layout](own, weight) - own)
        for own, alpha, weight in zip(spans, ALPHAS, weights, strict=True)
    ]
    return host.back(torch.cat(parts, dim=-1))


def grown(module: nn.Module, store: Urza, artifact_id: str) -> KasminaLayer:
    layer = KasminaLayer.adopt(module, num_seeds=2, urza=store, name="fc")
    for seed, alpha in enumerate(ALPHAS):
        grow(layer, seed, artifact_id, alpha=alpha, draw=seed)
    return layer


def weights_of(layer: KasminaLayer) -> list[Tensor]:
    return [own_parameters(layer, seed)["weight"].detach() for seed in range(2)]


def nothing_missed(layer: KasminaLayer) -> bool:
    return all(s["error_count"] + s["specialisation_misses"] == 0 for s in layer.get_layer_stats()["seeds"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_neighbours_are_those_of_the_same_item_and_gradients_are_those_of_float64(
    adapter_store: Urza, compiled: Callable[..., str], name: str, training: bool
) -> None:
    host = HOSTS[name]
    torch.manual_seed(5)
    bare = host.make().train(training)
    bare64 = copy.deepcopy(bare).double()
    layer = grown(bare, adapter_store, compiled(host.layout))
    memory_format = torch.channels_last if host.channels_last else torch.contiguous_format
    x = torch.randn(host.shape).contiguous(memory_format=memory_format).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    weights64 = [weight.double().requires_grad_() for weight in weights_of(layer)]
    wanted = blended(host, host.call(bare64, x64), weights64)
    probe = torch.randn(wanted.shape)
    grads64 = torch.autograd.grad((wanted * probe).sum(), [x64, *weights64, *bare64.parameters()], allow_unused=True)
    for _ in range(2):  # the general way, and the prepared one where there is one
        out = host.call(layer, x)
        assert out.shape == wanted.shape
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
        own = [own_parameters(layer, seed)["weight"] for seed in range(2)]
        grads = torch.autograd.grad((out * probe).sum(), [x, *own, *layer.parameters()], allow_unused=True)
        for grad, grad64 in zip(grads, grads64, strict=True):
            assert (grad is None) == (grad64 is None)
            if grad is not None:
                scale = max(1.0, grad64.abs().max().item())
                torch.testing.assert_close(grad.double() / scale, grad64 / scale, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(host.call(layer, x), out, rtol=1e-5, atol=1e-6)  # an attention of its own
    assert nothing_missed(layer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lead=st.lists(st.integers(0, 4), max_size=2), length=st.integers(1, 9))
def test_a_sequence_of_any_shape_is_convolved_item_by_item_in_calls_of_either_way(
    adapter_store: Urza, compiled: Callable[..., str], lead: list[int], length: int
) -> None:
    layer = grown(nn.Linear(IN, W), adapter_store, compiled("sequence"))
    x = torch.randn(*lead, length, IN)
    with torch.no_grad():
        h = layer.default_transform(x)
        host = Host(lambda: layer, (), lambda h: h.reshape(-1, length, W), lambda k: k.reshape(h.shape))
        wanted = blended(host, h, weights_of(layer))
        for _ in range(3):
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    prepared = vars(layer)["forward"]._prepared
    assert (prepared is not None) is (h.numel() > 0)
    assert nothing_missed(layer)


def test_a_change_of_the_length_is_no_other_sequence_of_the_same_rows(
    adapter_store: Urza, compiled: Callable[..., str]
) -> None:
    layer = grown(nn.Linear(IN, W), adapter_store, compiled("sequence"))
    x = torch.randn(12, IN)
    for batch, length in ((3, 4), (4, 3), (1, 12), (12, 1), (3, 4)):
        for _ in range(2):
            out = layer(x.view(batch, length, IN)).detach()
            h = layer.default_transform(x).view(batch, length, W).detach()
            torch.testing.assert_close(out, blended(HOSTS["Linear"], h, weights_of(layer)), rtol=1e-4, atol=1e-5)


def test_a_seed_of_rows_beside_one_of_sequences_gives_what_it_gives_alone(
    adapter_store: Urza, compiled: Callable[..., str], adapter_for: Callable[..., str]
) -> None:
    torch.manual_seed(1)
    layer = KasminaLayer.adopt(nn.MultiheadAttention(W, 4), num_seeds=2, urza=adapter_store)
    grow(layer, 0, compiled("sequence"), alpha=ALPHAS[0], draw=0)
    grow(layer, 1, adapter_for(D, 4), alpha=ALPHAS[1], draw=1)
    x = torch.randn(5, 2, W)
    out, h = layer(x, x, x)[0], layer.default_transform(x, x, x)[0]
    own = h[..., D:]
    adapted = own + ALPHAS[1] * (adapter(own, own_parameters(layer, 1)) - own)
    torch.testing.assert_close(out[..., D:], adapted, rtol=1e-4, atol=1e-4)
    items = h[..., :D].transpose(0, 1)
    k = over_sequence(items, own_parameters(layer, 0)["weight"])
    torch.testing.assert_close(out[..., :D].transpose(0, 1), items + ALPHAS[0] * (k - items), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("target", "batch_first"), [("self_attn", True), ("self_attn", False), ("linear1", True), ("norm2", True)]
)
def test_an_encoder_layer_is_that_of_torch_with_the_seed_written_out(
    adapter_store: Urza, compiled: Callable[..., str], target: str, batch_first: bool, training: bool
) -> None:
    torch.manual_seed(2)
    model = nn.TransformerEncoderLayer(W, 2, W, dropout=0.0, batch_first=batch_first).train(training)
    plain = copy.deepcopy(model).double()
    esper.wrap(model, [target], seeds_per_layer=2, urza=adapter_store)
    (layer,) = model.kasmina_layers.values()
    for seed, alpha in enumerate(ALPHAS):
        grow(layer, seed, compiled("sequence"), alpha=alpha, draw=seed)
    weights = [weight.double() for weight in weights_of(layer)]
    host = Host(lambda: model, (), *(() if batch_first else (turn, turn)))

    def written_out(module: nn.Module, args: Any, h: Any) -> Any:
        return (blended(host, h[0], weights), *h[1:]) if isinstance(h, tuple) else blended(host, h, weights)

    plain.get_submodule(target).register_forward_hook(written_out)
    x = torch.randn(3, 5, W)
    torch.testing.assert_close(model(x).double(), plain(x.double()), rtol=1e-4, atol=1e-4)
    assert nothing_missed(layer)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_block_that_is_adopted_whole_has_its_length_where_its_attention_has(
    adapter_store: Urza, compiled: Callable[..., str], batch_first: bool
) -> None:
    torch.manual_seed(2)
    block = nn.TransformerEncoderLayer(W, 2, W, dropout=0.0, batch_first=batch_first)
    layer = KasminaLayer.adopt(block, num_seeds=2, features=W, urza=adapter_store)
    for seed, alpha in enumerate(ALPHAS):
        grow(layer, seed, compiled("sequence"), alpha=alpha, draw=seed)
    host = Host(lambda: layer, (), *(() if batch_first else (turn, turn)))
    x = torch.randn(3, 5, W)
    wanted = blended(host, layer.default_transform(x), weights_of(layer))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_each_sequence_of_a_pack_is_an_item_of_its_own(adapter_store: Urza, compiled: Callable[..., str]) -> None:
    layer: Any = grown(nn.Linear(IN, W), adapter_store, compiled("sequence"))
    sequences = [torch.randn(length, IN) for length in (3, 1, 4)]
    for found, sequence in zip(layer(torch.nested.nested_tensor(sequences)).unbind(), sequences, strict=True):
        torch.testing.assert_close(found, layer(sequence), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "host", [nn.Linear(IN, W), nn.Conv1d(4, W, 3), nn.Conv3d(4, W, 1), nn.LayerNorm(W), nn.MultiheadAttention(W, 2),
             nn.BatchNorm1d(W), nn.Embedding(7, W)], ids=lambda m: type(m).__name__
)  # fmt: skip
def test_a_kernel_for_images_is_refused_where_there_can_be_none(
    adapter_store: Urza, compiled: Callable[..., str], host: nn.Module
) -> None:
    layer = KasminaLayer.adopt(host, num_seeds=2, urza=adapter_store, name="fc")
    assert layer.load_kernel_sync(0, compiled("image")) is False
    assert "works on images, [batch, features, height, width], and seed 0 of layer 'fc' gives none" in str(
        layer.last_error(0)
    )


def test_where_only_a_call_shows_that_there_is_no_image_it_is_the_hosts(
    adapter_store: Urza, compiled: Callable[..., str]
) -> None:
    layer = grown(nn.GroupNorm(4, W), adapter_store, compiled("image"))
    for shape in ((2, W), (2, W, 6), (2, W, 2, 2, 2)):
        x = torch.randn(shape)
        assert torch.equal(layer(x), layer.default_transform(x))
        assert torch.equal(
            torch.compile(nn.Sequential(layer), backend="eager", fullgraph=True)(x), layer.default_transform(x)
        )
    assert [s["specialisation_misses"] for s in layer.get_layer_stats()["seeds"]] == [3, 3]
    image = torch.randn(2, W, 2, 3)
    assert not torch.equal(layer(image), layer.default_transform(image))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["Linear", "Linear, one item", "Linear, transposed", "Attention", "Conv1d", "Conv2d"])
def test_a_layer_with_positions_compiles_to_one_graph_with_the_gradients_of_an_uncompiled_one(
    adapter_store: Urza, compiled: Callable[..., str], name: str, backend: str
) -> None:
    host = HOSTS[name]
    torch.manual_seed(5)
    layer = grown(host.make(), adapter_store, compiled(host.layout))
    module = torch.compile(Calling(host, layer), fullgraph=True, backend=backend)
    for change in (0, 2):  # the second shape makes torch take sizes as symbols
        shape = [size + change if place != len(host.shape) - 1 or "Conv" in name else size
                 for place, size in enumerate(host.shape)]  # fmt: skip
        if "Conv" in name:
            shape[1] = host.shape[1]
        x = torch.randn(shape, requires_grad=True)
        results = []
        for called in (module, Calling(host, layer)):
            out = called(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *weights(layer)])))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


class Calling(nn.Module):
    """A model around the layer: what is compiled is more than its hooks."""

    def __init__(self, host: Host, layer: nn.Module) -> None:
        super().__init__()
        self.host, self.layer = host, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.host.call(self.layer, x)


def weights(layer: KasminaLayer) -> list[nn.Parameter]:
    return [own_parameters(layer, seed)["weight"] for seed in range(2)]


@pytest.mark.parametrize(("name", "h"), [("Attention", (5, 2, W)), ("Conv2d", (2, W, 3, 5)), ("Linear", (3, 4, W))])
def test_the_operator_keeps_what_torch_asks_of_operators_with_positions_too(
    adapter_store: Urza, compiled: Callable[..., str], name: str, h: tuple[int, ...]
) -> None:
    layer = grown(HOSTS[name].make(), adapter_store, compiled(HOSTS[name].layout))
    dispatch = vars(layer)["forward"]
    assert isinstance(dispatch, Dispatch)
    alphas = [active.alpha for active in dispatch.plan.seeds]
    arguments = (torch.randn(h, requires_grad=True), None, alphas, weights(layer), None, dispatch._name, False)
    torch.library.opcheck(torch.ops.esper_triton.blend.default, arguments)


@pytest.mark.parametrize("name", ["Linear", "Attention", "Conv1d", "Conv2d", "Conv2d as a sequence"])
def test_a_seed_in_training_learns_on_the_items_of_its_layer(
    adapter_store: Urza, compiled: Callable[..., str], name: str
) -> None:
    host = HOSTS[name]
    torch.manual_seed(5)
    layer = KasminaLayer.adopt(host.make(), num_seeds=2, urza=adapter_store)
    assert layer.load_kernel_sync(0, compiled(host.layout))
    assert layer.seed_state(0) is S.TRAINING
    x = torch.randn(host.shape)
    host.call(layer, x)
    loss = layer.seed_loss()
    own = host.items(host.call(layer.default_transform, x))[..., :D].double().detach()  # type: ignore[arg-type]
    weight = own_parameters(layer, 0)["weight"]
    weight64 = weight.detach().double().requires_grad_()
    wanted = (CONVOLVED[host.layout](own, weight64) - own).square().sum() / own.square().sum()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    (grad,), (grad64,) = torch.autograd.grad(loss, weight), torch.autograd.grad(wanted, weight64)
    torch.testing.assert_close(grad.double(), grad64, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Linear", "Attention", "Conv1d", "Conv2d", "Linear, transposed"])
def test_a_baked_layer_gives_the_same_bits_and_is_not_merged_though_affine(
    adapter_store: Urza, compiled: Callable[..., str], name: str
) -> None:
    host = HOSTS[name]
    torch.manual_seed(5)
    model: Any = esper.wrap(nn.ModuleDict({"fc": host.make()}), ["fc"], seeds_per_layer=2, urza=adapter_store)
    for seed, alpha in enumerate(ALPHAS):
        grow(model["fc"], seed, compiled(host.layout), alpha=alpha, draw=seed)
        for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
            model["fc"].request_transition(seed, state)
    baked = esper.bake(model)["fc"]  # type: ignore[index]
    assert not isinstance(baked, (KasminaLayer, type(host.make())))
    results = []
    for module in (model["fc"], baked):
        x = torch.randn(host.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = host.call(module, x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_extents_are_read_from_the_shape_and_where_the_features_are() -> None:
    last, first = Axes(), Axes(-1, length_first=True)
    assert extents_of((7, 5, W), last) == Extents(35, 7, 5)
    assert extents_of((7, 5, W), first) == Extents(35, 5, 7)
    assert extents_of((7, W), first) == extents_of((7, W), last) == Extents(7, 1, 7)
    assert extents_of((2, 3, 4, W), last) == Extents(24, 6, 4)
    assert extents_of((2, W, 3, 4), Axes(1)) == extents_of((2, W, 3, 4), Axes(-3)) == Extents(24, 2, 12, 3, 4)
    assert extents_of((2, W), Axes(1)) == Extents(2, 2, 1)
    assert extents_of((W, 9), Axes(-2)) == Extents(9, 1, 9)


@pytest.fixture(autouse=True)
def _no_layer_is_left(_fresh_cache: None) -> None:
    assert KernelCache.process().stats().pinned == 0
