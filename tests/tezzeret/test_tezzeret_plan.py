"""A request is checked as a whole before anything is compiled, and its id has everything that changes the code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeding import grow, own_parameters
from torch import nn

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError, CompileError
from esper_triton.contracts.expressions import evaluate, symbols
from esper_triton.contracts.manifest import TargetSpec
from esper_triton.kasmina import KasminaLayer
from esper_triton.tezzeret.plan import Plan, plan_build, substitute
from esper_triton.tezzeret.source import load_source
from esper_triton.urza import Urza

H100 = TargetSpec(backend="cuda", arch="90")
DIMS = {"d": 64, "r": 16}
OF_KASMINA = Path(__file__).resolve().parent.parent / "kasmina" / "blueprints"


def plan(path: Path | Blueprint, dims: dict[str, int] | None = None, **changes: object) -> Plan:
    blueprint = path if isinstance(path, Blueprint) else Blueprint.load(path)
    request = {"dims": dims or DIMS, "dtype": "float32", "target": H100, "pipeline": "standard"} | changes
    return plan_build(blueprint, **request)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'feature_dim = "d"': 'feature_dim = "d"\nfeature_dimm = "d"'}, "unknown key 'feature_dimm'.*'feature_dim'"),
        ({'input = "h"\n': ""}, "missing key 'input'"),
        ({'feature_dim = "d"': 'feature_dim = "dd"'}, "feature_dim 'dd' is not a dim; did you mean 'd'"),
        ({'shape = ["r", "d"]': 'shape = ["rr", "d"]'}, "unknown symbol 'rr'.*did you mean 'r'"),
        ({'grid = ["cdiv(rows, BLOCK_ROWS)"]': 'grid = ["cdiv(rows, __import__)"]'}, "unknown symbol '__import__'"),
        ({"[dims]": "[dims"}, "not valid TOML"),
        ({'source = "bottleneck_adapter.py"': 'source = "../adapter.py"'}, "must be a file beside the blueprint"),
        ({'grid = ["cdiv(rows, BLOCK_ROWS)"]': 'grid = ["batch"]'}, r"forward\[0\].grid: unknown symbol 'batch'"),
        (
            {'feature_dim = "d"': 'feature_dim = "d"\nlayout = "images"'},
            "layout: Input should be 'rows'",
        ),
        ({"[dims]": "[dims]\nlength = { max = 9 }"}, "dim 'length' is the name of an extent"),
        (
            {"[scratch]": '[scratch]\ntraining = { shape = ["rows"] }'},
            "tensor name 'training' is .*reserved",
        ),
    ],
)
def test_a_faulty_blueprint_is_refused_with_the_nearest_valid_name(
    adapter_variant: Callable[..., Path], changes: dict[str, str], message: str
) -> None:
    path = adapter_variant(toml=changes)
    with pytest.raises(BlueprintError, match=message) as caught:
        Blueprint.load(path)
    assert str(path) in str(caught.value)


def test_every_fault_of_a_request_is_listed_at_once(adapter_path: Path) -> None:
    with pytest.raises(BlueprintError) as caught:
        plan(adapter_path, {"dd": 64, "r": 4096}, dtype="float23", pipeline="fats")
    message = str(caught.value)
    assert "unknown dim 'dd'; did you mean 'd'?" in message
    assert "dim 'd' is missing; it takes 1 to 65536" in message
    assert "dim 'r' is 4096, expected 1 to 256" in message
    assert "unknown dtype 'float23'; did you mean 'float32'" in message
    assert "unknown pipeline 'fats'; did you mean 'fast'" in message


@pytest.mark.parametrize("size", [0, -1, True, 6.5, "64"])
def test_a_dim_that_is_not_a_size_is_refused(adapter_path: Path, size: object) -> None:
    with pytest.raises(BlueprintError, match="dim 'd' is"):
        plan(adapter_path, {"d": size, "r": 16})


@pytest.mark.parametrize(
    ("toml", "source", "message"),
    [
        (
            {'"adapter_forward"': '"adapter_forwards"'},
            {},
            "no @triton.jit function 'adapter_forwards'; did you mean",
        ),
        ({}, {"up_bias_ptr": "upp_bias_ptr"}, "'adapter_forward': parameter 'upp_bias_ptr' is bound to.*'up_bias_ptr'"),
        (
            {},
            {"BLOCK_D: tl": "BLOCK_DD: tl"},
            "constexpr 'BLOCK_DD' is not in .*did you mean 'BLOCK_D'",
        ),
        ({}, {"    out_ptr,\n": ""}, "no forward kernel takes out_ptr"),
        ({}, {"    grad_up_bias_ptr,\n": ""}, "no backward kernel takes grad_up_bias_ptr"),
        ({}, {"def reference(": "def references("}, "defines no function 'reference'"),
        (
            {},
            {"import torch\n": "import torhc\n"},
            "source bottleneck_adapter.py does not run: ModuleNotFound",
        ),
        ({'BLOCK_ROWS = "32"': 'BLOCK_ROWS = "32 // (r - 16)"'}, {}, "constexprs.BLOCK_ROWS.*divides by zero"),
    ],
)
def test_a_blueprint_that_does_not_fit_its_source_is_refused(
    adapter_variant: Callable[..., Path], toml: dict[str, str], source: dict[str, str], message: str
) -> None:
    with pytest.raises(BlueprintError, match=message):
        plan(adapter_variant(toml=toml, source=source))


def test_kernels_are_not_planned_for_the_interpreter(adapter_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CompileError, match="TRITON_INTERPRET is set"):
        plan(adapter_path)


def test_arguments_are_bound_by_name_and_grids_are_left_in_rows_alone(adapter_path: Path) -> None:
    made = plan(adapter_path, {"d": 200, "r": 16}, dtype="bfloat16")
    (forward,) = made.forward
    bound = dict(zip(forward.arguments, made.kernels["adapter_forward"].signature.values(), strict=True))
    assert bound == {
        "h": "*bf16",
        "h.row_stride": "i64",
        "down_weight": "*bf16",
        "down_bias": "*bf16",
        "up_weight": "*bf16",
        "up_bias": "*bf16",
        "alpha": "*fp32",
        "out": "*bf16",
        "out.row_stride": "i64",
        "z": "*fp32",
        "rows": "i32",
    }
    assert forward.grid == ("cdiv(rows, 32)", "1", "1")
    assert made.backward[1].grid == ("4", "1", "1")
    assert made.parameters["up_weight"].shape == (200, 16)


def test_what_a_layout_has_and_the_mode_of_the_layer_are_bound_by_name() -> None:
    blueprints = {name: Blueprint.load(OF_KASMINA / f"{name}.toml") for name in ("depthwise_image", "dropout")}
    image = plan(blueprints["depthwise_image"], {"d": 6})
    assert image.forward[0].grid == ("image_width", "image_height", "batch")
    assert {"length", "image_height", "image_width"} < set(image.forward[0].arguments)
    kernel = plan(blueprints["dropout"], {"d": 6}).kernels["dropout_forward"]
    bound = dict(zip(kernel.arguments, kernel.signature.values(), strict=True))
    assert (bound["dropout_seed"], bound["training"]) == ("*i64", "i32")


def test_rows_of_no_order_have_no_length(tmp_path: Path) -> None:
    for suffix in ("toml", "py"):
        text = (
            (OF_KASMINA / f"dropout.{suffix}")
            .read_text()
            .replace("    training,\n    D:", "    training,\n    length,\n    D:")
        )
        (tmp_path / f"dropout.{suffix}").write_text(text)
    with pytest.raises(BlueprintError, match="kernel 'dropout_forward': parameter 'length' is bound to nothing"):
        plan(tmp_path / "dropout.toml", {"d": 6})


def test_a_blueprint_over_the_input_alone_is_given_what_it_is_blended_with(tmp_path: Path, store: Urza) -> None:
    for suffix in ("toml", "py"):
        text = (OF_KASMINA / f"linear_branch.{suffix}").read_text()
        text = text.replace('input = "xh"', 'input = "x"').replace("x: Tensor, h: Tensor,", "x: Tensor,")
        (tmp_path / f"linear_branch.{suffix}").write_text(text)
    artifact_id = esper.compile(tmp_path / "linear_branch.toml", dims={"d": 16, "d_in": 6}, urza=store).id
    manifest = store.get(artifact_id).manifest
    assert manifest.input == "x"
    assert {"x", "h", "h.row_stride"} < set(manifest.forward[0].arguments)
    layer = KasminaLayer.adopt(nn.Linear(6, 16), num_seeds=1, urza=store)
    grow(layer, 0, artifact_id, alpha=0.25)
    x = torch.randn(3, 6, requires_grad=True)
    out, h = layer(x), layer.default_transform(x)
    wanted = h + 0.25 * (x @ own_parameters(layer, 0)["weight"].T - h)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    (grad,), (expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, wanted))
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_the_id_changes_with_whatever_changes_the_code(
    adapter_path: Path, adapter_variant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_ENABLE_LLVM_DEBUG", raising=False)
    ids = [
        plan(adapter_path).artifact_id,
        plan(adapter_path, {"d": 65, "r": 16}).artifact_id,
        plan(adapter_path, {"d": 64, "r": 17}).artifact_id,
        plan(adapter_path, dtype="float16").artifact_id,
        plan(adapter_path, target=TargetSpec(backend="cuda", arch="80")).artifact_id,
        plan(adapter_path, target=TargetSpec(backend="hip", arch="gfx942")).artifact_id,
        plan(adapter_variant(toml={'BLOCK_ROWS = "32"': 'BLOCK_ROWS = "64"'})).artifact_id,
        plan(adapter_variant(source={"No atomics": "no atomics"})).artifact_id,
    ]
    monkeypatch.setenv("TRITON_ENABLE_LLVM_DEBUG", "1")  # one of the variables that Triton obeys
    ids.append(plan(adapter_path).artifact_id)
    assert len(set(ids)) == len(ids)


def test_the_id_of_a_cpu_artifact_changes_with_the_features_that_its_code_may_use(adapter_path: Path) -> None:
    from esper_triton.cpu.host import cpu_features, cpu_name

    here = TargetSpec(backend="cpu", arch=cpu_name(), features=cpu_features())
    less = here.model_copy(update={"features": cpu_features()[1:]})
    assert plan(adapter_path, target=here).artifact_id != plan(adapter_path, target=less).artifact_id


def test_the_id_does_not_change_with_names_prose_or_place(
    adapter_path: Path, adapter_variant: Callable[..., Path]
) -> None:
    moved = adapter_variant(toml={'name = "bottleneck_adapter"': 'name = "other"', "Houlsby et al. 2019": "a paper"})
    assert plan(moved).artifact_id == plan(adapter_path).artifact_id


@given(
    text=st.sampled_from(
        [
            "cdiv(rows, B)",
            "cdiv(d, B)",
            "rows * d - B",
            "(rows - d) * (B - 1)",
            "min(rows, d) % B",
            "7",
        ]
    ),
    rows=st.integers(0, 5000),
    d=st.integers(1, 5000),
    b=st.integers(1, 300),
)
def test_substituting_numbers_keeps_the_value_of_an_expression(text: str, rows: int, d: int, b: int) -> None:
    expected = evaluate(text, {"rows": rows, "d": d, "B": b})
    left = substitute(text, {"d": d, "B": b})
    assert symbols(left) <= {"rows"}
    assert evaluate(left, {"rows": rows}) == expected


def test_what_is_compiled_is_the_text_that_was_read_even_if_the_file_has_changed(
    adapter_variant: Callable[..., Path],
) -> None:
    path = adapter_variant()
    blueprint = Blueprint.load(path)
    path.with_suffix(".py").write_text("raise SystemExit('the file was run')\n")
    module = load_source(blueprint)
    assert inspect.getsource(module.reference) in blueprint.source_text
    assert module.adapter_forward.src in blueprint.source_text


def test_sources_can_be_loaded_by_many_threads_at_once(adapter_path: Path) -> None:
    blueprint = Blueprint.load(adapter_path)
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(lambda _: load_source(blueprint), range(24)))
    assert len({id(module) for module in modules}) == 24
    assert {module.adapter_forward.cache_key for module in modules} == {
        load_source(blueprint).adapter_forward.cache_key
    }
