"""What growing costs where it should cost nothing: steps outside TRAINING, and decisions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from growth_tasks import RowsAdapter
from torch import nn

import esper_triton as esper
from esper_triton.contracts.commands import CommandKind, KasminaCommand
from esper_triton.contracts.system import LayerGradients, SystemState
from esper_triton.kasmina import linear
from esper_triton.model.system import SystemReader
from esper_triton.tamiyo.controller import Controller

__all__ = ["decisions", "overhead"]

ADAPTER_WIDTH = 16
BLOCK = 100  # steps; `GrowthHook` measures gradients at most so often
SHAPES = ((64, 64), (256, 128), (512, 256))  # width and batch
_S = esper.SeedLifecycleState


def overhead(folder: Path, samples: int) -> dict[str, list[dict[str, Any]]]:
    """Steps of training loops, in blocks of as many as lie between two rounds of measuring gradients, sampled in turn
    in an order that turns too, by the CPU time of this thread, in which other work of the machine is not. `low` and
    `high` are the middle half of the ratios of neighbours; the bare loop is there twice, and what that ratio is away
    from 1 is noise."""
    urza = esper.Urza(folder / "overhead")
    idle, grown = [], []
    for width, batch in SHAPES:
        host = f"MLP, 3 layers, d={width}, batch {batch}"
        loops = {
            "bare": _bare(width, batch),
            "bare, again": _bare(width, batch),
            "hook, Manual": _hooked(width, batch, esper.Manual()),
            "hook, Heuristic that waits": _hooked(width, batch, esper.Heuristic(urza, warmup_epochs=10**9)),
            "hook, gradients measured": _hooked(width, batch, AlwaysMeasures()),
        }
        idle += [{"host": host, **row} for row in _compared(loops, samples)]
        artifact = esper.compile("parallel_adapter", dims={"d_in": width, "d": width, "r": ADAPTER_WIDTH}, urza=urza).id
        loops = {
            "adapter in plain torch": _bare(width, batch, adapter=True),
            "the same, again": _bare(width, batch, adapter=True),
            "seed in FINE_TUNING": _hooked(width, batch, esper.Manual(), urza, artifact),
        }
        grown += [{"host": host, **row} for row in _compared(loops, samples)]
    return {
        "a step with the hook and nothing growing": idle,
        "a step with a seed being fine-tuned, over the same adapter in plain torch": grown,
    }


class AlwaysMeasures:
    """Decides nothing, and wants the gradients for it: a round begins every hundred steps."""

    needs_gradients = True

    def step(self, state: SystemState) -> list[KasminaCommand]:
        return []


def _compared(loops: dict[str, Callable[[], None]], samples: int) -> list[dict[str, Any]]:
    """A row for each loop but the first, over that one."""
    names = list(loops)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(samples + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.thread_time()
            for _ in range(BLOCK):
                loops[name]()
            times[name].append((time.thread_time() - began) / BLOCK * 1e6)
    first, *others = (times[name][1:] for name in names)  # the first block of each warms up
    rows: list[dict[str, Any]] = []
    for name, own in zip(names[1:], others, strict=True):
        low, median, high = statistics.quantiles([b / a for a, b in zip(first, own, strict=True)], n=4)
        micros = {"rival_us": statistics.median(first), "us": statistics.median(own)}
        rows.append({"loop": name, **micros, "ratio": median, "low": low, "high": high})
    return rows


def _host(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))


def _bare(width: int, batch: int, *, adapter: bool = False) -> Callable[[], None]:
    model = _host(width)
    if adapter:
        model[1] = RowsAdapter(model[1], ADAPTER_WIDTH)
    return _stepper(model, torch.randn(batch, width), torch.optim.Adam(model.parameters()), None)


def _hooked(
    width: int, batch: int, controller: Controller, urza: esper.Urza | None = None, artifact: str = ""
) -> Callable[[], None]:
    """With an artifact, its seed is in FINE_TUNING and stays there."""
    model = esper.wrap(_host(width), [nn.Linear], seeds_per_layer=1, urza=urza)
    optimizer = torch.optim.Adam(model.parameters())
    hook = esper.GrowthHook(model, optimizer, controller=controller, auto_advance=not artifact)
    step = _stepper(model, x := torch.randn(batch, width), optimizer, hook)
    if artifact:
        if not model.load_kernel_sync("1", 0, artifact):
            raise RuntimeError(f"not loaded: {model.kasmina_layers['1'].last_error(0)}")
        model.graft("1", 0, linear(1))
        step()
        for state in (_S.STABILIZATION, _S.EVALUATING):
            model.request_transition("1", 0, state)
        model.evaluate_seed("1", 0, lambda model: float(model(x).square().mean()))
        model.request_transition("1", 0, _S.FINE_TUNING)
        step()
        found = model.kasmina_layers["1"].get_layer_stats()["seeds"][0]["state"]
        if found != "FINE_TUNING":
            raise RuntimeError(f"the seed is in {found}")
    return step


def _stepper(
    model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer, hook: esper.GrowthHook | None
) -> Callable[[], None]:
    def step() -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hook is not None:
            hook.step(loss)

    return step


def decisions(folder: Path, layers: int, samples: int) -> list[dict[str, Any]]:
    """What a decision of `Heuristic` on four seeds a layer takes of this thread's CPU time: reading the model, and
    deciding."""
    urza = esper.Urza(folder / "decisions")
    for r in (4, 8, 16):
        esper.compile("bottleneck_adapter", dims={"d": 8, "r": r}, urza=urza, pipeline="fast")
    model = esper.wrap(
        nn.Sequential(*(nn.Linear(8, 32) for _ in range(layers))), [nn.Linear], seeds_per_layer=4, urza=urza
    )
    reader = SystemReader(model.kasmina_layers)
    gradients = {
        str(k): LayerGradients(rows=100, step=1, gradient_norm=2.0, bottleneck=1.0 + k % 97, unexpressed=0.5)
        for k in range(layers)
    }
    rows = []
    for what in ("chooses a layer and a kernel", "waits for a seed"):
        if what.startswith("waits") and not model.load_kernel_sync(str(layers - 1), 3, urza.ids()[0]):
            raise RuntimeError(f"not loaded: {model.kasmina_layers[str(layers - 1)].last_error(3)}")
        read, decided = [], []
        for _ in range(samples):
            controller = esper.Heuristic(urza, plateau_epochs=0, warmup_epochs=0)
            began = time.thread_time()
            state = reader.read(epoch=3, step=100, gradients=gradients, metrics=[1.0], lower_is_better=True, results=())
            between = time.thread_time()
            commands = controller.step(state)
            decided.append((time.thread_time() - between) * 1e3)
            read.append((between - began) * 1e3)
            expected = [CommandKind.REQUEST_GERMINATION] if what.startswith("chooses") else []
            if [command.command for command in commands] != expected:
                raise RuntimeError(f"{what}: {controller.explanation}")
        rows.append(
            {
                "it": what,
                "seeds": layers * 4,
                "read_ms": statistics.median(read),
                "decide_ms": statistics.median(decided),
                "worst_of_both_ms": max(a + b for a, b in zip(read, decided, strict=True)),
            }
        )
    return rows
