"""`esper.dashboard(model)`: a page from a thread of the training process."""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import Any

import pytest
import torch
from bus_servers import eventually
from torch import nn

import esper_triton as esper
from esper_triton.contracts.errors import BusUnavailable
from esper_triton.nissa import Dashboard
from esper_triton.nissa.terminal import ask
from esper_triton.oona import Oona


def wrapped(urza: esper.Urza) -> nn.Module:
    return esper.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), ["0"], seeds_per_layer=2, urza=urza)


def models(page: Dashboard) -> dict[str, Any]:
    return ask(page.url)["models"]


def test_a_model_on_no_bus_is_put_on_one_for_its_page_and_taken_off_again(store: esper.Urza) -> None:
    model = wrapped(store)
    threads = set(threading.enumerate())
    with esper.dashboard(model, port=0, name="alone") as page:
        eventually(lambda: models(page).get("alone", {}).get("seeds") == 2)
        assert models(page)["alone"]["seeds_by_state"] == {"DORMANT": 2}
        with urllib.request.urlopen(f"{page.url}metrics") as answer:
            assert b'esper_seeds{model="alone",state="DORMANT"} 2.0' in answer.read()
        model(torch.zeros(2, 8))  # nothing is in the way of training
        model.step_boundary()
    assert all(layer._kasmina.boundary is None for layer in model.kasmina_layers.values())
    eventually(lambda: set(threading.enumerate()) <= threads)
    with pytest.raises(BusUnavailable, match="does not answer"):
        ask(page.url)


def test_a_model_on_a_bus_keeps_its_bus_and_its_name(store: esper.Urza) -> None:
    model = wrapped(store)
    with Oona() as bus:
        remote = esper.connect(model, bus, name="its own")
        with esper.dashboard(model, port=0, name="another") as page:
            eventually(lambda: list(models(page)) == ["its own"])
            remote.publish_health()
        assert bus.publish("audit.lifecycle", {}) is True
        assert model.kasmina_layers["0"]._kasmina.boundary is remote
        remote.close()


def test_what_cannot_be_shown_is_refused_and_leaves_nothing(store: esper.Urza) -> None:
    with pytest.raises(ValueError, match="Linear is not wrapped"):
        esper.dashboard(nn.Linear(2, 2), port=0)
    model = wrapped(store)
    with Oona() as bus, Dashboard(bus, port=0) as page:
        port = int(page.url.rstrip("/").rsplit(":", 1)[1])
        threads = set(threading.enumerate())
        with pytest.raises(OSError, match="address already in use"):
            esper.dashboard(model, port=port)
        assert model.kasmina_layers["0"]._kasmina.boundary is None
        eventually(lambda: set(threading.enumerate()) <= threads)
        assert json.loads(json.dumps(ask(page.url)))["models"] == {}
