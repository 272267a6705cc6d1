"""Every kind of module that can be adopted: invisible while dormant, blended by law 2 while a seed is active."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import grow, law_2, own_parameters
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, KernelCache
from esper_triton.urza import Urza

D, R = 16, 4
W = 2 * D  # the width of every host here: two seeds
ALPHAS = (0.75, 0.4)
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Renamed(nn.Linear):
    """A subclass with an argument of its own."""

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(tokens) * scale


class FirstOnly(nn.MultiheadAttention):
    """A subclass that gives the tensor alone."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(query, query, query, *args, **kwargs)[0]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrised() -> nn.Module:
    linear = nn.Linear(6, W)
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


@dataclass(frozen=True)
class Host:
    """A module of W features, and inputs for it. `feature_dim` is where its output has them."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    feature_dim: int = -1
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()  # the names to give the inputs by
    integers: bool = False
    modes: tuple[bool, ...] = (True, False)
    random: bool = False

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(len(self.shapes))
        if self.integers:
            return [torch.randint(0, 7, shape, generator=generator) for shape in self.shapes]
        return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in self.shapes]

    def call(self, module: nn.Module, inputs: list[Tensor]) -> Any:
        torch.manual_seed(11)
        if self.keywords:
            return module(**dict(reversed(list(zip(self.keywords, inputs, strict=True)))), **self.options)
        return module(*inputs, **self.options)


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(W, 4, **options)


CAUSAL = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True}
PADDED = {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
QKV = ((5, 2, W),) * 3
HOSTS = {
    "Linear": Host(lambda: nn.Linear(6, W), ((3, 6),)),
    "Linear, one row": Host(lambda: nn.Linear(6, W), ((6,),)),
    "Linear, rank 4, keyword": Host(lambda: nn.Linear(6, W, bias=False), ((2, 3, 2, 6),), keywords=("input",)),
    "Linear, subclass": Host(lambda: Renamed(6, W), ((3, 6),), options={"scale": 2.0}, keywords=("tokens",)),
    "Linear, parametrised": Host(parametrised, ((3, 6),)),
    "Linear, weight_norm": Host(lambda: parametrizations.weight_norm(nn.Linear(6, W)), ((3, 6),)),
    "Linear, spectral_norm": Host(
        lambda: parametrizations.spectral_norm(nn.Linear(6, W)), ((3, 6),), modes=(False,)
    ),  # in training every access to the weight goes on with the power iteration
    "Bilinear": Host(lambda: nn.Bilinear(3, 4, W), ((2, 5, 3), (2, 5, 4))),
    "Bilinear, keywords": Host(lambda: nn.Bilinear(3, 4, W), ((5, 3), (5, 4)), keywords=("input1", "input2")),
    "Conv1d": Host(lambda: nn.Conv1d(4, W, 3), ((2, 4, 9),), -2),
    "Conv1d, unbatched": Host(lambda: nn.Conv1d(4, W, 3, stride=2), ((4, 9),), -2),
    "Conv2d": Host(lambda: nn.Conv2d(4, W, 3, padding=1, groups=2), ((2, 4, 5, 6),), -3),
    "Conv2d, unbatched": Host(lambda: nn.Conv2d(4, W, (1, 2), dilation=2), ((4, 5, 6),), -3),
    "Conv2d, reflecting": Host(lambda: nn.Conv2d(4, W, 3, padding="same", padding_mode="reflect"), ((2, 4, 5, 6),), -3),
    "Conv3d": Host(lambda: nn.Conv3d(2, W, 2), ((2, 2, 3, 4, 3),), -4),
    "Conv3d, unbatched": Host(lambda: nn.Conv3d(2, W, 2), ((2, 3, 4, 3),), -4),
    "ConvTranspose1d": Host(lambda: nn.ConvTranspose1d(4, W, 3, stride=2), ((2, 4, 5),), -2),
    "ConvTranspose1d, output_size": Host(
        lambda: nn.ConvTranspose1d(4, W, 3, stride=2), ((2, 4, 5),), -2, {"output_size": [12]}, ("input",)
    ),
    "ConvTranspose2d": Host(lambda: nn.ConvTranspose2d(4, W, 2), ((2, 4, 3, 4),), -3),
    "ConvTranspose2d, unbatched": Host(lambda: nn.ConvTranspose2d(4, W, 2), ((4, 3, 4),), -3),
    "ConvTranspose3d": Host(lambda: nn.ConvTranspose3d(2, W, 2), ((1, 2, 2, 3, 2),), -4),
    "Conv2d, weight_norm": Host(lambda: parametrizations.weight_norm(nn.Conv2d(4, W, 3)), ((2, 4, 5, 6),), -3),
    "Embedding": Host(lambda: nn.Embedding(7, W, padding_idx=0), ((2, 5),), integers=True),
    "EmbeddingBag": Host(lambda: nn.EmbeddingBag(7, W), ((2, 5),), integers=True),
    "LayerNorm": Host(lambda: nn.LayerNorm(W), ((2, 3, W),)),
    "LayerNorm, two dimensions": Host(lambda: nn.LayerNorm((3, W)), ((2, 3, W),)),
    "RMSNorm": Host(lambda: nn.RMSNorm(W), ((2, 3, W),), keywords=("x",)),
    "GroupNorm": Host(lambda: nn.GroupNorm(4, W), ((3, W, 2, 3),), 1),
    "GroupNorm, no places": Host(lambda: nn.GroupNorm(4, W), ((3, W),), 1),
    "BatchNorm1d": Host(lambda: nn.BatchNorm1d(W), ((5, W),), 1),
    "BatchNorm1d, sequence": Host(lambda: nn.BatchNorm1d(W, momentum=None), ((5, W, 3),), 1),
    "BatchNorm2d": Host(lambda: nn.BatchNorm2d(W), ((3, W, 2, 4),), 1),
    "BatchNorm2d, no statistics": Host(lambda: nn.BatchNorm2d(W, track_running_stats=False), ((3, W, 2, 4),), 1),
    "BatchNorm3d": Host(lambda: nn.BatchNorm3d(W, affine=False), ((3, W, 2, 2, 2),), 1),
    "SyncBatchNorm": Host(lambda: nn.SyncBatchNorm(W), ((3, W, 4),), 1, modes=(False,)),  # trains on a GPU only
    "InstanceNorm1d": Host(lambda: nn.InstanceNorm1d(W, track_running_stats=True), ((3, W, 4),), -2),
    "InstanceNorm2d, unbatched": Host(lambda: nn.InstanceNorm2d(W, affine=True), ((W, 2, 3),), -3),
    "MultiheadAttention": Host(attention(), QKV),
    "MultiheadAttention, keywords": Host(attention(), QKV, options=CAUSAL, keywords=("query", "key", "value")),
    "MultiheadAttention, no weights": Host(attention(), QKV, options={"need_weights": False, **PADDED}),
    "MultiheadAttention, every head": Host(attention(bias=False), QKV, options={"average_attn_weights": False}),
    "MultiheadAttention, unbatched": Host(attention(), ((5, W),) * 3),
    "MultiheadAttention, batch first": Host(attention(batch_first=True), ((2, 5, W),) * 3, options=PADDED),
    "MultiheadAttention, other widths": Host(
        attention(kdim=6, vdim=8, batch_first=True, add_bias_kv=True), ((2, 3, W), (2, 5, 6), (2, 5, 8))
    ),
    "MultiheadAttention, dropout": Host(attention(dropout=0.3), QKV, random=True),
    "MultiheadAttention, subclass": Host(lambda: FirstOnly(W, 4), ((5, 2, W),), options={"need_weights": False}),
}
ATTENTIONS = ["MultiheadAttention", "MultiheadAttention, batch first"]
CASES = [pytest.param(HOSTS[name], mode, id=f"{name}-{mode}") for name in HOSTS for mode in HOSTS[name].modes]
drawn = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(host: Host, training: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return host.make().to(dtype).train(training)


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def others(result: Any) -> tuple[Any, ...]:
    return result[1:] if isinstance(result, tuple) else ()


def gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    wanted = [t for t in tensors if t.requires_grad]
    return list(torch.autograd.grad(out.square().sum(), wanted, allow_unused=True))


def same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return found is expected
    return torch.equal(found, expected) and found.stride() == expected.stride() and found.dtype == expected.dtype


def wrapped(module: nn.Module, store: Urza, artifact_id: str | None = None) -> KasminaLayer:
    """The module as a model of one layer; with an artifact both its seeds are active."""
    model: Any = esper.wrap(module, [""], seeds_per_layer=2, urza=store)
    if artifact_id is not None:
        for seed, alpha in enumerate(ALPHAS):
            grow(model, seed, artifact_id, alpha=alpha, draw=seed)
    return model


def reference(layer: KasminaLayer, h: Tensor, feature_dim: int, parameters: list[dict[str, Tensor]]) -> Tensor:
    seeds = [(layer.seed_span(seed), ALPHAS[seed], own) for seed, own in enumerate(parameters)]
    return law_2(h.movedim(feature_dim, -1), seeds).movedim(-1, feature_dim)


@pytest.mark.parametrize(("host", "training"), CASES)
def test_a_dormant_host_gives_the_same_bits_gradients_buffers_and_random_stream(
    store: Urza, host: Host, training: bool
) -> None:
    bare = made(host, training)
    layer = wrapped(made(host, training), store)
    results = []
    for module in (bare, layer):
        inputs = host.inputs(torch.float32)
        result = host.call(module, inputs)
        grads = gradients(first(result), [*inputs, *module.parameters()])
        results.append((first(result), *others(result), *grads, *module.state_dict().values(), torch.get_rng_state()))
    assert len(results[0]) == len(results[1])
    assert all(same(found, expected) for found, expected in zip(results[1], results[0], strict=True))
    assert list(layer.state_dict()) == list(bare.state_dict())


@pytest.mark.parametrize("name", ["Linear, parametrised", "Linear, weight_norm", "Conv2d", "BatchNorm2d", *ATTENTIONS])
def test_a_dormant_host_is_compiled_whole_and_called_functionally_as_the_bare_one(store: Urza, name: str) -> None:
    host = HOSTS[name]
    results = []
    for module in (made(host, False), wrapped(made(host, False), store)):
        torch.compiler.reset()
        inputs = host.inputs(torch.float32)
        doubled = {n: 2 * p for n, p in module.named_parameters()}
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        functional = torch.func.functional_call(module, doubled, tuple(inputs), dict(host.options))
        results.append((first(host.call(compiled, inputs)), first(functional)))
    assert all(torch.equal(found, expected) for found, expected in zip(results[1], results[0], strict=True))


@pytest.mark.parametrize(("host", "training"), [case for case in CASES if not case.values[0].random])
def test_active_seeds_blend_by_law_2_and_the_gradients_are_those_of_the_eager_adapter_in_float64(
    adapter_store: Urza, adapter_for: Callable[..., str], host: Host, training: bool
) -> None:
    bare, bare64 = made(host, training), made(host, training, torch.float64)
    layer = wrapped(made(host, training), adapter_store, adapter_for(D, R))
    inputs = host.inputs(torch.float32)
    inputs64 = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    bare_result, result, result64 = host.call(bare, inputs), host.call(layer, inputs), host.call(bare64, inputs64)
    out = first(result)
    parameters = [own_parameters(layer, seed) for seed in range(2)]
    parameters64 = [{n: p.detach().double().requires_grad_() for n, p in own.items()} for own in parameters]
    wanted = reference(layer, first(result64), host.feature_dim, parameters64)
    # The hosts' own float32 sums and statistics differ from float64 by some 1e-6, times factors of the adapter near 10.
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])
    assert (out - first(bare_result)).abs().max() > 0.05
    assert out.stride() == first(bare_result).stride()
    assert type(result) is type(bare_result)
    assert all(same(found, expected) for found, expected in zip(others(result), others(bare_result), strict=True))
    grads = gradients(out, [*inputs, *layer.parameters(), *(p for own in parameters for p in own.values())])
    grads64 = gradients(wanted, [*inputs64, *bare64.parameters(), *(p for own in parameters64 for p in own.values())])
    assert len(grads) == len(grads64) >= 8
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert (grad is None) == (grad64 is None)
        if grad is not None:
            scale = max(1.0, grad64.abs().max().item())
            torch.testing.assert_close(grad.double() / scale, grad64 / scale, rtol=1e-3, atol=1e-5)
    # Running statistics: the host ran once, as the bare one did.
    for (name, buffer), (_, expected) in zip(layer.state_dict().items(), bare.state_dict().items(), strict=True):
        assert torch.equal(buffer, expected), name
    assert [s["error_count"] + s["specialisation_misses"] for s in layer.get_layer_stats()["seeds"]] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "BatchNorm2d", "MultiheadAttention", "Embedding"])
def test_hosts_of_half_precision_grow_with_artifacts_of_theirs(
    adapter_store: Urza, adapter_for: Callable[..., str], name: str, dtype: torch.dtype
) -> None:
    host = HOSTS[name]
    bare, layer = made(host, False, dtype), wrapped(made(host, False, dtype), adapter_store)
    inputs = host.inputs(dtype)
    h = first(host.call(bare, inputs))
    assert torch.equal(first(host.call(layer, inputs)), h)
    for seed, alpha in enumerate(ALPHAS):
        grow(layer, seed, adapter_for(D, R, str(dtype).removeprefix("torch.")), alpha=alpha, draw=seed)
    out = first(host.call(layer, inputs))
    parameters = [{n: p.detach().double() for n, p in own_parameters(layer, seed).items()} for seed in range(2)]
    wanted = reference(layer, h.double(), host.feature_dim, parameters)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (out - h).abs().max() > 0.05


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "BatchNorm1d", "BatchNorm3d", "Embedding", "MultiheadAttention"])
def test_a_host_of_float64_is_invisible_while_dormant_and_loading_into_it_is_refused_with_the_way_out(
    adapter_store: Urza, adapter_for: Callable[..., str], name: str
) -> None:
    host = HOSTS[name]
    bare, layer = made(host, True, torch.float64), wrapped(made(host, True, torch.float64), adapter_store)
    inputs = host.inputs(torch.float64)
    assert torch.equal(first(host.call(layer, inputs)), first(host.call(bare, inputs)))
    assert layer.load_kernel_sync(0, adapter_for(D, R)) is False
    reason = str(layer.last_error(0))
    assert "is float64" in reason
    assert "float32, float16, bfloat16" in reason
    assert "with dtype float64" not in reason


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_running_statistics_under_activation_checkpointing_are_those_of_the_bare_module(
    adapter_store: Urza, adapter_for: Callable[..., str], use_reentrant: bool, active: bool
) -> None:
    host = HOSTS["BatchNorm2d"]
    bare = made(host, True)
    layer = wrapped(made(host, True), adapter_store, adapter_for(D, R) if active else None)
    for module in (bare, layer):
        for _ in range(3):
            (x,) = host.inputs(torch.float32)
            checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    assert bare.num_batches_tracked == 6  # torch runs the forward again for backward
    for (name, buffer), (_, expected) in zip(layer.named_buffers(), bare.named_buffers(), strict=False):
        if not name.startswith("_kasmina"):
            assert torch.equal(buffer, expected), name


@drawn
@given(
    lead=st.lists(st.integers(0, 3), max_size=2),
    places=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "expanded"]),
    needs_grad=st.booleans(),
)
def test_an_image_of_any_layout_keeps_the_strides_of_the_hosts_output(
    adapter_store: Urza,
    adapter_for: Callable[..., str],
    lead: list[int],
    places: list[int],
    layout: str,
    needs_grad: bool,
) -> None:
    shape = [*lead[:1], W, *places]
    match layout:
        case "contiguous":
            x = torch.randn(shape)
        case "channels_last":
            x = torch.randn([*lead[:1], *places, W]).movedim(-1, -3)
        case "transposed":
            x = torch.randn([*lead[:1], W, *reversed(places)]).mT
        case _:
            x = torch.randn([*lead[:1], W, 1, 1]).expand(shape)
    x.requires_grad_(needs_grad)
    torch.manual_seed(1)
    bare = nn.Conv2d(W, W, 1)
    layer = wrapped(copy.deepcopy(bare), adapter_store, adapter_for(D, R))
    h, out = bare(x), layer(x)
    parameters = [{n: p.double() for n, p in own_parameters(layer, seed).items()} for seed in range(2)]
    torch.testing.assert_close(out.double(), reference(layer, h.double(), -3, parameters), rtol=1e-4, atol=1e-4)
    assert out.stride() == h.stride()
    out.sum().backward()
    assert (x.grad is None) is not needs_grad
    assert all(p.grad is not None for _, p in layer.seed_parameters())


@pytest.mark.parametrize("name", ["Linear", "Conv1d", "Conv2d", "LayerNorm", "GroupNorm", "Embedding"])
def test_an_empty_batch_is_as_empty_as_the_hosts(
    adapter_store: Urza, adapter_for: Callable[..., str], name: str
) -> None:
    host = HOSTS[name]
    bare, layer = made(host, True), wrapped(made(host, True), adapter_store, adapter_for(D, R))
    inputs = [t.detach()[:0].requires_grad_(t.requires_grad) for t in host.inputs(torch.float32)]
    out, expected = first(host.call(layer, inputs)), first(host.call(bare, inputs))
    assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), expected.dtype)
    out.sum().backward()
    for parameter in (*layer.parameters(), *(p for _, p in layer.seed_parameters())):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert [s["error_count"] for s in layer.get_layer_stats()["seeds"]] == [0, 0]


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "BatchNorm1d", "MultiheadAttention"])
def test_without_gradients_the_output_is_the_same_and_asks_for_none(
    adapter_store: Urza, adapter_for: Callable[..., str], name: str
) -> None:
    host = HOSTS[name]
    layer = wrapped(made(host, False), adapter_store, adapter_for(D, R))
    inputs = host.inputs(torch.float32)
    out = first(host.call(layer, inputs))
    with torch.no_grad():
        quiet = first(host.call(layer, inputs))
    with torch.inference_mode():
        assert torch.equal(first(host.call(layer, inputs)), quiet)
    assert torch.equal(out, quiet)
    assert out.requires_grad
    assert not quiet.requires_grad


def test_a_tuple_keeps_the_hosts_own_output_where_no_seed_can_take_part(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    host = HOSTS["MultiheadAttention"]
    layer = wrapped(made(host, False), adapter_store, adapter_for(D, R))
    layer.double()
    inputs = host.inputs(torch.float64)
    result = host.call(layer, inputs)
    expected = layer.default_transform(*inputs)
    assert all(torch.equal(found, wanted) for found, wanted in zip(result, expected, strict=True))
    assert layer.get_layer_stats()["seeds"][0]["specialisation_misses"] == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("target", ["self_attn", "linear1", "linear2", "norm1", "norm2"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own encoder makes them
def test_no_fast_path_of_an_encoder_passes_over_an_active_seed_or_its_gradients(
    adapter_store: Urza,
    adapter_for: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    target: str,
    frozen: bool,
    padded: bool,
    training: bool,
) -> None:
    torch.manual_seed(2)
    block = nn.TransformerEncoderLayer(D, 2, D, dropout=0.0, batch_first=True)
    # With a frozen host torch takes its fast path under autograd too, and packs what is padded.
    model = nn.TransformerEncoder(block, 2).train(training).requires_grad_(not frozen)
    plain = copy.deepcopy(model)
    esper.wrap(model, [f"layers.*.{target}"], seeds_per_layer=1, urza=adapter_store)
    x = torch.randn(2, 5, D)
    mask = torch.tensor([[False] * 4 + [True], [False] * 5]) if padded else None
    host = plain(x, src_key_padding_mask=mask)
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), host, rtol=0, atol=0)
    for index, layer in enumerate(model.kasmina_layers.values()):
        grow(layer, 0, adapter_for(D, R), alpha=0.5, draw=index)
    grown = model(x, src_key_padding_mask=mask)
    assert (grown - host).abs().amax(dim=-1)[0, :4].min() > 1e-3
    packed = frozen and padded and not training
    assert grown.requires_grad is not packed
    assert [r.levelname for r in caplog.records] == ["WARNING"] * (2 if packed else 0)
    assert all("enable_nested_tensor=False" in r.message for r in caplog.records)
    # The same model with the adapters in plain torch, on the path that calls every module.
    for index, layer in enumerate(model.kasmina_layers.values()):
        parameters = {n: p.detach().clone().requires_grad_() for n, p in own_parameters(layer, 0).items()}
        own = plain.get_submodule(f"layers.{index}.{target}")

        def blended(module: nn.Module, args: Any, h: Any, parameters: Any = parameters) -> Any:
            out = law_2(first(h), [((0, D), 0.5, parameters)])
            return (out, *h[1:]) if isinstance(h, tuple) else out

        own.register_forward_hook(blended)
        own.seed = list(parameters.values())
    plain.train()  # dropout is 0, so that this changes the path alone
    wanted = plain(x, src_key_padding_mask=mask)
    real = slice(0, 4)  # what stands in padded places is torch's own affair
    torch.testing.assert_close(grown[:, real], wanted[:, real], rtol=1e-3, atol=1e-4)
    if packed:
        return
    grads = torch.autograd.grad(grown[:, real].square().sum(), list(esper.seed_parameters(model)))
    leaves = [p for index in range(2) for p in plain.get_submodule(f"layers.{index}.{target}").seed]
    for grad, expected in zip(grads, torch.autograd.grad(wanted[:, real].square().sum(), leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-3)
    assert all(layer.get_layer_stats()["seeds"][0]["error_count"] == 0 for layer in model.kasmina_layers.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_pack_of_sequences_is_blended_sequence_by_sequence_and_keeps_its_gradients(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = wrapped(made(HOSTS["Linear"], True), adapter_store, adapter_for(D, R))
    sequences = [torch.randn(length, 6) for length in (3, 1, 4)]
    leaves = [*layer.parameters(), *(p for _, p in layer.seed_parameters())]
    found = layer(torch.nested.nested_tensor(sequences))
    apart = [layer(sequence) for sequence in sequences]
    for part, expected in zip(found.unbind(), apart, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)  # the host's sums go in another order
    grads = torch.autograd.grad(sum(part.square().sum() for part in found.unbind()), leaves)
    wanted = torch.autograd.grad(sum(part.square().sum() for part in apart), leaves)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """One module in two places, and others in a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.second = self.first
        self.listed = nn.ModuleList([nn.Linear(D, D), nn.Conv1d(D, D, 1)])
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(D), "again": self.listed[0]})

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        x = self.listed[1](torch.tanh(self.listed[0](x)).mT).mT
        return self.named["again"](self.named["norm"](x))


def test_a_module_in_two_places_is_wrapped_once_and_active_in_both(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    torch.manual_seed(4)
    model: Any = Shared()
    esper.wrap(model, ["first", "listed.*", "named.*"], seeds_per_layer=1, urza=adapter_store)
    assert list(model.kasmina_layers) == ["first", "second", "listed.0", "listed.1", "named.norm", "named.again"]
    assert model.kasmina_layers["first"] is model.kasmina_layers["second"]
    assert model.get_model_stats()["num_layers"] == 4
    for index, name in enumerate(["second", "named.again", "listed.1", "named.norm"]):
        assert model.load_kernel_sync(name, 0, adapter_for(D, R))
        model.unload_kernel(name, 0)
        grow(model.kasmina_layers[name], 0, adapter_for(D, R), alpha=0.5, draw=index)
    x = torch.randn(2, 3, D)
    out = model(x)

    def step(layer: KasminaLayer, value: Tensor, feature_dim: int = -1) -> Tensor:
        h = layer.default_transform(value).movedim(feature_dim, -1)
        return law_2(h, [((0, D), 0.5, own_parameters(layer, 0))]).movedim(-1, feature_dim)

    y = step(model.second, torch.tanh(step(model.first, x)))
    y = step(model.listed[1], torch.tanh(step(model.listed[0], y)).mT, -2).mT
    y = step(model.named["again"], step(model.named["norm"], y))
    torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-4)
    assert {layer.get_layer_stats()["forward_calls_active"] for layer in model.kasmina_layers.values()} == {1, 2}
    assert len(list(esper.seed_parameters(model))) == 4 * 4


def test_a_model_on_meta_is_wrapped_materialised_and_then_grown(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Conv1d(4, D, 1), nn.BatchNorm1d(D))
    esper.wrap(model, ["0", "1"], seeds_per_layer=1, urza=adapter_store)
    assert model(torch.empty(2, 4, 3, device="meta")).shape == (2, D, 3)
    assert model[0].state.storage.is_meta
    assert model.load_kernel_sync("0", 0, adapter_for(D, R)) is False
    assert "is on meta" in str(model[0].last_error(0))
    model.unload_kernel("0", 0)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for module in model:
        module.reset_parameters()
    assert model[1].state.storage.tolist() == [0] * model[1].state.storage.numel()
    x = torch.randn(2, 4, 3)
    h = model[0](x)
    grow(model[0], 0, adapter_for(D, R), alpha=0.5)
    wanted = law_2(h.mT, [((0, D), 0.5, own_parameters(model[0], 0))]).mT
    torch.testing.assert_close(model[0](x), wanted, rtol=1e-4, atol=1e-4)
    health = model[0].state.health_accumulator
    health.fill_(0.5)
    model.to_empty(device="cpu")
    assert model[0].state.health_accumulator.tolist() == [0.5]


@pytest.fixture(autouse=True)
def _no_layer_is_left(_fresh_cache: None) -> None:
    assert KernelCache.process().stats().pinned == 0
