"""What the bus costs and carries: handing over, a WebSocket hub, Redis Streams, the health of ten thousand seeds, and
what telemetry as a whole takes of training.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python bench/oona.py [--only publish,hub,redis,health,training] [--seconds 2]
        [--output docs]

Hub and server run on this machine, with the sender and the reader in this process, so that all four share its cores.
The hub keeps lifecycle events on the disk before it confirms them, and telemetry in memory; Redis writes to its log
before it answers.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from options import made_folder, names_of
from rich.console import Console
from rich.table import Table

from esper_triton.contracts.envelope import HEALTH, LIFECYCLE
from esper_triton.oona import Oona

PARTS = ("publish", "hub", "redis", "health", "training")
PAYLOAD = {"model": "m", "layer": "encoder.0.fc1", "seed": 1, "alpha": 0.25, "latency_us": 17.5}
console = Console(width=130)


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[int(0.99 * (len(ordered) - 1))]}


def shown(value: float | list[float]) -> str:
    """To four digits."""
    return " to ".join(f"{v:.4g}" for v in value) if isinstance(value, list) else f"{value:.4g}"


def measure_publish(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The publishing thread's own time, with nobody reading and with a reader on another thread."""
    for reading in (False, True):
        with Oona() as bus:
            subscription = bus.subscribe(HEALTH) if reading else None
            stop = threading.Event()

            def read() -> None:
                while not stop.is_set():  # noqa: B023
                    subscription.get(0.05)  # noqa: B023

            reader = threading.Thread(target=read)
            if reading:
                reader.start()
            publish, count = bus.publish, 200_000
            rates = []
            until = time.perf_counter() + options.seconds
            while time.perf_counter() < until or len(rates) < 5:
                began = time.perf_counter()
                for _ in range(count):
                    publish(HEALTH, PAYLOAD)
                rates.append(count / (time.perf_counter() - began))
            now = time.perf_counter_ns
            times, clock = [], []
            for _ in range(count):
                began = now()
                publish(HEALTH, PAYLOAD)
                times.append((now() - began) / 1000)
            for _ in range(count // 10):
                began = now()
                clock.append((now() - began) / 1000)
            stop.set()
            if reading:
                reader.join()
            cost = percentiles(times)
            yield {
                "what": "publish, " + ("one reader" if reading else "no reader"),
                "messages_per_s": statistics.median(rates),
                "p50_us": cost["p50"] - statistics.median(clock),
                "p99_us": cost["p99"] - statistics.median(clock),
                "dropped": bus.stats()["sent"][HEALTH]["dropped"],
            }


def measure_through(name: str, address: str, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Throughput from the first publish to the last message read, and the time from publish to read at 5,000/s."""
    for topic, group in ((HEALTH, None), (LIFECYCLE, "group")):
        with Oona(address, journal=folder / "journal") as sender, Oona(address, journal=folder / "journal") as receiver:
            subscription = receiver.subscribe(topic, group, window=8192)
            rates, count = [], 20_000
            for _ in range(3):
                began = time.perf_counter()
                for _ in range(count):
                    sender.publish(topic, PAYLOAD)
                for _ in range(count):
                    delivery = subscription.get(30.0)
                    if group is not None:
                        subscription.ack(delivery)
                rates.append(count / (time.perf_counter() - began))
            latencies: list[float] = []
            total = int(5000 * options.seconds)

            def publish() -> None:
                began = time.perf_counter()
                for k in range(total):  # noqa: B023
                    while time.perf_counter() < began + k / 5000:
                        time.sleep(0.0005)
                    sender.publish(topic, {"at": time.perf_counter_ns()})  # noqa: B023

            thread = threading.Thread(target=publish)
            thread.start()
            for _ in range(total):
                delivery = subscription.get(30.0)
                latencies.append((time.perf_counter_ns() - delivery.envelope.payload["at"]) / 1e6)
                if group is not None:
                    subscription.ack(delivery)
            thread.join()
            end_to_end = percentiles(latencies)
            yield {
                "what": f"{name}, {topic}" + ("" if group is None else ", in a group"),
                "messages_per_s": statistics.median(rates),
                "p50_ms": end_to_end["p50"],
                "p99_ms": end_to_end["p99"],
                "dropped": sender.stats()["sent"][topic]["dropped"],
            }


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Address of a hub of its own."""
    command = [sys.executable, "-m", "esper_triton.oona", "serve", "--port", "0", "--state", str(folder / "hub")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Address of a Redis server of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--logfile", "redis.log"]
    durable = ["--appendonly", "yes", "--appendfsync", "everysec"]
    with subprocess.Popen(["redis-server", *options, *durable]) as process:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


def measure_health(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """This process's time for one message with all seeds: the training thread's, and the whole with packing and
    sending to a hub."""
    from torch import nn

    import esper_triton as esper
    from esper_triton.kasmina import KernelCache
    from esper_triton.kasmina.statistics import ActivationStatistics

    model = esper.wrap(nn.Sequential(*(nn.Linear(8, 8) for _ in range(2500))), [nn.Linear], seeds_per_layer=4)
    for layer in model.kasmina_layers.values():
        for seed in layer._kasmina.seeds:  # as if each had run and had been sampled: the longest message
            seed.latency_ns, seed.timed_calls, seed.calls, seed.load_latency_us = 17_500, 1, 1, 1234.5
            seed.activations = ActivationStatistics(0.123456789 + seed.index, 0.25, 0.0987654321)
    KernelCache.process()._hits = 1
    with hub(folder) as address, Oona(address, journal=folder / "journal") as bus:
        remote = esper.connect(model, bus)
        remote.publish_health()
        bus.flush()
        handed, whole = [], []
        for _ in range(15):
            before, own = time.process_time(), time.thread_time()
            remote.publish_health()
            handed.append(1000 * (time.thread_time() - own))
            bus.flush()
            whole.append(1000 * (time.process_time() - before))
        remote.close()
    yield {
        "what": "health of 10,000 seeds",
        "training_thread_ms": statistics.median(handed),
        "process_ms": statistics.median(whole),
        "share_of_a_core_at_1_per_s": statistics.median(whole) / 1000,
    }


def measure_training(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Training steps of one model with telemetry and of an equal one without any: launches timed, activations sampled
    within the default share of the time, and health published through a hub every hundredth step, or nothing of it.
    Blocks of steps of the two, and of another without (`again`: what the clock makes of equals), take turns; samples
    and messages count in the blocks that they fall into. Times of the processor are of all threads of this process."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import esper_triton as esper

    urza = esper.Urza(folder / "urza")
    artifact = esper.compile("kernels/bottleneck_adapter.toml", dims={"d": 128, "r": 16}, urza=urza).id

    def trainer(telemetry: bool) -> tuple[Any, Any]:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 256))
        model = esper.wrap(host, ["0", "2"], seeds_per_layer=4, urza=urza, telemetry_enabled=telemetry)
        for name in ("0", "2"):
            for seed in range(4):
                model.load_kernel_sync(name, seed, artifact)
                model.graft(name, seed)
                model.set_alpha(name, seed, 0.5)
        optimizer = torch.optim.SGD([*model.parameters(), *esper.model.seed_parameters(model)], lr=1e-3)
        x, y = torch.randn(512, 256), torch.randn(512, 256)

        def steps(count: int) -> tuple[float, float]:
            began, own = time.perf_counter(), time.process_time()
            for _ in range(count):
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                model.step_boundary()
            return (time.perf_counter() - began) / count, (time.process_time() - own) / count

        return model, steps

    with hub(folder) as address, Oona(address, journal=folder / "journal") as bus:
        (_, without), (_, again), (model, with_it) = trainer(False), trainer(False), trainer(True)
        remote = esper.connect(model, bus, health_every=100)
        without(20), again(20), with_it(200)  # until the first samples have been charged
        clock = model.kasmina_layers["0"]._kasmina.clock
        spent, samples = clock.spent_ns, clock.samples
        turns: list[tuple[list[tuple[float, float]], Any]] = [([], without), ([], again), ([], with_it)]
        for block in range(30):
            for times, steps in turns[:: -1 if block % 2 else 1]:
                times.append(steps(25))
        remote.close()
        bus.flush()
    (off, _), (equal, _), (on, _) = turns
    passed_s = 25 * sum(wall for wall, _ in on)
    row: dict[str, Any] = {"what": "training with telemetry over training without"}
    row["step_ms"] = 1000 * statistics.median(wall for wall, _ in off)
    for name, place in (("wall", 0), ("processor", 1)):
        for kind, times in (("", on), ("_again", equal)):
            ratios = sorted(a[place] / b[place] for a, b in zip(times, off, strict=True))
            row[f"{name}{kind}"] = statistics.median(ratios)
            row[f"{name}{kind}_quartiles"] = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
    row["samples"] = clock.samples - samples
    row["share_of_samples"] = (clock.spent_ns - spent) / 1e9 / passed_s
    yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), type=names_of(PARTS), help="parts, with commas")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=made_folder, default="docs")
    options = parser.parse_args()
    wanted = options.only
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if "publish" in wanted:
            rows += measure_publish(options)
        if "hub" in wanted:
            with hub(folder) as address:
                rows += measure_through("hub", address, folder, options)
        if "redis" in wanted and shutil.which("redis-server"):
            with redis_server(folder) as address:
                rows += measure_through("Redis", address, folder, options)
        if "health" in wanted:
            rows += measure_health(folder, options)
        if "training" in wanted:
            rows += measure_training(folder, options)
    table = Table("what", "messages/s", "p50", "p99", "dropped", "else")
    for row in rows:
        unit = "us" if "p50_us" in row else "ms"
        known = {"what", "messages_per_s", "dropped", f"p50_{unit}", f"p99_{unit}"}
        table.add_row(
            row["what"],
            f"{row['messages_per_s']:,.0f}" if "messages_per_s" in row else "",
            *(f"{row[f'{p}_{unit}']:.2f} {unit}" if f"{p}_{unit}" in row else "" for p in ("p50", "p99")),
            str(row.get("dropped", "")),
            ", ".join(f"{name} {shown(value)}" for name, value in row.items() if name not in known),
        )
    console.print(table)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(f"{os.cpu_count()} cores, load {load}; OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}")
    machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
    text = json.dumps({"machine": machine, "rows": rows}, indent=2)
    (options.output / "oona.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
