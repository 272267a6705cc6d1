"""What a page is sent: once everything, then what has changed since."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_triton.nissa.view import STATES, ModelView, View

__all__ = ["Feed", "overview"]

_MOST_ENTRIES = 500
_MOST_JOBS = 200


@dataclass
class _Sent:
    """Of one model, to one page."""

    version: int = -1
    layers: tuple[str, ...] = ()
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)


class Feed:
    """For one page: `changes` gives the message that brings it from where the last one has left it to now.

    Messages are JSON. `states` comes once. Each of `models` has `seeds`, all columns, where its seeds are new to the
    page, and otherwise `patch`, the columns at the places `at` that have changed. `jobs` and `entries` are those that
    are new or have changed.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._version = -1
        self._number = 0
        self._jobs: dict[str, str] = {}
        self._sent: dict[str, _Sent] = {}

    def changes(self) -> str | None:
        """The next message; None where there is nothing new."""
        view = self._view
        with view.lock:
            if view.version == self._version:
                return None
            message: dict[str, Any] = {"models": [], "jobs": [], "entries": []}
            if self._version == -1:
                message["states"] = STATES
            self._version = view.version
            for name, model in view.models.items():
                sent = self._sent.setdefault(name, _Sent())
                if sent.version != model.version:
                    message["models"].append(_model(model, sent))
            for entry in view.entries_after(self._number, _MOST_ENTRIES):
                self._number = entry.number
                message["entries"].append(entry.as_dict())
            for job in list(view.jobs.values())[-_MOST_JOBS:]:
                state = f"{job.outcome} {len(job.artifacts)}"
                if self._jobs.get(job.id) != state:
                    self._jobs[job.id] = state
                    message["jobs"].append(job.as_dict())
            self._jobs = {number: state for number, state in self._jobs.items() if number in view.jobs}
            message["bus"] = _bus(view)
        return json.dumps(message, separators=(",", ":"))


def overview(view: View) -> dict[str, Any]:
    """For scripts and the terminal: models with their seeds by state, means, cache, jobs, and the bus."""
    with view.lock:
        return {
            "models": {name: _summary(model) for name, model in view.models.items()},
            "compile": {
                "waiting": view.waiting()[0],
                "jobs": [job.as_dict() for job in list(view.jobs.values())[-20:]],
            },
            "validation": {"waiting": view.waiting()[1]},
            "failures": [entry.as_dict() for entry in view.entries if entry.failure][-20:],
            "bus": _bus(view),
        }


def _summary(model: ModelView) -> dict[str, Any]:
    times, means = model.means.rows()
    latest = [_number(float(value)) for value in means[-1]] if times else [None, None]
    return {
        "seeds": len(model.seed),
        "layers": len(model.layers),
        "seeds_by_state": model.counts(),
        "epoch": model.epoch,
        "step": max(model.steps, default=None),
        "active_alpha_mean": latest[0],
        "active_health_mean": latest[1],
        "faults": int(model.errors.sum()),
        "cache": model.cache,
        "damaged": {layer: list(arrays) for layer, arrays in model.damaged.items()},
        "seen_at": None if model.frame is None else model.frame.timestamp,
        "active": [
            {
                "layer": model.layers[int(model.layer[place])],
                "seed": int(model.seed[place]),
                "state": STATES[int(model.state[place])],
                "alpha": _number(float(model.alpha[place])),
                "health": _number(float(model.health[place])),
                "latency_us": _number(float(model.latency_us[place])),
                "errors": int(model.errors[place]),
            }
            for place in np.flatnonzero(model.active).tolist()[:200]
        ],
    }


def _model(model: ModelView, sent: _Sent) -> dict[str, Any]:
    columns: dict[str, NDArray[Any]] = {
        "state": model.state.copy(),
        "alpha": model.alpha,
        "health": model.health,
        "latency_us": model.latency_us,
        "errors": model.errors,
    }
    times, means = model.means.rows()
    message: dict[str, Any] = {
        "name": model.name,
        "epoch": model.epoch,
        "cache": model.cache,
        "damaged": sorted(model.damaged),
        "seen_at": None if model.frame is None else model.frame.timestamp,
        "means": {"at": times, "alpha": _numbers(means[:, 0]), "health": _numbers(means[:, 1])},
    }
    if sent.version == -1 or sent.layers is not model.layers or len(sent.columns["state"]) != len(model.state):
        message["seeds"] = {"layers": model.layers, "layer": model.layer.tolist(), "seed": model.seed.tolist()} | {
            name: _numbers(column) for name, column in columns.items()
        }
    else:
        changed = np.zeros(len(model.state), np.bool_)
        for name, column in columns.items():
            changed |= (column != sent.columns[name]) & ~(np.isnan(column) & np.isnan(sent.columns[name]))
        places = np.flatnonzero(changed)
        message["patch"] = {"at": places.tolist()} | {
            name: _numbers(column[places]) for name, column in columns.items()
        }
    sent.version, sent.layers, sent.columns = model.version, model.layers, columns
    return message


def _bus(view: View) -> dict[str, Any]:
    groups = view.server.get("groups")
    named = {name: one for name, one in groups.items() if not name.startswith("~")} if isinstance(groups, dict) else {}
    return {
        "up": bool(view.server),
        "groups": {name: {"lag": one.get("lag", 0), "held": one.get("held", 0)} for name, one in named.items()},
    }


def _numbers(values: NDArray[Any]) -> list[float | int | None]:
    """Five digits are more than anybody sees; JSON has no NaN."""
    if not np.issubdtype(values.dtype, np.floating):
        return [*values.tolist()]
    rounded = np.round(values.astype(np.float64), 5)
    known = np.isfinite(rounded)
    found = rounded.tolist()
    return found if known.all() else [v if k else None for v, k in zip(found, known.tolist(), strict=True)]


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
