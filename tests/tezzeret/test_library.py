"""Every blueprint that ships: complete, equal to its PyTorch layer, the host when fresh, and proven on every target."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shipped import BLUEPRINTS, EQUIVALENTS, KERNELS, POSITIONS, dims_of, k_of
from torch import Tensor

import esper_triton as esper
from esper_triton.contracts.manifest import KernelStatus, parameter_records
from esper_triton.kasmina.loading import make_parameters
from esper_triton.urabrask.verdict import read_report

NAMES = set(
    "linear conv1x1 conv3x3 layernorm rmsnorm multi_head_attention bottleneck_adapter lora swiglu_ffn residual_mlp "
    "squeeze_excite depthwise_adapter gated_residual channel_scale low_rank_attention parallel_adapter".split()
)
ADAPTERS = sorted(name for name, blueprint in BLUEPRINTS.items() if "h" in blueprint.inputs)
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def fresh(name: str, dims: dict[str, int]) -> dict[str, Tensor]:
    """What a seed's parameters start as, in float64."""
    records = parameter_records(BLUEPRINTS[name].parameters, dims)
    manifest = SimpleNamespace(id=name, dtype="float32", parameters=records)
    request = SimpleNamespace(layer_name="fc", seed=0, device=torch.device("cpu"))
    return {n: p.detach().double() for n, p in make_parameters(request, manifest).items()}  # type: ignore[arg-type]


def inputs_of(name: str, dims: dict[str, int], items: int, seed: int) -> dict[str, Tensor]:
    blueprint = BLUEPRINTS[name]
    generator = torch.Generator().manual_seed(seed)
    widths = {"h": dims["d"], "x": dims.get("d_in", dims["d"])}
    shapes = {n: (items, *POSITIONS[blueprint.layout], widths[n]) for n in blueprint.inputs}
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def test_everything_that_was_announced_is_there_and_called_as_its_file_is():
    assert set(BLUEPRINTS) >= NAMES
    assert {name: blueprint.name for name, blueprint in BLUEPRINTS.items()} == {name: name for name in BLUEPRINTS}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_each_says_what_it_is_and_who_introduced_it_and_has_a_size_for_every_dim_that_no_layer_gives(name: str):
    blueprint = BLUEPRINTS[name]
    assert len(blueprint.description.split()) > 15
    assert re.search(r"\b(19|20)\d\d$", blueprint.introduced_by), "a paper, and its year at the end"
    assert {dim for dim, limits in blueprint.dims.items() if limits.default is None} <= {"d", "d_in"}
    assert (name in EQUIVALENTS) == (blueprint.equivalent_to is not None)
    assert blueprint.ops, "a graph"


def test_the_page_lists_the_library_as_it_is():
    rows = ""
    for name, blueprint in BLUEPRINTS.items():
        defaults = {dim: limits.default for dim, limits in blueprint.dims.items()}
        dims = ", ".join(f"`{dim}` = {size}" if size else f"`{dim}`" for dim, size in defaults.items())
        equal = f"`{blueprint.equivalent_to.removeprefix('torch.')}`" if blueprint.equivalent_to else ""
        affine = "yes" if blueprint.affine else ""
        reads = ", ".join(f"`{n}`" for n in blueprint.inputs)
        rows += (
            f"| `{name}` | {reads} | {blueprint.layout} | {dims} | {equal} | {affine} | {blueprint.introduced_by} |\n"
        )
    head = "| blueprint | reads | layout | dims | equal to | affine | introduced by |\n" + "| --- " * 7 + "|\n"
    assert head + rows in PAGE, f"the table of docs/kernels.md should be:\n{head}{rows}"


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_page_describes_each_as_its_file_does(name: str):
    assert f"**{name}.** {' '.join(BLUEPRINTS[name].description.split())}\n" in PAGE


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kernels").symlink_to(KERNELS)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["artifact"].status is KernelStatus.VALIDATED


def test_what_is_affine_row_by_row_is_what_can_be_merged_into_a_weight():
    assert {n for n, b in BLUEPRINTS.items() if b.affine} == {"linear", "conv1x1", "lora", "channel_scale"}


@settings(max_examples=15, deadline=None)
@given(
    d=st.integers(1, 6),
    d_in=st.integers(1, 9),
    heads=st.integers(1, 3),
    items=st.integers(0, 4),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", EQUIVALENTS)
def test_equal_to_its_layer_with_the_layers_own_parameters_and_so_are_the_gradients(
    name: str, d: int, d_in: int, heads: int, items: int, seed: int
):
    dims = dims_of(name, {"d": d * heads, "d_in": d_in, "heads": heads})
    equivalent = EQUIVALENTS[name]
    torch.manual_seed(seed)
    layer = equivalent.make(dims).double()
    assert type(layer) is getattr(torch.nn, str(BLUEPRINTS[name].equivalent_to).rpartition(".")[2])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    own = equivalent.parameters(layer, name)
    shapes = {n: r.shape for n, r in parameter_records(BLUEPRINTS[name].parameters, dims).items()}
    parameters = {n: p.detach().reshape(shapes[n]).requires_grad_() for n, p in own.items()}
    (x,) = inputs_of(name, dims, items, seed).values()
    if name == "conv1x1":  # its layer takes images; as a blueprint it is of rows in any order
        x = x.reshape(items, 1, 1, d_in).repeat(1, 2, 3, 1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = equivalent.apply(layer, theirs)
    k = k_of(name, dims, {"x": ours}, parameters)
    torch.testing.assert_close(k, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(k.shape, dtype=torch.float64)
    found = torch.autograd.grad(k, [ours, *parameters.values()], weight)
    wanted = torch.autograd.grad(expected, [theirs, *own.values()], weight)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_is_the_host_and_its_gradient_moves_it(name: str):
    dims = dims_of(name)
    parameters = {n: p.requires_grad_() for n, p in fresh(name, dims).items()}
    inputs = inputs_of(name, dims, 4, 1)
    k = k_of(name, dims, inputs, parameters)
    assert torch.equal(k, inputs["h"])
    grads = torch.autograd.grad((k * torch.randn_like(k)).sum(), list(parameters.values()))
    assert any(grad.count_nonzero() for grad in grads)


@pytest.mark.parametrize("name", EQUIVALENTS)
def test_one_that_is_equal_to_a_layer_starts_as_the_layer_does(name: str):
    dims = dims_of(name, {"d": 64, "d_in": 96})
    torch.manual_seed(0)
    own = EQUIVALENTS[name].parameters(EQUIVALENTS[name].make(dims), name)
    for parameter, value in fresh(name, dims).items():
        theirs = own[parameter].detach().double()
        # Both uniform in an interval about 0, or both constant: so of one extent and one spread. The largest of n draws
        # lies some 1 / n below the bound and the spread of n draws is off by less than 1 / sqrt(n); three of each.
        n = value.numel()
        assert value.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=6 / n)
        assert value.std().item() == pytest.approx(theirs.std().item(), rel=3 / math.sqrt(n))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_compiled_for_this_machine_and_proven(
    library_artifact: Callable[..., str], library_store: esper.Urza, name: str, dtype: str
):
    artifact = library_store.get(library_artifact(name, dtype))
    assert artifact.status is KernelStatus.VALIDATED
    assert (artifact.manifest.dims, artifact.manifest.dtype) == (dims_of(name), dtype)
    report = read_report(artifact.id, library_store)  # of a seed that this run has drawn
    assert (report.verdict, report.failures) == ("VALIDATED", ())
    assert report.cases >= 20


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_compiled_for_gpus_that_are_not_here(store: esper.Urza, name: str):
    dims = {dim: min(size, 16) for dim, size in dims_of(name).items()}
    targets = ("cuda:80", "cuda:90", "hip:gfx942")
    request = {"dims": dims, "dtype": "bfloat16", "targets": targets, "pipeline": "fast"}
    artifacts = esper.compile(BLUEPRINTS[name], urza=store, **request)
    assert [a.manifest.target.label for a in artifacts] == ["cuda80", "cuda90", "hipgfx942"]
    assert {a.status for a in artifacts} <= {KernelStatus.PENDING_HARDWARE, KernelStatus.VALIDATED}
    for artifact in artifacts:
        _, blobs = store.load(artifact.id)
        assert all(blobs[kernel.binary].startswith(b"\x7fELF") for kernel in artifact.manifest.kernels.values())
