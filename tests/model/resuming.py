"""A training run that is the same in every process. As a program it resumes one: `resuming.py STORE DIR OPTIMIZER ID`
reads DIR/half.pt and writes DIR/resumed.pt."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.kasmina import SeedLifecycleState
from esper_triton.kasmina.schedules import cosine, drift_controlled

D = 16
Run = tuple[esper.MorphableModel, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


def build(store: esper.Urza, optimizer: str) -> Run:
    """A model with dropout, and an optimizer with a schedule that is attached to it."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, D), nn.Dropout(0.25), nn.Tanh(), nn.Linear(D, D))
    model = esper.wrap(host, ["0", "3"], seeds_per_layer=1, urza=store)
    options: dict[str, Any] = {"lr": 0.01} if optimizer == "Adam" else {"lr": 0.05, "momentum": 0.9}
    optim = getattr(torch.optim, optimizer)(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 20)
    esper.attach(optim, model, schedulers=[scheduler], weight_decay=0.01)
    return model, optim, scheduler


def train(
    model: esper.MorphableModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    steps: Iterable[int],
    artifact_id: str,
) -> list[Tensor]:
    """Outputs of the steps. One seed learns on its own from step 1 on, is grafted by a schedule from step 3 on and held
    from step 15 on; another is grafted from step 8 on by one that looks at the drift."""
    first, second = model.kasmina_layers.values()
    outputs = []
    for step in steps:
        if step in (1, 8):
            layer = first if step == 1 else second
            assert layer.load_kernel_sync(0, artifact_id), layer.last_error(0)
        if step == 3:
            first.graft(0, cosine(15))
        if step == 8:
            second.graft(0, drift_controlled(8, max_drift=0.5))
        if step == 15:
            first.request_transition(0, SeedLifecycleState.STABILIZATION)
        out = model(torch.randn(5, 6))
        optimizer.zero_grad()
        (out - torch.randn(5, D)).square().mean().backward()
        model.train_seeds()
        optimizer.step()
        scheduler.step()
        model.step_boundary()
        outputs.append(out.detach().clone())
    return outputs


def resume(store: Path, folder: Path, optimizer: str, artifact_id: str) -> None:
    model, optim, scheduler = build(esper.Urza(store), optimizer)
    saved = torch.load(folder / "half.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    esper.load_esper_state_dict(model, saved["esper"], optim)
    optim.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"])
    outputs = train(model, optim, scheduler, range(10, 20), artifact_id)
    seeds = {f"{n}.{p}": t.detach() for n, layer in model.kasmina_layers.items() for p, t in layer.seed_parameters()}
    torch.save({"outputs": outputs, "model": model.state_dict(), "seeds": seeds}, folder / "resumed.pt")


if __name__ == "__main__":
    resume(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
