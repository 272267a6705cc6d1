"""Archives: artifacts with their signed records in one file, written whole and taken in whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from esper_triton.contracts.errors import (
    ArchiveRefused,
    ArtifactRefused,
    StoreUnavailable,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.record import Record
from esper_triton.urza.parsing import OtherSchema, is_id, parse_manifest, parse_record
from esper_triton.urza.shelf import BLOB_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, RECORD_LIMIT_BYTES

__all__ = ["Admitted", "ArchiveReader", "write_archive"]

SCHEMA_VERSION = 1
_CONTENTS = "esper-urza.json"
_OBJECT = re.compile(r"objects/([0-9a-f]{64})")
_RECORD = re.compile(r"records/(.{1,200})")
_MOST_MEMBERS = 1_000_000
_MOST_BYTES = 64 << 30
_DAMAGED = "it is not a tar file, or is damaged"
_PENDING = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.PENDING_HARDWARE)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Admitted:
    """One artifact of an archive that may be stored: its manifest and the bytes that this is from. `record` is None
    where it is to be signed anew, as unproven."""

    manifest: Manifest
    content: bytes
    record: Record | None
    digests: tuple[str, ...]


def write_archive(
    path: Path, artifacts: Iterable[tuple[bytes, bytes, dict[str, bytes]]], count: int, progress: Progress | None = None
) -> int:
    """Writes records, manifests and blobs as a tar file (POSIX ustar, no compression), replaced in one step.

        esper-urza.json      {"schema_version": 1}
        objects/<sha256>     manifests and blobs, each once
        records/<id>         the signed record of each artifact, after its objects
        end.json             how many objects and records there are: an archive that was cut short has none

    The same artifacts give the same bytes. Returns the size. Raises StoreUnavailable where it cannot be written.
    """
    unfinished = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    objects: set[str] = set()
    records = 0
    try:
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with (
                open(descriptor, "wb") as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
            ):
                _add(archive, _CONTENTS, json.dumps({"schema_version": SCHEMA_VERSION}).encode())
                for record, manifest, blobs in artifacts:
                    for content in (manifest, *blobs.values()):
                        digest = sha256(content)
                        if digest not in objects:
                            objects.add(digest)
                            _add(archive, f"objects/{digest}", content)
                    _add(archive, f"records/{json.loads(record)['id']}", record)
                    records += 1
                    if progress is not None:
                        progress(records, count)
                _add(archive, "end.json", json.dumps({"objects": len(objects), "records": records}).encode())
                archive.close()
                file.flush()
                os.fsync(file.fileno())
            size = unfinished.stat().st_size
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except StoreUnavailable:
        raise
    except OSError as error:
        raise StoreUnavailable(f"archive {path} cannot be written: {error.strerror or error}") from error
    return size


@dataclass
class _Contents:
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # of each object: offset and size
    records: dict[str, bytes] = field(default_factory=dict)


class ArchiveReader:
    """An archive that has been read to its end and found right: names, sizes, digests, records, nothing besides.

    Only plain files of two kinds of names are taken, so that nothing in an archive can name a place outside of a store;
    and no member becomes a file before the whole has been checked. Use as a context; objects are read when asked for,
    and hashed again.
    """

    def __init__(self, path: Path) -> None:
        """Raises ArchiveRefused, and StoreUnavailable where the file cannot be read."""
        self._path = path
        try:
            self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115 - closed by the context that this is
        except OSError as error:
            raise StoreUnavailable(f"archive {path} cannot be read: {error.strerror}") from error
        try:
            self._contents = self._checked()
        except OSError as error:
            self._file.close()
            raise StoreUnavailable(f"archive {path} cannot be read: {error.strerror or error}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def object(self, digest: str) -> bytes:
        """Raises ArchiveRefused where the file has changed since it was opened."""
        offset, size = self._contents.places[digest]
        self._file.seek(offset)
        content = self._file.read(size)
        if sha256(content) != digest:
            raise self._refused(f"objects/{digest} has changed while it was read")
        return content

    def admitted(
        self, check: Callable[[Record, Manifest], None], *, resign: bool, progress: Progress | None = None
    ) -> list[Admitted]:
        """Every artifact, after `check` has taken it. Raises ArchiveRefused, UntrustedArtifact, ArtifactRefused.

        resign: one that is not trusted is admitted as an unproven one, without its report, tags and figures.
        """
        found = []
        for artifact_id, content in self._contents.records.items():
            found.append(self._admitted(artifact_id, content, check, resign=resign))
            if progress is not None:
                progress(len(found), len(self._contents.records))
        needed = {digest for one in found for digest in one.digests}
        needed |= {parse_record(content, name).manifest for name, content in self._contents.records.items()}
        if not resign and (extra := sorted(self._contents.places.keys() - needed)):
            raise self._refused(f"objects/{extra[0]} is part of no artifact in it")
        return found

    def _admitted(
        self, artifact_id: str, content: bytes, check: Callable[[Record, Manifest], None], *, resign: bool
    ) -> Admitted:
        where = f"records/{artifact_id}"
        try:
            record = parse_record(content, artifact_id)
        except ValueError as error:
            raise self._refused(f"{where} is corrupt: {error}") from error
        except OtherSchema as error:
            raise ArtifactRefused(f"archive {self._path}: {where}: {error}") from None
        if record.manifest not in self._contents.places:
            raise self._refused(f"{where}: its manifest {record.manifest} is not in it")
        if self._contents.places[record.manifest][1] > MANIFEST_LIMIT_BYTES:
            raise self._refused(f"{where}: its manifest is larger than {MANIFEST_LIMIT_BYTES} bytes")
        try:
            stored = self.object(record.manifest)
            manifest = parse_manifest(stored)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]["msg"]
            raise self._refused(f"{where}: objects/{record.manifest} is not a manifest: {first}") from error
        except OtherSchema as error:
            raise ArtifactRefused(f"archive {self._path}: {where}: {error}") from None
        if manifest.id != artifact_id:
            raise self._refused(f"{where}: its manifest is of another artifact: {manifest.id}")
        for digest in manifest.blobs:
            if digest not in self._contents.places:
                raise self._refused(f"{where}: blob {digest} is not in it")
        try:
            check(record, manifest)
        except UntrustedArtifact:
            if not resign:
                raise
            status = manifest.status if manifest.status in _PENDING else KernelStatus.PENDING_BENCHMARKING
            manifest = manifest.with_status(status, None)
            return Admitted(manifest, manifest.canonical_bytes(), None, manifest.blobs)
        return Admitted(manifest, stored, record, manifest.blobs)

    def _checked(self) -> _Contents:
        contents = _Contents()
        end: bytes | None = None
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                for number, member in enumerate(self._members(archive)):
                    size = self._content_size(member, archive)
                    if number == 0:
                        self._check_schema(member, archive)
                    elif end is not None:
                        raise self._refused(f"{member.name!r} comes after its end")
                    elif member.name == "end.json":
                        end = self._read(archive, member, RECORD_LIMIT_BYTES)
                    elif found := _OBJECT.fullmatch(member.name):
                        if found[1] in contents.places:
                            raise self._refused(f"{member.name!r} is there twice")
                        content = self._read(archive, member, BLOB_LIMIT_BYTES)
                        if sha256(content) != found[1]:
                            raise self._refused(f"{member.name} is corrupt: it has the SHA-256 {sha256(content)}")
                        contents.places[found[1]] = (member.offset_data, size)
                    elif (found := _RECORD.fullmatch(member.name)) and is_id(found[1]):
                        if found[1] in contents.records:
                            raise self._refused(f"{member.name!r} is there twice")
                        contents.records[found[1]] = self._read(archive, member, RECORD_LIMIT_BYTES)
                    else:
                        raise self._refused(
                            f"{member.name[:200]!r} is not a name that an archive has: objects/<sha256> or records/<id>"
                        )
                offset = archive.offset
        except tarfile.TarError as error:
            raise self._refused(_DAMAGED) from error
        except (ValueError, OverflowError, EOFError, UnicodeError) as error:  # tarfile's, on headers that are nonsense
            if isinstance(error, ArchiveRefused):
                raise
            raise self._refused(_DAMAGED) from error
        if end is None:
            raise self._refused("it was cut short: it has no end.json")
        said = json.dumps({"objects": len(contents.places), "records": len(contents.records)}).encode()
        if end != said:
            raise self._refused(f"its end says {end[:100]!r}, and {said!r} was found")
        self._file.seek(offset)
        # Two empty blocks, and then as many as make it a multiple of a record.
        most = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
        rest = self._file.read(most)
        if rest.strip(b"\0") or len(rest) == most:
            raise self._refused("something comes after its end")
        return contents

    def _members(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        total = 0
        for count, member in enumerate(archive):
            if count >= _MOST_MEMBERS:
                raise self._refused(f"it has more than {_MOST_MEMBERS} entries")
            total += member.size
            if total > _MOST_BYTES:
                raise self._refused(f"it holds more than {_MOST_BYTES} bytes")
            yield member
            archive.members = []  # type: ignore[attr-defined]  # else it keeps every header

    def _content_size(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> int:
        name = member.name[:200]
        if member.size < 0:  # newer releases of tarfile say so themselves
            raise self._refused(_DAMAGED)
        if name.startswith("/") or ".." in name.split("/"):
            raise self._refused(f"{name!r} leads out of it")
        if member.issym() or member.islnk():
            raise self._refused(f"{name!r} is a link")
        if not member.isreg() or member.issparse():
            raise self._refused(f"{name!r} is not a plain file")
        if member.pax_headers or archive.pax_headers:
            raise self._refused(f"{name!r} has extended headers, which no archive has")
        return member.size

    def _check_schema(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        version: object = None
        if member.name == _CONTENTS:
            content = self._read(archive, member, RECORD_LIMIT_BYTES)
            with contextlib.suppress(ValueError, AttributeError):
                version = json.loads(content).get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise self._refused(f"it does not begin with {_CONTENTS}, so it is no archive of a store")
        if version > SCHEMA_VERSION:
            raise ArtifactRefused(
                f"archive {self._path} has schema {version}, newer than {SCHEMA_VERSION}; upgrade esper_triton"
            )

    def _read(self, archive: tarfile.TarFile, member: tarfile.TarInfo, limit_bytes: int) -> bytes:
        if member.size > limit_bytes:
            raise self._refused(f"{member.name[:200]!r} has {member.size} bytes; at most {limit_bytes} are allowed")
        file = archive.extractfile(member)
        content = b"" if file is None else file.read()
        if len(content) != member.size:
            raise self._refused(f"{member.name[:200]!r} was cut short: {len(content)} of {member.size} bytes")
        return content

    def _refused(self, fault: str) -> ArchiveRefused:
        return ArchiveRefused(f"archive {self._path}: {fault}; nothing of it was stored")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
