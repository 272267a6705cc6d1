"""The table of docs/nissa.md is what is exported."""

from __future__ import annotations

from pathlib import Path

from messages import one_of_everything

from esper_triton.nissa.metrics import Metrics
from esper_triton.nissa.view import View

PAGE = Path(__file__).resolve().parents[2] / "docs" / "nissa.md"


def table() -> str:
    """A row for each metric, as the registry has it."""
    metrics = Metrics()
    view = View(metrics)
    metrics.show(view)
    one_of_everything(view)
    rows = []
    for family in sorted(metrics.registry.collect(), key=lambda family: family.name):
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kind = {"gaugehistogram": "histogram of now"}.get(family.type, family.type)
        shown = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {shown} | {kind}: {family.documentation} |")
    return "\n".join(rows) + "\n"


def test_the_table_is_of_what_is_exported() -> None:
    found = "\n".join(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `esper_")) + "\n"
    assert found == table(), f"the table of docs/nissa.md should be:\n{table()}"
