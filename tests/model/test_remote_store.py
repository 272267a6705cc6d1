"""A model whose layers load from a server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import esper_triton as esper
from esper_triton.urza import Urza

sys.path.append(str(Path(__file__).resolve().parent.parent / "urza"))
from loopback import Loopback


@pytest.fixture
def small(adapter_for: Callable[..., str]) -> str:
    return adapter_for(16, 4)


def test_a_layer_loads_from_a_server_and_then_without_it(adapter_store: Urza, small: str, tmp_path: Path) -> None:
    server = Loopback(adapter_store, tmp_path)
    try:
        client = server.client(tmp_path / "cache", "read")
        model = esper.wrap(nn.Sequential(nn.Linear(16, 16)), ["0"], seeds_per_layer=1, urza=client)
        assert model.load_kernel_sync("0", 0, small)
        server.stop()
        offline = server.client(tmp_path / "cache", "read")
        again = esper.wrap(nn.Sequential(nn.Linear(16, 16)), ["0"], seeds_per_layer=1, urza=offline)
        assert again.load_kernel_sync("0", 0, small)
        assert again(torch.zeros(2, 16)).shape == (2, 16)
        empty = server.client(tmp_path / "empty", "read")
        alone = esper.wrap(nn.Sequential(nn.Linear(16, 16)), ["0"], seeds_per_layer=1, urza=empty)
        assert not alone.load_kernel_sync("0", 0, small)
    finally:
        server.stop()
