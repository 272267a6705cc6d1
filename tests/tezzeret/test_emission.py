from __future__ import annotations

from pathlib import Path

import graphs
from emitting import agreement, load, source_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.graph import layout_of

_ITEM = {"rows": 1, "sequence": 7, "image": 15}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    blueprint=graphs.blueprints(),
    d=st.sampled_from([1, 5, 16, 48, 300]),
    r=st.sampled_from([1, 3, 16, 40]),
    d_in=st.sampled_from([4, 70]),
    items=st.integers(0, 11),
)
def test_any_graph_computes_what_torch_computes_and_so_does_its_derivative(
    blueprint: Blueprint, d: int, r: int, d_in: int, items: int, tmp_path: Path
) -> None:
    dims = {"d": d, "r": r, "d_in": d_in}
    dims = {name: dims[name] for name in blueprint.dims}
    module = load(source_of(blueprint, dims), tmp_path)
    ratios = agreement(blueprint, dims, module, items * _ITEM[layout_of(blueprint.ops)])
    assert max(ratios.values()) <= 1, ratios
