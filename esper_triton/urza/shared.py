"""`Urza("s3://bucket/prefix")`: artifacts in a place that fsspec knows, with a directory here in front."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    InvalidCommit,
    StoreUnavailable,
)
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.query import KernelMatch, KernelQuery
from esper_triton.contracts.record import Figures, Record, Role
from esper_triton.urza.cached import CachedUrza, Unreachable, cache_root
from esper_triton.urza.checks import check_commit
from esper_triton.urza.directory import object_parts
from esper_triton.urza.incoming import Incoming
from esper_triton.urza.library import Urza
from esper_triton.urza.parsing import is_id
from esper_triton.urza.shelf import RECORD_LIMIT_BYTES, Artifact
from esper_triton.urza.trust import Trust

__all__ = ["SharedUrza"]

_PIECE_BYTES = 1 << 20
_SECRET = re.compile("key|secret|token|passw|credential", re.IGNORECASE)
_T = TypeVar("_T")


class _Catalog(Urza):
    _replaceable = ("objects", "refs", "audit.log")


class SharedUrza(CachedUrza):
    """Objects and records below a URL, named as in a directory (`objects/ab/...`, `refs/<id>`); see CachedUrza for what
    is kept here.

    Nobody there signs: this side does, with the keys of the cache or of `keys`. For several machines, give each the
    same `keys` folder, or name the others' public keys in `trust`. A record is written after all that it names, in one
    step as far as the place has such (S3 does): that is the commit. There is no lock there: of two that write one
    artifact's record within the same moment the last one stays, whole; a record that had changed since it was read is
    not overwritten. Nothing is removed there, so pins and lineages count in the cache alone, as leases do. The audit
    log and the history are of the cache, too.
    """

    def __init__(
        self,
        url: str,
        *,
        trust: str | Trust = "local",
        keys: str | Path | None = None,
        roles: Iterable[Role | str] = tuple(Role),
        max_bytes: int | None = None,
        cache: str | Path | None = None,
        storage_options: Mapping[str, Any] | None = None,
        fresh_s: float = 5.0,
    ) -> None:
        """Asks nothing yet.

        Args:
            url: such as `s3://bucket/prefix`; every protocol that fsspec has a package for. storage_options: what that
                takes, such as `endpoint_url` of S3. Secrets are better in the environment: a pickle has none of them.
            trust, keys, roles: as of a directory. max_bytes: what the cache may hold. cache: its directory.

        Raises ValueError, and StoreUnavailable where the protocol's package is not installed.
        """
        try:
            from fsspec.core import url_to_fs

            self._files, self._prefix = url_to_fs(url, **(storage_options or {}))
        except (ImportError, ValueError) as error:
            raise StoreUnavailable(
                f"{url!r} cannot be opened: {error}; `pip install 'esper-triton[remote]'` has what s3:// needs, and "
                "`python -m esper_triton.urza serve` needs nothing"
            ) from error
        self._begin(url, fresh_s)
        self._marks: dict[str, object] = {}
        self._lost: set[str] = set()  # objects that are not there, or have not the bytes that they should have
        super().__init__(cache or cache_root(url), trust=trust, keys=keys, roles=roles, max_bytes=max_bytes)
        # What there is, without blobs, for questions: the cache itself has whole artifacts only.
        self._catalog = _Catalog(self.root / "catalog", trust=self.trust, roles=())
        self._options = {
            **self._options,
            "cache": str(self.root),
            "storage_options": None if storage_options is None else dict(storage_options),
            "fresh_s": fresh_s,
        }

    def _sent_without_secrets(self) -> dict[str, Any]:
        sent = self.sent()
        return sent | {"storage_options": _without_secrets(sent["storage_options"])}

    def __contains__(self, artifact_id: object) -> bool:
        if not is_id(artifact_id):
            return False
        try:
            return bool(self._there(lambda: self._files.exists(self._path("refs", str(artifact_id)))))
        except Unreachable:
            return super().__contains__(artifact_id)

    def close(self) -> None:
        super().close()
        self._catalog.close()

    # ---- reading

    def ids(self) -> list[str]:
        try:
            return sorted(self._listed())
        except Unreachable as error:
            self._offline(error)
            return super().ids()

    def query(self, query: KernelQuery | None = None, /, **conditions: Any) -> list[KernelMatch]:
        asked = query if query is not None else KernelQuery(**conditions)
        try:
            self._sync()
        except Unreachable as error:
            self._offline(error)
        return self._catalog.query(asked)

    # ---- writing

    def commit(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> Artifact:
        check_commit(manifest, manifest.canonical_bytes(), blobs)
        with contextlib.suppress(ArtifactNotFound, ArtifactRefused, CorruptObject):
            self._fetch(manifest.id)
        before = self._head(manifest.id)
        super().commit(manifest, blobs)
        return self._published(manifest.id, before)

    def take_signed(self, manifest: Manifest, content: bytes, blobs: Mapping[str, bytes], record: Record) -> Artifact:
        with contextlib.suppress(ArtifactNotFound, ArtifactRefused, CorruptObject):
            self._fetch(manifest.id)
        before = self._head(manifest.id)
        super().take_signed(manifest, content, blobs, record)
        return self._published(manifest.id, before)

    def set_status(
        self,
        artifact_id: str,
        status: KernelStatus,
        report: bytes | None = None,
        *,
        tags: Iterable[str] | None = None,
        figures: Figures | None = None,
    ) -> Artifact:
        self._fetch(artifact_id, again=True)
        before = self._head(artifact_id)
        super().set_status(artifact_id, status, report, tags=tags, figures=figures)
        return self._published(artifact_id, before)

    def _published(self, artifact_id: str, before: str | None) -> Artifact:
        """Brings an artifact of the cache there. Raises InvalidCommit where its record there is not `before` any more:
        the cache then has what is there."""
        artifact, blobs = self._shelf.whole(artifact_id)
        content, record = self._shelf.record(artifact_id)
        try:
            if sha256(content) != before or not self._lost.isdisjoint((*blobs, record.manifest)):
                for digest, one in (*blobs.items(), (record.manifest, self._shelf.manifest_bytes(record))):
                    self._there(functools.partial(self._put_object, digest, one))
                if self._head(artifact_id) != before:
                    raise InvalidCommit(
                        f"artifact {artifact_id!r} was changed at {self._where} meanwhile; ask it again"
                    )
                self._there(lambda: self._put(self._path("refs", artifact_id), content))
        except BaseException:
            with contextlib.suppress(StoreUnavailable):
                self.drop(artifact_id)  # else the cache would have what is nowhere else
            self._asked.pop(artifact_id, None)
            raise
        return artifact

    # ---- inside

    @property
    def _how_to_shrink(self) -> str:
        return (
            f"{self._where} has no lock, and what is garbage there another machine may be about to commit; pull what "
            "is to stay into a directory, push it from there to another prefix, and remove the old one when it is not "
            "used any more"
        )

    def _ask_record(self, artifact_id: str, known: str | None) -> bytes | None:
        if not is_id(artifact_id):
            raise InvalidCommit(f"{artifact_id!r} is not an artifact id")
        try:
            content: bytes = self._there(
                lambda: self._files.cat_file(self._path("refs", artifact_id), start=0, end=RECORD_LIMIT_BYTES + 1)
            )
        except FileNotFoundError:
            raise ArtifactNotFound(f"no artifact {artifact_id!r} in {self._where}") from None
        if len(content) > RECORD_LIMIT_BYTES:
            raise CorruptObject(f"{self._where}: record of {artifact_id!r}: more than {RECORD_LIMIT_BYTES} bytes")
        return content

    def _download(self, digest: str, incoming: Incoming, limit_bytes: int) -> None:
        path = self._path(*object_parts(digest))

        def pieces() -> None:
            with self._files.open(path, "rb") as file:
                if incoming.size_bytes > file.size:
                    incoming.restart()
                file.seek(incoming.size_bytes)
                while piece := file.read(_PIECE_BYTES):
                    if incoming.size_bytes + len(piece) > limit_bytes:
                        incoming.restart()
                        raise CorruptObject(f"{self._where}: object {digest} has more than {limit_bytes} bytes")
                    incoming.append(piece)

        resumed = incoming.size_bytes > 0
        try:
            self._there(pieces)
            if incoming.digest != digest and resumed:
                incoming.restart()
                self._there(pieces)
        except FileNotFoundError:
            self._lost.add(digest)
            raise CorruptObject(f"{self._where}: no object has the SHA-256 {digest}") from None
        if incoming.digest != digest:
            found = incoming.digest
            incoming.restart()
            self._lost.add(digest)
            raise CorruptObject(f"{self._where}: SHA-256 expected {digest}, found {found}")

    def _head(self, artifact_id: str) -> str | None:
        try:
            content = self._ask_record(artifact_id, None)
        except ArtifactNotFound:
            return None
        return None if content is None else sha256(content)

    def _put_object(self, digest: str, content: bytes) -> None:
        path = self._path(*object_parts(digest))
        if digest in self._lost or not self._files.exists(path):
            self._put(path, content)
            self._lost.discard(digest)

    def _put(self, path: str, content: bytes) -> None:
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(path, content)

    def _path(self, *parts: str) -> str:
        return "/".join((self._prefix.rstrip("/"), *parts))

    def _listed(self) -> dict[str, object]:
        """The ids there, each with what changes when its record does."""

        def listed() -> list[dict[str, Any]]:
            self._files.invalidate_cache()
            try:
                found: list[dict[str, Any]] = self._files.ls(self._path("refs"), detail=True)
            except FileNotFoundError:
                return []
            return found

        names = {str(one["name"]).rpartition("/")[2]: one for one in self._there(listed)}
        return {name: json.dumps(one, default=str, sort_keys=True) for name, one in names.items() if is_id(name)}

    def _sync(self) -> None:
        """Makes the catalogue what is there. What cannot be read or is not trusted is left out of it."""
        marks = self._listed()
        for artifact_id in self._catalog.ids():
            if artifact_id not in marks:
                self._catalog.drop(artifact_id)
        for artifact_id, mark in marks.items():
            if self._marks.get(artifact_id) == mark:
                continue
            with contextlib.suppress(ArtifactNotFound, ArtifactRefused, CorruptObject):
                content = self._ask_record(artifact_id, None)
                if content is not None and sha256(content) != self._catalog._shelf.head(artifact_id):
                    record, manifest, stored = self._checked(artifact_id, content)
                    with self._catalog._shelf.lock():
                        self._catalog._shelf.publish(manifest, stored, what="imported", record=record)
            self._marks[artifact_id] = mark

    def _there(self, action: Callable[[], _T]) -> _T:
        """What `action` gives; FileNotFoundError is its own, and everything else that goes wrong there Unreachable."""
        with self._translated():
            return action()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreUnavailable, CorruptObject):
            raise
        except Exception as error:  # of whichever package: their classes have no common base
            raise Unreachable(f"{self._where} cannot be reached: {type(error).__name__}: {error}") from error


def _without_secrets(options: Any) -> Any:
    """Options without those that are secrets by their name, such as `secret` and `aws_access_key_id`."""
    if not isinstance(options, Mapping):
        return options
    return {name: _without_secrets(value) for name, value in options.items() if not _SECRET.search(str(name))}
