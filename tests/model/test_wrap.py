from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seeding import grow
from torch import nn

import esper_triton as esper
from esper_triton.kasmina import KasminaLayer, SeedLifecycleState
from esper_triton.urza import Urza

D, R = 16, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, D)
        self.fc2 = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))

    def describe(self) -> str:
        return "a block"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.attention = nn.MultiheadAttention(D, 2)
        self.plain_attention = nn.MultiheadAttention(D, 2)
        self.plain_attention.out_proj = nn.Linear(D, D)  # as a quantiser or an initialiser may put there
        self.conv = nn.Conv1d(D, D, 1)
        self.memory = nn.GRU(D, D)
        self.head = nn.Linear(D, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))

    def generate(self, n: int) -> int:
        return n + 1


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ([nn.Linear], ["encoder.0.fc1", "encoder.0.fc2", "encoder.1.fc1", "encoder.1.fc2", "head"]),
        (["encoder.*.fc1"], ["encoder.0.fc1", "encoder.1.fc1"]),
        (["head"], ["head"]),
        (["head", "encoder.1.*"], ["encoder.1.fc1", "encoder.1.fc2", "head"]),
        (["encoder.?.fc[2]", nn.LayerNorm], None),
        (
            ["*"],
            [
                "encoder.0.fc1",
                "encoder.0.fc2",
                "encoder.1.fc1",
                "encoder.1.fc2",
                "attention",
                "plain_attention",
                "conv",
                "head",
            ],
        ),
        ([nn.Conv1d, "attention"], ["attention", "conv"]),
    ],
)
def test_targets_are_types_names_and_globs(store: Urza, targets: list[object], names: list[str] | None) -> None:
    model = Net()
    if names is None:
        with pytest.raises(ValueError, match=r"nn\.LayerNorm matches no layer"):
            esper.wrap(model, targets, seeds_per_layer=2, urza=store)
        return
    assert list(esper.wrap(model, targets, seeds_per_layer=2, urza=store).kasmina_layers) == names


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["encoder.0.fc11"], ValueError, "matches no layer; did you mean 'encoder.0.fc1'"),
        ([nn.LayerNorm], ValueError, "nn.LayerNorm matches no layer"),
        (["attention.out_proj"], ValueError, "never calls it"),
        (["memory"], ValueError, "returns its hidden state"),
        ([nn.RNNBase], ValueError, "returns its hidden state"),
        (["plain_attention.out_proj"], ValueError, "never calls it"),
        ([nn.Linear, "nothing.*"], ValueError, r"'nothing\.\*' matches no layer"),
        ([], ValueError, "target_layers is empty"),
        ("head", TypeError, r"a list .* write \['head'\]"),
        ([nn.Linear(2, 2)], TypeError, "neither a subclass of nn.Module nor a string"),
    ],
)
def test_a_target_that_cannot_be_is_one_clear_error_and_nothing_is_changed(
    store: Urza, targets: list[object], error: type[Exception], message: str
) -> None:
    model = Net()
    before, attributes = classes(model), [sorted(vars(m)) for m in model.modules()]
    with pytest.raises(error, match=message):
        esper.wrap(model, targets, seeds_per_layer=2, urza=store)
    assert classes(model) == before
    assert [sorted(vars(m)) for m in model.modules()] == attributes


def test_more_seeds_than_features_is_refused_by_exact_name(store: Urza) -> None:
    with pytest.raises(ValueError, match="4 seeds cannot share 3 features"):
        esper.wrap(Net(), ["head"], seeds_per_layer=4, urza=store)


def test_wrapping_is_in_place_and_the_model_keeps_its_methods(store: Urza) -> None:
    model = Net()
    wrapped = esper.wrap(model, [nn.Linear], seeds_per_layer=1, urza=store)
    assert wrapped is model
    assert isinstance(wrapped, esper.MorphableModel)
    assert isinstance(wrapped, Net)
    assert wrapped.generate(4) == 5
    assert wrapped.encoder[0].describe() == "a block"
    assert [name for name, _ in wrapped.named_modules()] == [name for name, _ in Net().named_modules()]


def test_a_copy_leaves_the_original_alone(store: Urza) -> None:
    model = Net()
    before = classes(model)
    wrapped = esper.wrap(model, [nn.Linear], seeds_per_layer=1, urza=store, copy=True)
    assert wrapped is not model
    assert classes(model) == before
    assert len(wrapped.kasmina_layers) == 5
    x = torch.randn(2, D)
    assert torch.equal(wrapped(x), model(x))


def test_wrapping_twice_is_an_error_that_says_so(store: Urza) -> None:
    model = esper.wrap(Net(), ["head"], seeds_per_layer=1, urza=store)
    with pytest.raises(ValueError, match=r"wrapped already; esper_triton.unwrap\(model\) first"):
        esper.wrap(model, [nn.Linear], urza=store)
    with pytest.raises(ValueError, match="has modules that are wrapped already: '0', '0\\.head'"):
        esper.wrap(nn.Sequential(model), [nn.Linear], urza=store)


def test_a_shared_module_is_wrapped_once_and_has_all_its_names(store: Urza) -> None:
    model = nn.Module()
    model.a = nn.Linear(D, D)
    model.b = model.a
    layers = esper.wrap(model, ["b"], seeds_per_layer=1, urza=store).kasmina_layers
    assert list(layers) == ["a", "b"]
    assert layers["a"] is layers["b"] is model.a
    assert model.get_model_stats()["num_layers"] == 1


def test_methods_by_name_reach_the_layer(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    model = esper.wrap(Net(), [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    x = torch.randn(2, D)
    host = model(x)
    name = "encoder.0.fc1"
    assert model.load_kernel_sync(name, 0, adapter_for(D, R))
    assert {id(p) for p in esper.seed_parameters(model)} == {
        id(p) for _, p in model.kasmina_layers[name].seed_parameters()
    }
    assert len(list(esper.seed_parameters(model, SeedLifecycleState.TRAINING))) == 4
    assert list(esper.seed_parameters(model, SeedLifecycleState.GRAFTING)) == []
    model.graft(name, 0)
    model.set_alpha(name, 0, 0.5)
    next(iter(dict(model.kasmina_layers[name].seed_parameters()).values())).data.add_(1.0)
    dict(model.kasmina_layers[name].seed_parameters())["0.up_bias"].data.add_(1.0)
    assert not torch.equal(model(x), host)
    stats = model.get_model_stats()
    assert (stats["active_seeds"], stats["num_seeds"], stats["layers"][name]["seeds"][0]["alpha"]) == (1, 5, 0.5)
    assert model.unload_kernel(name, 0)
    assert torch.equal(model(x), host)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.load_kernel_sync("encoder.0.fc3", 0, "id"),
        lambda m: m.unload_kernel("encoder.0.fc3", 0),
        lambda m: m.graft("encoder.0.fc3", 0),
        lambda m: m.set_alpha("encoder.0.fc3", 0, 0.5),
    ],
)
def test_a_layer_name_that_does_not_exist_is_one_clear_error(store: Urza, call: Callable[..., object]) -> None:
    model = esper.wrap(Net(), [nn.Linear], seeds_per_layer=1, urza=store)
    with pytest.raises(ValueError, match=r"no wrapped layer 'encoder\.0\.fc3'; did you mean 'encoder\.0\.fc2'"):
        call(model)


def test_what_replaces_modules_works_before_wrapping_and_is_named_after_it(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).eval()

    converted = nn.SyncBatchNorm.convert_sync_batchnorm
    model = esper.wrap(converted(made()), ["1"], seeds_per_layer=1, urza=adapter_store)
    x = torch.randn(3, D)
    host = model(x)
    grow(model.kasmina_layers["1"], 0, adapter_for(D, R), alpha=0.5)
    assert not torch.equal(model(x), host)
    late = converted(esper.wrap(made(), ["0", "1"], seeds_per_layer=1, urza=adapter_store))
    assert list(late.kasmina_layers) == ["0"]
    message = (
        r"no wrapped layer '1': it is a SyncBatchNorm .* took the place of one after wrapping; .* first, then wrap"
    )
    with pytest.raises(ValueError, match=message):
        late.load_kernel_sync("1", 0, adapter_for(D, R))


def test_a_root_that_is_itself_the_layer_is_both(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    linear = nn.Linear(3, D)
    model = esper.wrap(linear, [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    assert isinstance(model, esper.MorphableModel)
    assert isinstance(model, KasminaLayer)
    assert model.kasmina_layers == {"": linear}
    x = torch.randn(2, 3)
    host = model(x)
    assert model.load_kernel_sync("", 0, adapter_for(D, R))
    model.graft(0)  # as a layer
    model.set_alpha("", 0, 1.0)  # as a model
    dict(model.seed_parameters())["0.up_bias"].data.add_(1.0)
    torch.testing.assert_close(model(x), host + 1.0)
    assert model.unload_kernel(0)
    esper.unwrap(model)
    assert type(linear) is nn.Linear


def test_the_step_boundary_commits_what_failed(adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    model = esper.wrap(Net(), ["encoder.0.fc1"], seeds_per_layer=1, urza=adapter_store)
    layer = model.kasmina_layers["encoder.0.fc1"]
    grow(layer, 0, adapter_for(D, R), alpha=1.0)
    x = torch.randn(2, D)
    dict(layer.seed_parameters())["0.up_bias"].data = torch.zeros(1)
    model(x)
    assert layer.seed_state(0) is SeedLifecycleState.GRAFTING
    model.step_boundary()
    assert layer.seed_state(0) is SeedLifecycleState.ERROR_RECOVERY
    assert model.get_model_stats()["error_count"] == 1


def test_unwrapping_what_is_not_wrapped_changes_nothing() -> None:
    model = Net()
    before = classes(model)
    assert esper.unwrap(model) is model
    assert classes(model) == before


def test_a_class_put_on_top_by_another_library_is_not_silently_removed(store: Urza) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(D, D)), [nn.Linear], seeds_per_layer=1, urza=store)
    model[0].__class__ = type("Theirs", (type(model[0]),), {})
    with pytest.raises(TypeError, match="Theirs was made from an adopted class by something else"):
        esper.unwrap(model)
