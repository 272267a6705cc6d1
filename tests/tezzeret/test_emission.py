"""Emitted kernels on drawn graphs, each source run alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emitting import agreement, load, source_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.graph import layout_of
from esper_triton.testing import graphs
from esper_triton.tezzeret.rows import Tiles

_ITEM = {"rows": 1, "sequence": 7, "image": 15}
# A compile is most of an example: a failing one is not made smaller, which would take many.
_drawn = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
_TILES = [
    Tiles(rows=16, cols=16, depth=16, sums_rows=2, full=16, sum_depth=8),
    Tiles(rows=16, cols=16, depth=16, held=16 * 16),
    Tiles(separate=True),
]


def _dims(blueprint: Blueprint, d: int, r: int, d_in: int) -> dict[str, int]:
    dims = {"d": d, "r": r, "d_in": d_in}
    return {name: dims[name] for name in blueprint.dims}


@_drawn
@given(
    blueprint=graphs.blueprints(),
    d=st.sampled_from([1, 5, 16, 48, 300]),
    r=st.sampled_from([1, 3, 16, 40]),
    d_in=st.sampled_from([4, 70]),
    items=st.integers(1, 11),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_graph_and_its_derivative_are_what_torch_computes(
    dtype: torch.dtype, blueprint: Blueprint, d: int, r: int, d_in: int, items: int, seed: int, tmp_path: Path
) -> None:
    dims = _dims(blueprint, d, r, d_in)
    module = load(source_of(blueprint, dims, str(dtype).removeprefix("torch.")), tmp_path)
    ratios = agreement(blueprint, dims, module, items * _ITEM[layout_of(blueprint.ops)], dtype, seed=seed)
    assert max(ratios.values()) <= 1, ratios


@_drawn
@given(
    blueprint=graphs.blueprints(),
    d=st.sampled_from([5, 16, 48, 300]),
    r=st.sampled_from([1, 3, 16]),
    tiles=st.sampled_from(_TILES),
)
def test_fusing_and_the_extents_of_blocks_change_nothing_but_roundings(
    blueprint: Blueprint, d: int, r: int, tiles: Tiles, tmp_path: Path
) -> None:
    dims = _dims(blueprint, d, r, 24)
    rows = 3 * _ITEM[layout_of(blueprint.ops)]
    ratios = agreement(blueprint, dims, load(source_of(blueprint, dims, tiles=tiles), tmp_path), rows)
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("held", [16 * 16, 16 * 48, 64 * 48, 64 * 64])
@pytest.mark.parametrize("graph", [
    "a = gelu(linear(x, w_in))\nb = gelu(linear(a, w))\nk = linear(b, w)",
    "a = gelu(linear(x, w_in))\nb = linear(a, w)\nk = add(linear(gelu(b), w), b)",
    "a = layernorm(linear(x, w_in))\nk = div(linear(a, w), sum(linear(a, w)))",
    "a = linear(x, w_in)\nb = linear(a, w)\nk = linear(b + linear(gelu(a), w, transposed=true), w)",
])  # fmt: skip
def test_products_of_products_fit_the_tile_that_a_weight_may_have(held: int, graph: str, tmp_path: Path) -> None:
    shapes = {"w_in": ["d", "d_in"], "w": ["d", "d"]}
    blueprint = Blueprint.model_validate({
        "name": "chain", "input": "x", "dims": {"d": {}, "d_in": {}}, "graph": graph, "output": "k",
        "parameters": {name: {"shape": shape, "init": "kaiming_uniform"} for name, shape in shapes.items()},
    })  # fmt: skip
    dims = {"d": 48, "d_in": 24}
    source = source_of(blueprint, dims, tiles=Tiles(rows=16, cols=16, depth=16, held=held))
    ratios = agreement(blueprint, dims, load(source, tmp_path), 35)
    assert max(ratios.values()) <= 1, ratios


def test_the_largest_of_a_product_that_went_through_memory_has_its_gradient(tmp_path: Path) -> None:
    blueprint = Blueprint.model_validate({
        "name": "largest", "input": "h", "dims": {"d": {}, "r": {}}, "output": "k",
        "parameters": {"w": {"shape": ["r", "d"], "init": "kaiming_uniform"}},
        "graph": "a = linear(h, w)\nk = add(add(h, max(a)), mean(a))",
    })  # fmt: skip
    dims = {"d": 48, "r": 16}
    ratios = agreement(blueprint, dims, load(source_of(blueprint, dims, "bfloat16"), tmp_path), 40, torch.bfloat16)
    assert max(ratios.values()) <= 1, ratios
