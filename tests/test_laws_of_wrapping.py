"""Law 8: a dormant wrap is invisible."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from seeding import grow, linear_with_seeds
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.kasmina import KernelCache
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


# ---- Law 8: a dormant wrap is invisible


def _host() -> nn.Sequential:
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 11)
    )
    model[5].weight = nn.Parameter(torch.randn(11, 8))
    model[0].weight = model[5].weight  # tied
    model[4].weight.requires_grad_(False)
    return model


TARGETS = [nn.Linear, nn.Embedding, nn.LayerNorm]


def _run_host(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    tokens = torch.randint(0, 11, (2, 5))
    out = model(tokens)
    grads = torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return [out, *grads]


@pytest.mark.parametrize("training", [True, False])
def test_law_8_outputs_and_gradients_of_a_dormant_wrap_are_the_same_bits(store: Urza, training: bool) -> None:
    model = _host().train(training)
    before = _run_host(model)
    esper.wrap(model, TARGETS, seeds_per_layer=2, urza=store)
    assert all(torch.equal(a, b) for a, b in zip(before, _run_host(model), strict=True))
    assert model.training is training


def test_law_8_a_dormant_layer_runs_the_host_classs_own_forward(store: Urza) -> None:
    layer = linear_with_seeds(store, IN, D, 2)
    assert "forward" not in vars(layer)
    assert layer.forward.__func__ is nn.Linear.forward


def test_law_8_state_dict_parameters_hooks_and_flags_are_kept(store: Urza) -> None:
    model = _host().double()
    calls: list[str] = []
    handle = model[1].register_forward_hook(lambda *_: calls.append("hook"))
    keys = list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    flags = [p.requires_grad for p in model.parameters()]
    saved = copy.deepcopy(model.state_dict())
    esper.wrap(model, TARGETS, seeds_per_layer=2, urza=store)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert [p.requires_grad for p in model.parameters()] == flags
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.load_state_dict(saved, strict=True).missing_keys == []
    model(torch.zeros(1, 1, dtype=torch.long))
    assert calls == ["hook"]
    assert isinstance(model[1], nn.Linear)
    handle.remove()


def test_law_8_the_random_stream_is_untouched_by_wrapping_and_by_loading(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    model = nn.Sequential(nn.Linear(IN, D))
    before = torch.random.get_rng_state()
    esper.wrap(model, [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    assert model.load_kernel_sync("0", 0, adapter_for(D, R))
    model.graft("0", 0)
    model(torch.zeros(2, IN))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_law_8_a_dormant_wrap_can_be_copied_and_saved(store: Urza, tmp_path: Path, way: str) -> None:
    model = esper.wrap(_host().eval(), TARGETS, seeds_per_layer=2, urza=store)
    match way:
        case "deepcopy":
            other = copy.deepcopy(model)
        case "pickle":
            other = pickle.loads(pickle.dumps(model))
        case _:
            torch.save(model, tmp_path / "model.pt")
            other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(other) is type(model)
    assert list(other.kasmina_layers) == list(model.kasmina_layers)
    assert other[0].weight is other[5].weight
    assert all(torch.equal(a, b) for a, b in zip(_run_host(model), _run_host(other), strict=True))


def test_law_8_unwrap_leaves_nothing(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    model = nn.Sequential(nn.Linear(IN, D), nn.Linear(D, D))
    before = {name: (type(m), sorted(vars(m)), sorted(m._buffers)) for name, m in model.named_modules()}
    non_persistent = [set(m._non_persistent_buffers_set) for m in model.modules()]
    x = torch.randn(2, IN)
    host = model(x)
    esper.wrap(model, [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    grow(model[0], 0, adapter_for(D, R), alpha=0.5)
    assert not torch.equal(model(x), host)
    assert esper.unwrap(model) is model
    assert {name: (type(m), sorted(vars(m)), sorted(m._buffers)) for name, m in model.named_modules()} == before
    assert [m._non_persistent_buffers_set for m in model.modules()] == non_persistent
    assert all(not m._forward_hooks for m in model.modules())
    assert torch.equal(model(x), host)
    assert type(model) is nn.Sequential


# ---- An active seed changes the output of every wrapped kind, in train and eval (the fast-path trap of adoption)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layer_name", ["layers.0.linear1", "layers.1.linear2", "layers.1.norm1"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own encoder makes them
def test_law_8_an_encoder_layers_fast_path_does_not_pass_over_an_active_seed(
    adapter_store: Urza, adapter_for: Callable[..., str], layer_name: str, padded: bool, training: bool
) -> None:
    encoder_layer = nn.TransformerEncoderLayer(D, 2, D, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(encoder_layer, 2).train(training)
    model = esper.wrap(encoder, [layer_name], seeds_per_layer=1, urza=adapter_store)
    x = torch.randn(2, 5, D)
    mask = torch.tensor([[False] * 4 + [True], [False] * 5]) if padded else None
    with torch.no_grad():
        host = model(x, src_key_padding_mask=mask)
        grow(model.kasmina_layers[layer_name], 0, adapter_for(D, R), alpha=1.0)
        grown = model(x, src_key_padding_mask=mask)
        model.unload_kernel(layer_name, 0)
        again = model(x, src_key_padding_mask=mask)
    assert (grown - host).abs().amax(dim=-1)[0, :4].min() > 1e-3
    assert torch.equal(again, host)
    assert all(not m._forward_hooks for m in model.modules())
