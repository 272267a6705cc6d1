"""Envelope: what every message of the bus travels in, and the topics that there are. msgpack between machines."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from esper_triton.contracts.errors import nearest

__all__ = [
    "CHARACTERIZED",
    "COMMANDS",
    "COMPILE_FAILED",
    "EPOCH",
    "FIELD_REPORTS",
    "HEALTH",
    "KERNEL_READY",
    "LIFECYCLE",
    "PROOF_FAILED",
    "RESULTS",
    "SCHEMA_VERSION",
    "STORE",
    "SUBMITTED",
    "TOPICS",
    "Envelope",
    "Message",
    "check_schema_version",
    "check_topic",
    "is_telemetry",
    "topics_matching",
]

SCHEMA_VERSION = "1.0"

HEALTH = "telemetry.seed.health"
COMMANDS = "control.kasmina.commands"
RESULTS = "control.kasmina.results"
SUBMITTED = "compilation.blueprint.submitted"
KERNEL_READY = "compilation.kernel.ready"
COMPILE_FAILED = "compilation.blueprint.failed"
CHARACTERIZED = "validation.kernel.characterized"
EPOCH = "system.events.epoch"
PROOF_FAILED = "validation.kernel.failed"
FIELD_REPORTS = "innovation.field_reports"
LIFECYCLE = "audit.lifecycle"
STORE = "audit.store"

TOPICS = (
    HEALTH,
    COMMANDS,
    RESULTS,
    SUBMITTED,
    KERNEL_READY,
    COMPILE_FAILED,
    CHARACTERIZED,
    PROOF_FAILED,
    EPOCH,
    FIELD_REPORTS,
    LIFECYCLE,
    STORE,
)
"""Every topic. `compilation.blueprint.submitted` and `compilation.kernel.ready` are the queues of workers too: one that
subscribes with a group shares the jobs with the rest of the group."""


def is_telemetry(topic: str) -> bool:
    """Whether messages of a topic may be dropped, the oldest first. Everything else is kept until it has arrived."""
    return topic.startswith("telemetry.")


def check_topic(topic: str) -> str:
    """The topic itself. Raises ValueError for one that there is not, with the nearest."""
    if topic not in TOPICS:
        raise ValueError(f"no topic {topic!r}{nearest(str(topic), TOPICS)}")
    return topic


def topics_matching(pattern: str) -> tuple[str, ...]:
    """The topics that a name or a glob such as `telemetry.*` stands for (`*` crosses dots). Raises ValueError for one
    that stands for none."""
    found = tuple(topic for topic in TOPICS if fnmatch.fnmatchcase(topic, pattern))
    if not found:
        raise ValueError(f"no topic matches {pattern!r}{nearest(pattern, TOPICS)}")
    return found


def check_schema_version(found: str, known: str) -> str:
    """`found` itself, where a reader of version `known` can read it. Raises ValueError for a newer major."""
    major = found.partition(".")[0]
    if not major.isdecimal():
        raise ValueError(f"schema_version {found!r} is not of the form MAJOR.MINOR")
    if int(major) > int(known.partition(".")[0]):
        raise ValueError(f"schema_version {found} is newer than {known}, which is read here; update esper_triton")
    return found


class Message(BaseModel):
    """Base of what a message's payload may be: a frozen value of a schema version that can be read here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: str = SCHEMA_VERSION

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, value: str) -> str:
        return check_schema_version(value, SCHEMA_VERSION)


class Envelope(Message):
    """One message.

    Attributes:
        event_id: unique; a message that is delivered twice has it twice.
        sender_id: of one bus object in one process.
        sequence: of this sender on this topic, from 0, without holes except for telemetry that was dropped.
        timestamp: when it was published, in seconds since 1970.
        trace_id: follows an artifact through everything that is done with it.
        in_reply_to: the event_id that this answers.
        payload: plain values, as the model of the topic dumps itself.
    """

    event_id: Annotated[str, Field(min_length=1, max_length=200)]
    topic: str
    sender_id: Annotated[str, Field(min_length=1, max_length=200)]
    sequence: Annotated[int, Field(ge=0)]
    timestamp: float
    trace_id: Annotated[str, Field(max_length=200)] | None = None
    in_reply_to: Annotated[str, Field(max_length=200)] | None = None
    payload: dict[str, Any]

    @field_validator("topic")
    @classmethod
    def _known(cls, value: str) -> str:
        return check_topic(value)
