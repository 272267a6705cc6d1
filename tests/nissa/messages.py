"""Messages as they come over the bus, made by hand."""

from __future__ import annotations

import itertools

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.commands import CommandKind, CommandResult, CommandStatus, KasminaCommand
from esper_triton.contracts.envelope import Envelope, Message
from esper_triton.contracts.events import (
    CompileFailed,
    CompileRequest,
    EpochEvent,
    FieldReport,
    KernelCharacterized,
    KernelReady,
    StoreEvent,
    TransitionEvent,
)
from esper_triton.contracts.health import HealthFrame
from esper_triton.contracts.manifest import KernelStatus, TargetSpec
from esper_triton.nissa.view import View
from esper_triton.oona.wire import MODELS

ARTIFACT = "0123456789ab-cpu-standard-ba9876543210"
CUDA = TargetSpec(backend="cuda", arch="90")
_TOPICS = {model: topic for topic, model in MODELS.items()}
_numbers = itertools.count()


def envelope(message: Message, *, at: float = 1000.0, **fields: str) -> Envelope:
    number = next(_numbers)
    return Envelope(
        topic=_TOPICS[type(message)],
        sender_id="s",
        sequence=number,
        timestamp=at,
        payload=message.model_dump(mode="json"),
        **{"event_id": f"e{number}", **fields},
    )


def tell(view: View, message: Message, *, at: float = 1000.0, **fields: str) -> None:
    view.take(envelope(message, at=at, **fields), message)


def frame(
    states: list[str],
    *,
    model: str = "m",
    layers: int = 1,
    at: float = 1000.0,
    alpha: list[float] | None = None,
    health: list[float | None] | None = None,
    latency_us: list[float | None] | None = None,
    errors: list[int] | None = None,
) -> HealthFrame:
    """Seeds spread evenly over the layers."""
    count, each = len(states), len(states) // layers
    return HealthFrame(
        model=model,
        timestamp=at,
        layers=tuple(f"layers.{k}" for k in range(layers)),
        epochs=(3,) * layers,
        steps=(70,) * layers,
        layer=tuple(k // each for k in range(count)),
        seed=tuple(k % each for k in range(count)),
        chunk_start=tuple(8 * (k % each) for k in range(count)),
        chunk_stop=tuple(8 * (k % each) + 8 for k in range(count)),
        state=tuple(states),
        alpha=tuple(alpha or [0.0] * count),
        error_count=tuple(errors or [0] * count),
        is_ready_for_transition=(False,) * count,
        health_score=None if health is None else tuple(health),
        execution_latency_us=None if latency_us is None else tuple(latency_us),
    )


def move(source: str, target: str, *, layer: str = "layers.0", seed: int = 0, **fields: str) -> TransitionEvent:
    values = {"model": "m", "artifact_id": ARTIFACT, **fields}
    return TransitionEvent(layer=layer, seed=seed, source=source, target=target, step=70, epoch=3, **values)


def one_of_everything(view: View) -> None:
    """Every kind of message, with every outcome, and what a hub and a bus count."""
    tell(
        view,
        frame(
            ["GRAFTING", "FOSSILIZED", "DORMANT", "CULLED"],
            alpha=[0.25, 1.0, 0.0, 0.0],
            health=[0.5, 0.9, None, None],
            latency_us=[30.0, 90.0, None, None],
            errors=[0, 2, 0, 1],
        ),
    )
    tell(view, move("GERMINATED", "LOADING"), at=1001.0)
    tell(view, move("LOADING", "TRAINING"), at=1003.5)
    tell(view, move("GRAFTING", "CULLED", error="NonFiniteOutput"), at=1004.0)
    cache = {"hits": 7, "misses": 3, "evictions": 1, "entries": 2, "bytes": 4096, "pinned": 1}
    tell(view, EpochEvent(model="m", epoch=3, seeds_by_state={"DORMANT": 1}, cache=cache))
    request = CompileRequest(like_artifact_id=ARTIFACT, dtype="float16", targets=(CUDA,))
    for name in ("built", "broken", "open"):
        tell(view, request, at=1010.0, event_id=name, trace_id=f"trace {name}")
    ready = KernelReady(
        artifact_id=ARTIFACT,
        manifest_digest="0" * 64,
        status=KernelStatus.PENDING_BENCHMARKING,
        compile_seconds=0.7,
    )
    tell(view, ready, at=1012.0, in_reply_to="built")
    tell(view, CompileFailed(error="BlueprintError", message="unknown op"), at=1011.0, in_reply_to="broken")
    verdict = KernelCharacterized(artifact_id=ARTIFACT, manifest_digest="0" * 64, status=KernelStatus.REJECTED)
    tell(view, verdict.model_copy(update={"reasons": ("off by 3 times",)}), at=1016.0)
    report = {"model": "m", "blueprint": ARTIFACT[:12], "artifact_id": ARTIFACT, "layer": "layers.0", "seed": 1}
    tell(view, FieldReport(outcome="FOSSILIZED", metric_before=1.0, metric_after=0.5, **report))
    tell(view, KasminaCommand(command_id="1", layer="layers.0", seed=0, command=CommandKind.CULL, model="m"))
    refused = CommandStatus.REFUSED
    tell(view, CommandResult(command_id="1", model="m", status=refused, layer="layers.0", seed=0, reason="no"))
    tell(
        view, StoreEvent(model="m", store="/urza", kind="quarantined", artifact_id=ARTIFACT, message="it is cut short")
    )
    view.server = {
        "groups": {"tezzeret": {"lag": 4, "held": 2}, "urabrask": {"lag": 1, "held": 0}, "~own": {"lag": 9, "held": 0}},
        "topics": {topics.HEALTH: {"gaps": 5}},
    }
    counts = {"sent": 10, "dropped": 2, "refused": 1, "unheard": 0, "waiting": 0}
    view.bus = {"sent": {topics.HEALTH: counts}}
