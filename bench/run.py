"""Every benchmark of the project, one after the other.

    python bench/run.py [--quick] [--only kasmina,growth] [--output build/bench]      (make bench)

Each is a program of its own in `bench/`, run by itself with OMP_WAIT_POLICY=PASSIVE unless that is set, and says in its
first lines how it measures. Whole, they take hours; `--quick` takes fewer samples of fewer cases in some minutes, which
shows that all of them work and is too little to compare machines or releases by.

The folder gets what each writes by itself, `NAME.log` with all that it said, and of all of them `run.json`, `run.md`,
and `run.png`: machine, versions, threads and wait policy; how long each took; and the ratios against rivals. A ratio is
the rival's time over ours, so above 1 we are faster. One that fails is reported and the others go on; the exit status
is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from options import made_folder, names_of
from rich.console import Console
from rich.table import Table
from tables import machine, table

HERE = Path(__file__).resolve().parent
console = Console(width=150)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A rival's time over ours. `low` and `high` are the middle half of the samples, where there is one."""

    what: str
    rival: str
    ratio: float
    low: float | None = None
    high: float | None = None


def threads(row: dict[str, Any]) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] > 1)}"


def of_cpu_backend(figures: Any) -> list[Ratio]:
    rivals = {"eager": "eager", "inductor": "Inductor C++", "interpreter": "Triton's interpreter"}
    found = []
    for row in figures["kernels"]:
        for key, rival in rivals.items():
            if f"{key}_ratio" in row:
                low, high = row.get(f"{key}_spread", (None, None))
                what = f"{row['kernel']}, {threads(row)}"
                found.append(Ratio(what=what, rival=rival, ratio=row[f"{key}_ratio"], low=low, high=high))
    return found


def of_tezzeret(figures: Any) -> list[Ratio]:
    return [
        Ratio(
            what=f"{row['blueprint']} {row['size']} {row['what']}, {threads(row)}",
            rival=rival,
            ratio=row[f"over {key}"],
        )
        for row in figures["Kernels"]
        for key, rival in (("eager", "eager"), ("inductor", "torch.compile"))
    ]


def of_kasmina(figures: Any) -> list[Ratio]:
    found = []
    rows = figures.get("dormant", ())
    wrapped = {(row["host"], row["what"]): row for row in rows if row["model"] == "wrapped"}
    for row in rows:
        own = wrapped[row["host"], row["what"]]
        what = f"dormant {row['host']}, {row['what']}"
        if row is own:  # low and high are of ours over the rival's
            low, high = 1 / row["high"], 1 / row["low"]
            found.append(Ratio(what=what, rival="bare model", ratio=1 / row["ratio"], low=low, high=high))
        elif row["model"] != "again":
            found.append(Ratio(what=what, rival=row["model"], ratio=row["ratio"] / own["ratio"]))
    for row in figures.get("adapter", ()):
        what = f"layer and adapter {row['rows']}x{row['d']}, r={row['r']}, {threads(row)}"
        found.append(Ratio(what=what, rival="eager", ratio=row["eager/ours"], low=row["low"], high=row["high"]))
    return found


def of_growth(figures: Any) -> list[Ratio]:
    found = []
    for name, runs in figures["runs"].items():
        seconds = {contestant: statistics.fmean(run["seconds"] for run in own) for contestant, own in runs.items()}
        for rival in runs:
            if rival != "grown":
                ratio = seconds[rival] / seconds["grown"]
                found.append(Ratio(what=f"{name}, a training run", rival=f"growth: {rival}", ratio=ratio))
    steps = figures["tables"].get("overhead", {})
    for row in steps.get("a step with the hook and nothing growing", ()):
        if row["loop"].startswith("hook"):
            low, high = 1 / row["high"], 1 / row["low"]
            what = f"{row['loop']}: {row['host']}"
            found.append(Ratio(what=what, rival="bare loop", ratio=1 / row["ratio"], low=low, high=high))
    return found


def no_rival(figures: Any) -> list[Ratio]:
    return []


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One program: its arguments for a quick run and for a whole one, with FOLDER in them, and the JSON that it writes
    there."""

    name: str
    quick: str
    whole: str
    writes: str | None = None
    ratios: Callable[[Any], list[Ratio]] = no_rival

    def arguments(self, folder: Path, *, quick: bool) -> list[str]:
        words = (self.quick if quick else self.whole).split()
        return [word.replace("FOLDER", str(folder)) for word in words]


BENCHES = (
    Bench(
        name="cpu_backend",
        quick="--kernels add,softmax,matmul-512 --sizes cache --threads 1 --samples 8 --json FOLDER/cpu-backend.json",
        whole="--output FOLDER",
        writes="cpu-backend.json",
        ratios=of_cpu_backend,
    ),
    Bench(
        name="tezzeret",
        quick="--only lora --sizes 32x512 --threads 1 --samples 5 --output FOLDER",
        whole="--output FOLDER",
        writes="tezzeret.json",
        ratios=of_tezzeret,
    ),
    Bench(
        name="kasmina",
        quick="--only dormant,active,adapter --samples 5 --output FOLDER",
        whole="--output FOLDER",
        writes="kasmina.json",
        ratios=of_kasmina,
    ),
    Bench(
        name="urza",
        quick="--artifacts 2000 --samples 5 --output FOLDER",
        whole="--output FOLDER",
        writes="urza.json",
    ),
    Bench(
        name="forge",
        quick="--compiles 4 --seconds 4 --json FOLDER/forge.json",
        whole="--json FOLDER/forge.json",
        writes="forge.json",
    ),
    Bench(name="gauntlet", quick="--runs 1 --only lora --output FOLDER", whole="--output FOLDER"),
    Bench(name="oona", quick="--seconds 0.3 --output FOLDER", whole="--output FOLDER", writes="oona.json"),
    Bench(
        name="growth",
        quick="--quick --output FOLDER",
        whole="--output FOLDER",
        writes="growth.json",
        ratios=of_growth,
    ),
)


@dataclass
class Outcome:
    """What became of one program."""

    bench: str
    command: list[str]
    status: int
    seconds: float
    load_before: float
    figures: Any = None
    ratios: list[Ratio] = field(default_factory=list)
    fault: str = ""


def run(bench: Bench, folder: Path, *, quick: bool) -> Outcome:
    """Runs one program to its end. What it writes from an earlier run is gone before."""
    command = [sys.executable, str(HERE / f"{bench.name}.py"), *bench.arguments(folder, quick=quick)]
    written = None if bench.writes is None else folder / bench.writes
    if written is not None:
        written.unlink(missing_ok=True)
    log, began, load = folder / f"{bench.name}.log", time.perf_counter(), os.getloadavg()[0]
    with log.open("wb") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    outcome = Outcome(bench.name, command, status, time.perf_counter() - began, load)
    if status != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        outcome.fault = f"exit status {status}: {said[-1] if said else 'it said nothing'}"
    elif written is not None:
        try:
            outcome.figures = json.loads(written.read_text(encoding="utf-8"))
            outcome.ratios = bench.ratios(outcome.figures)
        except (OSError, ValueError, LookupError, TypeError) as error:
            outcome.fault = f"{written.name} is not what {Path(__file__).name} reads: {type(error).__name__}: {error}"
    return outcome


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each rival of each program: the geometric mean, the worst and the best of the ratios."""
    rows = []
    for outcome in outcomes:
        for rival in dict.fromkeys(ratio.rival for ratio in outcome.ratios):
            own = [ratio for ratio in outcome.ratios if ratio.rival == rival]
            worst, best = min(own, key=lambda r: r.ratio), max(own, key=lambda r: r.ratio)
            rows.append(
                {
                    "bench": outcome.bench,
                    "rival": rival,
                    "cases": len(own),
                    "geometric mean": statistics.geometric_mean(ratio.ratio for ratio in own),
                    "worst": f"{worst.ratio:.3g} ({worst.what})",
                    "best": f"{best.ratio:.3g} ({best.what})",
                }
            )
    return rows


def page(outcomes: Sequence[Outcome], where: dict[str, Any], *, quick: bool) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in where["settings"].items())
    lines = [
        "# All benchmarks",
        "",
        f"Made by `bench/run.py{' --quick' * quick}`. {where['processor']}, {where['architecture']}, {where['cores']} "
        f"cores, load {where['load'][0]} before; {where['system']}; Python {where['python']}, {versions}; {settings}. "
        "The number of threads stands in each row where it is not 1.",
    ]
    if quick:
        lines += ["", "**A quick run: too few samples to compare anything by.**"]
    ratios = summary(outcomes)
    if ratios:
        lines += ["", "## Against rivals", "", "The rival's time over ours: above 1 we are faster.", ""]
        lines += [*table(ratios, digits=3), "", "![Ratios](run.png)"]
    for outcome in outcomes:
        if outcome.ratios:
            rows = [
                {
                    "what": r.what,
                    "rival": r.rival,
                    "ratio": r.ratio,
                    "middle half": "" if r.low is None or r.high is None else f"{r.low:.3g} - {r.high:.3g}",
                }
                for r in outcome.ratios
            ]
            lines += ["", f"## {outcome.bench} against rivals", "", *table(rows, digits=3)]
    took = [
        {"bench": o.bench, "ended": o.fault.replace("|", "/") or "well", "s": o.seconds, "load before": o.load_before}
        for o in outcomes
    ]
    lines += ["", "## The runs", "", *table(took, digits=3)]
    return "\n".join(lines) + "\n"


def draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A row of points for each rival, on a scale where twice as fast is as far from 1 as half as fast."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, values = [], []
    for outcome in outcomes:
        for rival in dict.fromkeys(ratio.rival for ratio in outcome.ratios):
            names.append(f"{outcome.bench}: {rival}")
            values.append([ratio.ratio for ratio in outcome.ratios if ratio.rival == rival])
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.35 * len(names)), dpi=100)
    for position, own in enumerate(values):
        axes.scatter(own, [position] * len(own), s=14, alpha=0.5)
        axes.plot(statistics.geometric_mean(own), position, "k|", markersize=14)
    axes.set(xscale="log", xlabel="the rival's time over ours, and the geometric mean", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="grey", linewidth=0.8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some minutes in all; says whether they work, and no more")
    names = [bench.name for bench in BENCHES]
    every = ",".join(names)
    parser.add_argument("--only", default=every, type=names_of(names), help=f"benchmarks, with commas, of {every}")
    default = HERE.parent / "build" / "bench"
    parser.add_argument(
        "--output", type=made_folder, default=str(default), help="folder for everything, default build/bench"
    )
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder: Path = options.output.resolve()
    where = machine()
    console.print(where)
    outcomes = []
    for bench in BENCHES:
        if bench.name not in options.only:
            continue
        console.print(f"{bench.name} ... (it writes to {folder / f'{bench.name}.log'})", highlight=False)
        outcomes.append(outcome := run(bench, folder, quick=options.quick))
        style = "red" if outcome.fault else "green"
        console.print(f"  {outcome.fault or 'done'}, {outcome.seconds:.0f} s", style=style, markup=False)
        figures = {"machine": where, "quick": options.quick, "benches": [asdict(outcome) for outcome in outcomes]}
        (folder / "run.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (folder / "run.md").write_text(page(outcomes, where, quick=options.quick), encoding="utf-8")
    if any(outcome.ratios for outcome in outcomes):
        draw(folder / "run.png", outcomes)
        shown = Table(title="The rival's time over ours: above 1 we are faster")
        rows = summary(outcomes)
        for column in rows[0]:
            shown.add_column(column)
        for row in rows:
            shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(shown)
    failed = [outcome.bench for outcome in outcomes if outcome.fault]
    console.print(f"{folder / 'run.md'}; failed: {', '.join(failed) or 'none'}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
