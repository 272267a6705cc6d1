"""Whether growing pays, and what it costs: on scikit-learn's digits, with hosts that are too narrow in one place.

python bench/growth.py [--only mlp,cnn,overhead,decisions] [--seeds 5] [--epochs 80] [--output docs]

Four contestants train for the same epochs on the same batches, with Adam:

- host: the network alone, narrow in one layer;
- grown: the same with `GrowthHook` and `Heuristic`, all layers wrapped, from the start;
- adapter: the host with a plain torch adapter of the same design at its narrow layer, there from the start, of about as
  many parameters as have grown;
- wide: the host with that layer as wide as its neighbours.

A thousand images train, 300 validate (the gates and the heuristic see these alone), the last 497 are what is reported,
at the last epoch. Figures are means over the seeds with the standard deviation after the sign. `dip` is the largest
rise of the validation loss from one epoch to the next while a seed was under way, against that of the host alone in the
same epochs. Nothing is tuned by seed or by contestant; kernels are compiled before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from tables import markdown
from torch import Tensor, nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.contracts.commands import CommandKind
from esper_triton.kasmina import Policy, ReconstructionGate, linear

BATCH, RATE, ADAPTER_WIDTH = 50, 3e-3, 7
UNDER_WAY = {esper.SeedLifecycleState[s] for s in ("GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING")}
POLICY = Policy(
    to_grafting=ReconstructionGate(max_steps=20),
    schedule=linear(100),
    stabilization_steps=20,
    fine_tuning_steps=400,
    embargo_epochs=3,
)
Images = tuple[Tensor, Tensor]


class MLP(nn.Sequential):
    """64 pixels to 10 classes by way of `narrow` and 32 units."""

    at = "0"  # the layer whose width is `narrow`

    def __init__(self, narrow: int) -> None:
        super().__init__(nn.Linear(64, narrow), nn.GELU(), nn.Linear(narrow, 32), nn.GELU(), nn.Linear(32, 10))


class CNN(nn.Sequential):
    """8 x 8 images through two convolutions, and their 128 features through a layer of `narrow` units."""

    at = "8"

    def __init__(self, narrow: int) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, narrow),
            nn.GELU(),
            nn.Linear(narrow, 10),
        )


HOSTS: dict[str, tuple[Callable[[int], nn.Sequential], int, int]] = {"mlp": (MLP, 4, 32), "cnn": (CNN, 3, 32)}
"""The network, its narrow width, and the wide one."""


class Adapted(nn.Module):
    """What `parallel_adapter` computes, in plain torch, beside a linear layer: h + up gelu(down x)."""

    def __init__(self, host: nn.Linear, width: int) -> None:
        super().__init__()
        self.host = host
        self.down, self.up = nn.Linear(host.in_features, width), nn.Linear(width, host.out_features)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x) + self.up(F.gelu(self.down(x)))


@dataclass
class Run:
    """One contestant with one seed."""

    accuracy: float
    loss: float
    parameters: int
    seconds: float
    validation: list[float]
    under_way: list[bool]  # for each epoch, whether a seed contributed and was not permanent
    accuracies: list[float]
    grown: list[str] = field(default_factory=list)


class Digits:
    """Images in an order drawn by the seed."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
        x = torch.from_numpy(digits.data).float().div(8).sub(1)[order]
        y = torch.from_numpy(digits.target).long()[order]
        self.train, self.validation, self.test = (
            (x[:1000], y[:1000]),
            (x[1000:1300], y[1000:1300]),
            (x[1300:], y[1300:]),
        )


@torch.no_grad()
def loss_on(model: nn.Module, images: Images) -> float:
    return float(F.cross_entropy(model(images[0]), images[1]))


@torch.no_grad()
def accuracy_on(model: nn.Module, images: Images) -> float:
    return float((model(images[0]).argmax(1) == images[1]).float().mean())


def train(model: nn.Module, images: Digits, seed: int, epochs: int, urza: esper.Urza | None = None) -> Run:
    """Grows where there is a store."""
    optimizer, hook = torch.optim.Adam(model.parameters(), lr=RATE), None
    if urza is not None:
        controller = esper.Heuristic(urza, warmup_epochs=5, plateau_epochs=3)
        validate = lambda model: loss_on(model, images.validation)  # noqa: E731
        hook = esper.GrowthHook(model, optimizer, controller=controller, validate=validate, measure_every=40)
    layers = model.kasmina_layers.values() if isinstance(model, esper.MorphableModel) else ()
    batches = torch.Generator().manual_seed(seed)
    x, y = images.train
    run = Run(0.0, 0.0, 0, 0.0, [], [], [])
    for epoch in range(epochs):
        began, active = time.perf_counter(), False
        for rows in torch.randperm(len(y), generator=batches).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if hook is not None:
                hook.step(loss)
                active |= any(seed.state in UNDER_WAY for layer in layers for seed in layer._kasmina.seeds)
        run.validation.append(loss_on(model, images.validation))
        if hook is not None:
            hook.epoch_end(epoch, run.validation[-1])
        run.seconds += time.perf_counter() - began
        run.under_way.append(active)
        run.accuracies.append(accuracy_on(model, images.test))
    run.accuracy, run.loss = run.accuracies[-1], loss_on(model, images.test)
    run.parameters = sum(p.numel() for p in (*model.parameters(), *esper.seed_parameters(model)))
    for name, layer in getattr(model, "kasmina_layers", {}).items():
        run.grown += [f"{name}: {s.state.name}" for s in layer._kasmina.seeds if s.state.is_active]
    return run


def compile_for(model: nn.Sequential, urza: esper.Urza) -> None:
    """An adapter for every layer that can have one."""
    for layer in model:
        dims = None
        if isinstance(layer, nn.Linear):
            dims = {"d_in": layer.in_features, "d": layer.out_features}
        elif isinstance(layer, nn.Conv2d):
            dims = {"d_in": layer.in_channels, "d": layer.out_channels}
        if dims is not None:
            esper.compile("parallel_adapter", dims=dims | {"r": ADAPTER_WIDTH}, urza=urza, pipeline="fast")


def contest(name: str, seeds: int, epochs: int, folder: Path) -> dict[str, list[Run]]:
    build, narrow, wide = HOSTS[name]
    urza = esper.Urza(folder / name)
    compile_for(build(narrow), urza)
    runs: dict[str, list[Run]] = {"host": [], "grown": [], "adapter": [], "wide": []}
    for seed in range(seeds):
        images = Digits(seed)

        def fresh(width: int, seed: int = seed) -> nn.Sequential:
            torch.manual_seed(seed)
            return build(width)

        host = train(fresh(narrow), images, seed, epochs)
        model = fresh(narrow)
        targets = [str(k) for k, layer in enumerate(model) if isinstance(layer, (nn.Linear, nn.Conv2d))]
        model = esper.wrap(model, targets, seeds_per_layer=1, urza=urza, policy=POLICY)
        grown = train(model, images, seed, epochs, urza)
        adapted = fresh(narrow)
        at = int(adapted.at)
        added = grown.parameters - host.parameters
        per_unit = _parameters(Adapted(adapted[at], 2)) - _parameters(Adapted(adapted[at], 1))
        adapted[at] = Adapted(adapted[at], max(1, round(added / per_unit)))
        runs["host"].append(host)
        runs["grown"].append(grown)
        runs["adapter"].append(train(adapted, images, seed, epochs))
        runs["wide"].append(train(fresh(wide), images, seed, epochs))
    return runs


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def summary(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    hosts = runs["host"]
    steps_per_epoch = 1000 // BATCH
    rows = []
    for name, own in runs.items():
        reached = []
        for host, run in zip(hosts, own, strict=True):
            best = min(host.validation)
            reached.append(next((k + 1 for k, loss in enumerate(run.validation) if loss <= best), None))
        dips, quiet = [], []
        for host, run in zip(hosts, own, strict=True):
            during = [k for k in range(1, len(run.validation)) if run.under_way[k]]
            if during:
                dips.append(max(run.validation[k] - run.validation[k - 1] for k in during))
                quiet.append(max(host.validation[k] - host.validation[k - 1] for k in during))
        met = [k * steps_per_epoch for k in reached if k is not None]
        rows.append(
            {
                "contestant": name,
                "accuracy": spread([run.accuracy for run in own]),
                "test loss": spread([run.loss for run in own]),
                "parameters": round(statistics.fmean(run.parameters for run in own)),
                "seconds": spread([run.seconds for run in own]),
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
    deviation = statistics.stdev(run.accuracy for run in runs["host"]) if len(gains) > 1 else 0.0
    gain, wide = mean("grown") - mean("host"), mean("wide") - mean("host")
    first = [run.grown[0].partition(":")[0] if run.grown else "none" for run in runs["grown"]]
    return [
        {"wanted": "grown above the host by two spreads", "found": f"{gain:.3f}, spread {deviation:.3f}"},
        {"wanted": "90 % of the wider host's gain", "found": f"{gain / wide:.0%}" if wide else "no gain"},
        {
            "wanted": "at most 20 % of its added parameters",
            "found": f"{(parameters('grown') - parameters('host')) / (parameters('wide') - parameters('host')):.0%}",
        },
        {"wanted": "a seed in the narrow layer", "found": ", ".join(sorted(set(first)))},
        {"wanted": "better with every seed", "found": f"{sum(g > 0 for g in gains)} of {len(gains)}"},
    ]


def overhead(samples: int = 300) -> list[dict[str, Any]]:
    """A step of a bare loop, and of one with every layer wrapped, the hook, and nothing growing; in turn."""
    rows = []
    for width, batch in ((64, 64), (256, 256), (512, 512)):
        steps = [_stepper(width, batch, hooked) for hooked in (False, True)]
        times: list[list[float]] = [[], []]
        for _ in range(samples + 20):
            for step, own in zip(steps, times, strict=True):
                began = time.perf_counter()
                step()
                own.append((time.perf_counter() - began) * 1e6)
        bare, hooked = (statistics.median(own[20:]) for own in times)
        ratios = [b / a for a, b in zip(times[0][20:], times[1][20:], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "host": f"MLP, 3 layers, d={width}, batch {batch}",
                "bare_us": bare,
                "hooked_us": hooked,
                "ratio": median,
                "low": low,
                "high": high,
            }
        )
    return rows


def _stepper(width: int, batch: int, hooked: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
    if hooked:
        model = esper.wrap(model, [nn.Linear], seeds_per_layer=4)
    optimizer = torch.optim.Adam(model.parameters())
    hook = esper.GrowthHook(model, optimizer, controller=esper.Manual()) if hooked else None
    x = torch.randn(batch, width)

    def step() -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hook is not None:
            hook.step(loss)

    return step


def decisions(folder: Path, layers: int = 2500, samples: int = 30) -> list[dict[str, Any]]:
    """The time of a decision of `Heuristic` on four seeds a layer: reading the model, and deciding."""
    from esper_triton.contracts.system import LayerGradients
    from esper_triton.model.system import SystemReader

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
            began = time.perf_counter()
            state = reader.read(epoch=3, step=100, gradients=gradients, metrics=[1.0], lower_is_better=True, results=())
            between = time.perf_counter()
            commands = controller.step(state)
            decided.append((time.perf_counter() - between) * 1e3)
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
                "decide_worst_ms": max(decided),
            }
        )
    return rows


def draw(path: Path, contests: dict[str, dict[str, list[Run]]]) -> None:
    """Test accuracy over epochs, mean and standard deviation over the seeds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(contests), figsize=(6 * len(contests), 4), dpi=100, squeeze=False)
    for place, (name, runs) in zip(axes[0], contests.items(), strict=True):
        for contestant, own in runs.items():
            series = torch.tensor([run.accuracies for run in own])
            mean, deviation = series.mean(0), series.std(0) if len(own) > 1 else torch.zeros(series.shape[1])
            place.plot(mean, label=contestant)
            place.fill_between(range(len(mean)), mean - deviation, mean + deviation, alpha=0.15)
        place.set(title=name, xlabel="epoch", ylabel="test accuracy", ylim=(0.7, 1.0))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="mlp,cnn,overhead,decisions")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--output", type=Path, help="folder for growth.json, growth.md and growth.png")
    options = parser.parse_args()
    only = options.only.split(",")
    unknown = set(only) - {*HOSTS, "overhead", "decisions"}
    if unknown:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; known: {', '.join(HOSTS)}, overhead, decisions")
    torch.set_num_threads(1)
    logging.getLogger("esper_triton.kasmina").setLevel(logging.ERROR)
    parts: dict[str, list[dict[str, Any]]] = {}
    contests: dict[str, dict[str, list[Run]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
        for name in only:
            if name in HOSTS:
                contests[name] = contest(name, options.seeds, options.epochs, Path(folder))
                parts[name] = summary(contests[name])
                parts[f"{name}: what was wanted"] = verdict(contests[name])
            elif name == "overhead":
                parts["a step with the hook and nothing growing"] = overhead()
            else:
                parts["a decision"] = decisions(Path(folder))
    page = markdown("Does growing pay?", "growth.py", parts, digits=4, device="1 thread")
    sys.stdout.write(page)
    if options.output:
        (options.output / "growth.md").write_text(page)
        figures = {name: {c: [vars(r) for r in own] for c, own in runs.items()} for name, runs in contests.items()}
        (options.output / "growth.json").write_text(json.dumps(rounded({"parts": parts, "runs": figures})) + "\n")
        if contests:
            draw(options.output / "growth.png", contests)


if __name__ == "__main__":
    main()
