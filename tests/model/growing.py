"""A small run with a GrowthHook, the same every time: two layers, dropout, a schedule, and batches of a generator. As a
program, `growing.py STORE DIR EPOCHS DIES_IN`, it goes on where DIR has come to, and writes DIR/finished.pt."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.contracts.commands import CommandKind, KasminaCommand
from esper_triton.kasmina.gates import Policy, ReconstructionGate
from esper_triton.kasmina.schedules import linear

D = 16
STEPS = 6  # of an epoch
QUICK = Policy(
    to_grafting=ReconstructionGate(max_steps=3),
    schedule=linear(4),
    stabilization_steps=2,
    fine_tuning_steps=4,
    embargo_epochs=1,
)


def command(kind: str, layer: str = "0", seed: int = 0, **fields: Any) -> KasminaCommand:
    return KasminaCommand(
        command_id=f"{kind}-{layer}-{seed}", layer=layer, seed=seed, command=CommandKind(kind), **fields
    )


@dataclass
class Run:
    """Everything that a script with a training loop has."""

    model: esper.MorphableModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    batches: torch.Generator
    hook: esper.GrowthHook
    losses: list[float]

    def epoch(self, epoch: int) -> None:
        for _ in range(STEPS):
            self.step()
        self.scheduler.step()
        self.hook.epoch_end(epoch)

    def step(self, factor: float = 1.0) -> Any:
        x, y = self.batch()
        loss = (self.model(x) - y).square().mean() * factor
        loss = loss + 0.0 * (random.random() + np.random.rand())  # streams that have to be put back too
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        return self.hook.step(loss)

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 6, generator=self.batches)
        return x, torch.sin(3 * x[:, :1] * x[:, 1:2]).expand(-1, D)

    def everything(self) -> dict[str, Tensor]:
        """Weights, seeds' parameters and states, and moments of both; the streams' next numbers."""
        seeds = {f"{n}.{p}": t for n, layer in self.model.kasmina_layers.items() for p, t in layer.seed_parameters()}
        states = {
            f"{n}.{s.index}": torch.tensor([s.state, s.alpha, s.stage_steps, s.progress])
            for n, layer in self.model.kasmina_layers.items()
            for s in layer._kasmina.seeds
        }
        moments = {
            f"{k}.{j}.{name}": value
            for k, group in enumerate(self.optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
            for name, value in self.optimizer.state.get(parameter, {}).items()
        }
        rates = {f"lr.{k}": torch.tensor(group["lr"]) for k, group in enumerate(self.optimizer.param_groups)}
        streams = {"torch": torch.get_rng_state(), "batches": self.batches.get_state()}
        others = {"python": torch.tensor(random.getstate()[1]), "numpy": torch.tensor(np.random.get_state()[1])}
        every = {**dict(self.model.state_dict()), **seeds, **states, **moments, **rates, **streams, **others}
        return {name: torch.as_tensor(value).clone() for name, value in every.items()}


def build(
    store: esper.Urza,
    *,
    checkpoints: Path | None = None,
    policy: Policy = QUICK,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    **options: Any,
) -> Run:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    host = nn.Sequential(nn.Linear(6, D), nn.Dropout(0.1), nn.Tanh(), nn.Linear(D, D))
    model = esper.wrap(host, ["0", "3"], seeds_per_layer=1, urza=store, policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40) if schedule is None else schedule(optimizer)
    batches = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    y = torch.sin(3 * x[:, :1] * x[:, 1:2]).expand(-1, D)

    def validate(model: nn.Module) -> float:
        return float((model(x) - y).square().mean())

    options = {"validate": validate} | options
    hook = esper.GrowthHook(
        model, optimizer, schedulers=[scheduler], checkpoints=checkpoints, carry={"batches": batches}, **options
    )
    return Run(model, optimizer, scheduler, batches, hook, [])


def grown(store: esper.Urza, checkpoints: Path | None, epochs: int, *, dies_in: int | None = None) -> Run:
    """Grows by the heuristic; where it is to die, in the middle of that epoch, as by a power cut."""
    controller = esper.Heuristic(store, warmup_epochs=1, plateau_epochs=0, blueprints=["bottleneck_adapter"])
    run = build(store, checkpoints=checkpoints, controller=controller, measure_every=5)
    for epoch in range(run.hook.resume(), epochs):
        if epoch == dies_in:
            run.step()
            os.kill(os.getpid(), signal.SIGKILL)
        run.epoch(epoch)
    return run


if __name__ == "__main__":
    location, directory, until, death = sys.argv[1:]
    finished = grown(esper.Urza(location), Path(directory), int(until), dies_in=int(death) if death else None)
    torch.save({"everything": finished.everything(), "losses": finished.losses}, Path(directory) / "finished.pt")
