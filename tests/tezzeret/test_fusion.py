"""What becomes one kernel, and what the blend promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emitting import EXTENTS, draw, load, source_of

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.graph import layout_of
from esper_triton.tezzeret.design import design_of
from esper_triton.tezzeret.emission import emit
from esper_triton.tezzeret.rows import Tiles

KERNELS = Path(__file__).parents[2] / "kernels"
DIMS = {"d": 512, "d_in": 384, "r": 16, "hidden_width": 640, "heads": 2}


def shipped(name: str) -> tuple[Blueprint, dict[str, int]]:
    blueprint = Blueprint.load(KERNELS / f"{name}.toml")
    return blueprint, {dim: DIMS[dim] for dim in blueprint.dims}


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        # One kernel from end to end; gradients of inputs, and of each of two weights.
        ("bottleneck_adapter", 1, 3),
        ("lora", 1, 3),
        ("gated_residual", 1, 3),
        ("linear", 1, 2),
        ("conv3x3", 1, 2),
        ("layernorm", 1, 2),
        ("channel_scale", 1, 2),
        # The hidden features are too wide for registers and go through memory once.
        ("swiglu_ffn", 2, 4),
        # Products, scores with their softmax, product.
        ("multi_head_attention", 3, 5),
    ],
)
def test_shipped_designs_take_so_many_launches(name: str, forward: int, backward: int) -> None:
    emitted = emit(design_of(*shipped(name), "float32"), Tiles())
    assert (len(emitted.forward), len(emitted.backward)) == (forward, backward)


@pytest.mark.parametrize("name", ["bottleneck_adapter", "residual_mlp", "squeeze_excite"])
def test_at_alpha_0_a_seed_that_has_run_away_leaves_the_host_and_its_gradient_alone(name: str, tmp_path: Path) -> None:
    blueprint = Blueprint.load(KERNELS / f"{name}.toml")
    dims = {dim: {"d": 40, "r": 16, "hidden_width": 24}[dim] for dim in blueprint.dims}
    module = load(source_of(blueprint, dims), tmp_path)
    inputs, parameters, grad_out = draw(blueprint, dims, 21, torch.float32)
    parameters = {name: torch.full_like(value, torch.nan) for name, value in parameters.items()}
    call = {**inputs, **parameters, "alpha": torch.zeros(1), **EXTENTS[layout_of(blueprint.ops)]}
    out, saved = module.forward(**call)
    grads = module.backward(grad_out=grad_out, saved=saved, **call)
    assert torch.equal(out, inputs["h"])
    assert torch.equal(grads["h"], grad_out)
    assert all(not grads[name].count_nonzero() for name in parameters)


def test_at_alpha_1_the_output_is_k_to_the_bit(tmp_path: Path) -> None:
    blueprint, _ = shipped("layernorm")
    dims = {"d": 40}
    module = load(source_of(blueprint, dims), tmp_path)
    inputs, parameters, _ = draw(blueprint, dims, 21, torch.float32)
    with_host, _ = module.forward(**inputs, **parameters, alpha=torch.ones(1))
    other = {**inputs, "h": inputs["h"] + 1000}
    with_another, _ = module.forward(**other, **parameters, alpha=torch.ones(1))
    assert torch.equal(with_host, with_another)


@pytest.mark.parametrize("name", ["bottleneck_adapter", "layernorm", "low_rank_attention"])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(name: str, tmp_path: Path) -> None:
    blueprint = Blueprint.load(KERNELS / f"{name}.toml")
    dims = {dim: {"d": 72, "r": 16, "heads": 2}[dim] for dim in blueprint.dims}
    module = load(source_of(blueprint, dims), tmp_path)
    inputs, parameters, grad_out = draw(blueprint, dims, 210, torch.float32)
    call = {**inputs, **parameters, "alpha": torch.tensor([0.3]), **EXTENTS[layout_of(blueprint.ops)]}
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            out, saved = module.forward(**call)
            found.append({"out": out, **module.backward(grad_out=grad_out, saved=saved, **call)})
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def test_a_reader_finds_names_shapes_and_a_comment_for_each_group() -> None:
    source = source_of(*shipped("bottleneck_adapter"))
    assert "# linear [16] = h [512] times down_weight." in source
    assert "gelu = " in source
    assert "A block of rows of out [rows, 512]" in source
    compile(source, "emitted.py", "exec")


def test_no_row_is_addressed_in_32_bits() -> None:
    for path in KERNELS.glob("*.toml"):
        source = source_of(*shipped(path.stem))
        for line in source.splitlines():
            if "= tl.program_id(0)" in line and "arange" in line and ("row" in line or "line" in line):
                assert ".to(tl.int64)" in line, (path.stem, line)
