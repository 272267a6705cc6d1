"""The main job, end to end: a network that is too narrow grows a compiled kernel while it trains.

`python -m esper_triton.demo [--quick] [--output DIR]`, or `make demo`. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.contracts.manifest import Manifest

NARROW, HIDDEN = 5, 32  # width of the layer that is too narrow, and of the adapter's hidden layer
BATCH = 64
BLUEPRINT = Path(__file__).resolve().parent / "kernels" / "bottleneck_adapter.toml"
DOCS = Path(__file__).resolve().parent.parent / "docs"  # of a checkout; what is installed has none


class Digits(nn.Module):
    """8 x 8 images to 10 classes, through two layers of NARROW units: too few for a network of this kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, NARROW)
        self.second = nn.Linear(NARROW, NARROW)
        self.head = nn.Linear(NARROW, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 10] of x [batch, 64]."""
        return self.head(F.relu(self.second(F.relu(self.first(x)))))  # type: ignore[no-any-return]  # nn.Module's call


class Images:
    """scikit-learn's bundled digits, a quarter held out, in an order drawn once."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
        x = torch.from_numpy(digits.data).float().div(8).sub(1)[order]
        y = torch.from_numpy(digits.target).long()[order]
        held_out = len(y) // 4
        self.x, self.y, self.test_x, self.test_y = x[held_out:], y[held_out:], x[:held_out], y[:held_out]
        self.steps_per_epoch = -(-len(self.y) // BATCH)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless epochs, each in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.y), generator=generator)
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                yield self.x[rows], self.y[rows]


@dataclass
class Trainer:
    """A plain training loop that remembers what the picture shows."""

    model: nn.Module
    images: Images
    batches: Iterator[tuple[Tensor, Tensor]]
    alpha: Callable[[], float] = lambda: 0.0
    steps: int = 0
    history: list[tuple[int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)

    def step(self) -> None:
        x, y = next(self.batches)
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.optimizer.step()
        if self.steps % 10 == 0:
            self.history.append((self.steps, self.accuracy(), self.alpha()))
        self.steps += 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        return float((self.model(self.images.test_x).argmax(1) == self.images.test_y).float().mean())


async def compile_in_background(store: Path) -> dict[str, Any]:
    """The compile command in a process of its own, so that training keeps this one's interpreter to itself."""
    command = [sys.executable, "-m", "esper_triton.compile", str(BLUEPRINT), "--urza", str(store), "--json"]
    for name, value in (("d", NARROW), ("r", HIDDEN)):
        command += ["--dim", f"{name}={value}"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the compile command failed: {errors.decode().strip()}")
    answer: dict[str, Any] = json.loads(output)["artifacts"][0]
    return answer


def interleaved_us(first: Callable[[], object], second: Callable[[], object], calls: int) -> tuple[float, float]:
    """Median microseconds of two functions, called in turn so that the machine's moods meet both alike."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls):
        for function, times in zip((first, second), samples, strict=True):
            began = time.perf_counter_ns()
            function()
            times.append((time.perf_counter_ns() - began) / 1000)
    return statistics.median(samples[0]), statistics.median(samples[1])


def kernel_against_eager(store: esper.Urza, artifact_id: str, calls: int) -> list[tuple[str, float, float]]:
    """(rows, ours, eager) of the adapter's forward on this layer's width, blend included, without autograd."""
    from esper_triton.kasmina import KernelProgram

    artifact, blobs = store.load(artifact_id)
    program = KernelProgram.load(artifact.manifest, blobs)
    parameters = {name: torch.randn(record.shape) for name, record in artifact.manifest.parameters.items()}
    alpha = torch.tensor(0.5)

    def eager(h: Tensor) -> Tensor:
        z = F.linear(h, parameters["down_weight"], parameters["down_bias"])
        k = h + F.linear(F.gelu(z), parameters["up_weight"], parameters["up_bias"])
        return h + alpha * (k - h)

    rows_measured = []
    with torch.no_grad():
        for rows in (BATCH, 4096):
            h, out = torch.randn(rows, NARROW), torch.empty(rows, NARROW)
            ours, theirs = interleaved_us(
                lambda h=h, out=out: program.forward({"h": h}, parameters, alpha, out),  # type: ignore[misc]
                lambda h=h: eager(h),  # type: ignore[misc]
                calls,
            )
            rows_measured.append((f"{rows} x {NARROW}", ours, theirs))
    return rows_measured


def flip_a_byte(store: esper.Urza, manifest: Manifest) -> None:
    """Damages the forward kernel's machine code where it is stored."""
    path = store.object_path(manifest.kernels[manifest.forward[0].kernel].binary)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def draw(path: Path, trainer: Trainer, alone: Trainer, grafted_at: int) -> None:
    """Accuracy and alpha over steps, whole and around the graft, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, near) = pyplot.subplots(1, 2, figsize=(11, 4), dpi=110, sharey=True)
    steps, accuracy, alpha = zip(*trainer.history, strict=True)
    host = [point for point in alone.history if point[0] >= grafted_at]
    for axes in (whole, near):
        axes.plot(steps, accuracy, color="tab:blue", label="grown")
        axes.plot([p[0] for p in host], [p[1] for p in host], color="tab:gray", label="host alone, same steps")
        axes.axvline(grafted_at, color="tab:orange", linewidth=1)
        axes.set(xlabel="training step", ylim=(0.75, 1.0))
        right = axes.twinx()
        right.fill_between(steps, alpha, color="tab:orange", alpha=0.2, linewidth=0, label="alpha")
        right.set(ylim=(0, 3), yticks=[0, 0.5, 1])
    whole.set(ylabel="held-out accuracy", xlim=(0, steps[-1]), title="the whole run")
    near.set(xlim=(grafted_at - 100, grafted_at + 400), title="the graft: alpha from 0 to 1 in one epoch")
    right.set(ylabel="alpha")
    parts = [axes.get_legend_handles_labels() for axes in (near, right)]
    near.legend(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1], loc="center right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


async def demo(console: Console, output: Path, urza: esper.Urza, quick: bool) -> None:
    """Runs the whole story; raises where a part of it does not hold."""
    scale = 1 if quick else 4
    torch.set_num_threads(1)  # so small a network gains nothing by more, and the compiler has the other core
    torch.manual_seed(0)
    images = Images(seed=0)
    trainer = Trainer(Digits(), images, images.batches(seed=1))

    console.print(f"[bold]1.[/] Training a network with two layers of {NARROW} units on {len(images.y)} digits ...")
    trainer.run(10 * scale * images.steps_per_epoch)
    before = trainer.accuracy()
    model = esper.wrap(trainer.model, target_layers=["first", "second"], seeds_per_layer=1, urza=urza)
    wrapped_at = trainer.steps

    console.print("[bold]2.[/] Compiling a bottleneck adapter for this machine while training goes on ...")
    began = time.perf_counter()
    compiling = asyncio.create_task(compile_in_background(urza.root))
    while not compiling.done():
        trainer.step()
        await asyncio.sleep(0)
    compiled = await compiling
    compile_wall = time.perf_counter() - began
    meanwhile = trainer.steps - wrapped_at
    alone = Trainer(esper.unwrap(copy.deepcopy(trainer.model)), images, images.batches(seed=2))
    alone.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    alone.steps, alone.history = trainer.steps, list(trainer.history)
    trainer.batches = images.batches(seed=2)

    began = time.perf_counter()
    if not await model.load_kernel("first", 0, compiled["id"]):
        raise RuntimeError(f"the kernel was not loaded: {model.kasmina_layers['first'].last_error(0)}")
    load_wall = time.perf_counter() - began

    console.print("[bold]3.[/] Grafting it: alpha goes from 0 to 1 over an epoch, and training goes on ...")
    layer = model.kasmina_layers["first"]
    trainer.optimizer.add_param_group({"params": list(esper.seed_parameters(trainer.model))})
    trainer.alpha = lambda: layer.get_layer_stats()["seeds"][0]["alpha"]
    model.graft("first", 0)
    grafted_at, ready = trainer.steps, trainer.accuracy()
    for k in range(images.steps_per_epoch):
        model.set_alpha("first", 0, (k + 1) / images.steps_per_epoch)
        trainer.step()
    trainer.run(40 * scale * images.steps_per_epoch)
    alone.run(trainer.steps - grafted_at)

    timings = kernel_against_eager(urza, compiled["id"], calls=300 * scale)
    began = time.perf_counter()
    if not await model.load_kernel("second", 0, compiled["id"]):
        raise RuntimeError(f"the kernel was not loaded again: {model.kasmina_layers['second'].last_error(0)}")
    reload_wall = time.perf_counter() - began
    model.unload_kernel("second", 0)

    console.print("[bold]4.[/] Flipping one byte of the stored machine code and loading it into the second layer ...")
    flip_a_byte(urza, urza.get(compiled["id"]).manifest)
    refused = not await model.load_kernel("second", 0, compiled["id"])
    reason = model.kasmina_layers["second"].last_error(0)
    if not refused:
        raise RuntimeError("a damaged artifact was loaded")
    trainer.run(images.steps_per_epoch)
    stats = layer.get_layer_stats()
    after = trainer.accuracy()
    if stats["seeds"][0]["error_count"]:
        raise RuntimeError(f"the seed failed {stats['seeds'][0]['error_count']} times: {layer.last_error(0)}")

    picture = output / "demo.png"
    draw(picture, trainer, alone, grafted_at)
    cache = stats["cache"]
    table = Table(title="What was measured", show_header=False)
    seed_size = sum(p.numel() for p in esper.seed_parameters(trainer.model))
    host_size = sum(p.numel() for p in trainer.model.parameters())
    for row in (
        ("held-out accuracy when it was wrapped", f"{before:.1%}"),
        ("held-out accuracy before the graft", f"{ready:.1%}"),
        ("held-out accuracy after", f"{after:.1%}"),
        ("host alone, the same number of steps", f"{alone.accuracy():.1%}"),
        ("parameters", f"{host_size} of the host, {seed_size} of the seed"),
        ("compile (kernels, in its process)", f"{compiled['compile_ms']:.0f} ms"),
        ("compile (wall, process start and proof)", f"{compile_wall:.1f} s; {meanwhile} training steps meanwhile"),
        ("load (verify, place, allocate)", f"{load_wall * 1000:.1f} ms; {reload_wall * 1000:.1f} ms when in the cache"),
        *((f"adapter forward, {rows}", f"{us:.1f} us; eager torch {eager:.1f} us") for rows, us, eager in timings),
        ("forward calls with the seed active", str(stats["forward_calls_active"])),
        ("kernel cache", f"{cache['hits']} hits, {cache['misses']} misses, {cache['entries']} kernel sets"),
        ("damaged artifact", f"refused: {type(reason).__name__}"),
    ):  # fmt: skip
        table.add_row(*row)
    console.print(table)
    console.print(f"Refused because: {reason}", soft_wrap=True)
    console.print(
        f"Training went on: {trainer.steps} steps in all, no failed launch. Picture: {picture}", soft_wrap=True
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m esper_triton.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer training steps")
    parser.add_argument("--output", type=Path, default=DOCS if DOCS.is_dir() else Path(), help="folder for demo.png")
    options = parser.parse_args(argv)
    if not options.output.is_dir():
        parser.error(f"--output {options.output}: no such folder")
    began = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 110)
    logging.getLogger("esper_triton.kasmina").addHandler(logging.NullHandler())  # the refusal is printed below
    with tempfile.TemporaryDirectory(prefix="esper-demo-") as folder:
        asyncio.run(demo(console, options.output, esper.Urza(Path(folder) / "urza"), options.quick))
    console.print(f"Done in {time.perf_counter() - began:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
