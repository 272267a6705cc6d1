"""One seed in full: what was measured of it, where it has been, and what its artifact is."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import ValidationError

from esper_triton.contracts.errors import EsperError
from esper_triton.contracts.manifest import Manifest
from esper_triton.nissa.view import ModelView, View
from esper_triton.urza import Urza

__all__ = ["artifact_detail", "seed_detail"]

_MOST_REPORT_BYTES = 1 << 20


def seed_detail(view: View, model_name: str, layer: str, seed: int) -> dict[str, Any] | None:
    """A seed's signal, history and log in JSON's types; None where no such seed was seen."""
    with view.lock:
        model = view.models.get(model_name)
        place = None if model is None else model.place(layer, seed)
        if model is None or place is None:
            return None
        return {
            "model": model_name,
            "layer": layer,
            "seed": seed,
            "signal": _signal(model, place),
            "artifact_id": model.artifacts.get((layer, seed)),
            "history": _history(model, place),
            "entries": [entry.as_dict() for entry in view.entries_of(model_name, layer, seed)],
        }


def artifact_detail(urza: Urza | None, artifact_id: str) -> dict[str, Any]:
    """What the store says of an artifact, its validation report and its design; `error` says why it does not.

    Reads the disk or the network.
    """
    if urza is None:
        return {"error": "no store was given to this page (--store)"}
    try:
        record, _, manifest, blobs = urza.whole(artifact_id)
        match = urza.match(artifact_id)
        history = urza.history(artifact_id)
    except EsperError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = {
        "manifest": _summary(manifest),
        "digest": record.manifest,
        "tags": list(record.tags),
        "figures": record.figures.model_dump(mode="json"),
        "signed_by": None if record.signature is None else f"{record.signature.role} {record.signature.key[:16]}",
        "report": _report(manifest, blobs),
        "history": [change.model_dump(mode="json") for change in history],
        "lineages": [] if match is None else list(match.lineages),
        "size_bytes": sum(map(len, blobs.values())),
    }
    try:
        found["blueprint"] = urza.blueprint(artifact_id).to_toml()
    except EsperError as error:
        found["blueprint_error"] = str(error)
    return found


def _signal(model: ModelView, place: int) -> dict[str, Any]:
    assert model.frame is not None
    frame, position = model.frame, int(model.layer[place])

    def measured(name: str) -> float | None:
        column = getattr(frame, name)
        return None if column is None else column[place]

    return {
        "state": int(model.state[place]),
        "chunk": [frame.chunk_start[place], frame.chunk_stop[place]],
        "epoch": frame.epochs[position],
        "step": frame.steps[position],
        "alpha": float(model.alpha[place]),
        "error_count": int(model.errors[place]),
        "is_ready_for_transition": bool(model.ready[place]),
        "cache_hit_ratio": frame.cache_hit_ratio,
        "timestamp": frame.timestamp,
    } | {
        name: measured(name)
        for name in (
            "health_score",
            "execution_latency_us",
            "kernel_load_latency_us",
            "activation_variance",
            "dead_neuron_ratio",
            "avg_correlation",
        )
    }


def _history(model: ModelView, place: int) -> dict[str, list[float | None]]:
    times, alphas = model.alphas.column(place)
    _, healths = model.healths.column(place)
    return {"at": [*times], "alpha": _known(alphas), "health": _known(healths)}


def _known(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 5) for value in values]


def _summary(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(
        mode="json",
        include={
            *("id", "blueprint_id", "blueprint_name", "status", "target", "pipeline", "dtype", "dims", "toolchain"),
            *("created_at", "compile_seconds", "layout", "affine", "input"),
        },
    ) | {
        "kernels": [
            {"name": kernel.name, "num_warps": kernel.num_warps, "shared_bytes": kernel.shared_bytes}
            for kernel in manifest.kernels.values()
        ],
        "parameters": {name: list(record.shape) for name, record in manifest.parameters.items()},
    }


def _report(manifest: Manifest, blobs: dict[str, bytes]) -> Any:
    """As the prover wrote it; None where there is none that can be shown."""
    if manifest.report is None or len(blobs[manifest.report]) > _MOST_REPORT_BYTES:
        return None
    try:
        return json.loads(blobs[manifest.report])
    except (ValueError, RecursionError, ValidationError):
        return None
