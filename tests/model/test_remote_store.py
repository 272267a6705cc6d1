"""A model whose layers load from a server."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from seeding import copy_artifact, grow
from torch import nn

import esper_triton as esper
from esper_triton.kasmina.lifecycle import SeedLifecycleState as S
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


def test_what_a_saved_model_has_grown_is_kept_at_the_server_that_it_is_from(
    adapter_store: Urza, small: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Urza(tmp_path / "urza")
    copy_artifact(adapter_store, store, small)
    server = Loopback(store, tmp_path)
    try:
        for role, kept in (("read", False), ("write", True)):
            client = server.client(tmp_path / role, role)
            model = esper.wrap(nn.Sequential(nn.Linear(16, 16)), ["0"], seeds_per_layer=1, urza=client)
            grow(model.kasmina_layers["0"], 0, small, alpha=0.75)
            for state in (S.STABILIZATION, S.EVALUATING, S.FOSSILIZED):
                model.kasmina_layers["0"].request_transition(0, state)
            esper.save_model(model, tmp_path / "out")
            assert ("needs a token with the role 'write'" in caplog.text) is not kept, "the model is saved anyway"
            assert store.gc(0, dry_run=True).kept == ({"named by a lineage": (small,)} if kept else {})
            caplog.clear()
        (name,) = store.query()[0].lineages
        assert name.startswith(platform.node().replace(".", "_")[:8])
    finally:
        server.stop()
