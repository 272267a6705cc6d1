"""Draws architecture.svg and lifecycle.svg: `python docs/diagrams.py`. The moves are those of the code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from esper_triton.kasmina.lifecycle import ALLOWED_MOVES, SeedLifecycleState

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT = 146, 46  # of a box

# Both pages of a reader, light and dark: strokes are of a gray that shows on either, and boxes bring their own ground.
STYLE = """
text { font: 12px sans-serif; fill: #1c2733; text-anchor: middle }
text.title { font-weight: bold; font-size: 13px }
text.on { fill: #6b7a8a; font-size: 11px }
rect { fill: #eef3f8; stroke: #5b7c9d; rx: 6 }
rect.active { fill: #dff0df; stroke: #4c8c4c }
rect.ended { fill: #f6e7dd; stroke: #b0703c }
path { fill: none; stroke: #7b8794; stroke-width: 1.3; marker-end: url(#tip) }
path.aside { stroke-dasharray: 3 3 }
"""
TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0,0 L8,4 L0,8" style="stroke:#7b8794;marker-end:none"/></marker></defs>'
)

Point = tuple[float, float]


def head(width: int, height: int, title: str) -> str:
    """What a drawing begins with."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{title}</title><style>{STYLE}</style>{TIP}'
    )


def box(at: Point, title: str, below: str = "", kind: str = "") -> str:
    """A box with its centre `at`."""
    x, y = at
    text = f'<text class="title" x="{x}" y="{y - 3 if below else y + 4}">{escape(title)}</text>'
    text += f'<text x="{x}" y="{y + 14}">{escape(below)}</text>' if below else ""
    return (
        f'<rect class="{kind}" x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}"/>{text}'
    )


def edge_of(centre: Point, towards: Point) -> Point:
    """Where the line from a box's centre to a point leaves the box."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    scale = min(WIDTH / 2 / abs(dx) if dx else math.inf, HEIGHT / 2 / abs(dy) if dy else math.inf)
    return centre[0] + dx * scale, centre[1] + dy * scale


def arrow(start: Point, end: Point, label: str = "", kind: str = "", bend: float = 0.0) -> str:
    """An arrow from box to box, bent to the left of its way by `bend`."""
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    length = math.dist(start, end)
    control = (middle[0] + (end[1] - start[1]) / length * bend, middle[1] - (end[0] - start[0]) / length * bend)
    (x1, y1), (x2, y2) = edge_of(start, control), edge_of(end, control)
    drawn = f'<path class="{kind}" d="M{x1:.1f},{y1:.1f} Q{control[0]:.1f},{control[1]:.1f} {x2:.1f},{y2:.1f}"/>'
    at = ((x1 + x2) / 4 + control[0] / 2, (y1 + y2) / 4 + control[1] / 2 - 5)
    return drawn + (f'<text class="on" x="{at[0]:.1f}" y="{at[1]:.1f}">{escape(label)}</text>' if label else "")


def architecture() -> str:
    """The rooms, and what goes from one to the next."""
    rooms: dict[str, tuple[Point, str]] = {
        "blueprint": ((80, 60), "a design"),
        "Tezzeret": ((290, 60), "writes and compiles"),
        "Urza": ((500, 60), "stores and verifies"),
        "Urabrask": ((710, 60), "proves"),
        "Kasmina": ((500, 190), "runs in your model"),
        "your training loop": ((290, 190), ""),
        "Tamiyo": ((80, 190), "decides"),
        "Oona": ((500, 320), "carries"),
        "Nissa": ((710, 320), "shows"),
        "CPU backend": ((710, 190), "runs Triton on a CPU"),
    }
    ways = [
        ("blueprint", "Tezzeret", "", ""),
        ("Tezzeret", "Urza", "artifact", ""),
        ("Urza", "Urabrask", "", ""),
        ("Urza", "Kasmina", "proven kernels", ""),
        ("Tamiyo", "your training loop", "commands", ""),
        ("your training loop", "Kasmina", "steps", ""),
        ("Kasmina", "Oona", "events, health", ""),
        ("Oona", "Nissa", "", ""),
        ("Kasmina", "CPU backend", "launches", "aside"),
    ]
    parts = [head(800, 370, "The rooms of Esper, and what goes from one to the next")]
    parts += [arrow(rooms[a][0], rooms[b][0], label, kind) for a, b, label, kind in ways]
    parts.append(arrow(rooms["Urabrask"][0], rooms["Urza"][0], "verdict", bend=34))
    parts += [box(at, name, below) for name, (at, below) in rooms.items()]
    return "\n".join([*parts, "</svg>\n"])


S = SeedLifecycleState
PLACES: Mapping[SeedLifecycleState, Point] = {
    S.DORMANT: (90, 50),
    S.GERMINATED: (270, 50),
    S.LOADING: (450, 50),
    S.TRAINING: (630, 50),
    S.CANCELLED: (270, 160),
    S.CULLED: (450, 270),
    S.GRAFTING: (810, 160),
    S.STABILIZATION: (810, 270),
    S.EVALUATING: (810, 380),
    S.FINE_TUNING: (810, 480),
    S.FOSSILIZED: (810, 580),
    S.ROLLED_BACK: (990, 270),
    S.ERROR_RECOVERY: (450, 160),
}
BENDS = {  # around what would be in the way
    (S.LOADING, S.GRAFTING): 30.0,
    (S.LOADING, S.CULLED): 190.0,
    (S.CULLED, S.DORMANT): 125.0,
    (S.EVALUATING, S.FOSSILIZED): 190.0,
}


def moves() -> Iterator[tuple[SeedLifecycleState, SeedLifecycleState]]:
    """Every move of the table."""
    for source, targets in ALLOWED_MOVES.items():
        for target in targets:
            yield source, target


def lifecycle() -> str:
    """The states of a seed and its moves; those that end what it was are dashed."""
    given_up = (S.CULLED, S.CANCELLED, S.ROLLED_BACK)
    parts = [head(1080, 630, "The states of a seed and the moves between them")]
    for source, target in moves():
        kind = "aside" if target in given_up or source in given_up else ""
        bend = BENDS.get((source, target), 0.0)
        parts.append(arrow(PLACES[source], PLACES[target], kind=kind, bend=bend))
    for state, at in PLACES.items():
        kind = "active" if state.is_active else "ended" if state in (*given_up, S.ERROR_RECOVERY) else ""
        parts.append(box(at, state.name, kind=kind))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(architecture(), encoding="utf-8")
    (HERE / "lifecycle.svg").write_text(lifecycle(), encoding="utf-8")
