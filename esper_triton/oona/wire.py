"""Bytes of messages and of frames: msgpack, checked on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
from pydantic import BaseModel, ValidationError

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.commands import CommandResult, KasminaCommand
from esper_triton.contracts.envelope import Envelope, Message
from esper_triton.contracts.errors import MalformedMessage
from esper_triton.contracts.events import (
    CompileFailed,
    CompileRequest,
    EpochEvent,
    FieldReport,
    KernelCharacterized,
    KernelReady,
    ProofFailed,
    StoreEvent,
    TransitionEvent,
)
from esper_triton.contracts.health import HealthFrame

__all__ = [
    "FRAME_LIMIT",
    "MESSAGE_LIMIT",
    "MODELS",
    "check_message_limit",
    "faults",
    "pack",
    "pack_frame",
    "parse",
    "plain",
    "unpack",
    "unpack_frame",
]

MODELS: Mapping[str, type[Message]] = {
    topics.HEALTH: HealthFrame,
    topics.COMMANDS: KasminaCommand,
    topics.RESULTS: CommandResult,
    topics.SUBMITTED: CompileRequest,
    topics.KERNEL_READY: KernelReady,
    topics.COMPILE_FAILED: CompileFailed,
    topics.CHARACTERIZED: KernelCharacterized,
    topics.PROOF_FAILED: ProofFailed,
    topics.EPOCH: EpochEvent,
    topics.FIELD_REPORTS: FieldReport,
    topics.LIFECYCLE: TransitionEvent,
    topics.STORE: StoreEvent,
}
"""What the payload of each topic is."""

MESSAGE_LIMIT = 16 * 2**20
"""Bytes of one message that can be allowed."""
FRAME_LIMIT = 3 * MESSAGE_LIMIT
"""Bytes of a frame. A batch has one message more than fits, at most, so that no sender can make a frame that its hub
takes for an attack, and send it again for ever."""


def check_message_limit(limit_bytes: int) -> None:
    """Raises ValueError for a limit that frames have no room for."""
    if not 1 <= limit_bytes <= MESSAGE_LIMIT:
        raise ValueError(f"max_message_bytes is from 1 to {MESSAGE_LIMIT}, found {limit_bytes}")


def faults(error: ValidationError) -> str:
    """Every fault that pydantic has found, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in error.errors())


def plain(payload: object) -> dict[str, Any]:
    """A payload as plain values. Raises MalformedMessage for what is neither a model nor a mapping."""
    if isinstance(payload, BaseModel):
        return payload.model_dump(mode="json")
    if isinstance(payload, Mapping):
        return dict(payload)
    raise MalformedMessage(f"a payload is a pydantic model or a mapping, found {type(payload).__name__}")


def parse(envelope: Envelope) -> Message:
    """The payload as its topic's model. Raises MalformedMessage."""
    model = MODELS[envelope.topic]
    try:
        return model.model_validate(envelope.payload, strict=False)
    except ValidationError as error:
        raise MalformedMessage(
            f"{envelope.topic} of {envelope.sender_id}: no {model.__name__}: {faults(error)}"
        ) from error


def pack(values: Mapping[str, Any]) -> bytes:
    """The bytes of a message with these fields of an Envelope. Raises MalformedMessage for values that msgpack has no
    form for."""
    try:
        packed: bytes = msgpack.packb(values)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MalformedMessage(f"{values['topic']}: a payload of plain values is expected: {error}") from error
    return packed


def unpack(content: bytes) -> Envelope:
    """The message of these bytes. Raises MalformedMessage."""
    try:
        return Envelope.model_validate(_unpacked(content))
    except ValidationError as error:
        raise MalformedMessage(f"no envelope: {faults(error)}") from error


def pack_frame(operation: str, **fields: object) -> bytes:
    """A frame between a hub and its clients."""
    packed: bytes = msgpack.packb({"op": operation, **fields})
    return packed


def unpack_frame(content: bytes) -> dict[str, Any]:
    """A frame's fields, `op` among them. Raises MalformedMessage."""
    found = _unpacked(content)
    if not isinstance(found, dict) or not isinstance(found.get("op"), str):
        raise MalformedMessage(f"a frame is a map with a string op, found {type(found).__name__}")
    return found


def _unpacked(content: bytes) -> Any:
    try:
        return msgpack.unpackb(content)
    except Exception as error:  # msgpack raises a dozen kinds, ValueError and what the bytes make of Python's own
        raise MalformedMessage(f"not msgpack: {type(error).__name__}: {error}") from error
