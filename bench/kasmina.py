"""What Kasmina costs: dormant layers, active seeds, the kernel cache, state, and loading in the background.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python bench/kasmina.py [--only dormant,active] [--device cuda] [--samples 31]
        [--output docs]

Everything is a ratio or a difference of things measured in turn in this one process: medians over samples, each of as
many calls as take about a millisecond. The machine's other work shows in the spread, the middle half of the samples.
On a GPU a sample ends when the device has done its work.
In the table of dormant layers stand, where `make test` has installed them, PEFT (a LoRA adapter on the same layers,
which is disabled) and Hugging Face's kernels (the same layers, of a class whose forward `kernelize` may exchange).
"""

import argparse
import asyncio
import contextlib
import copy
import gc
import json
import logging
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kasmina_instructions
import kasmina_replicas
import torch
from kasmina_hosts import HOSTS, Transformer
from options import made_folder, names_of
from rich.console import Console
from rich.table import Table
from tables import markdown
from torch import nn
from torch.nn import functional as F

import esper_triton as esper
from esper_triton.kasmina import KasminaStateLayout, KernelCache, loading
from esper_triton.kasmina.pending import load_request
from esper_triton.kasmina.prepared import Prepared
from esper_triton.model.germination import target_name

BLUEPRINT = Path(__file__).resolve().parent.parent / "kernels" / "bottleneck_adapter.toml"
SAMPLE_S = 1e-3
PARTS = ("dormant", "instructions", "active", "adapter", "cache", "state", "pause")
console = Console(width=130)


def synchronize() -> None:
    """Waits until a GPU, where this process uses one, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timer(function: Callable[[], Any]) -> Callable[[], float]:
    """A function that gives the microseconds of one call, over as many as take `SAMPLE_S`."""
    function()
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    calls = max(1, min(5000, int(SAMPLE_S / max(time.perf_counter() - began, 1e-7))))

    def sample() -> float:
        began = time.perf_counter_ns()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter_ns() - began) / calls / 1000

    return sample


def in_turn(samples: int, **functions: Callable[[], Any]) -> dict[str, list[float]]:
    """Microseconds of each function, sampled one after the other, in an order that turns by one each time."""
    timers = {name: timer(function) for name, function in functions.items()}
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    for turn in range(samples + 2):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            value = timers[name]()
            if turn >= 2:
                times[name].append(value)
    gc.enable()
    return times


def compiled(options: argparse.Namespace, urza: esper.Urza, **dims: int) -> str:
    """Id of the shipped adapter for the device that is measured, float32."""
    target = target_name(torch.device(options.device))
    return esper.compile(BLUEPRINT, dims=dims, targets=target, urza=urza).id


def compared(times: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """`name` over `base`: the ratio of the medians, and the middle half of the ratios of neighbours."""
    ratios = statistics.quantiles([a / b for a, b in zip(times[name], times[base], strict=True)], n=4)
    return {
        "us": statistics.median(times[name]),
        "base_us": statistics.median(times[base]),
        "ratio": statistics.median(times[name]) / statistics.median(times[base]),
        "low": ratios[0],
        "high": ratios[2],
    }


def peft_disabled(model: nn.Module, device: str) -> nn.Module:
    """The model with a LoRA adapter on every Linear that is switched off."""
    from peft import LoraConfig, get_peft_model

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=names))
    adapted.base_model.disable_adapter_layers()
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" not in name)  # as in the bare model, all of which trains
    return adapted.base_model.model.to(device)


def kernelized(model: nn.Module, device: str) -> nn.Module:
    """The model after `kernels.kernelize`, which has no kernel for its layers."""
    from kernels import Mode, kernelize, use_kernel_forward_from_hub

    logging.getLogger("kernels").setLevel(logging.ERROR)

    @use_kernel_forward_from_hub("Linear")
    class Linear(nn.Linear):
        pass

    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # a line for each layer
        return kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE, device=device)


def python_calls(model: nn.Module, x: torch.Tensor) -> int:
    """Python frames that one call enters."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    model(x)
    sys.setprofile(note)
    model(x)
    sys.setprofile(None)
    return count


def dormant(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # what is looked for is less than the threads of a batch of eight take to wake
    rows = []
    for host, (make, shape) in HOSTS.items():
        torch.manual_seed(0)
        bare = make().to(options.device)
        models = {"bare": bare, "again": copy.deepcopy(bare)}
        with tempfile.TemporaryDirectory() as folder:
            models["wrapped"] = esper.wrap(
                copy.deepcopy(bare), [nn.Linear], seeds_per_layer=4, urza=esper.Urza(folder), telemetry_enabled=True
            )
        sys.path.append(str(Path(sys.prefix) / "company"))
        for name, change in (("PEFT, disabled", peft_disabled), ("kernels, kernelize", kernelized)):
            try:
                models[name] = change(copy.deepcopy(bare), options.device)
            except ImportError as error:
                console.print(f"[dim]without {name}: {error}[/]")
        sys.path.pop()
        x = torch.randn(shape, device=options.device)
        for what in ("forward", "forward+backward"):

            def call(model: nn.Module, what: str = what, x: torch.Tensor = x) -> None:
                if what == "forward":
                    with torch.no_grad():
                        model(x)
                else:
                    model(x).sum().backward()

            times = in_turn(options.samples * 5, **{n: lambda m=m: call(m) for n, m in models.items()})
            for name in models:
                if name != "bare":
                    added = python_calls(models[name], x) - python_calls(bare, x)
                    rows.append({"host": host, "what": what, "model": name, "added_frames": added}
                                | compared(times, name, "bare"))  # fmt: skip
    table("dormant layers: times the bare model ('again' is a copy of it: what the clock makes of equals)", rows)
    return rows


def instructions(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.device != "cpu":
        console.print("[yellow]instructions: skipped, a GPU's cannot be counted[/]")
        return []
    if shutil.which("valgrind") is None:
        console.print("[yellow]instructions: skipped, there is no valgrind here, which counts them[/]")
        return []
    rows = kasmina_instructions.count()
    table("dormant layers: instructions of one forward pass, by valgrind", rows)
    return rows


def grown(options: argparse.Namespace, urza: esper.Urza, d: int, r: int) -> nn.Module:
    """Linear(d, d) with one grafted adapter at alpha 1/2."""
    artifact = compiled(options, urza, d=d, r=r)
    model = esper.wrap(nn.Sequential(nn.Linear(d, d)).to(options.device), ["0"], seeds_per_layer=1, urza=urza)
    assert model.load_kernel_sync("0", 0, artifact), model[0].last_error(0)
    model.graft("0", 0)
    model.set_alpha("0", 0, 0.5)
    return model


def active(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        layer = grown(options, esper.Urza(folder), 64, 16)[0]
        host = nn.Linear(64, 64, device=options.device)
        x = torch.randn(8, 64, device=options.device)
        layer(x)
        prepared = vars(layer)["forward"]._prepared
        assert isinstance(prepared, Prepared)
        (seed,) = prepared.seeds
        h = host(x).detach()
        out, saved = (
            torch.empty_like(h),
            [torch.empty(shape, dtype=dtype, device=h.device) for shape, dtype in seed.saved],
        )
        values = (*seed.forward.constants, h.data_ptr(), out.data_ptr(), *seed.static, *(t.data_ptr() for t in saved))
        ((run, grid, pick),) = seed.forward.launches
        arguments = pick(values)

        def bare() -> None:
            run(*grid, *arguments)

        def bound() -> None:
            for launch, extents, chosen in seed.forward.launches:
                launch(*extents, *chosen(values))

        for what, context in (("no_grad", torch.no_grad), ("autograd", torch.enable_grad)):
            with context():
                times = in_turn(
                    options.samples * 3, host=lambda: host(x), active=lambda: layer(x), kernel=bare, bound=bound
                )
            medians = {name: statistics.median(values) for name, values in times.items()}
            beyond = medians["active"] - medians["host"] - medians["kernel"]
            rows.append({"what": what, **{f"{n}_us": v for n, v in medians.items()}, "beyond_us": beyond,
                         "bound_beyond_kernel_us": medians["bound"] - medians["kernel"]})  # fmt: skip
    table("one active seed, Linear(64, 64), 8 rows, one thread: host-side time beyond host and kernel", rows)
    return rows


class EagerAdapter(nn.Module):
    """The same host layer with the adapter written in torch."""

    def __init__(self, host: nn.Linear, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.host, self.alpha = host, torch.tensor(0.5, device=host.weight.device)
        self.down_weight, self.down_bias, self.up_weight, self.up_bias = (
            nn.Parameter(parameters[f"0.{name}"].detach().clone())
            for name in ("down_weight", "down_bias", "up_weight", "up_bias")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.host(x)
        k = h + F.linear(F.gelu(F.linear(h, self.down_weight, self.down_bias)), self.up_weight, self.up_bias)
        return h + self.alpha * (k - h)


def adapter(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        urza = esper.Urza(folder)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for batch, d, r in ((64, 64, 16), (512, 512, 64), (4096, 768, 64)):
                layer = grown(options, urza, d, r)[0]
                host = nn.Linear(d, d, device=options.device)
                host.load_state_dict(layer.state_dict())
                eager = EagerAdapter(host, dict(layer.seed_parameters()))
                x = torch.randn(batch, d, device=options.device)
                with torch.no_grad():
                    torch.testing.assert_close(layer(x), eager(x), rtol=1e-4, atol=1e-4)

                def train(module: nn.Module, x: torch.Tensor = x) -> None:
                    module(x).sum().backward()

                times = in_turn(
                    options.samples,
                    host=lambda host=host, train=train: train(host),
                    ours=lambda layer=layer, train=train: train(layer),
                    eager=lambda eager=eager, train=train: train(eager),
                )
                figures = compared(times, "eager", "ours")
                above = [statistics.median(times[n]) - statistics.median(times["host"]) for n in ("eager", "ours")]
                rows.append({"threads": threads, "rows": batch, "d": d, "r": r, "eager_us": figures["us"],
                             "ours_us": figures["base_us"], "eager/ours": figures["ratio"], "low": figures["low"],
                             "high": figures["high"], "without host": above[0] / above[1]})  # fmt: skip
    table("a grafted adapter against the same in eager torch, whole layer, forward and backward", rows)
    return rows


def cache(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        urza = esper.Urza(folder)
        ids = [compiled(options, urza, d=32, r=r) for r in range(1, 65)]
        layers = nn.ModuleList(nn.Linear(32, 32, device=options.device) for _ in range(32))
        model = esper.wrap(layers, [nn.Linear], seeds_per_layer=1, urza=urza)
        first = model.kasmina_layers["0"]
        kernels = KernelCache.process()
        kernels.reset()
        request = load_request(first, first._kasmina.seeds[0], ids[0], holder=first)
        loading.load(request, urza)
        key = next(iter(kernels._entries))

        hit = in_turn(options.samples, hit=lambda: kernels.load(key, lambda: None, first))["hit"]
        misses = []
        for turn in range(5):
            for artifact in ids:
                kernels.reset()
                own = load_request(first, first._kasmina.seeds[0], artifact, holder=first)
                began = time.perf_counter_ns()
                loading.load(own, urza)
                if turn:
                    misses.append((time.perf_counter_ns() - began) / 1000)
        kernels.reset()
        generator = torch.Generator().manual_seed(0)

        def churn(loads: int) -> None:
            names = list(model.kasmina_layers)
            for k in range(loads):
                name = names[k % len(names)]
                chosen = int(torch.randint(len(ids), (1,), generator=generator))
                assert model.load_kernel_sync(name, 0, ids[chosen])
                model.unload_kernel(name, 0)

        churn(500)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        churn(options.cycles)
        seconds = time.perf_counter() - began
        gc.collect()
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        stats = kernels.stats()
    rows = [
        {"what": "hit, us", "value": statistics.median(hit)},
        {"what": "load from Urza on a miss, p50, us", "value": statistics.median(misses)},
        {"what": "load from Urza on a miss, p99, us", "value": statistics.quantiles(misses, n=100)[98]},
        {"what": f"hit rate over {stats.hits + stats.misses} loads of 64 artifacts in 32 layers, %",
         "value": 100 * stats.hits / (stats.hits + stats.misses)},
        {"what": f"growth over {options.cycles} loads and unloads, KiB", "value": growth},
        {"what": "one load and unload, us", "value": seconds / options.cycles * 1e6},
    ]  # fmt: skip
    table("the kernel cache", rows)
    return rows


def state(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    seeds, layers = 10_000, 100
    with tempfile.TemporaryDirectory() as folder:
        urza = esper.Urza(folder)
        each = seeds // layers
        artifact = compiled(options, urza, d=1, r=1)
        bare = nn.Sequential(*(nn.Linear(each, each, device=options.device) for _ in range(layers)))
        model = esper.wrap(copy.deepcopy(bare), [nn.Linear], seeds_per_layer=each, urza=urza)
        x = torch.randn(8, each, device=options.device)
        with torch.no_grad():
            times = in_turn(options.samples, bare=lambda: bare(x), wrapped=lambda: model(x))
        for name in model.kasmina_layers:
            for seed in range(each):
                assert model.load_kernel_sync(name, seed, artifact)
        transitions, boundaries = [], []
        for target in ("GRAFTING", "STABILIZATION", "EVALUATING", "FOSSILIZED"):
            state = esper.SeedLifecycleState[target]
            began = time.perf_counter()
            with model.within_step():
                for layer in model.kasmina_layers.values():
                    for seed in range(each):
                        layer.request_transition(seed, state)
                asked = time.perf_counter()
            boundaries.append((time.perf_counter() - asked) * 1000)
            transitions.append((asked - began) * 1000)
    dormant_ratio = compared(times, "wrapped", "bare")
    rows = [
        {"what": "bytes a seed, beside its parameters", "value": KasminaStateLayout.required_bytes(seeds) / seeds},
        {
            "what": "transitions of 10,000 seeds: the boundary, ms, median of four",
            "value": statistics.median(boundaries),
        },
        {"what": "asking for them one by one, ms", "value": statistics.median(transitions)},
        {"what": "dormant forward of 10,000 seeds, times the bare model's", "value": dormant_ratio["ratio"]},
        *kasmina_replicas.measure(boundaries=10 * options.samples),
    ]
    table("state", rows)
    return rows


def pause(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        urza = esper.Urza(folder)
        ids = [compiled(options, urza, d=256, r=r) for r in range(1, 11)]
        model = esper.wrap(
            Transformer(4).to(options.device), ["*.out"], seeds_per_layer=25, chunking="whole", urza=urza
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x = torch.randn(4, 64, 256, device=options.device)
        places = [(name, seed) for name in model.kasmina_layers for seed in range(25)]
        model.defer_transitions()  # what is loaded waits for a boundary: only the loads themselves are looked at

        def step() -> float:
            began = time.perf_counter()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            synchronize()
            return (time.perf_counter() - began) * 1000

        async def load() -> None:
            KernelCache.process().reset()
            for k, place in enumerate(places):
                assert await model.load_kernel(*place, ids[k % len(ids)])

        for _ in range(20):
            step()
        times: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(6):
            times["without"] += [step() for _ in range(40)]
            thread = threading.Thread(target=lambda: asyncio.run(load()))
            thread.start()
            while thread.is_alive():
                times["with"].append(step())
            thread.join()
            for place in places:
                model.unload_kernel(*place)
            model.step_boundary()
    p99 = {name: statistics.quantiles(values, n=100)[98] for name, values in times.items()}
    rows = [
        {"what": "step p50 without, ms", "value": statistics.median(times["without"])},
        {"what": "step p50 while 100 kernels load, ms", "value": statistics.median(times["with"])},
        {"what": "step p99 without, ms", "value": p99["without"]},
        {"what": "step p99 while 100 kernels load, ms", "value": p99["with"]},
        {"what": "p99 with / without", "value": p99["with"] / p99["without"]},
    ]
    table("training while kernels load in the background (one thread of torch's, two cores)", rows)
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> None:
    shown = Table(title=title)
    for column in rows[0]:
        shown.add_column(column, justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = ",".join(PARTS)
    parser.add_argument("--only", default=every, type=names_of(PARTS), help=f"parts, with commas, of {every}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models are")
    parser.add_argument(
        "--samples",
        type=int,
        default=31,
        help="of each contender; dormant takes five times as many, active three times",
    )
    parser.add_argument("--cycles", type=int, default=100_000, help="loads and unloads for the cache's growth")
    parser.add_argument("--output", type=made_folder, help="a folder: kasmina-speed.md and kasmina.json go there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="kernels")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    parts = {name: rows for name in PARTS if name in options.only if (rows := globals()[name](options))}
    if options.output:
        (options.output / "kasmina.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
        page = markdown("What Kasmina costs", "kasmina.py", parts, digits=4, device=gpu)
        (options.output / "kasmina-speed.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
