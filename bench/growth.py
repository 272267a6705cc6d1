"""Whether growing pays, and what it costs: real data, and hosts that are too narrow in one place (growth_tasks.py).

python bench/growth.py [--quick] [--only mlp,cnn,transformer,overhead,decisions] [--seeds 5] [--first 10]
    [--jobs 1] [--output docs]

Four contestants train for the same epochs on the same batches, with AdamW at the same rate:

- host: the network alone, narrow in one place;
- grown: the same with `GrowthHook` and `Heuristic`, all Linear and convolution layers wrapped, from the start;
- adapter: the host with a plain torch module of the same design as the kernels, in the one place where it does most
  good, there from the start, of about as many parameters as have grown;
- wide: the host with that place as wide as such networks have it: a hidden layer four times (mlp) or twice (cnn) as
  wide as the stream beside it, attention as wide as it (transformer).

The validation part is what the gates and the heuristic see; what is reported is the test part at the last epoch.
Figures are means over the seeds with the standard deviation after the sign. A seed draws the initial weights, the order
of the batches, and, of digits, which ones train. `dip` is the largest rise of the validation loss from one epoch to the
next while a seed was under way, against that of the host alone in the same epochs. Kernels are compiled before the
clock starts.

Hosts, designs and sizes of kernels, epochs, ramps and rates were chosen by what came of seeds 0 to 9, after hosts were
dropped in which growing does little: such as are narrow in the stream that everything goes through, where no kernel can
bring back what is lost. Seeds that the choice has not seen are therefore what is reported: from `--first` on. No
contestant has options of its own for a seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from growth_costs import decisions, overhead
from growth_tasks import LEAST_WIDTH, TASKS, Data, Task
from options import made_folder, names_of
from tables import markdown
from torch import Tensor, nn
from torch.nn import functional as F

import esper_triton as esper

_S = esper.SeedLifecycleState
UNDER_WAY = {_S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING}


@dataclass
class Run:
    """One contestant with one seed."""

    accuracy: float
    loss: float
    parameters: int
    seconds: float
    cpu_seconds: float
    steps: int  # in an epoch
    validation: list[float]  # loss, at the end of each epoch
    under_way: list[bool]  # for each epoch, whether a seed contributed and was not permanent
    accuracies: list[float]  # on the test part
    grown: list[str] = field(default_factory=list)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def loss_on(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    return float(loss_of(model, *part))


@torch.no_grad()
def loss_on_half(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """On a half of the part that is drawn anew each time, so that the gates know how far the metric is chance."""
    half = torch.randperm(len(part[1]))[: len(part[1]) // 2]
    return float(loss_of(model, part[0][half], part[1][half]))


@torch.no_grad()
def accuracy_on(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    return float((model(part[0]).argmax(-1) == part[1]).float().mean())


def train(task: Task, model: nn.Module, data: Data, seed: int, epochs: int, urza: esper.Urza | None = None) -> Run:
    """Grows where there is a store."""
    optimizer, hook = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=task.decay), None
    if urza is not None:
        controller = esper.Heuristic(urza, **task.heuristic)
        hook = esper.GrowthHook(
            model,
            optimizer,
            controller=controller,
            validate=lambda model: loss_on_half(model, data.validation),
            repeats=5,
            undecided_evaluations=10,
            measure_every=2 * data.steps,
        )
    layers = model.kasmina_layers.values() if isinstance(model, esper.MorphableModel) else ()
    batches = torch.Generator().manual_seed(seed)
    run = Run(0.0, 0.0, 0, 0.0, 0.0, data.steps, [], [], [])
    for epoch in range(epochs):
        began, cpu, active = time.perf_counter(), time.process_time(), False
        for x, y in data.epoch(batches):
            loss = loss_of(model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if hook is not None:
                hook.step(loss)
                active |= any(seed.state in UNDER_WAY for layer in layers for seed in layer._kasmina.seeds)
        run.validation.append(loss_on(model, data.validation))
        if hook is not None:
            hook.epoch_end(epoch, run.validation[-1])
        run.seconds += time.perf_counter() - began
        run.cpu_seconds += time.process_time() - cpu
        run.under_way.append(active)
        run.accuracies.append(accuracy_on(model, data.test))
    run.accuracy, run.loss = run.accuracies[-1], loss_on(model, data.test)
    run.parameters = _parameters(model) + sum(p.numel() for p in esper.seed_parameters(model))
    for name, layer in getattr(model, "kasmina_layers", {}).items():
        run.grown += [f"{name}: {s.state.name}" for s in layer._kasmina.seeds if s.state.is_active]
    return run


def targets(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def compile_for(task: Task, model: nn.Module, urza: esper.Urza) -> None:
    """What the heuristic may choose from, for every layer."""
    for name in targets(model):
        layer = model.get_submodule(name)
        if len(layer.weight) >= LEAST_WIDTH:
            for design, dims in task.kernels(layer):
                esper.compile(design, dims=dims, urza=urza, pipeline="fast")


def adapted(task: Task, model: nn.Module, at: str, parameters: int) -> nn.Module:
    """The host with an adapter of about so many parameters beside the layer `at`."""
    layer = model.get_submodule(at)
    one, two = (_parameters(task.adapter(layer, r)) for r in (1, 2))
    r = max(1, 1 + round((parameters - (one - _parameters(layer))) / (two - one)))
    model.set_submodule(at, task.adapter(layer, r))
    return model


def contest(task: Task, seed: int, epochs: int, urza: esper.Urza) -> dict[str, Run]:
    """All contestants with one seed; what may grow is in the store."""
    data = task.data(seed)

    def fresh(width: int) -> nn.Module:
        torch.manual_seed(seed)
        return task.build(width)

    host = train(task, fresh(task.narrow), data, seed, epochs)
    model = fresh(task.narrow)
    model = esper.wrap(model, targets(model), seeds_per_layer=1, urza=urza, policy=task.policy)
    grown = train(task, model, data, seed, epochs, urza)
    rival = adapted(task, fresh(task.narrow), task.at, grown.parameters - host.parameters or task.parameters)
    adapter = train(task, rival, data, seed, epochs)
    wide = train(task, fresh(task.wide), data, seed, epochs)
    return {"host": host, "grown": grown, "adapter": adapter, "wide": wide}


def in_process(name: str, seed: int, epochs: int, folder: str) -> dict[str, Run]:
    """`contest`, in a process of its own."""
    _prepare(folder)
    return contest(TASKS[name], seed, epochs, esper.Urza(Path(folder) / name))


def contests(name: str, seeds: Sequence[int], epochs: int, folder: Path, jobs: int) -> dict[str, list[Run]]:
    """By contestant, a run for each seed."""
    task = TASKS[name]
    compile_for(task, task.build(task.narrow), esper.Urza(folder / name))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(in_process, name, seed, epochs, str(folder)) for seed in seeds]
        runs = [one.result() for one in done]
    return {contestant: [one[contestant] for one in runs] for contestant in runs[0]}


def _prepare(folder: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("esper_triton.kasmina").setLevel(logging.ERROR)
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def falls(hosts: Sequence[Run], runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """For each run in which something grew, the largest rise of its validation loss while a seed was under way, and
    that of the host alone in the same epochs."""
    dips, quiet = [], []
    for host, run in zip(hosts, runs, strict=True):
        during = [k for k in range(1, len(run.validation)) if run.under_way[k]]
        if during:
            dips.append(max(run.validation[k] - run.validation[k - 1] for k in during))
            quiet.append(max(host.validation[k] - host.validation[k - 1] for k in during))
    return dips, quiet


def summary(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    hosts = runs["host"]
    steps_per_epoch = hosts[0].steps
    rows = []
    for name, own in runs.items():
        reached = []
        for host, run in zip(hosts, own, strict=True):
            best = min(host.validation)
            reached.append(next((k + 1 for k, loss in enumerate(run.validation) if loss <= best), None))
        dips, quiet = falls(hosts, own)
        met = [k * steps_per_epoch for k in reached if k is not None]
        rows.append(
            {
                "contestant": name,
                "accuracy": spread([run.accuracy for run in own]),
                "test loss": spread([run.loss for run in own]),
                "parameters": round(statistics.fmean(run.parameters for run in own)),
                "wall s": spread([run.seconds for run in own]),
                "CPU s": spread([run.cpu_seconds for run in own]),
                "steps to the host's best": f"{round(statistics.median(met))} ({len(met)} of {len(own)})"
                if met
                else "never",
                "dip": f"{spread(dips)} (host: {spread(quiet)})" if dips else "",
            }
        )
    return rows


def verdict(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """What was wanted, and what came out."""

    def mean(name: str) -> float:
        return statistics.fmean(run.accuracy for run in runs[name])

    def parameters(name: str) -> float:
        return statistics.fmean(run.parameters for run in runs[name])

    gains = [grown.accuracy - host.accuracy for grown, host in zip(runs["grown"], runs["host"], strict=True)]
    deviations = [statistics.stdev(run.accuracy for run in runs[name]) for name in ("host", "grown") if len(gains) > 1]
    dips, quiet = falls(runs["host"], runs["grown"])
    gain, wide = mean("grown") - mean("host"), mean("wide") - mean("host")
    where = [layer for run in runs["grown"] for layer in run.grown or ["nowhere"]]
    return [
        {
            "wanted": "grown above the host by two spreads",
            "found": f"{gain:.3f}, the larger spread {max(deviations, default=0.0):.3f}",
        },
        {"wanted": "90 % of the wider host's gain", "found": f"{gain / wide:.0%}" if wide else "no gain"},
        {
            "wanted": "at most 20 % of its added parameters",
            "found": f"{(parameters('grown') - parameters('host')) / (parameters('wide') - parameters('host')):.0%}",
        },
        {"wanted": "better with every seed", "found": f"{sum(g > 0 for g in gains)} of {len(gains)}"},
        {
            "wanted": "no dip beyond the host's own",
            "found": f"{spread(dips)}, the host's {spread(quiet)}" if dips else "nothing grew",
        },
        {
            "wanted": "seeds that stay",
            "found": ", ".join(f"{one} ({where.count(one)})" for one in sorted(set(where))),
        },
    ]


def draw(path: Path, contests: dict[str, Any]) -> None:
    """Test accuracy over epochs, mean and standard deviation over the seeds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(contests), figsize=(6 * len(contests), 4), dpi=100, squeeze=False)
    for place, (name, runs) in zip(axes[0], contests.items(), strict=True):
        for contestant, own in runs.items():
            series = torch.tensor([run["accuracies"] for run in own])
            mean, deviation = series.mean(0), series.std(0) if len(own) > 1 else torch.zeros(series.shape[1])
            place.plot(mean, label=contestant)
            place.fill_between(range(len(mean)), mean - deviation, mean + deviation, alpha=0.15)
        place.set(title=name, xlabel="epoch", ylabel="test accuracy")
        place.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def rounded(value: Any) -> Any:
    """Every float with five digits: more of a run's path says nothing."""
    match value:
        case float():
            return float(f"{value:.5g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list():
            return [rounded(item) for item in value]
    return value


PARTS = (*TASKS, "overhead", "decisions")


def kept(path: Path, only: Sequence[str]) -> dict[str, Any]:
    """What an earlier run has written of other parts."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    return {
        kind: {name: value for name, value in known.get(kind, {}).items() if name not in only}
        for kind in ("runs", "tables", "circumstances")
    }


def tables_of(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Every table of the page, in the order of the parts."""
    found = {}
    for name in PARTS:
        if name in figures["runs"]:
            runs = {who: [Run(**run) for run in own] for who, own in figures["runs"][name].items()}
            found |= {name: summary(runs), f"{name}: what was wanted": verdict(runs)}
        found |= figures["tables"].get(name, {})
    rows = [{"part": name, **figures["circumstances"][name]} for name in PARTS if name in figures["circumstances"]]
    return found | {"the circumstances": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(PARTS)
    parser.add_argument("--only", default=every, type=names_of(PARTS), help=f"parts, with commas, of {every}")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first", type=int, default=10, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process and a thread of its own")
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs: whether it works at all")
    parser.add_argument(
        "--output",
        type=made_folder,
        help="folder for growth.json, growth.md and growth.png; other parts there are kept",
    )
    options = parser.parse_args()
    figures: dict[str, Any] = {"runs": {}, "tables": {}, "circumstances": {}}
    with tempfile.TemporaryDirectory() as folder:
        _prepare(folder)
        for name in options.only:
            jobs = 1
            if name == "overhead":
                figures["tables"][name] = overhead(Path(folder), samples=2 if options.quick else 12)
            elif name == "decisions":
                layers, samples = (250, 5) if options.quick else (2500, 30)
                figures["tables"][name] = {"a decision": decisions(Path(folder), layers, samples)}
            else:
                seeds = range(options.first, options.first + (1 if options.quick else options.seeds))
                jobs = options.jobs
                epochs = TASKS[name].epochs // (10 if options.quick else 1)
                runs = contests(name, seeds, epochs, Path(folder), jobs)
                figures["runs"][name] = {who: [vars(run) for run in own] for who, own in runs.items()}
            load = os.getloadavg()[1]
            figures["circumstances"][name] = {"runs at a time": jobs, "load of the machine": round(load, 1)}
    figures = rounded(figures)
    if options.output:
        before = kept(options.output / "growth.json", options.only)
        figures = {kind: before[kind] | figures[kind] for kind in figures}
    page = markdown("Does growing pay?", "growth.py", tables_of(figures), digits=4, device="1 thread")
    sys.stdout.write(page)
    if options.output:
        (options.output / "growth.md").write_text(page)
        (options.output / "growth.json").write_text(json.dumps(figures) + "\n")
        if figures["runs"]:
            draw(options.output / "growth.png", figures["runs"])


if __name__ == "__main__":
    main()
