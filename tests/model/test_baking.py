from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import copy_artifact, flip_one_byte, grow, own_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactRefused, CorruptObject
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.kasmina.fixed import fetch_program, fixed_seeds
from esper_triton.model.baking import BakedLayer
from esper_triton.urza import Urza

DATA = Path(__file__).with_name("data")
D, R, IN = 16, 4, 6
S = SeedLifecycleState
drawn = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Compiled = Callable[..., str]


@pytest.fixture
def small(adapter_for: Compiled) -> str:
    return adapter_for(D, R)


@pytest.fixture(scope="session")
def affine_for(adapter_store: Urza) -> Compiled:
    """`affine_for("channel_scale", d=16)`: id of a blueprint of `data/`, in `adapter_store`."""

    def compiled(name: str, dtype: object = "float32", **dims: int) -> str:
        return esper.compile(DATA / f"{name}.toml", dims=dims, dtype=dtype, urza=adapter_store).id

    return compiled


def fossilise(layer: KasminaLayer, seed: int, artifact_id: str, alpha: float) -> None:
    grow(layer, seed, artifact_id, alpha=alpha, draw=seed + 1)
    for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
        layer.request_transition(seed, state)


def net(store: Urza | None, artifact_id: str | None, chunking: str = "features") -> esper.MorphableModel:
    """Two seeds in layer 0, permanent; a dormant one and a permanent one in layer 2."""
    torch.manual_seed(0)
    width = 2 * D if chunking == "features" else D
    host = nn.Sequential(nn.Linear(IN, width), nn.Tanh(), nn.Linear(width, width), nn.LayerNorm(width))
    model = esper.wrap(host, ["0", "2", "3"], seeds_per_layer=2, urza=store, chunking=chunking)  # type: ignore[arg-type]
    if artifact_id is not None:
        fossilise(model.kasmina_layers["0"], 0, artifact_id, 0.5)
        fossilise(model.kasmina_layers["0"], 1, artifact_id, 0.75)
        fossilise(model.kasmina_layers["2"], 1, artifact_id, 1.0)
    return model


@pytest.mark.parametrize("chunking", ["features", "whole"])
def test_a_baked_model_gives_the_outputs_and_gradients_of_the_wrapped_one_to_the_bit(
    adapter_store: Urza, small: str, chunking: str
) -> None:
    model = net(adapter_store, small, chunking)
    baked = esper.bake(model)
    for shape in ((3, IN), (2, 5, IN), (IN,), (0, IN)):
        x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        assert torch.equal(baked(y), model(x))
        leaves = [x, *model.parameters()], [y, *(p for p in baked.parameters() if p.requires_grad)]
        grads = [torch.autograd.grad(m(v[0]).square().sum(), v) for m, v in zip((model, baked), leaves, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_of_kasmina_is_left_and_the_model_stays_as_it_was(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store, small)
    x = torch.randn(3, IN)
    expected, layers = model(x), dict(model.kasmina_layers)
    baked = esper.bake(model)
    assert [type(m) for m in baked] == [BakedLayer, nn.Tanh, BakedLayer, nn.LayerNorm]
    assert type(baked) is nn.Sequential
    assert not any("kasmina" in name.lower() for m in baked.modules() for name in (*vars(m), type(m).__name__))
    assert not any(isinstance(m, KasminaLayer) for m in baked.modules())
    assert not any(p.requires_grad for n, p in baked.named_parameters() if ".seeds." in n)
    assert baked[0].weight is baked[0].host.weight
    with torch.no_grad():
        for parameter in baked.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(x), expected)
    assert model.kasmina_layers == layers
    assert isinstance(model, esper.MorphableModel)


def test_a_baked_model_outlives_the_wrapped_one_and_its_cache(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store, small)
    x = torch.randn(3, IN)
    expected, baked = model(x), esper.bake(model)
    del model
    KernelCache.process().reset()
    gc.collect()
    assert torch.equal(baked(x), expected)
    assert torch.equal(copy.deepcopy(baked)(x), expected)


def test_a_model_of_dormant_seeds_is_baked_to_the_host(adapter_store: Urza) -> None:
    model = net(adapter_store, None)
    baked = esper.bake(model)
    assert [type(m) for m in baked] == [nn.Linear, nn.Tanh, nn.Linear, nn.LayerNorm]
    x = torch.randn(3, IN)
    assert torch.equal(baked(x), model(x))


def test_seeds_that_are_not_done_are_named_with_their_states(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store, small)
    grow(model.kasmina_layers["2"], 0, small, alpha=0.5)
    assert model.load_kernel_sync("3", 1, small)
    with pytest.raises(ValueError, match=r"seed 0 of layer '2' is GRAFTING; seed 1 of layer '3' is TRAINING$"):
        esper.bake(model)
    with pytest.raises(ValueError, match="Linear has no seeds, so there is nothing to bake"):
        esper.bake(nn.Linear(2, 2))


def test_a_seed_that_has_just_failed_is_not_baked(
    adapter_store: Urza, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(adapter_store, small)
    model.kasmina_layers["0"]._kasmina.seeds[1].fault(RuntimeError("failed"))
    with pytest.raises(ValueError, match="seed 1 of layer '0' is failing"):
        esper.bake(model)


def test_kernels_are_fetched_and_verified_again(store: Urza, adapter_store: Urza, small: str, tmp_path: Path) -> None:
    copy_artifact(adapter_store, store, small)
    model = net(store, small)
    other = Urza(tmp_path / "other")
    copy_artifact(adapter_store, other, small, created_at="2001-01-01T00:00:00+00:00")
    with pytest.raises(ArtifactRefused, match=f"seed 0 of layer '0': artifact '{small}' has a manifest of digest"):
        esper.bake(model, urza=other)
    flip_one_byte(store, small)
    with pytest.raises(ArtifactRefused, match=r"seed 0 of layer '0': .* cannot be baked: .*binary of kernel"):
        esper.bake(model)
    assert isinstance(esper.bake(model, urza=adapter_store)[0], BakedLayer)


def test_an_unpickled_model_fetches_its_kernels_and_without_them_is_an_error(
    store: Urza, adapter_store: Urza, small: str
) -> None:
    copy_artifact(adapter_store, store, small)
    model = net(store, small)
    stored = pickle.dumps(esper.bake(model))
    x = torch.randn(3, IN)
    assert torch.equal(pickle.loads(stored)(x), model(x))
    flip_one_byte(store, small)
    with pytest.raises(CorruptObject, match="binary of kernel"):
        pickle.loads(stored)


def test_a_baked_model_runs_in_a_new_process(adapter_store: Urza, small: str, tmp_path: Path) -> None:
    model, x = net(adapter_store, small), torch.randn(3, IN)
    torch.save({"model": esper.bake(model), "x": x}, tmp_path / "baked.pt")
    program = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1] + '/baked.pt', weights_only=False)\n"
        "torch.save(saved['model'](saved['x']).detach(), sys.argv[1] + '/out.pt')\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(esper.__file__).parents[1])}  # the package that is tested here
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), model(x))


def test_hooks_see_what_they_saw(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store, small)
    first, second = model.kasmina_layers["0"], model.kasmina_layers["2"]
    seen: list[tuple[Tensor, Tensor]] = []
    first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    first.register_forward_hook(lambda module, args, out: seen.append((module.weight, out)))
    second.register_full_backward_hook(lambda module, to_x, to_out: seen.append((to_x[0], to_out[0])))
    x = torch.randn(3, IN)
    model(x).sum().backward()
    before, seen[:] = list(seen), []
    esper.bake(model)(x).sum().backward()
    assert len(seen) == len(before) == 2
    assert all(torch.equal(a, b) for pair in zip(seen, before, strict=True) for a, b in zip(*pair, strict=True))


def test_a_root_and_a_shared_layer_are_baked_in_every_place(adapter_store: Urza, small: str) -> None:
    torch.manual_seed(0)
    root = esper.wrap(nn.Linear(IN, D), [nn.Linear], seeds_per_layer=1, urza=adapter_store)
    fossilise(root, 0, small, 0.5)
    x = torch.randn(3, IN)
    assert torch.equal(esper.bake(root)(x), root(x))

    inner = nn.Linear(D, D)
    shared = esper.wrap(nn.Sequential(inner, nn.Tanh(), inner), ["0"], seeds_per_layer=1, urza=adapter_store)
    fossilise(shared.kasmina_layers["0"], 0, small, 0.5)
    baked, x = esper.bake(shared), torch.randn(3, D)
    assert baked[0] is baked[2]
    assert torch.equal(baked(x), shared(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own encoder makes them
def test_the_fast_path_of_an_encoder_does_not_pass_over_a_baked_seed(
    adapter_store: Urza, small: str, padded: bool, training: bool
) -> None:
    torch.manual_seed(0)
    encoder_layer = nn.TransformerEncoderLayer(D, 2, D, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(encoder_layer, 1).train(training)
    model = esper.wrap(encoder, ["layers.0.linear1"], seeds_per_layer=1, urza=adapter_store)
    x = torch.randn(2, 3, D)
    mask = torch.tensor([[False, False, True], [False] * 3]) if padded else None
    with torch.no_grad():
        host = model(x, src_key_padding_mask=mask)
        fossilise(model.kasmina_layers["layers.0.linear1"], 0, small, 1.0)
        out = esper.bake(model)(x, src_key_padding_mask=mask)
        assert torch.equal(out, model(x, src_key_padding_mask=mask))
    assert not torch.allclose(out, host)


def test_a_call_that_a_kernel_is_not_for_raises_instead_of_being_the_hosts(adapter_store: Urza, small: str) -> None:
    baked = esper.bake(net(adapter_store, small))
    with pytest.raises(ValueError, match=r"out is \(3, 16\) torch.float64 on cpu, artifact .* takes \[rows, 16\]"):
        baked.double()(torch.randn(3, IN, dtype=torch.float64))


def test_a_kernel_model_is_exported_with_its_operator(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store, small).eval()
    baked, x = esper.bake(model), torch.randn(3, IN)
    exported = torch.export.export(baked, (x,))
    calls = [node for node in exported.graph.nodes if "fixed_seeds" in str(node.target)]
    assert len(calls) == 2
    assert torch.equal(exported.module()(x), model(x))


def test_a_kernel_model_is_compiled_in_one_graph(adapter_store: Urza, small: str) -> None:
    model = net(adapter_store, small)
    compiled = torch.compile(esper.bake(model), backend="aot_eager", fullgraph=True)
    x, y = (torch.randn(3, IN, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    assert torch.equal(compiled(x), model(y))
    grads = [torch.autograd.grad(m(v).square().sum(), v)[0] for m, v in ((compiled, x), (model, y))]
    assert torch.equal(*grads)


def test_the_operator_keeps_torchs_rules_and_says_what_it_does_not_have(adapter_store: Urza, small: str) -> None:
    artifact = adapter_store.get(small)
    program = fetch_program(adapter_store, small, artifact.digest, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: program.manifest.parameters[name].shape for name in sorted(program.manifest.parameters)}
    parameters = [torch.randn(shape, generator=generator) for shape in shapes.values()]
    h = torch.randn(3, D, requires_grad=True)
    for seeds in (([0.5], [artifact.digest], [0]), ([0.5, 1.0], [artifact.digest] * 2, [0, 0])):
        given = parameters * len(seeds[0])
        call = (h, None, given, *seeds, D, -1, False, False, None)
        torch.library.opcheck(torch.ops.esper_triton.fixed_seeds.default, call)
    image = torch.randn(2, D, 3, 4, requires_grad=True)
    one = ([0.5], [artifact.digest], [0], D)
    call = (image, None, parameters, *one, -3, False, False, None)
    torch.library.opcheck(torch.ops.esper_triton.fixed_seeds.default, call)
    (grad,) = torch.autograd.grad(fixed_seeds(h, None, parameters, *one).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    trained = [parameter.clone().requires_grad_() for parameter in parameters]
    with pytest.raises(RuntimeError, match="parameters of fixed seeds are frozen"):
        fixed_seeds(h, None, trained, *one).sum().backward()
    with pytest.raises(RuntimeError, match="the kernel of manifest 0000 is not loaded"):
        fixed_seeds(h, None, parameters, [0.5], ["0000"], [0], D)
    with pytest.raises(ArtifactRefused, match="expected 0000"):
        fetch_program(adapter_store, small, "0000", torch.device("cpu"))


class _Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(query=x, key=x, value=x)
        return out, weights


@pytest.mark.parametrize(
    ("host", "name", "shape"),
    [
        # As wide as the features are many, where a wrong dimension would pass for the right one.
        (nn.Sequential(nn.Conv1d(4, D, 1)), "0", (2, 4, D)),
        (nn.Sequential(nn.Conv2d(4, D, 3, padding=1), nn.BatchNorm2d(D)), "0", (2, 4, 5, D)),
        (nn.Sequential(nn.Conv2d(4, D, 1)).to(memory_format=torch.channels_last), "0", (2, 4, 5, D)),
        (nn.Sequential(nn.BatchNorm1d(D)), "0", (3, D)),
        (_Attended(), "attention", (2, 5, D)),
    ],
)
def test_features_in_another_dimension_and_tuples_are_baked_as_they_are_grown(
    adapter_store: Urza, small: str, host: nn.Module, name: str, shape: tuple[int, ...]
) -> None:
    model = esper.wrap(host, [name], seeds_per_layer=1, urza=adapter_store, copy=True).eval()
    fossilise(model.kasmina_layers[name], 0, small, 0.5)
    baked = esper.bake(model)
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    ours, wanted = baked(y), model(x)
    if isinstance(wanted, tuple):
        assert torch.equal(ours[1], wanted[1])
        ours, wanted = ours[0], wanted[0]
    assert torch.equal(ours, wanted)
    assert ours.stride() == wanted.stride()
    assert torch.equal(torch.autograd.grad(ours.square().sum(), y)[0], torch.autograd.grad(wanted.square().sum(), x)[0])
    assert not torch.equal(ours, host.eval()(x)[0] if name == "attention" else host.eval()(x))


# ---- merging


def of_scale(h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h * p["scale"] + p["shift"]


def of_low_rank(h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h + F.linear(F.linear(x, p["down"]), p["up"])


@drawn
@given(
    name=st.sampled_from(["channel_scale", "low_rank"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunking=st.sampled_from(["features", "whole"]),
    bias=st.booleans(),
    alphas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_affine_seeds_are_merged_into_a_linear_layer(
    adapter_store: Urza,
    affine_for: Compiled,
    name: str,
    dtype: torch.dtype,
    chunking: str,
    bias: bool,
    alphas: tuple[float, float],
) -> None:
    dims = {"d": D} if name == "channel_scale" else {"d": D, "d_in": IN, "r": 3}
    width = 2 * D if chunking == "features" else D
    host = nn.Sequential(nn.Linear(IN, width, bias=bias, dtype=dtype))
    model = esper.wrap(host, ["0"], seeds_per_layer=2, urza=adapter_store, chunking=chunking)  # type: ignore[arg-type]
    layer = model.kasmina_layers["0"]
    for seed, alpha in enumerate(alphas):
        fossilise(layer, seed, affine_for(name, dtype, **dims), alpha)
    baked = esper.bake(model)
    assert type(baked[0]) is nn.Linear
    x = torch.randn(5, IN).to(dtype)
    wide = x.double()
    h = F.linear(wide, layer.weight.double(), layer.bias.double() if bias else None)
    expected = h.clone()
    for seed, alpha in enumerate(alphas):
        span = slice(*layer.seed_span(seed))
        own = {n: p.double() for n, p in own_parameters(layer, seed).items()}
        k = (of_scale if name == "channel_scale" else of_low_rank)(h[:, span], wide, own)
        expected[:, span] += alpha * (k - h[:, span])
    # One rounding of the kernel's values that M, N and c are read from, of the merged weight, of the bias and of the
    # output; and the sums of the product. 8 for what cancels: M - 1, two seeds on one span.
    eps = torch.finfo(dtype).eps
    size = wide.abs() @ layer.weight.double().abs().T + 1.0 + expected.abs() + wide.abs().sum(-1, keepdim=True)
    assert ((baked(x).double() - expected).abs() <= 8 * eps * size).all()


def test_a_merged_model_is_plain_and_can_be_exported_and_loaded_without_a_store(
    adapter_store: Urza, affine_for: Compiled
) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(IN, D), nn.Tanh(), nn.Linear(D, D, bias=False)).eval()
    model = esper.wrap(host, ["0", "2"], seeds_per_layer=1, urza=adapter_store)
    fossilise(model.kasmina_layers["0"], 0, affine_for("low_rank", d=D, d_in=IN, r=2), 0.5)
    fossilise(model.kasmina_layers["2"], 0, affine_for("low_rank", d=D, d_in=D, r=2), 1.0)
    baked, x = esper.bake(model), torch.randn(3, IN)
    assert [type(m) for m in baked] == [nn.Linear, nn.Tanh, nn.Linear]
    assert baked[2].bias is None  # nothing was added to it
    assert list(baked.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(baked(x), model(x), rtol=1e-5, atol=1e-5)  # two layers of float32 products
    assert torch.equal(torch.export.export(baked, (x,)).module()(x), baked(x))
    file = io.BytesIO()
    torch.save(baked, file)
    assert b"esper" not in file.getvalue()


def test_affine_seeds_are_merged_into_an_embeddings_table(adapter_store: Urza, affine_for: Compiled) -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Embedding(7, D)), ["0"], seeds_per_layer=1, urza=adapter_store)
    layer = model.kasmina_layers["0"]
    fossilise(layer, 0, affine_for("channel_scale", d=D), 0.5)
    baked = esper.bake(model)
    assert type(baked[0]) is nn.Embedding
    index = torch.arange(7)
    own = {n: p.double() for n, p in own_parameters(layer, 0).items()}
    h = layer.weight.double()
    expected = h + 0.5 * (h * own["scale"] + own["shift"] - h)
    torch.testing.assert_close(baked(index).double(), expected, rtol=1e-6, atol=1e-6)  # a few roundings of float32


PLACES = {
    "Conv1d of places": (lambda **o: nn.Conv1d(IN, 2 * D, 1, **o), (2, IN, 5), 1),
    "Conv2d of places": (lambda **o: nn.Conv2d(IN, 2 * D, 1, **o), (2, IN, 3, 4), 1),
    "Conv2d of places, unbatched": (lambda **o: nn.Conv2d(IN, 2 * D, 1, **o), (IN, 3, 4), 0),
}
NEIGHBOURS = {
    "Conv1d": (lambda **o: nn.Conv1d(IN, 2 * D, 3, padding=1, **o), (2, IN, 5), 1),
    "Conv2d": (lambda **o: nn.Conv2d(IN, 2 * D, 3, stride=2, padding=1, padding_mode="reflect", **o), (2, IN, 6, 5), 1),
    "Conv3d": (lambda **o: nn.Conv3d(IN, 2 * D, (1, 2, 1), dilation=2, **o), (1, IN, 2, 4, 3), 1),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "kernel"),
    [*((name, "channel_scale") for name in PLACES | NEIGHBOURS), *((name, "low_rank") for name in PLACES)],
)
def test_affine_seeds_are_merged_into_a_convolution(
    adapter_store: Urza, affine_for: Compiled, name: str, kernel: str, bias: bool
) -> None:
    make, shape, feature_dim = (PLACES | NEIGHBOURS)[name]
    torch.manual_seed(0)
    host = make(bias=bias)
    h_of = copy.deepcopy(host).double()
    model = esper.wrap(nn.Sequential(host), ["0"], seeds_per_layer=2, urza=adapter_store)
    layer = model.kasmina_layers["0"]
    dims = {"d": D} if kernel == "channel_scale" else {"d": D, "d_in": IN, "r": 3}
    for seed, alpha in enumerate((0.5, 1.0)):
        fossilise(layer, seed, affine_for(kernel, **dims), alpha)
    baked = esper.bake(model)
    assert type(baked[0]) is type(h_of)
    x = torch.randn(shape)
    h, rows = h_of(x.double()).movedim(feature_dim, -1), x.double().movedim(feature_dim, -1)
    expected = h.clone()
    for seed, alpha in enumerate((0.5, 1.0)):
        span = slice(*layer.seed_span(seed))
        own = {n: p.double() for n, p in own_parameters(layer, seed).items()}
        k = (of_scale if kernel == "channel_scale" else of_low_rank)(h[..., span], rows, own)
        expected[..., span] += alpha * (k - h[..., span])
    # A few roundings of float32 in sums of some twenty products, as of the linear layer above.
    torch.testing.assert_close(baked(x).movedim(feature_dim, -1).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(h, expected, atol=1e-2)


@pytest.mark.parametrize(
    "why", ["tied", "reparametrized", "norm", "mixed", "max_norm", "groups", "transposed", "neighbours"]
)
def test_what_cannot_be_merged_runs_by_its_kernel(
    adapter_store: Urza, affine_for: Compiled, small: str, why: str
) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    x = torch.randn(3, D)
    if why == "tied":
        host[1].weight = host[0].weight
    if why == "norm":
        host[0] = nn.LayerNorm(D)
    if why == "groups":
        host[0], x = nn.Conv1d(D, D, 1, groups=2), torch.randn(2, D, D)
    if why == "transposed":
        host[0], x = nn.ConvTranspose1d(D, D, 1), torch.randn(2, D, D)
    if why == "neighbours":
        host[0], x = nn.Conv1d(D, D, 3, padding=1), torch.randn(2, D, D)
    if why == "max_norm":
        host[0], x = nn.Embedding(7, D, max_norm=1.0), torch.arange(7)
    if why == "reparametrized":
        prune.random_unstructured(host[0], "weight", 0.5)
    model = esper.wrap(host, ["0"], seeds_per_layer=2, urza=adapter_store, chunking="whole")
    layer = model.kasmina_layers["0"]
    fossilise(layer, 0, affine_for("channel_scale", d=D), 0.5)
    if why == "mixed":
        fossilise(layer, 1, small, 0.5)
    if why == "neighbours":  # of which its x is the middle one
        fossilise(layer, 1, affine_for("low_rank", d=D, d_in=D, r=2), 0.5)
    with torch.no_grad():
        model(x)  # torch copies no module whose pruned weight has a graph
    baked = esper.bake(model)
    assert type(baked[0]) is BakedLayer
    assert torch.equal(baked(x), model(x))


def test_a_kernel_that_is_not_as_affine_as_it_says_is_refused(store: Urza, adapter_store: Urza, small: str) -> None:
    copy_artifact(adapter_store, store, small, affine=True)
    model = net(store, small)
    with pytest.raises(ArtifactRefused, match=f"'{small}' says that it is affine, and its kernel is not"):
        esper.bake(model)


def test_a_blueprint_whose_reference_is_not_affine_is_not_proven_as_such(
    store: Urza, adapter_variant: Callable[..., Path]
) -> None:
    path = adapter_variant(toml={'input = "h"': 'input = "h"\naffine = true'})
    with pytest.raises(esper.EsperError, match=r"does not compute what .* says and was stored as REJECTED: .*k\(2x\)"):
        esper.compile(path, dims={"d": D, "r": R}, urza=store)
