"""Tables of figures as Markdown, as the pages in docs/ have them."""

import os
import platform
from typing import Any

import torch


def markdown(title: str, script: str, parts: dict[str, list[dict[str, Any]]], *, digits: int, device: str = "") -> str:
    """A page with a table for each part; `digits` of every float count. `device` is named beside the machine."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if device:
        machine += f", {device}"
    lines = [
        f"# {title}",
        "",
        f"Made by `bench/{script} --output docs`, which says how it measures. "
        f"{machine}; OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}.",
    ]
    for name, rows in parts.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| " + " | ".join(rows[0]) + " |",
            "| " + " | ".join("---" for _ in rows[0]) + " |",
        ]
        lines += [
            "| " + " | ".join(f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
            for row in rows
        ]
    return "\n".join(lines) + "\n"
