"""What emitted kernels take, against torch eager and torch.compile on the same module; and what compiling takes.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python bench/tezzeret.py [--only lora,linear] [--sizes 32x512] [--threads 1,2]
        [--samples 21] [--device cuda] [--dtype bfloat16] [--output docs]

A case is a shipped blueprint as the seed of a layer whose output h is there already: `h + alpha (k - h)` at alpha 0.5,
forward without gradients, and forward with backward for all inputs and parameters. The rivals compute the same with
torch.lerp from a module written in plain torch. All are called in turn, in drawn order, warm; medians of samples that
take at least a millisecond, which on a GPU end when it has done its work. Rows are 32 positions an item for attention,
and images of 4x8 for convolutions.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from options import made_folder, names_of, numbers
from rich.console import Console
from rich.table import Table
from tables import markdown
from tezzeret_modules import CASES, Case
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.kasmina import KasminaLayer
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.model.germination import target_name

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
SIZES = ("32x512", "512x512", "4096x768")
ITEM = {"rows": (), "sequence": (32,), "image": (4, 8)}
SAMPLE_S = 1e-3
ALPHA = 0.5
console = Console(width=150)


class Given(nn.Linear):
    """A layer whose output is there already: only its seed takes time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.h


class GivenImage(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.h


def contenders(
    case: Case, blueprint: Blueprint, rows: int, d: int, urza: esper.Urza, device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Named calls `<what> <who>`, and the largest relative difference between our output and eager's."""
    dims = case.dims(d)
    target = target_name(torch.device(device))
    artifact_id = esper.compile(blueprint, dims=dims, dtype=dtype, targets=target, urza=urza).id
    artifact, blobs = urza.load(artifact_id)
    program = KernelProgram.load(artifact.manifest, blobs, torch.device(device))
    item = ITEM[program.layout]
    d_in = dims.get("d_in", d)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    lead = (rows // math.prod(item), *item) if item else (rows,)
    h, x = draw(*lead, d).requires_grad_(), draw(*lead, d_in).requires_grad_()
    host = (GivenImage(d_in, d, 1) if program.layout == "image" else Given(d_in, d)).to(device, dtype)
    layer = KasminaLayer.adopt(host, num_seeds=1, chunking="whole", urza=urza, name="host")
    assert layer.load_kernel_sync(0, artifact_id), layer.last_error(0)
    layer.graft(0)
    layer.set_alpha(0, ALPHA)
    own = {name.removeprefix("0."): parameter for name, parameter in layer.seed_parameters()}
    with torch.no_grad():
        for parameter in own.values():
            scale = math.prod(parameter.shape[1:]) ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(draw(*parameter.shape) * scale)
    grad_out = draw(*lead, d)
    inputs = [{"h": h, "x": x}[name] for name in program.inputs]
    leaves = [*dict.fromkeys([h, *inputs]), *own.values()]

    def grown(h: Tensor, x: Tensor) -> Tensor:
        if program.layout != "image":
            layer.h = h
            return layer(x)
        layer.h = h.permute(0, 3, 1, 2)
        return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def plain(h: Tensor, *inputs: Tensor) -> Tensor:
        return torch.lerp(h, case.k(*inputs, own), ALPHA)

    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: grown(h, x),
        "eager": lambda: plain(h, *inputs),
        "inductor": lambda: compiled(h, *inputs),
    }
    functions: dict[str, Callable[[], Any]] = {}
    for who, call in calls.items():

        def forward(call: Callable[[], Tensor] = call) -> Tensor:
            with torch.no_grad():
                return call()

        def both(call: Callable[[], Tensor] = call) -> Any:
            return torch.autograd.grad(call(), leaves, grad_out)

        functions[f"forward {who}"], functions[f"forward+backward {who}"] = forward, both
    ours, theirs = functions["forward+backward ours"](), functions["forward+backward eager"]()
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    return functions, off


def synchronize() -> None:
    """Waits until a GPU, where this process uses one, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def samples(functions: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Microseconds of a call, `count` times for each."""
    calls = {}
    for name, function in functions.items():
        function()
        synchronize()
        began = time.perf_counter()
        function()
        synchronize()
        calls[name] = max(1, math.ceil(SAMPLE_S / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, drawn = list(functions), random.Random(7)
    for _ in range(count):
        drawn.shuffle(order)
        for name in order:
            function, repeats = functions[name], range(calls[name])
            began = time.perf_counter()
            for _ in repeats:
                function()
            synchronize()
            times[name].append((time.perf_counter() - began) / len(repeats) * 1e6)
    return times


def measure(options: argparse.Namespace, urza: esper.Urza) -> list[dict[str, Any]]:
    rows_of_table: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for size in options.sizes:
            rows, d = map(int, size.split("x"))
            for name in options.only:
                blueprint = Blueprint.load(KERNELS / f"{name}.toml")
                torch.compiler.reset()
                functions, off = contenders(
                    CASES[name], blueprint, rows, d, urza, options.device, getattr(torch, options.dtype)
                )
                count = options.samples if rows * d < 2**20 else max(5, options.samples // 3)
                times = samples(functions, count)
                for what in ("forward", "forward+backward"):
                    medians = {who: statistics.median(times[f"{what} {who}"]) for who in ("ours", "eager", "inductor")}
                    rows_of_table.append(
                        {
                            "blueprint": name,
                            "size": size,
                            "threads": threads,
                            "what": what,
                            "us": medians["ours"],
                            "over eager": medians["eager"] / medians["ours"],
                            "over inductor": medians["inductor"] / medians["ours"],
                            "difference": off,
                        }
                    )
                    console.print(
                        " ".join(
                            f"{k}={v:.4g}" if isinstance(v, float) else f"{v}" for k, v in rows_of_table[-1].items()
                        )
                    )
    return rows_of_table


def summary(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the library, and of the bottleneck alone."""
    lines = []
    for threads in sorted({row["threads"] for row in table}):
        mine = [row for row in table if row["threads"] == threads]
        for rival, wanted in (("eager", 1.5), ("inductor", 1.1)):
            ratios = [row[f"over {rival}"] for row in mine]
            lines.append({"what": f"geometric mean over {rival}, threads {threads}", "asked": wanted,
                          "found": statistics.geometric_mean(ratios)})  # fmt: skip
        for row in mine:
            if row["blueprint"] == "bottleneck_adapter":
                what = f"bottleneck over eager, {row['size']} {row['what']}, threads {threads}"
                lines.append({"what": what, "asked": 2.0, "found": row["over eager"]})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(CASES), type=names_of(CASES), help="blueprints, with commas")
    parser.add_argument("--sizes", default=",".join(SIZES), help="rows x features, with commas")
    parser.add_argument("--threads", default="1,2", type=numbers, help="with commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--samples", type=int, default=21)
    parser.add_argument("--output", type=made_folder, help="a folder: tezzeret-speed.md and tezzeret.json go there")
    options = parser.parse_args()
    options.sizes = options.sizes.split(",")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    with tempfile.TemporaryDirectory() as folder:
        table = measure(options, esper.Urza(folder))
    parts = {"Summary": summary(table), "Kernels": table}
    for name, rows in parts.items():
        shown = Table(title=name)
        for column in rows[0]:
            shown.add_column(column)
        for row in rows:
            shown.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(shown)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    if options.output:
        (options.output / "tezzeret.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        (options.output / "tezzeret-speed.md").write_text(
            markdown("Speed of emitted kernels", "tezzeret.py", parts, digits=3, device=gpu), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
