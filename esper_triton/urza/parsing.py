"""From bytes to manifests and records: what they have to be, and which release may judge them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from esper_triton.contracts.manifest import SCHEMA_VERSION as MANIFEST_SCHEMA
from esper_triton.contracts.manifest import ArtifactId, Manifest
from esper_triton.contracts.record import SCHEMA_VERSION as RECORD_SCHEMA
from esper_triton.contracts.record import Record
from esper_triton.urza.trust import is_signed

__all__ = ["OtherSchema", "first_fault", "is_id", "major_minor", "parse_manifest", "parse_record", "schema_of"]

_ARTIFACT_ID: TypeAdapter[str] = TypeAdapter(ArtifactId)


class _Schema(BaseModel):
    schema_version: Annotated[str, Field(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}$")]


def schema_of(content: bytes) -> str:
    """The schema, MAJOR.MINOR, that JSON says it has. Raises pydantic's ValidationError."""
    return _Schema.model_validate_json(content).schema_version


def major_minor(version: str) -> tuple[int, int]:
    """Both numbers of a schema, which compare as schemas do."""
    major, minor = version.split(".")
    return int(major), int(minor)


class OtherSchema(Exception):
    """A sound manifest or record of another release."""


def parse_manifest(content: bytes) -> Manifest:
    """Raises pydantic's ValidationError, or OtherSchema where the content is for another release to judge."""
    version = schema_of(content)
    found, ours = major_minor(version), major_minor(MANIFEST_SCHEMA)
    if found[0] < ours[0]:
        raise OtherSchema(
            f"its manifest has schema {version}, older than {ours[0]}.x; compile it again into a new store"
        )
    upgrade = f"its manifest has schema {version}, newer than {MANIFEST_SCHEMA}; upgrade esper_triton"
    if found[0] > ours[0]:
        raise OtherSchema(upgrade)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError:
        if found > ours:  # the fault may be a field that came later
            raise OtherSchema(upgrade) from None
        raise


def parse_record(content: bytes, artifact_id: str, *, check_signature: bool = True) -> Record:
    """Of the schema now, or of the one before, a digest and nothing else, unsigned. Its signature is right.

    Raises ValueError with the fault, or OtherSchema where the content is for another release to judge.
    """
    if re.fullmatch(rb"[0-9a-f]{64}\n", content):
        return Record(schema_version="1.0", id=artifact_id, manifest=content[:64].decode())
    try:
        version = schema_of(content)
    except ValidationError:
        raise ValueError(f"a signed record was expected, found {_shown(content)}") from None
    found, ours = major_minor(version), major_minor(RECORD_SCHEMA)
    upgrade = f"its record has schema {version}, newer than {RECORD_SCHEMA}; upgrade esper_triton"
    if found[0] > ours[0]:
        raise OtherSchema(upgrade)
    try:
        if found[0] < ours[0]:
            raise ValueError(f"schema {version} has no such form")
        record = Record.model_validate_json(content)
    except ValidationError as error:
        if found > ours:
            raise OtherSchema(upgrade) from None
        raise ValueError(first_fault(error)) from None
    if record.id != artifact_id:
        raise ValueError(f"it is of another artifact: expected {artifact_id!r}, found {record.id!r}")
    if record.canonical_bytes() != content:
        raise ValueError("it is not in the canonical form, which alone is signed")
    if check_signature and record.signature is not None and not is_signed(record):
        raise ValueError(f"its signature is not by {record.signature.role} key {record.signature.key[:16]}")
    return record


def is_id(text: object) -> bool:
    """Whether this has the form of an artifact's id."""
    try:
        _ARTIFACT_ID.validate_python(text, strict=True)
    except ValidationError:
        return False
    return True


def first_fault(error: ValidationError) -> str:
    """Where a model found the first fault, and which, on one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:80] or "the whole"
    return f"{where}: {first['msg']}"


def _shown(content: bytes) -> str:
    return repr(content if len(content) <= 80 else content[:80] + b"...")
