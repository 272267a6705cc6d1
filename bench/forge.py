"""What compiling costs: of a blueprint for all targets, of a hit, and of a training step while others compile.

python bench/forge.py [--compiles 50] [--seconds 20] [--json PATH]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper_triton as esper
from esper_triton.tezzeret.library import shipped
from esper_triton.tezzeret.pool import Forge

TARGETS = ("cpu", "cuda:80", "cuda:89", "cuda:90", "cuda:100", "hip:gfx942")
DESIGNS = ("bottleneck_adapter", "layernorm", "lora", "channel_scale")
SIZES = {"d": 256, "d_in": 256, "r": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiles", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0, help="of steps alone, before and after")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
        rows = [*costs(Path(folder)), *steps(Path(folder), options.compiles, options.seconds)]
    for row in rows:
        sys.stdout.write(f"{row['what']:<62}{row['value']:>12.4g}\n")
    if options.json:
        options.json.write_text(json.dumps({"processors": os.cpu_count(), "rows": rows}, indent=1) + "\n")


def costs(folder: Path) -> list[dict[str, Any]]:
    store = esper.Urza(folder / "costs")
    esper.compile("linear", dims={"d": 16, "d_in": 16}, targets=TARGETS, pipeline="fast", urza=store)  # warm
    rows: list[dict[str, Any]] = []
    made, spent = 0, 0.0
    for name in DESIGNS:
        blueprint = esper.Blueprint.load(shipped()[name])
        dims = {dim: SIZES[dim] for dim in blueprint.dims}
        wall, cpu = time.perf_counter(), used_s()
        made += len(esper.compile(blueprint, dims=dims, targets=TARGETS, pipeline="fast", urza=store))
        wall, cpu = time.perf_counter() - wall, used_s() - cpu
        spent += cpu
        rows.append({"what": f"{name}, {len(TARGETS)} targets, fast, cold: s", "value": wall})
        rows.append({"what": f"{name}, {len(TARGETS)} targets, fast, cold: processor s", "value": cpu})
        hits = []
        for _ in range(30):
            began = time.perf_counter()
            esper.compile(blueprint, dims=dims, pipeline="fast", urza=store)
            hits.append(time.perf_counter() - began)
        rows.append({"what": f"{name}, a hit: ms", "value": statistics.median(hits) * 1e3})
    rows.append({"what": "artifacts an hour and core", "value": made / spent * 3600})
    return rows


def used_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def steps(folder: Path, compiles: int, seconds: float) -> list[dict[str, Any]]:
    """Steps of one thread alone, while `compiles` are made in one process, and alone again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(256, 256)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - began

    def alone() -> list[float]:
        end = time.perf_counter() + seconds / 2
        times = []
        while time.perf_counter() < end:
            times.append(step())
        return times

    for _ in range(50):
        step()
    blueprint = esper.Blueprint.load(shipped()["bottleneck_adapter"])
    with Forge(esper.Urza(folder / "steps"), jobs=1) as forge:
        forge.submit(blueprint, {"d": 64, "r": 4}, pipeline="fast").result()  # the worker is there
        times = {"alone": alone(), "meanwhile": []}
        tasks = [forge.submit(blueprint, {"d": 65 + i, "r": 4}, pipeline="fast") for i in range(compiles)]
        while not all(task.done() for task in tasks):
            times["meanwhile"].append(step())
        times["alone"] += alone()
    rows = []
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=100)
        what = "alone" if name == "alone" else f"while {compiles} compiles run"
        rows.append({"what": f"step {what}, p50: us", "value": cuts[49] * 1e6})
        rows.append({"what": f"step {what}, p99: us", "value": cuts[98] * 1e6})
    return rows


if __name__ == "__main__":
    main()
