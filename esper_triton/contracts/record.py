"""Record: what a store says of one artifact, signed; and the entries of its audit log. JSON on disk."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from esper_triton.contracts.manifest import ArtifactId, Digest, KernelStatus

__all__ = ["AuditEntry", "Figures", "ProverTag", "Record", "Role", "Signature", "Tag", "roles_for"]

SCHEMA_VERSION = "2.0"

Tag = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
ProverTag = Literal["high_speed", "medium_speed", "low_speed", "high_memory", "numerically_stable"]
"""What the prover says of an artifact. Whoever characterizes one by hand may say other things."""


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Role(enum.StrEnum):
    """Who signs. Each role has a key of its own: one that can sign builds cannot say that they are proven."""

    FORGE = "forge"
    PROVER = "prover"


def roles_for(status: KernelStatus) -> tuple[Role, ...]:
    """The roles that may sign a record whose manifest has this status. Archiving only takes away, so both may."""
    if status in (KernelStatus.VALIDATED, KernelStatus.REJECTED):
        return (Role.PROVER,)
    return (Role.PROVER, Role.FORGE) if status is KernelStatus.ARCHIVED else (Role.FORGE,)


class Signature(_Value):
    """An Ed25519 signature (RFC 8032). `key` is the raw public key and `value` the signature, both in hex."""

    role: Role
    key: Digest
    value: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Figures(_Value):
    """What the prover measured, for choosing among artifacts; null where it did not. Microseconds, bytes, and the
    largest relative error against float64."""

    latency_us: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    drift: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Record(_Value):
    """The head of an artifact: which manifest it has now, and what was found out about it since.

    Tags and figures are here and not in the manifest because tags are relative to what else there is: they change, and
    a checkpoint that names the manifest's digest must not break by it.
    """

    schema_version: str = SCHEMA_VERSION
    id: ArtifactId
    manifest: Digest
    tags: Annotated[tuple[Tag, ...], Field(max_length=32)] = ()
    figures: Figures = Figures()
    signature: Signature | None = None

    @property
    def is_characterized(self) -> bool:
        """Whether it says more than which manifest: tags or figures, which come from a proof."""
        return bool(self.tags) or self.figures != Figures()

    def signed_bytes(self, role: Role, key: str) -> bytes:
        """What a signature of this record is over: everything but its value, with role and key."""
        return _signed(b"esper-urza record\0", self, role, key)

    def canonical_bytes(self) -> bytes:
        """UTF-8 JSON with sorted keys, on one line."""
        return _canonical(self.model_dump(mode="json")) + b"\n"


class AuditEntry(_Value):
    """One line of the audit log.

    `previous` is the SHA-256 of the line before it (zeros at the start), newline left out. `source` and `target` are
    the statuses before and after, null for an artifact that is not there. `before` and `after` are the SHA-256 of the
    record's bytes. An entry of a record that was signed elsewhere is `imported`, and vouches for nothing. `pinned` and
    `unpinned` leave the record as it is. A `void` entry says that the change before it was never made: its writer died.
    """

    schema_version: str = SCHEMA_VERSION
    sequence: Annotated[int, Field(ge=0)]
    previous: Digest
    when: str
    what: Literal[
        "committed",
        "imported",
        "status",
        "characterized",
        "pinned",
        "unpinned",
        "removed",
        "quarantined",
        "signed",
        "void",
    ]
    artifact: ArtifactId
    source: KernelStatus | None
    target: KernelStatus | None
    manifest: Digest | None
    before: Digest | None
    after: Digest | None
    signature: Signature | None = None

    def signed_bytes(self, role: Role, key: str) -> bytes:
        """What a signature of this entry is over: everything but its value, with role and key."""
        return _signed(b"esper-urza audit\0", self, role, key)

    def canonical_bytes(self) -> bytes:
        """UTF-8 JSON with sorted keys, on one line."""
        return _canonical(self.model_dump(mode="json")) + b"\n"


def _canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _signed(domain: bytes, value: BaseModel, role: Role, key: str) -> bytes:
    body = value.model_dump(mode="json") | {"signature": {"role": role.value, "key": key}}
    return domain + _canonical(body)
