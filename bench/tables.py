"""Tables of figures as Markdown, as the pages in docs/ have them, and the machine that figures are of."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["machine", "markdown", "processor", "table"]


def markdown(title: str, script: str, parts: dict[str, list[dict[str, Any]]], *, digits: int, device: str = "") -> str:
    """A page with a table for each part; `digits` of every float count. `device` is named beside the machine."""
    where = f"{platform.machine()}, {os.cpu_count()} cores, torch {metadata.version('torch')}"
    if device:
        where += f", {device}"
    lines = [
        f"# {title}",
        "",
        f"Made by `bench/{script} --output docs`, which says how it measures. "
        f"{where}; OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}.",
    ]
    for name, rows in parts.items():
        lines += ["", f"## {name}", "", *table(rows, digits=digits)]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], *, digits: int) -> list[str]:
    """The lines of one table. The first row names the columns."""
    return [
        "| " + " | ".join(rows[0]) + " |",
        "| " + " | ".join("---" for _ in rows[0]) + " |",
        *(
            "| " + " | ".join(f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
            for row in rows
        ),
    ]


def machine() -> dict[str, Any]:
    """What figures are of: processor, cores, what else runs, versions, and what governs threads."""
    names = ("torch", "triton", "llvmlite", "numpy", "peft", "kernels")
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := _version(name)) is not None},
        "settings": {
            name: os.environ.get(name, "unset") for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        },
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
