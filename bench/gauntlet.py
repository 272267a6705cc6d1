"""What the gauntlet says of broken kernels, and of sound ones.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python bench/gauntlet.py [--level fast] [--runs 20] [--only lora,linear]
        [--output docs]

Every mutant of tests/urabrask/mutants.py is put through the gauntlet and has to be rejected; the table has what caught
it. One that shows beyond 2^31 elements alone is put through level `standard`.
Every blueprint that ships, in every dtype, is put through it `--runs` times, each with a seed of its own, and has to be
validated each time.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from options import names_of
from rich.console import Console
from tables import markdown

sys.path += [str(Path(__file__).resolve().parent.parent / "tests" / "urabrask")]

from mutants import MUTANTS, blueprint_of, dims_of, forged

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.tezzeret.forge import forge
from esper_triton.tezzeret.library import shipped
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urabrask import examine

DTYPES = ("float32", "float16", "bfloat16")
console = Console(width=170)


def broken(level: str) -> list[dict[str, Any]]:
    """A row for each mutant."""
    rows = []
    for mutant in MUTANTS:
        made = forged(mutant)
        began = time.perf_counter()
        deepest = max(level, mutant.level, key=("fast", "standard", "thorough").index)
        report = examine(made.manifest, made.blobs, blueprint_of(mutant.blueprint), level=deepest, seed=1)  # type: ignore[arg-type]
        caught, _, said = report.reasons[0].partition(": ")
        rows.append(
            {
                "mutant": mutant.name,
                "of": f"{mutant.blueprint}, {mutant.kernel}",
                "verdict": report.verdict,
                "caught by": caught if report.verdict == "REJECTED" else "-",
                "as": said.rpartition(": ")[2][:100].replace("|", "/"),
                "s": time.perf_counter() - began,
            }
        )
        console.print(rows[-1])
    return rows


def sound(names: list[str], runs: int, level: str) -> list[dict[str, Any]]:
    """A row for each blueprint and dtype."""
    rows = []
    draw = random.Random(2019)
    for name in names:
        blueprint = Blueprint.load(shipped()[name])
        for dtype in DTYPES:
            made = forge(plan_build(blueprint, dims_of(blueprint, {}), dtype, parse_target("cpu"), "fast"))
            began, failures, worst = time.perf_counter(), [], 0.0
            for _ in range(runs):
                seed = draw.getrandbits(48)
                report = examine(made.manifest, made.blobs, blueprint, level=level, seed=seed)  # type: ignore[arg-type]
                worst = max(worst, *report.worst.values())
                if report.verdict != "VALIDATED":
                    failures.append(f"seed {seed}: {report.reasons[0]}")
            seconds = (time.perf_counter() - began) / runs
            rows.append(
                {
                    "blueprint": name,
                    "dtype": dtype,
                    "runs": runs,
                    "validated": runs - len(failures),
                    "worst error in tolerances": worst,
                    "s a run": seconds,
                }
            )
            console.print(rows[-1], *failures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--level", choices=("fast", "standard"), default="fast")
    parser.add_argument("--runs", type=int, default=20)
    every = sorted(shipped())
    parser.add_argument("--only", default=",".join(every), type=names_of(every), help="blueprints, with commas")
    parser.add_argument("--output", type=Path, help="a folder: urabrask-mutants.md goes there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        mutants = broken(options.level)
        kernels = sound(options.only, options.runs, options.level) if options.runs else []
    killed = sum(row["verdict"] == "REJECTED" for row in mutants)
    runs, validated = sum(row["runs"] for row in kernels), sum(row["validated"] for row in kernels)
    says = (
        f"{killed} of {len(mutants)} mutants were rejected; {validated} of {runs} runs of sound kernels were validated"
    )
    console.print(says)
    if options.output is not None:
        parts = {f"Broken kernels: {killed} of {len(mutants)} rejected, at level {options.level}": mutants}
        if kernels:
            parts[f"Kernels that ship: {validated} of {runs} runs validated"] = kernels
        page = markdown("What the gauntlet catches", "gauntlet.py", parts, digits=3)
        (options.output / "urabrask-mutants.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
