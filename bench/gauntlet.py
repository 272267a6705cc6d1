"""What the gauntlet says of broken kernels, and of sound ones.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python bench/gauntlet.py [--level fast] [--runs 20] [--only lora,linear]
        [--results FILE] [--output docs]

Every mutant of tests/urabrask/mutants.py is put through the gauntlet and has to be rejected; the table has what caught
it. One that shows beyond 2^31 elements alone is put through level `standard`.
Every blueprint that ships, in every dtype, is put through it `--runs` times, each with a seed of its own, and has to be
validated each time.

It takes an hour or more. With `--results` each outcome is a line of JSON at the end of that file as soon as it is
there, and what the file has is not done again: the work can be ended and begun again, and done by several processes at
a time that are given different blueprints. The page is made of all that the file has.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from options import made_folder, names_of
from rich.console import Console
from tables import markdown

# Before this folder, in which a file has the name of one there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "urabrask"))

from mutants import MUTANTS, blueprint_of, dims_of, forged

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.tezzeret.forge import forge
from esper_triton.tezzeret.library import shipped
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask import examine

DTYPES = ("float32", "float16", "bfloat16")
LEVELS = ("fast", "standard", "thorough")
A_DAY = 24 * 60 * 60
Row = dict[str, Any]
console = Console(width=170)


def broken(names: list[str], level: str, known: list[Row]) -> Iterator[Row]:
    """An outcome for each mutant of these blueprints, and of those that no blueprint that ships is."""
    done = {row["mutant"] for row in known if "mutant" in row}
    for mutant in MUTANTS:
        if mutant.name in done or (mutant.blueprint in shipped() and mutant.blueprint not in names):
            continue
        made = forged(mutant)
        deepest = max(level, mutant.level, key=LEVELS.index)
        report = examine(made.manifest, made.blobs, blueprint_of(mutant.blueprint), level=deepest, seed=1)  # type: ignore[arg-type]
        caught, _, said = report.reasons[0].partition(": ")
        yield {
            "mutant": mutant.name,
            "of": f"{mutant.blueprint}, {mutant.kernel}",
            "level": deepest,
            "verdict": report.verdict,
            "caught by": caught if report.verdict == "REJECTED" else "-",
            "as": (said.partition(": ")[2] or said)[:110].replace("|", "/"),
            "cases": report.cases,
            "s": report.seconds,
        }


def sound(names: list[str], runs: int, level: str, known: list[Row]) -> Iterator[Row]:
    """An outcome for each run of each blueprint and dtype, one run of all before the next of any."""
    done = {(row["blueprint"], row["dtype"], row["level"], row["seed"]) for row in known if "blueprint" in row}
    made = {}
    for run in range(runs):
        for name in names:
            for dtype in DTYPES:
                seed = random.Random(f"{name} {dtype} {run}").getrandbits(48)
                if (name, dtype, level, seed) in done:
                    continue
                blueprint = Blueprint.load(shipped()[name])
                if (name, dtype) not in made:
                    plan = plan_build(blueprint, dims_of(blueprint, {}), dtype, parse_target("cpu"), "fast")
                    made[name, dtype] = forge(plan)
                artifact = made[name, dtype]
                report = examine(artifact.manifest, artifact.blobs, blueprint, level=level, seed=seed)  # type: ignore[arg-type]
                yield {
                    "blueprint": name,
                    "dtype": dtype,
                    "level": level,
                    "seed": seed,
                    "verdict": report.verdict,
                    "reason": report.reasons[0],
                    "cases": report.cases,
                    "worst": max(report.worst.values()),
                    "s": report.seconds,
                }


def of_kernels(rows: list[Row]) -> list[Row]:
    """The runs of each kernel, as a line of the table."""
    table = []
    for name, dtype in sorted({(row["blueprint"], row["dtype"]) for row in rows}):
        of = [row for row in rows if (row["blueprint"], row["dtype"]) == (name, dtype)]
        table.append(
            {
                "blueprint": name,
                "dtype": dtype,
                "runs": len(of),
                "validated": sum(row["verdict"] == "VALIDATED" for row in of),
                "cases a run": round(statistics.median(row["cases"] for row in of)),
                "worst error in tolerances": max(row["worst"] for row in of),
                "s a run": statistics.median(row["s"] for row in of),
            }
        )
    return table


def page(rows: list[Row]) -> str:
    """All that was found, in Markdown."""
    mutants = [row for row in rows if "mutant" in row]
    order = {mutant.name: number for number, mutant in enumerate(MUTANTS)}
    mutants.sort(key=lambda row: order[row["mutant"]])
    killed = sum(row["verdict"] == "REJECTED" for row in mutants)
    parts = {f"Broken kernels: {killed} of {len(mutants)} rejected": mutants}
    for level in LEVELS:
        runs = [row for row in rows if "blueprint" in row and row["level"] == level]
        if runs:
            validated = sum(row["verdict"] == "VALIDATED" for row in runs)
            a_day = round(A_DAY / statistics.fmean(row["s"] for row in runs))
            title = f"Kernels that ship, at level {level}: {validated} of {len(runs)} runs validated, {a_day} a day"
            parts[title] = of_kernels(runs)
    return markdown("What the gauntlet catches", "gauntlet.py", parts, digits=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--level", choices=LEVELS[:2], default="fast")
    parser.add_argument("--runs", type=int, default=20, help="of each sound kernel")
    known = sorted(shipped())
    parser.add_argument("--only", default=known, type=lambda text: names_of(known)(text) if text else [],
                        help="blueprints, with commas; none where it is empty")  # fmt: skip
    parser.add_argument("--results", type=Path, help="a file that has what was done, and gets what is done")
    parser.add_argument("--output", type=made_folder, help="a folder: urabrask-mutants.md goes there")
    options = parser.parse_args()
    names: list[str] = options.only
    rows: list[Row] = []
    if options.results is not None and options.results.exists():
        rows += map(json.loads, options.results.read_text(encoding="utf-8").splitlines())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        works = (broken(names, options.level, rows), sound(names, options.runs, options.level, rows)) if names else ()
        began, new = time.perf_counter(), []
        for work in works:
            for row in work:
                new.append(row)
                console.print(row)
                if options.results is not None:
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    console.print(f"{len(new)} artifacts in {time.perf_counter() - began:.0f} s")
    if options.output is not None:
        (options.output / "urabrask-mutants.md").write_text(page(rows + new), encoding="utf-8")


if __name__ == "__main__":
    main()
