"""The table, the summary against the targets, and the plot of `cpu_backend.py`'s figures."""

import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Name in the figures, words, target, and whether the target is a least value.
COST_TARGETS = (
    ("prepared_launch_us", "prepared launch of a 1024-element add, us", 1.0),
    ("stock_launch_us", "stock launch of a 1024-element add, us", 9.0),
    ("softmax_compile_ms", "cold compile of softmax, ms", 60.0),
    ("matmul_compile_ms", "cold compile of matmul, ms", 120.0),
    ("softmax_load_ms", "load of softmax's object code, ms", 1.0),
    ("matmul_load_ms", "load of matmul's object code, ms", 1.0),
)


_COLUMNS = (
    "kernel", "threads", "outputs", "Triton", "over eager", "over Inductor C++", "of copy", "of MKL", "sanitizer",
    "interpreter",
)  # fmt: skip


def _geometric(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def _line(what: str, value: float, target: float, *, least: bool, note: str = "") -> dict:
    return {
        "what": what,
        "value": value,
        "target": ("at least " if least else "at most ") + f"{target:g}",
        "met": value >= target if least else value <= target,
        "note": note,
    }


def summary(rows: list[dict], costs: dict[str, float]) -> list[dict]:
    """Each target with the value found and whether it is met; only what was measured."""
    lines = []
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        on = f"{threads} thread{'s' * (threads > 1)}"
        for rival, target in (("eager", 2.0), ("inductor", 1.3)):
            if ratios := [row[f"{rival}_ratio"] for row in mine if f"{rival}_ratio" in row]:
                lines.append(_line(f"geometric mean over {rival}, {on}", _geometric(ratios), target, least=True))
        worst = {
            row["kernel"]: min(row[key] for key in ("eager_ratio", "inductor_ratio") if key in row) for row in mine
        }
        name = min(worst, key=worst.__getitem__)
        below = ", ".join(f"{kernel} {ratio:.2f}" for kernel, ratio in worst.items() if ratio < 0.9)
        lines.append(
            _line(f"worst kernel over the better rival, {on}", worst[name], 0.9, least=True, note=below or name)
        )
        for key, what, target in (("of_copy", "of copy bandwidth", 0.85), ("of_mkl", "of MKL", 0.9)):
            found = {
                row["kernel"]: row[key] for row in mine if key in row and (row["memory_bound"] or key != "of_copy")
            }
            if found:
                name = min(found, key=found.__getitem__)
                below = ", ".join(f"{kernel} {part:.2f}" for kernel, part in found.items() if part < target)
                lines.append(_line(f"least part {what}, {on}", found[name], target, least=True, note=below or name))
        if checked := {row["kernel"]: row["sanitized_ratio"] for row in mine if "sanitized_ratio" in row}:
            name = max(checked, key=checked.__getitem__)
            lines.append(_line(f"sanitizer's overhead, {on}", checked[name], 5.0, least=False, note=name))
    scaling = _scaling(rows)
    if scaling:
        name = min(scaling, key=scaling.__getitem__)
        lines.append(_line("thread scaling of products over MKL's", scaling[name], 0.9, least=True, note=name))
    for key, what, target in COST_TARGETS:
        if key in costs:
            lines.append(_line(what, costs[key], target, least=False))
    if "growth_kib" in costs:
        lines.append(_line(f"growth over {costs['launches']} launches, KiB", costs["growth_kib"], 256, least=False))
    return lines


def _scaling(rows: list[dict]) -> dict[str, float]:
    """Speed-up from one thread to most, over that of MKL, for each product that MKL has."""
    most = max(row["threads"] for row in rows)
    by_place = {(row["kernel"], row["threads"]): row for row in rows if "of_mkl" in row}
    return {
        kernel: row["of_mkl"] / by_place[kernel, 1]["of_mkl"]
        for (kernel, threads), row in by_place.items()
        if threads == most > 1 and (kernel, 1) in by_place
    }


def show(figures: dict, console: Console) -> None:
    """Prints the table of kernels, the costs and the summary."""
    rows, machine = figures["kernels"], figures["machine"]
    interpreter, sanitizer = (any(f"{name}_us" in row for row in rows) for name in ("interpreter", "sanitized"))
    title = f"{machine['processor']}, triton {machine['triton']}, torch {machine['torch']}; us, {machine['clock']}"
    table = Table(title=f"{title}; " + ", ".join(f"{name}={value}" for name, value in machine["settings"].items()))
    columns = ["thr", "out", "triton", "eager", "inductor", "eager\n/triton", "middle\nhalf", "inductor\n/triton"]
    columns += ["middle\nhalf", "of\ncopy", "of\nMKL", "GB/s or\nGFLOP/s", *(["checked"] if sanitizer else [])]
    columns += ["inter-\npreter"] if interpreter else []
    table.add_column("kernel", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["kernel"], str(row["threads"]), "given" if row["preallocated"] else "new"]
        cells += [_cell(row, f"{name}_us", ".0f") for name in ("triton", "eager", "inductor")]
        for name in ("eager", "inductor"):
            spread = row.get(f"{name}_spread")
            cells += [_cell(row, f"{name}_ratio", ".2f"), f"{spread[0]:.2f}-{spread[1]:.2f}" if spread else ""]
        cells += [_cell(row, "of_copy", ".2f"), _cell(row, "of_mkl", ".2f")]
        cells.append(_cell(row, "gb_per_s" if "gb_per_s" in row else "gflop_per_s", ".1f"))
        if sanitizer:
            cells.append(_cell(row, "sanitized_ratio", ".1f"))
        if interpreter:
            cells.append(f"{row['interpreter_ratio']:.0f}x" if "interpreter_ratio" in row else "")
        table.add_row(*cells)
    console.print(table)
    if figures["costs"]:
        costs = Table(title="costs, medians")
        costs.add_column("what")
        costs.add_column("value", justify="right")
        for name, value in figures["costs"].items():
            costs.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
        console.print(costs)
    targets = Table(title="targets")
    for column in ("what", "value", "target", "", "which"):
        targets.add_column(column)
    for line in figures["summary"]:
        value = f"{line['value']:.3g}"
        targets.add_row(line["what"], value, line["target"], "met" if line["met"] else "MISSED", line["note"])
    console.print(targets)


def markdown(figures: dict) -> str:
    """The same tables as a page of documentation."""
    machine = figures["machine"]
    settings = ", ".join(f"{name}={value}" for name, value in machine["settings"].items())
    lines = [
        "# Speed of the CPU backend",
        "",
        "Made by `bench/cpu_backend.py --output docs`, which says how it measures.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, triton {machine['triton']}, "
        f"Python {machine['python']}; {settings}; {machine['clock']}.",
        "",
        "![Speed over torch eager and over Inductor](cpu-backend.png)",
        "",
        "## Kernels",
        "",
        "Medians in us, and how many times as long the rivals take, with the middle half of the samples.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| --- " * len(_COLUMNS) + "|",
    ]
    for row in figures["kernels"]:
        cells = [row["kernel"], str(row["threads"]), "given" if row["preallocated"] else "new"]
        cells.append(_cell(row, "triton_us", ".0f"))
        for name in ("eager", "inductor"):
            spread = row.get(f"{name}_spread")
            cells.append(f"{row[f'{name}_ratio']:.2f} ({spread[0]:.2f}-{spread[1]:.2f})" if spread else "")
        cells += [_cell(row, "of_copy", ".2f"), _cell(row, "of_mkl", ".2f")]
        cells += [_cell(row, "sanitized_ratio", ".1f"), _cell(row, "interpreter_ratio", ".0f")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Costs", "", "| | |", "| --- | --- |"]
    for name, value in figures["costs"].items():
        lines.append(f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value} |")
    lines += ["", "## Targets", "", "| | found | target | | |", "| --- | --- | --- | --- | --- |"]
    for line in figures["summary"]:
        met = "met" if line["met"] else "missed"
        lines.append(f"| {line['what']} | {line['value']:.3g} | {line['target']} | {met} | {line['note']} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def plot(rows: list[dict], path: Path) -> None:
    """Bars of the speed over eager and over Inductor, one panel for each number of threads."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    counts = sorted({row["threads"] for row in rows})
    each = max(sum(row["threads"] == threads for row in rows) for threads in counts)
    figure, panels = pyplot.subplots(1, len(counts), figsize=(7 * len(counts), 0.32 * each + 1.5), squeeze=False)
    for panel, threads in zip(panels[0], counts, strict=True):
        mine = [row for row in rows if row["threads"] == threads][::-1]
        for shift, rival in ((0.2, "eager"), (-0.2, "inductor")):
            known = [
                (place + shift, row[f"{rival}_ratio"]) for place, row in enumerate(mine) if f"{rival}_ratio" in row
            ]
            if known:
                panel.barh(
                    *zip(*known, strict=True),
                    height=0.4,
                    label=f"over {'torch eager' if rival == 'eager' else 'Inductor C++'}",
                )
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yticks(range(len(mine)), [row["kernel"] for row in mine], fontsize=8)
        panel.set_xlabel("speed of Triton on the CPU, times that of the rival")
        panel.set_title(f"{threads} thread{'s' * (threads > 1)}")
        panel.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
