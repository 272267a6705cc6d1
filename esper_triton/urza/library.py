"""Urza: artifacts by id, over a directory of objects by digest."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    InvalidCommit,
    StoreUnavailable,
    nearest,
)
from esper_triton.contracts.manifest import SCHEMA_VERSION, ArtifactId, KernelStatus, Manifest, sha256
from esper_triton.urza.directory import Damage, Directory, object_parts
from esper_triton.urza.requests import in_turn, recall, remember

__all__ = ["Artifact", "Urza", "default_root"]

# Bounds on what a reader takes into memory; far above any honest manifest, kernel or report.
MANIFEST_LIMIT_BYTES = 1 << 20
BLOB_LIMIT_BYTES = 256 << 20
REF_LIMIT_BYTES = 65  # 64 hex digits and a newline

ALLOWED: dict[KernelStatus, tuple[KernelStatus, ...]] = {
    KernelStatus.PENDING_BENCHMARKING: (KernelStatus.VALIDATED, KernelStatus.REJECTED),
    KernelStatus.PENDING_HARDWARE: (KernelStatus.VALIDATED, KernelStatus.REJECTED),
    KernelStatus.VALIDATED: (KernelStatus.REJECTED, KernelStatus.ARCHIVED),
    KernelStatus.REJECTED: (KernelStatus.ARCHIVED,),
    KernelStatus.ARCHIVED: (),
}

_ARTIFACT_ID: TypeAdapter[str] = TypeAdapter(ArtifactId)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: its manifest, and the SHA-256 (hex) that the manifest was read by."""

    manifest: Manifest
    digest: str

    @property
    def id(self) -> str:
        """`<blueprint[:12]>-<target>-<pipeline>-<build[:12]>`."""
        return self.manifest.id

    @property
    def status(self) -> KernelStatus:
        """The status when it was read."""
        return self.manifest.status


class Urza:
    """A store of artifacts in a directory, made on first use. Any number of processes may read and write at a time.

        objects/ab/<62 hex>   blobs and manifests, each named by its SHA-256, never changed
        refs/<artifact id>    the digest of the artifact's manifest: replacing this file is the commit
        requests/             what requests were built as, by the SHA-256 of each
        quarantine/           what did not have the bytes that it should have, each with a JSON report
        tmp/, lock, building/ the writers'

    What a concurrent reader may see: an artifact as one writer committed it, whole, or not at all. Objects are in place
    before the ref that leads to them, a ref is replaced in one step, and objects are never rewritten, so there is no
    moment at which one writer's manifest meets another's binary. Readers take no lock. Writers take turns.

    What survives a crash: every commit and change of status that had returned. One that had not is there as a whole, or
    leaves objects that nothing refers to and a later commit uses. A power cut is a crash: data is synced before it is
    named.

    What is trusted: nothing that is read. Each call hashes what it reads. Bytes that do not match their name are moved
    to quarantine and CorruptObject is raised; committing the same artifact again repairs it.
    """

    def __init__(self, root: str | Path) -> None:
        """`root`: the directory, `~` expanded. Touches nothing on disk."""
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        self._directory = Directory(self.root)

    def __repr__(self) -> str:
        return f"Urza({str(self.root)!r})"

    def __contains__(self, artifact_id: object) -> bool:
        """Whether an artifact was committed under this id. Does not say that its bytes are still intact."""
        return isinstance(artifact_id, str) and _is_id(artifact_id) and artifact_id in self._directory.names("refs")

    def ids(self) -> list[str]:
        """Ids of all committed artifacts, sorted. Raises StoreUnavailable."""
        return [name for name in self._directory.names("refs") if _is_id(name)]

    def object_path(self, digest: str) -> Path:
        """Where the object with this SHA-256 lies, if it does. For people and tools; `load` is what checks bytes."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is not a SHA-256 of 64 hex digits")
        return self.root.joinpath(*object_parts(digest))

    def get(self, artifact_id: str) -> Artifact:
        """The artifact's manifest, verified; its blobs are not read.

        Raises ArtifactNotFound, CorruptObject, StoreUnavailable, and ArtifactRefused where another release wrote it.
        """
        return self._repaired_or_refused(artifact_id, lambda: self._artifact(artifact_id))

    def load(self, artifact_id: str) -> tuple[Artifact, dict[str, bytes]]:
        """The artifact and all its blobs by SHA-256, every one hashed on this call. Raises as `get` does."""
        return self._repaired_or_refused(artifact_id, lambda: self._whole(artifact_id))

    def commit(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> Artifact:
        """Stores an artifact: all of it becomes visible in one step, when this returns at the latest.

        `blobs` holds exactly the digests of `manifest.blobs`, by SHA-256. An intact artifact that is already there
        under this id is kept and returned, with the status that it has; a damaged one is repaired, or replaced.
        Raises InvalidCommit where they do not fit or another build has this id, ArtifactRefused where an artifact of
        another release has it (in both cases nothing is written), and StoreUnavailable.
        """
        content = manifest.canonical_bytes()
        _check_commit(manifest, content, blobs)
        with self._directory.lock():
            stored = self._intact(manifest)
            if stored is None:
                for blob in blobs.values():
                    self._directory.write_object(blob, limit_bytes=BLOB_LIMIT_BYTES)
                # If blobs were all that it lacked, the stored manifest stands: its verdict was on these very bytes.
                stored = self._intact(manifest)
            return self._publish(manifest, content) if stored is None else stored

    def set_status(self, artifact_id: str, status: KernelStatus, report: bytes | None = None) -> Artifact:
        """Gives an artifact a new status and, where given, a new report: a new manifest under the same id, in one step.

        The old manifest stays as an object. The status that it has already changes nothing.
        Raises InvalidCommit where the move is not in `ALLOWED`, and as `get` does.
        """
        self.get(artifact_id)  # an unknown id must not make the directory, as the lock does
        with self._directory.lock():
            try:
                artifact = self._artifact(artifact_id)
            except Damage as damage:
                raise self._refusal(artifact_id, damage, self._set_aside(artifact_id, damage)) from None
            if status == artifact.status:
                return artifact
            allowed = ALLOWED[artifact.status]
            if status not in allowed:
                moves = ", ".join(allowed) or "nothing; the status is final"
                raise InvalidCommit(
                    f"artifact {artifact_id!r} cannot go from {artifact.status} to {status}; allowed: {moves}"
                )
            update: dict[str, object] = {"status": KernelStatus(status)}
            if report is not None:
                _check_size("the report", report, BLOB_LIMIT_BYTES)
                update["report"] = self._directory.write_object(report, limit_bytes=BLOB_LIMIT_BYTES)
            manifest = artifact.manifest.model_copy(update=update)
            return self._publish(manifest, manifest.canonical_bytes())

    def recall(self, request: str) -> bytes | None:
        """What `remember` has kept of the request with this SHA-256; None where that is nothing, or damaged. It is not
        signed: whoever reads it must see for himself that it fits. Raises ValueError, StoreUnavailable."""
        return recall(self._directory, request)

    def remember(self, request: str, content: bytes) -> None:
        """Keeps what a request (by its SHA-256) was built as. Raises ValueError, StoreUnavailable."""
        remember(self._directory, request, content)

    @contextlib.contextmanager
    def building(self, artifact_id: str) -> Iterator[Artifact | None]:
        """One build of an artifact at a time, in all processes and threads: gives the artifact that is there, or None
        to whoever is to build and commit it in this context; others wait. The lock ends with its holder.

        Raises as `load` does, but for artifacts that are missing or damaged: those are to be built.
        """
        if not _is_id(artifact_id):
            self.get(artifact_id)  # says what is wrong with it
        with in_turn(self._directory, artifact_id):
            try:
                existing = self.load(artifact_id)[0]
            except (ArtifactNotFound, CorruptObject):
                existing = None
            yield existing

    def _publish(self, manifest: Manifest, content: bytes) -> Artifact:
        digest = self._directory.write_object(content, limit_bytes=MANIFEST_LIMIT_BYTES)
        self._directory.write(("refs", manifest.id), f"{digest}\n".encode())
        return Artifact(manifest, digest)

    def _artifact(self, artifact_id: str) -> Artifact:
        # Where an object has the bytes that its name promises but isn't this artifact's manifest, it is the ref that is
        # wrong: the object may be a sound part of another artifact, and must stay.
        if not _is_id(artifact_id):
            form = "<blueprint sha256[:12]>-<target>-<pipeline>-<build sha256[:12]>"
            known = nearest(str(artifact_id), self.ids())
            raise ArtifactNotFound(f"{artifact_id!r} is not an artifact id ({form}){known}")
        ref = ("refs", artifact_id)
        try:
            line = self._directory.read(ref, "ref", limit_bytes=REF_LIMIT_BYTES)
        except FileNotFoundError:
            aside = [name for name in self._directory.names("quarantine") if name.startswith(artifact_id)]
            hint = f"; its ref is in quarantine ({aside[-1]})" if aside else nearest(artifact_id, self.ids())
            raise ArtifactNotFound(f"no artifact {artifact_id!r} in {self.root}{hint}") from None
        if not re.fullmatch(rb"[0-9a-f]{64}\n", line):
            reason = f"is corrupt: a SHA-256 was expected, found {line!r}"
            raise Damage(ref, "ref", reason, found=sha256(line), size_bytes=len(line))
        digest = line.decode("ascii").strip()
        content = self._directory.read_object(digest, "manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
        try:
            manifest = _parse(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:80] or "the whole"
            reason = f"names {digest}, which is not a valid manifest: {where}: {first['msg']}"
            raise Damage(ref, "ref", reason, found=sha256(line), size_bytes=len(line)) from error
        except _OtherSchema as error:
            raise ArtifactRefused(f"artifact {artifact_id!r}: {error}") from None
        if manifest.id != artifact_id:
            reason = f"names the manifest of another artifact: expected {artifact_id!r}, found {manifest.id!r}"
            raise Damage(ref, "ref", reason, found=sha256(line), size_bytes=len(line))
        return Artifact(manifest, digest)

    def _whole(self, artifact_id: str) -> tuple[Artifact, dict[str, bytes]]:
        artifact = self._artifact(artifact_id)
        roles = _roles(artifact.manifest)
        blobs = {
            digest: self._directory.read_object(digest, roles[digest], limit_bytes=BLOB_LIMIT_BYTES)
            for digest in artifact.manifest.blobs
        }
        return artifact, blobs

    def _intact(self, manifest: Manifest) -> Artifact | None:
        """The artifact stored under this id, None where there is none or it is damaged. Only under the lock."""
        try:
            stored, _ = self._whole(manifest.id)
        except ArtifactNotFound:
            return None
        except Damage as damage:
            self._set_aside(manifest.id, damage)
            return None
        for field in ("blueprint_id", "target", "pipeline", "toolchain", "dims", "dtype"):
            found, offered = getattr(stored.manifest, field), getattr(manifest, field)
            if found != offered:
                raise InvalidCommit(
                    f"artifact id {manifest.id!r} is taken by another build: {field} is {found!r} in the store and "
                    f"{offered!r} in the manifest offered"
                )
        return stored

    def _repaired_or_refused(self, artifact_id: str, read: Callable[[], _T]) -> _T:
        """What `read` gives. On damage it is read once more under the lock: a writer may have repaired it since, and a
        repaired file must not be set aside."""
        try:
            return read()
        except Damage as error:
            damage = error
        try:
            with self._directory.lock():
                try:
                    return read()
                except Damage as error:
                    damage = error
                    note = self._set_aside(artifact_id, damage)
        except StoreUnavailable as error:  # a store that cannot be written still refuses what is damaged
            note = f"; it could not be moved to quarantine: {error}"
        raise self._refusal(artifact_id, damage, note)

    def _set_aside(self, artifact_id: str, damage: Damage) -> str:
        aside = self._directory.set_aside(damage, artifact_id)
        return "" if aside is None else f"; moved to {aside}"

    def _refusal(self, artifact_id: str, damage: Damage, note: str) -> CorruptObject:
        return CorruptObject(f"artifact {artifact_id!r}: {damage}{note}; compile it again to restore it")


def default_root() -> Path:
    """The directory used when none is named: `$ESPER_URZA`, else `~/.cache/esper/urza`."""
    return Path(os.environ.get("ESPER_URZA") or "~/.cache/esper/urza").expanduser()


class _Schema(BaseModel):
    schema_version: Annotated[str, Field(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}$")]


class _OtherSchema(Exception):
    """A sound manifest of another release."""


def _parse(content: bytes) -> Manifest:
    """Raises pydantic's ValidationError, or _OtherSchema where the content is for another release to judge."""
    version = _Schema.model_validate_json(content).schema_version
    found, ours = _major_minor(version), _major_minor(SCHEMA_VERSION)
    if found[0] < ours[0]:
        raise _OtherSchema(
            f"its manifest has schema {version}, older than {ours[0]}.x; compile it again into a new store"
        )
    upgrade = f"its manifest has schema {version}, newer than {SCHEMA_VERSION}; upgrade esper_triton"
    if found[0] > ours[0]:
        raise _OtherSchema(upgrade)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError:
        if found > ours:  # the fault may be a field that came later
            raise _OtherSchema(upgrade) from None
        raise


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def _is_id(text: str) -> bool:
    try:
        _ARTIFACT_ID.validate_python(text, strict=True)
    except ValidationError:
        return False
    return True


def _roles(manifest: Manifest) -> dict[str, str]:
    """What each blob is, by digest, for messages; where several kernels share one, the first is named."""
    roles: dict[str, str] = {}
    for name, kernel in manifest.kernels.items():
        for role in ("binary", "ttir", "source"):
            roles.setdefault(getattr(kernel, role), f"{role} of kernel {name!r}")
    if manifest.report is not None:
        roles.setdefault(manifest.report, "report")
    return roles


def _check_size(what: str, content: bytes, limit_bytes: int) -> None:
    if len(content) > limit_bytes:
        raise InvalidCommit(f"{what} has {len(content)} bytes; at most {limit_bytes} are allowed")


def _check_commit(manifest: Manifest, content: bytes, blobs: Mapping[str, bytes]) -> None:
    about = f"artifact {manifest.id!r}"
    _check_size(f"{about}: the manifest", content, MANIFEST_LIMIT_BYTES)
    try:
        _parse(content)  # what this release could not read again must not be written
    except (ValidationError, _OtherSchema) as error:
        raise InvalidCommit(f"{about}: the manifest is not valid: {error}") from error
    roles = _roles(manifest)
    faults = [f"missing {roles[digest]} ({digest})" for digest in manifest.blobs if digest not in blobs]
    faults += [f"unexpected blob {digest}" for digest in blobs if digest not in roles]
    for digest in manifest.blobs:
        if digest in blobs:
            _check_size(f"{about}: {roles[digest]}", blobs[digest], BLOB_LIMIT_BYTES)
            found = sha256(blobs[digest])
            if found != digest:
                faults.append(f"{roles[digest]}: SHA-256 expected {digest}, found {found}")
    if faults:
        raise InvalidCommit(f"{about}: the blobs do not fit the manifest: " + "; ".join(faults))
