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
    tiles=st.sampled_from([Tiles(rows=16, cols=16, depth=16, sums_rows=2, full=16, sum_depth=8), Tiles(separate=True)]),
)
def test_fusing_and_the_extents_of_blocks_change_nothing_but_roundings(
    blueprint: Blueprint, d: int, r: int, tiles: Tiles, tmp_path: Path
) -> None:
    dims = _dims(blueprint, d, r, 24)
    rows = 3 * _ITEM[layout_of(blueprint.ops)]
    for choice in (Tiles(), tiles):
        ratios = agreement(blueprint, dims, load(source_of(blueprint, dims, tiles=choice), tmp_path), rows)
        assert max(ratios.values()) <= 1, (choice, ratios)
