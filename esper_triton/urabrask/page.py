"""A report for people: a line, tables, and a page with the distribution of its latency."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from esper_triton.contracts.report import Latency, RowsBenchmark, ValidationReport

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["html", "line", "lines_of_failure", "tables"]

_SHOWN = 5  # failures of a check


def line(report: ValidationReport) -> str:
    """Verdict, id and the main figures in one line."""
    parts = [f"{report.verdict} {report.artifact_id}", f"{report.cases} cases in {report.seconds:.1f} s"]
    if report.risk_score is not None and report.verdict != "REJECTED":
        parts.append(f"worst error {report.risk_score:.0%} of its tolerance")
    if report.benchmarks:
        usual = report.benchmarks[len(report.benchmarks) // 2]
        parts.append(f"{usual.kernel.p50_us:,.1f} us for {usual.rows} rows{_speedup(usual)}")
    if report.tags:
        parts.append(" ".join(report.tags))
    return "; ".join(parts)


def lines_of_failure(report: ValidationReport) -> Iterator[str]:
    """Why it was not validated, with what shows it; nothing where it was."""
    if report.verdict == "VALIDATED":
        return
    yield from report.reasons
    shown = report.counterexample
    if shown is not None:
        yield f"the simplest call that shows it ({shown.tried} tried): {shown.case}"
        yield f"  {shown.what}"
        yield f"again with: --level {report.level} --seed {report.seed}"


def _speedup(one: RowsBenchmark) -> str:
    return "" if one.eager is None else f" ({one.eager.p50_us / max(one.kernel.p50_us, 1e-3):.2f} x eager)"


def tables(report: ValidationReport) -> Iterator[Table]:
    """The report as rich's tables."""
    from rich.table import Table

    head = Table(title=f"{report.verdict}: {report.artifact_id}", show_header=False, title_justify="left")
    for name, value in _facts(report):
        head.add_row(name, value)
    yield head
    checks = Table(title="Checks", title_justify="left")
    for name in ("check", "cases", "worst error / tolerance", "seconds", "found"):
        checks.add_column(name, justify="left" if name in ("check", "found") else "right", overflow="fold")
    for check in report.checks:
        found = "\n".join(check.failures[:_SHOWN]) or check.skipped or "passed"
        worst = "-" if check.worst is None else f"{check.worst:.3g}"
        checks.add_row(check.name, str(check.cases), worst, f"{check.seconds:.2f}", found)
    yield checks
    if report.benchmarks:
        yield _benchmarks(report)


def _facts(report: ValidationReport) -> Iterator[tuple[str, str]]:
    where = report.environment
    yield "blueprint", f"{report.blueprint_name} {report.blueprint_id[:12]}"
    yield "reasons", "\n".join(report.reasons)
    yield "level, seed", f"{report.level}, {report.seed}"
    if report.counterexample is not None:
        yield "simplest call that fails", f"{report.counterexample.case}\n{report.counterexample.what}"
    if report.drift is not None:
        yield "drift against float64", f"{report.drift:.3g}"
    if report.risk_score is not None:
        yield "risk score", f"{report.risk_score:.2f}"
    if report.memory_bytes_peak is not None:
        yield "tensors of the largest call", f"{report.memory_bytes_peak / 1e6:,.1f} MB"
    if report.tags:
        yield "tags", " ".join(report.tags)
    for text in report.field_reports:
        yield "reported from training", text
    yield "where", f"{where.device}, {where.processor}, {where.cores} cores, {where.system}"
    yield "with", f"torch {where.torch}, triton {where.triton}"
    yield "sandbox", where.sandbox if where.degraded is None else f"{where.sandbox}; degraded: {where.degraded}"


def _benchmarks(report: ValidationReport) -> Table:
    from rich.table import Table

    table = Table(title="Forward, microseconds", title_justify="left")
    for name in ("rows", "mean", "p50", "p99", "+-", "backward p50", "eager p50", "torch.compile p50", "rows/s"):
        table.add_column(name, justify="right")
    for one in report.benchmarks:
        kernel = one.kernel
        table.add_row(
            f"{one.rows:,}",
            *(f"{value:,.1f}" for value in (kernel.mean_us, kernel.p50_us, kernel.p99_us)),
            f"{one.interval:.1%}" + ("" if one.converged else " (time was up)"),
            *("-" if side is None else f"{side.p50_us:,.1f}" for side in (one.backward, one.eager, one.compiled)),
            f"{one.throughput_rows_per_s:,.0f}",
        )
    return table


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.VALIDATED { color: #17692b; } .REJECTED { color: #a11616; } .PENDING_HARDWARE { color: #8a5a00; }
svg { display: block; margin: .5em 0 1.5em; } svg text { font: 11px system-ui, sans-serif; fill: #444; }
"""


def html(report: ValidationReport) -> str:
    """A page that needs nothing but itself."""
    facts = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value).replace(chr(10), '<br>')}</td></tr>"
        for name, value in _facts(report)
    )
    checks = "".join(
        f'<tr><td>{escape(check.name)}</td><td class="n">{check.cases}</td>'
        f'<td class="n">{"-" if check.worst is None else f"{check.worst:.3g}"}</td>'
        f"<td>{'<br>'.join(map(escape, check.failures[:_SHOWN])) or escape(check.skipped or 'passed')}</td></tr>"
        for check in report.checks
    )
    plots = "".join(
        f"<h3>{one.rows:,} rows{escape(_speedup(one))}</h3>" + "".join(_plot(name, side) for name, side in _sides(one))
        for one in report.benchmarks
    )
    title = f"{report.verdict}: {report.artifact_id}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<h1 class="{report.verdict}">{escape(title)}</h1><table>{facts}</table>'
        f'<h2>Checks</h2><table><tr><th>check</th><th class="n">cases</th><th class="n">worst error / tolerance</th>'
        f"<th>found</th></tr>{checks}</table>" + (f"<h2>Latency</h2>{plots}" if plots else "") + "</html>\n"
    )


def _sides(one: RowsBenchmark) -> Iterator[tuple[str, Latency]]:
    for name, side in (
        ("kernel, forward", one.kernel),
        ("kernel, backward", one.backward),
        ("eager PyTorch", one.eager),
        ("torch.compile", one.compiled),
    ):
        if side is not None:
            yield name, side


def _plot(name: str, latency: Latency) -> str:
    """The histogram of one side's samples as SVG, up to the 99th percentile, with the median marked."""
    width, height, bottom = 640, 110, 90
    most = max((*latency.histogram, 1))
    step = width / max(1, len(latency.histogram))
    bars = "".join(
        f'<rect x="{index * step:.1f}" y="{bottom - 70 * count / most:.1f}" width="{step * 0.9:.1f}" '
        f'height="{70 * count / most:.1f}" fill="#4878a8"/>'
        for index, count in enumerate(latency.histogram)
    )
    span = max(latency.high_us - latency.low_us, 1e-9)
    at = width * min(1.0, max(0.0, (latency.p50_us - latency.low_us) / span))
    summary = f"{name}: mean {latency.mean_us:,.2f}, p50 {latency.p50_us:,.2f}, p99 {latency.p99_us:,.2f} us"
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{escape(summary)}">'
        f'<text x="0" y="12">{escape(summary)} ({latency.samples} samples)</text>{bars}'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="18" y2="{bottom}" stroke="#c03a2b" stroke-dasharray="3 2"/>'
        f'<text x="0" y="{height - 4}">{latency.low_us:,.2f} us</text>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end">{latency.high_us:,.2f} us</text></svg>'
    )
