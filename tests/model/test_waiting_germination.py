"""Who stands still for a compile is not put behind everything else that the machine does."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.tezzeret.pool import Forge, shared_forge

DOUBLE = 'name = "double"\ninput = "h"\ngraph = "k = mul(h, 2.0)"\n[dims]\nd = {}\n'


def niceness_of_workers(forge: Forge) -> list[int]:
    workers = [worker for worker in forge._serving.values() if worker is not None]
    return [os.getpriority(os.PRIO_PROCESS, worker.pid) for worker in workers]


def test_who_waits_gets_a_worker_as_nice_as_himself_and_background_compiles_a_nicer_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), ["0"], seeds_per_layer=1, urza=esper.Urza(tmp_path / "urza"))
    assert model.germinate_sync("0", Blueprint.from_text(DOUBLE), pipeline="fast") == 0
    waited_for = shared_forge(waited_for=True)
    assert niceness_of_workers(waited_for) == [os.nice(0)]
    assert shared_forge() is not waited_for
    assert shared_forge().nice > waited_for.nice
    waited_for.close()  # its worker would stay for the tests that come after
