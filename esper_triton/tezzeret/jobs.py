"""Compiles over the bus: what a worker does with a request, and how one is made and waited for."""

from __future__ import annotations

import asyncio
import functools
import platform
import threading
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import (
    BlueprintError,
    BusUnavailable,
    CompileError,
    UnknownTarget,
    error_named,
)
from esper_triton.contracts.events import CompileFailed, CompileRequest, KernelReady
from esper_triton.contracts.manifest import TargetSpec
from esper_triton.oona.jobs import GivenBack, Job, JobServer
from esper_triton.oona.subscription import Delivery
from esper_triton.tezzeret.pool import DEFAULT_BUDGET_S, CompileTask, Forge
from esper_triton.tezzeret.targets import parse_target

if TYPE_CHECKING:
    import torch

    from esper_triton.oona import Oona
    from esper_triton.urza import Urza

__all__ = ["GROUP", "compile_server", "request_of", "submit_over", "target_name_of"]

GROUP = "tezzeret"
"""The group of the workers."""

_LOOK_S = 0.5
_MOST_TEXT = 8000


# ---- a worker


def compile_server(bus: Oona, forge: Forge, urza: Urza, *, slots: int = 1, allow_sources: bool = False) -> JobServer:
    """Serves `compilation.blueprint.submitted`: compiles in the forge's processes, stores in `urza`, and answers with a
    KernelReady for each artifact or one CompileFailed.

    Args:
        allow_sources: also compile hand-written sources that come with a request. They are Python that is run, so
            whoever may submit could then run anything as this user. One that an artifact of the store keeps was signed,
            and is compiled either way.
    """
    work = functools.partial(_compile, forge=forge, urza=urza, allow_sources=allow_sources)
    return JobServer(bus, topics.SUBMITTED, GROUP, work, _refused, slots=slots)


def _compile(job: Job, *, forge: Forge, urza: Urza, allow_sources: bool) -> list[KernelReady]:
    request = job.message
    assert isinstance(request, CompileRequest)
    blueprint, dims = _design(request, urza, allow_sources=allow_sources)
    names = list(dict.fromkeys(map(target_name_of, request.targets)))
    task = forge.submit(blueprint, dims, request.dtype, names, request.pipeline, urza=urza, budget_s=request.budget_s)
    _wait(task, job)
    task.result()
    return [
        KernelReady(
            artifact_id=one.artifact.id,
            manifest_digest=one.artifact.digest,
            status=one.artifact.status,
            compile_seconds=one.artifact.manifest.compile_seconds,
            hit=one.hit,
            part=part,
            parts=len(task.outcomes),
        )
        for part, one in enumerate(task.outcomes)
    ]


def _wait(task: CompileTask, job: Job) -> None:
    over = threading.Event()
    task.add_done_callback(lambda _: over.set())
    while not over.wait(_LOOK_S):
        if job.given_back.is_set() and task.cancel():
            raise GivenBack


def _design(request: CompileRequest, urza: Urza, *, allow_sources: bool) -> tuple[Blueprint, Mapping[str, int]]:
    if request.like_artifact_id is not None:
        _, _, manifest, _ = urza.whole(request.like_artifact_id)
        blueprint = urza.blueprint(request.like_artifact_id)
        return blueprint, manifest.dims if request.dims is None else request.dims
    assert request.blueprint is not None
    blueprint = Blueprint.from_canonical_bytes(request.blueprint.encode(), source_text=request.source_text)
    if not blueprint.ops and not allow_sources:
        raise BlueprintError(
            f"blueprint {blueprint.name!r} is a hand-written source, which is code that the worker would run, and this "
            "worker takes none (--allow-sources); compile it where the store is, or submit a graph"
        )
    return blueprint, request.dims or {}


def target_name_of(spec: TargetSpec) -> str:
    """What this machine calls a target: `cpu` where the processor is its own, and for another processor the best
    baseline that it has. Raises UnknownTarget for what cannot be compiled for here."""
    if spec.backend != "cpu":
        name = f"{spec.backend}:{spec.arch}"
        parse_target(name)
        return name
    from esper_triton.cpu.host import BASELINES

    if spec == parse_target("cpu"):
        return "cpu"
    if platform.machine() in ("x86_64", "AMD64"):
        if BASELINES.get(spec.arch) == spec.features:
            return f"cpu:{spec.arch}"
        levels = [name for name, features in BASELINES.items() if set(features) <= set(spec.features)]
        if "sse2" in spec.features:  # which every processor of this kind has, and no other
            return f"cpu:{max(levels, key=lambda name: len(BASELINES[name]))}"
    raise UnknownTarget(
        f"target cpu {spec.arch!r} with features {', '.join(spec.features[:8]) or 'none'} cannot be compiled for on "
        f"this {platform.machine()} machine"
    )


def _refused(_: Delivery, error: Exception) -> CompileFailed:
    return CompileFailed(error=type(error).__name__, message=str(error)[:_MOST_TEXT])


# ---- whoever asks


def request_of(
    blueprint: Blueprint | None,
    dims: Mapping[str, int] | None,
    dtype: torch.dtype | str,
    targets: Iterable[str | TargetSpec] | str,
    pipeline: str,
    *,
    like: str | None = None,
    budget_s: float = DEFAULT_BUDGET_S,
) -> CompileRequest:
    """The message that asks for these artifacts; `cpu` among the targets is this machine. Raises UnknownTarget, and
    ValueError for what is no request."""
    names = [targets] if isinstance(targets, str) else list(dict.fromkeys(targets))
    text = None if blueprint is None else blueprint.canonical_bytes().decode()
    fields: dict[str, Any] = {
        "blueprint": text,
        "source_text": "" if blueprint is None or blueprint.ops else blueprint.source_text,
        "like_artifact_id": like,
        "dims": None if dims is None else dict(dims),
        "dtype": str(dtype).removeprefix("torch."),
        "targets": tuple(parse_target(one) if isinstance(one, str) else one for one in names),
        "pipeline": pipeline,
        "budget_s": budget_s,
    }
    return CompileRequest(**fields)


async def submit_over(
    bus: Oona,
    blueprint: Blueprint | None = None,
    dims: Mapping[str, int] | None = None,
    dtype: torch.dtype | str = "float32",
    targets: Iterable[str | TargetSpec] | str = ("cpu",),
    pipeline: str = "standard",
    *,
    like: str | None = None,
    budget_s: float = DEFAULT_BUDGET_S,
    timeout_s: float = 600.0,
    trace_id: str | None = None,
) -> tuple[KernelReady, ...]:
    """Has a worker on the bus compile, and waits for its answer: one artifact for each target, in their order, in the
    store of the workers.

    Args: as of `Forge.submit`; `like` in place of a blueprint is an artifact of that store, whose blueprint (and,
        without `dims`, dims) it is. timeout_s: for everything together, the time in the queue too.

    Raises what went wrong, as `Forge.submit` does; CompileError where the worker met something else; TimeoutError,
    after which the job may still be done; BusUnavailable where it is not taken.
    """
    request = request_of(blueprint, dims, dtype, targets, pipeline, like=like, budget_s=budget_s)
    event_id = uuid.uuid4().hex
    answers = await asyncio.to_thread(bus.subscribe, (topics.KERNEL_READY, topics.COMPILE_FAILED))
    parts: dict[int, KernelReady] = {}
    try:
        if not bus.publish(topics.SUBMITTED, request, trace_id=trace_id, event_id=event_id):
            raise BusUnavailable(f"{bus.sender_id}: a request to compile was not taken")
        async with asyncio.timeout(timeout_s):
            while (delivery := await answers.receive()) is not None:
                if delivery.envelope.in_reply_to != event_id:
                    continue
                answer = delivery.parse()
                if isinstance(answer, CompileFailed):
                    told = f"{answer.error}: {answer.message}"
                    raise error_named(answer.error, answer.message) or CompileError(f"the worker answers: {told}")
                assert isinstance(answer, KernelReady)
                parts[answer.part] = answer
                if len(parts) == answer.parts:
                    return tuple(parts[part] for part in sorted(parts))
    except TimeoutError:
        raise TimeoutError(
            f"no worker has answered the request {event_id} within {timeout_s:g} s; is there one on this bus? "
            "(python -m esper_triton.tezzeret worker)"
        ) from None
    finally:
        answers.close()
    raise BusUnavailable(f"{bus.sender_id} was closed while a compile was waited for")
