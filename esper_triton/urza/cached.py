"""What stores on other machines have in common: a directory here in front of them, and what is done to fill it."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import time
from pathlib import Path

from pydantic import ValidationError

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    InvalidCommit,
    StoreUnavailable,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import Manifest, sha256
from esper_triton.contracts.query import KernelMatch
from esper_triton.contracts.record import Record
from esper_triton.urza import keeping
from esper_triton.urza.carrying import Imported, Progress
from esper_triton.urza.collecting import Collected
from esper_triton.urza.directory import Damage
from esper_triton.urza.incoming import Incoming, sweep
from esper_triton.urza.library import Urza
from esper_triton.urza.parsing import OtherSchema, parse_manifest, parse_record
from esper_triton.urza.shelf import BLOB_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, Artifact

__all__ = ["CachedUrza", "Unreachable", "cache_root"]


class Unreachable(StoreUnavailable):
    """A store on another machine does not answer. What the cache has can still be had."""


class CachedUrza(Urza, abc.ABC):
    """A store elsewhere, and a directory (`root`) that caches what was read from it.

    `get` and `load` ask which record an artifact has there, at most every `fresh_s` seconds, and fetch what the cache
    lacks: every object is hashed, and signature and trust are checked here, whatever was said there. An artifact comes
    into the cache as a whole. Where the store cannot be reached, what the cache has is served, and told once as an
    event (`degraded`); what it lacks raises Unreachable, a StoreUnavailable. Who rules over the store elsewhere can
    give an old record of an artifact, rightly signed as that is, and nothing here can tell.

    Objects and records come here without waiting for the disk, which would be most of the time of a load. A power cut
    may damage those of the last seconds, as a load finds, which then fetches them again.
    """

    _replaceable = ("objects", "refs")
    _fresh_s: float
    _where: str

    def _begin(self, where: str, fresh_s: float) -> None:
        self._where, self._fresh_s = where, fresh_s
        self._asked: dict[str, float] = {}
        self._swept = False

    # ---- what each kind has of its own

    @property
    @abc.abstractmethod
    def _how_to_shrink(self) -> str:
        """Why no collection is made from here, and what to do."""

    @abc.abstractmethod
    def _ask_record(self, artifact_id: str, known: str | None) -> bytes | None:
        """The bytes of an artifact's record there; may be None where their SHA-256 is `known`. Raises ArtifactNotFound,
        CorruptObject, InvalidCommit where this is no id, and Unreachable."""

    @abc.abstractmethod
    def _download(self, digest: str, incoming: Incoming, limit_bytes: int) -> None:
        """Appends to `incoming` until it has the object. Raises ArtifactNotFound, CorruptObject, Unreachable."""

    def _know_keys(self) -> None:
        """Makes sure of the public keys that the trust policy calls local."""

    # ---- reading

    def __repr__(self) -> str:
        return f"Urza({self._where!r})"

    @property
    def location(self) -> str:
        return self._where

    def get(self, artifact_id: str) -> Artifact:
        self._fetch(artifact_id)
        try:
            return super().get(artifact_id)
        except CorruptObject:
            self._fetch(artifact_id, again=True)
            return super().get(artifact_id)

    def load(self, artifact_id: str) -> tuple[Artifact, dict[str, bytes]]:
        self._fetch(artifact_id)
        try:
            return super().load(artifact_id)
        except CorruptObject:
            self._fetch(artifact_id, again=True)
            return super().load(artifact_id)

    def match(self, artifact_id: str) -> KernelMatch | None:
        self._fetch(artifact_id)
        return super().match(artifact_id)

    def whole(self, artifact_id: str) -> tuple[Record, bytes, Manifest, dict[str, bytes]]:
        self.load(artifact_id)
        return super().whole(artifact_id)

    # ---- writing

    def sign(self, artifact_id: str) -> Artifact:
        raise InvalidCommit(f"artifact {artifact_id!r}: sign it in the store that has it, which {self._where} is not")

    def import_(self, path: str | Path, *, resign: bool = False, progress: Progress | None = None) -> Imported:
        raise InvalidCommit(
            f"archive {path}: an archive is imported into a directory, and from there pushed to {self._where}; nothing "
            "of it was stored"
        )

    # ---- space

    def pin(self, artifact_id: str) -> bool:
        self._fetch(artifact_id)
        return super().pin(artifact_id)

    def gc(self, max_bytes: int | None = None, *, dry_run: bool = False, progress: Progress | None = None) -> Collected:
        raise InvalidCommit(
            f"nothing was removed: {self._how_to_shrink}; for the cache of it here, `python -m esper_triton.urza gc "
            f"--urza {self.root}`, or max_bytes="
        )

    # ---- inside

    def _fetch(self, artifact_id: str, *, again: bool = False) -> None:
        """Makes the cache's record of an artifact the server's, with all that it names."""
        now = time.monotonic()
        if not again and now - self._asked.get(artifact_id, -1e9) < self._fresh_s and super().__contains__(artifact_id):
            return
        cached = None if again else self._shelf.head(artifact_id) if super().__contains__(artifact_id) else None
        try:
            content = self._ask_record(artifact_id, cached)
            if content is not None and (again or sha256(content) != self._shelf.head(artifact_id)):
                self._take(artifact_id, content)
        except Unreachable as error:
            if not super().__contains__(artifact_id):
                raise Unreachable(f"artifact {artifact_id!r} is not in the cache, {self.root}: {error}") from error
            self._offline(error)
            return
        except InvalidCommit:  # not an id: the cache says so
            return
        except ArtifactNotFound:
            if super().__contains__(artifact_id):
                self.drop(artifact_id)
                keeping.unpin(self._shelf, artifact_id)
            raise
        self._asked[artifact_id] = now

    def _take(self, artifact_id: str, content: bytes) -> None:
        """Fetches what a record from elsewhere names, checks all of it, and puts it into the cache."""
        record, manifest, stored = self._checked(artifact_id, content)
        blobs = {digest: self._object(digest, BLOB_LIMIT_BYTES) for digest in manifest.blobs}
        try:
            self.take(manifest, stored, blobs, record)
        except InvalidCommit:  # another build under the id, which is not there any more
            self.drop(artifact_id)
            self.take(manifest, stored, blobs, record)
        self._asked[artifact_id] = time.monotonic()
        self._keep_within(sum(map(len, blobs.values())))

    def _checked(self, artifact_id: str, content: bytes) -> tuple[Record, Manifest, bytes]:
        """A record from elsewhere, its manifest, and that one's bytes, after signature and trust were checked."""
        about = f"{self._where}: artifact {artifact_id!r}"
        try:
            record = parse_record(content, artifact_id)
        except ValueError as error:
            raise CorruptObject(f"{about}: its record is corrupt: {error}") from error
        except OtherSchema as error:
            raise ArtifactRefused(f"{about}: {error}") from None
        self._know_keys()
        stored = self._object(record.manifest, MANIFEST_LIMIT_BYTES)
        try:
            manifest = parse_manifest(stored)
        except ValidationError as error:
            raise CorruptObject(f"{about}: its manifest is not one: {error}") from error
        except OtherSchema as error:
            raise ArtifactRefused(f"{about}: {error}") from None
        if manifest.id != artifact_id:
            raise CorruptObject(f"{about}: it was given the manifest of {manifest.id!r}")
        try:
            self.check_trust(record, manifest)
        except UntrustedArtifact as error:
            raise UntrustedArtifact(f"{self._where}: {error}") from error
        return record, manifest, stored

    def _object(self, digest: str, limit_bytes: int) -> bytes:
        with contextlib.suppress(Damage):
            return self.directory.read_object(digest, "object", limit_bytes=limit_bytes)
        if not self._swept:
            self._swept = True
            sweep(self.directory)
        with Incoming(self.directory, digest) as incoming:
            try:
                return self.directory.read_object(digest, "object", limit_bytes=limit_bytes)  # another was faster
            except Damage as damage:
                if not damage.missing:
                    with self._shelf.lock():
                        self.directory.set_aside(damage, None)
            self._download(digest, incoming, limit_bytes)
            incoming.finish()
        return self.directory.read_object(digest, "object", limit_bytes=limit_bytes)

    def _offline(self, error: Unreachable) -> None:
        if not self.root.exists():
            raise error  # no answer is not the answer that there is nothing
        self._degraded("offline", f"the cache is used alone: {error}")


def cache_root(url: str) -> Path:
    """The cache of a URL: `urza-<12 hex>` in `$ESPER_CACHE`, else in `~/.cache/esper`."""
    folder = Path(os.environ.get("ESPER_CACHE") or "~/.cache/esper").expanduser()
    return folder / f"urza-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
