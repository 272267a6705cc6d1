"""What Urza costs: questions, manifests and loads of a large store, and writing to one.

    .venv/bin/python bench/urza.py [--artifacts 100000] [--samples 31] [--store DIR] [--output docs]

The store is filled by writing its files directly, without waiting for the disk; `--store` keeps it for the next run.
Everything after that goes through the library as it is, waits for the disk included. Warm is in the page cache and seen
before by this store object, which remembers signatures and parsed manifests; cold is the first load of a new one, its
lease and all. Files that are not in the page cache are read from the disk: what is the disk's part of that, and what is
ours, shows the same files being opened, read and hashed and nothing else, in turns with the loads. Medians, with the
middle half of the samples. A goal is met where the median is below it.
"""

import argparse
import json
import os
import platform
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from options import made_folder
from rich.console import Console
from rich.progress import track
from rich.table import Table

from esper_triton.contracts.manifest import KernelStatus, Manifest, TargetSpec, sha256
from esper_triton.contracts.query import KernelQuery
from esper_triton.contracts.record import AuditEntry, Figures, Record, Role
from esper_triton.urza import Urza
from esper_triton.urza.audit import START, now
from esper_triton.urza.directory import object_parts
from esper_triton.urza.trust import signed

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "urza"))
from handmade import make_artifact

TARGETS = (
    TargetSpec(backend="cpu", arch="generic", features=("avx2",)),
    TargetSpec(backend="cuda", arch="90"),
    TargetSpec(backend="hip", arch="gfx942"),
)
SPEEDS = ("high_speed", "medium_speed", "medium_speed", "low_speed", "low_speed")
PER_BLUEPRINT = 200
BINARY_BYTES = 64 << 10
console = Console(width=120)


def made(number: int, status: KernelStatus = KernelStatus.VALIDATED) -> tuple[Manifest, dict[str, bytes]]:
    """The artifact with this number. Binaries of 64 KiB are shared by a thousand, or the store would take gigabytes."""
    target = TARGETS[number % len(TARGETS)]
    blueprint = sha256(f"blueprint {number // PER_BLUEPRINT}".encode())
    manifest, blobs = make_artifact(
        f"{blueprint[:12]}-{target.label}-standard-{number:012x}",
        binary=random.Random(number // 1000).randbytes(BINARY_BYTES),
        status=status,
        created_at=f"2025-01-01T00:00:00.{number % 10**6:06d}+00:00",
        dims={"d": 64 << number % 5, "r": 4 << number % 3},
        compile_seconds=0.1 * (number % 10),
        target=target,
    )
    name = f"adapter_{number // PER_BLUEPRINT}"
    return manifest.model_copy(update={"blueprint_id": blueprint, "blueprint_name": name}), blobs


def fill(root: Path, count: int) -> None:
    """Writes `count` artifacts as committed and validated ones lie in a store, and its audit log."""
    store = Urza(root)
    store.commit(*made(0, KernelStatus.PENDING_BENCHMARKING))  # makes the keys
    signer = store._keys.signer([Role.PROVER])
    for begin in range(256):
        (root / "objects" / f"{begin:02x}").mkdir(exist_ok=True)
    tail = store._shelf.log.tail()
    previous, sequence = tail.digest, 1
    with open(root / "audit.log", "ab") as log:
        for number in track(range(1, count), f"filling a store with {count:,} artifacts", console=console):
            manifest, blobs = made(number)
            content = manifest.canonical_bytes()
            digest = sha256(content)
            for one in (content, *(blobs.values() if number % 1000 == 1 else ())):
                root.joinpath(*object_parts(sha256(one))).write_bytes(one)
            generator = random.Random(-number)
            record = Record(
                id=manifest.id,
                manifest=digest,
                tags=(generator.choice(SPEEDS), *(["high_memory"] if number % 4 == 0 else [])),
                figures=Figures(latency_us=generator.uniform(5, 500), memory_bytes=generator.randrange(1 << 20)),
            )
            after = signed(record, signer).canonical_bytes()
            (root / "refs" / manifest.id).write_bytes(after)
            entry = AuditEntry(
                sequence=sequence,
                previous=previous,
                when=now(),
                what="committed",
                artifact=manifest.id,
                source=None,
                target=manifest.status,
                manifest=digest,
                before=None,
                after=sha256(after),
            )
            line = signed(entry, signer).canonical_bytes()
            log.write(line)
            previous, sequence = sha256(line[:-1]), sequence + 1
    assert tail.digest != START


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - began) / 1000


def files_of(store: Urza, artifact_id: str) -> list[Path]:
    """What a load reads."""
    manifest = store.get(artifact_id).manifest
    paths = [store.root / "refs" / artifact_id, store.root / "keys" / "public", store.object_path(manifest.digest)]
    return [*paths, *(store.object_path(digest) for digest in manifest.blobs)]


def forget(paths: list[Path]) -> None:
    """Drops files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(paths: list[Path]) -> None:
    """What no load of these files could do without."""
    for path in paths:
        sha256(path.read_bytes())


def queries(generator: random.Random, ids: list[str], store: Urza) -> Iterator[tuple[str, KernelQuery]]:
    """One question of each kind, with drawn values."""
    manifest = store.get(generator.choice(ids)).manifest
    target = manifest.target.label
    yield "a blueprint's for a target", KernelQuery(blueprint_id=manifest.blueprint_id, target=target)
    yield (
        "a blueprint's, two tags preferred",
        KernelQuery(blueprint_id=manifest.blueprint_id, preferred=("high_speed", "high_memory")),
    )
    yield "the fastest for a target", KernelQuery(target=target, limit=10)
    yield "a target's, two tags preferred", KernelQuery(target=target, preferred=("high_speed", "high_memory"))
    yield "any, of any status", KernelQuery(statuses=tuple(KernelStatus), limit=50)
    yield (
        "a target's with dims, a tag and a bound",
        KernelQuery(target=target, dims=manifest.dims, required=("high_speed",), max_latency_us=400.0, limit=10),
    )


def measure(root: Path, samples: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def row(what: str, times_us: list[float], goal_us: float | None = None) -> None:
        low, _, high = statistics.quantiles(times_us, n=4)
        rows.append(
            {"what": what, "median_us": statistics.median(times_us), "low_us": low, "high_us": high, "goal_us": goal_us}
        )

    generator = random.Random(1)
    store = Urza(root)
    ids = store.ids()
    console.print(f"{len(ids):,} artifacts; making the index ...")
    rebuilding = timed(store.rebuild_index)
    times: dict[str, list[float]] = {}
    for _ in range(samples):
        for kind, query in queries(generator, ids, store):
            times.setdefault(kind, []).append(timed(lambda query=query: store.query(query)))  # type: ignore[misc]
    row("query, all kinds", [one for kind in times.values() for one in kind], 2000)
    for kind, found in times.items():
        row(f"query: {kind}", found)

    warm, cold = generator.sample(ids, samples), generator.sample(ids, samples)
    for one in warm:
        store.load(one)
    row("get a manifest, warm", [timed(lambda one=one: store.get(one)) for one in warm], 100)  # type: ignore[misc]
    row("load 64 KiB, warm", [timed(lambda one=one: store.load(one)) for one in warm], 300)  # type: ignore[misc]
    for what, drop in (("cold", False), ("cold, and not in the page cache", True)):
        first, bare = [], []
        for one in cold:
            paths = files_of(store, one)
            prepare = forget if drop else read
            prepare(paths)
            fresh = Urza(root)
            first.append(timed(lambda one=one, fresh=fresh: fresh.load(one)))  # type: ignore[misc]
            fresh.close()
            prepare(paths)
            bare.append(timed(lambda paths=paths: read(paths)))  # type: ignore[misc]
        row(f"load 64 KiB, {what}", first, 1000)
        row("  the same files opened, read and hashed", bare)
    for what, times_us in over_http(root, cold).items():
        row(f"load 64 KiB over HTTP on loopback, {what}", times_us)
    missing = "0123456789ab-cpu-standard-ba9876543210"
    row("ask for one that is not there", [timed(lambda: missing in store) for _ in range(samples)])

    writing: dict[str, list[float]] = {"commit": [], "change of status": [], "query after a change": []}
    new = int(time.time() * 100)  # none that an earlier run has left in a store that is kept
    for number in range(samples):
        manifest, blobs = made(new + number, KernelStatus.PENDING_BENCHMARKING)
        writing["commit"].append(timed(lambda m=manifest, b=blobs: store.commit(m, b)))  # type: ignore[misc]
        writing["change of status"].append(timed(lambda m=manifest: store.promote(m.id)))  # type: ignore[misc]
        query = KernelQuery(blueprint_id=manifest.blueprint_id)
        writing["query after a change"].append(timed(lambda query=query: store.query(query)))  # type: ignore[misc]
    for what, found in writing.items():
        row(what, found)
    collecting = timed(lambda: store.gc(1 << 20, dry_run=True))
    for what, once in (("making the index anew", rebuilding), ("looking for garbage", collecting)):
        rows.append({"what": what, "median_us": once, "low_us": once, "high_us": once, "goal_us": None})
    store.close()
    return rows


def over_http(root: Path, ids: list[str]) -> dict[str, list[float]]:
    """Loads by a client of `python -m esper_triton.urza serve`, without TLS: into an empty cache, and again from the
    cache, after the server has been asked whether it is still right, and without asking it."""
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        tokens.touch(mode=0o600)
        tokens.write_text(f"read {token}\n")
        command = [sys.executable, "-m", "esper_triton.urza", "serve", "--json", "--port", "0", "--rate", "100000"]
        server = subprocess.Popen(
            [*command, "--token-file", str(tokens), "--urza", str(root)], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            store = Urza(url, token=token, cache=Path(folder) / "cache", fresh_s=0.0)
            lazy = Urza(url, token=token, cache=Path(folder) / "cache", fresh_s=1e9)
            found: dict[str, list[float]] = {"cold": [], "warm": [], "warm, not asking": []}
            for one in ids:
                found["cold"].append(timed(lambda one=one: store.load(one)))  # type: ignore[misc]
                store.load(one)
                found["warm"].append(timed(lambda one=one: store.load(one)))  # type: ignore[misc]
                lazy.load(one)
                found["warm, not asking"].append(timed(lambda one=one: lazy.load(one)))  # type: ignore[misc]
            store.close()
            lazy.close()
            return found
        finally:
            server.terminate()
            server.wait()
            server.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=int, default=100_000, metavar="N")
    parser.add_argument("--samples", type=int, default=31, metavar="N", help="of each figure (31)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="where the store is, or is made and kept")
    parser.add_argument("--output", type=made_folder, metavar="DIR", help="write urza.json there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = (options.store or Path(folder)) / "urza"
        if not root.exists():
            fill(root, options.artifacts)
        rows = measure(root, options.samples)
        count = len(Urza(root).ids())
    table = Table(title=f"Urza, {count:,} artifacts (us)")
    table.add_column("")
    for column in ("median", "middle half", "goal", "met"):
        table.add_column(column, justify="right")
    for one in rows:
        spread = f"{one['low_us']:,.0f} - {one['high_us']:,.0f}"
        goal = "" if one["goal_us"] is None else f"< {one['goal_us']:,.0f}"
        met = "" if one["goal_us"] is None else "yes" if one["median_us"] < one["goal_us"] else "no"
        table.add_row(one["what"], f"{one['median_us']:,.0f}", spread, goal, met)
    console.print(table)
    if options.output is not None:
        body = {"machine": platform.machine(), "cores": os.cpu_count(), "artifacts": count, "rows": rows}
        (options.output / "urza.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
