"""What the page shows, in a terminal: asked of the page's server, and drawn with rich."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from esper_triton.contracts.errors import BusUnavailable

__all__ = ["ask", "draw"]

_ANSWER_S = 10.0
_COLOURS = {
    "DORMANT": "dim",
    "TRAINING": "blue",
    "GRAFTING": "magenta",
    "EVALUATING": "yellow",
    "FOSSILIZED": "green",
    "CULLED": "red",
    "ROLLED_BACK": "red",
    "ERROR_RECOVERY": "bold red",
}
_FULL = 20  # characters of a bar


def ask(url: str, *, token: str | None = None, tls_ca: Path | None = None) -> dict[str, Any]:
    """The overview of the server of a page (see `live.overview`). Raises BusUnavailable where there is none, or it does
    not answer this token."""
    request = urllib.request.Request(f"{url.rstrip('/')}/api/overview")
    if not request.full_url.startswith(("http://", "https://")):
        raise BusUnavailable(f"the address of a page begins with http:// or https://, found {url!r}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    tls = None if tls_ca is None else ssl.create_default_context(cafile=str(tls_ca))
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S, context=tls) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        with error:
            raise BusUnavailable(f"{url} answers with {error.code}: {error.reason}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise BusUnavailable(
            f"{url} does not answer: {reason}; is the page served? (python -m esper_triton.nissa)"
        ) from error


def draw(overview: Mapping[str, Any], rows: int = 20) -> RenderableType:
    """The overview, with at most `rows` active seeds of each model."""
    parts: list[RenderableType] = [_model(name, model, rows) for name, model in overview["models"].items()]
    if not parts:
        parts.append(Text("no model was seen yet", style="dim"))
    parts += [_forge(overview), _failures(overview)]
    return Group(*parts)


def _model(name: str, model: Mapping[str, Any], rows: int) -> RenderableType:
    states = Text("  ").join(
        Text(f"{count} {state.lower()}", style=_COLOURS.get(state, ""))
        for state, count in model["seeds_by_state"].items()
    )
    facts = [f"{model['seeds']} seeds in {model['layers']} layers", f"epoch {_known(model['epoch'])}"]
    facts.append(f"step {_known(model['step'])}")
    cache = model["cache"]
    if cache:
        facts.append(f"cache {cache['hits']} hits, {cache['misses']} misses, {cache['bytes']:,} bytes")
    if model["faults"]:
        facts.append(f"{model['faults']} faults")
    body: list[RenderableType] = [Text(", ".join(facts)), states]
    for layer, arrays in model["damaged"].items():
        body.append(Text(f"state arrays of {layer} are damaged: {', '.join(arrays)}", style="bold red"))
    active = model["active"]
    if active:
        table = Table(box=None, pad_edge=False)
        for column in ("layer", "seed", "state", "alpha", "", "health", "launch us", "errors"):
            table.add_column(column, justify="left" if column in ("layer", "state", "") else "right")
        for one in active[:rows]:
            table.add_row(
                Text(one["layer"]),
                str(one["seed"]),
                Text(one["state"].lower(), style=_COLOURS.get(one["state"], "")),
                _known(one["alpha"]),
                Text("█" * round(_FULL * (one["alpha"] or 0.0)), style="magenta"),
                _known(one["health"]),
                _known(one["latency_us"]),
                str(one["errors"]),
            )
        body.append(table)
        if len(active) > rows:
            body.append(Text(f"and {len(active) - rows} more active seeds", style="dim"))
    return Panel(Group(*body), title=Text(name), title_align="left")


def _forge(overview: Mapping[str, Any]) -> RenderableType:
    groups = overview["bus"]["groups"]
    lines = [
        f"{queue}: {groups[group]['lag']} waiting, {groups[group]['held']} with a worker"
        if group in groups
        else f"{queue}: {overview[queue]['waiting']} without an answer, no worker"
        for queue, group in (("compile", "tezzeret"), ("validation", "urabrask"))
    ]
    state = Text("answers", style="green") if overview["bus"]["up"] else Text("is away", style="bold red")
    return Panel(
        Group(Text("bus ").append_text(state), *map(Text, lines)), title=Text("bus and queues"), title_align="left"
    )


def _failures(overview: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    for entry in overview["failures"][-8:]:
        where = " ".join(str(entry[part]) for part in ("model", "layer", "seed") if entry[part] is not None)
        at = time.strftime("%H:%M:%S", time.localtime(entry["at"]))
        table.add_row(Text(at, style="dim"), Text(entry["kind"]), Text(where), Text(entry["text"], style="red"))
    shown: RenderableType = table if table.row_count else Text("none", style="dim")
    return Panel(shown, title=Text("failures"), title_align="left")


def _known(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
