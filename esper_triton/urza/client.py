"""`Urza("https://...")`: a store on another machine, with a directory here that keeps what was loaded from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    InvalidCommit,
    StoreUnavailable,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.query import Change, KernelMatch, KernelQuery
from esper_triton.contracts.record import Figures, Record, Role
from esper_triton.urza.checks import check_commit, check_size
from esper_triton.urza.directory import Damage
from esper_triton.urza.incoming import Incoming, sweep
from esper_triton.urza.library import Urza
from esper_triton.urza.shelf import (
    BLOB_LIMIT_BYTES,
    MANIFEST_LIMIT_BYTES,
    Artifact,
    OtherSchema,
    parse_manifest,
    parse_record,
)
from esper_triton.urza.trust import Trust
from esper_triton.urza.wire import MissingThere, Patience, Server, Unreachable

__all__ = ["RemoteUrza", "cache_root"]

_ABANDONED_S = 7 * 86400.0


class RemoteUrza(Urza):
    """A store behind a server, and a directory (`root`) that caches what was read from it.

    `get` and `load` ask the server which record an artifact has, at most every `fresh_s` seconds, and fetch what the
    cache lacks: every object is hashed, and signature and trust are checked here, whatever the server says. An artifact
    comes into the cache as a whole. Where the server cannot be reached, what the cache has is served, and told once as
    an event (`degraded`); what it lacks raises Unreachable, a StoreUnavailable. A server can give an old record of an
    artifact, rightly signed as that is, and nothing here can tell.

    `commit`, `set_status` and what is made of them are done by the server, which signs them if the token allows.
    `query`, `history` and `ids` ask it, and the cache while it cannot be reached. Pins, lineages, leases, `gc`,
    `verify` and `export` are of the cache.
    """

    def __init__(
        self,
        url: str,
        *,
        trust: str | Trust = "local",
        keys: str | Path | None = None,
        roles: Iterable[Role | str] = (),
        max_bytes: int | None = None,
        cache: str | Path | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
        patience: Patience | None = None,
        fresh_s: float = 5.0,
    ) -> None:
        """Asks nothing yet.

        Args:
            url: `https://HOST[:PORT][/PREFIX]`; `http` is taken for this machine only.
            trust: as of a directory. `local` are the keys that the server named when it was first asked; they are kept
                in the cache, and a server that names others later is refused.
            max_bytes: what the cache may hold.
            cache: its directory; by default one in `~/.cache/esper/` by the URL.
            token: else `$ESPER_URZA_TOKEN`. ca: certificates to trust instead of the system's.

        Raises ValueError, and StoreUnavailable where `ca` cannot be read.
        """
        if keys is not None:
            raise ValueError(f"{url!r}: a server signs with its own keys; keys= is for a directory")
        token = os.environ.get("ESPER_URZA_TOKEN") if token is None else token
        self._server = Server(url, token=token or None, ca=ca, patience=patience)
        self._fresh_s = fresh_s
        self._asked: dict[str, float] = {}
        self._keys_known = self._swept = False
        super().__init__(cache or cache_root(self._server.url), trust=trust, roles=(), max_bytes=max_bytes)
        self._options: dict[str, Any] = {
            "trust": self.trust,
            "max_bytes": max_bytes,
            "cache": str(self.root),
            "token": token,
            "ca": None if ca is None else os.fspath(ca),
            "patience": patience,
            "fresh_s": fresh_s,
        }

    def __repr__(self) -> str:
        return f"Urza({self._server.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._server.url, self._options)

    def __contains__(self, artifact_id: object) -> bool:
        if not isinstance(artifact_id, str):
            return False
        try:
            self._server.ask("GET", f"/v1/artifacts/{quote(artifact_id, safe='')}")
        except Unreachable:
            return super().__contains__(artifact_id)
        except (ArtifactNotFound, ArtifactRefused, CorruptObject, InvalidCommit):
            return False
        return True

    @property
    def location(self) -> str:
        return self._server.url

    def close(self) -> None:
        super().close()
        self._server.close()

    # ---- reading

    def ids(self) -> list[str]:
        try:
            found = self._server.ask("GET", "/v1/artifacts").json()["ids"]
        except Unreachable as error:
            self._offline(error)
            return super().ids()
        return sorted(map(str, found))

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

    def query(self, query: KernelQuery | None = None, /, **conditions: Any) -> list[KernelMatch]:
        asked = query if query is not None else KernelQuery(**conditions)
        try:
            body = asked.model_dump_json().encode()
            found = self._server.ask("POST", "/v1/kernels/query", body).json()["artifacts"]
            return [KernelMatch.model_validate_json(json.dumps(one)) for one in found]
        except Unreachable as error:
            self._offline(error)
            return super().query(asked)
        except (ValidationError, KeyError, TypeError) as error:
            raise StoreUnavailable(f"{self._server.url}: its answer to a query is not one: {error}") from error

    def match(self, artifact_id: str) -> KernelMatch | None:
        self._fetch(artifact_id)
        return super().match(artifact_id)

    def history(self, blueprint_or_artifact: str) -> list[Change]:
        try:
            path = f"/v1/history/{quote(blueprint_or_artifact, safe='')}"
            found = self._server.ask("GET", path).json()["history"]
            return [Change.model_validate_json(json.dumps(one)) for one in found]
        except Unreachable as error:
            self._offline(error)
            return super().history(blueprint_or_artifact)

    # ---- writing

    def commit(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> Artifact:
        return self.push(manifest, manifest.canonical_bytes(), blobs, None)

    def push(self, manifest: Manifest, content: bytes, blobs: Mapping[str, bytes], record: Record | None) -> Artifact:
        """Commits an artifact at the server: as its forge signs it or, with a `record`, as it is signed. Raises as
        `commit` does, UntrustedArtifact where the server or this side does not trust the signer, and Unreachable: the
        server may then have it, and committing it again is safe."""
        check_commit(manifest, content, blobs)
        objects = {**blobs, sha256(content): content}
        body = {"manifest": sha256(content), "record": None if record is None else record.model_dump(mode="json")}
        for last in (False, False, True):
            for digest, one in objects.items():
                self._put(digest, one)
            try:
                answer = self._server.ask("POST", "/v1/artifacts", json.dumps(body).encode())
                break
            except MissingThere:  # a collection there was faster
                if last:
                    raise
        self._take(manifest.id, answer.json())
        return self.get(manifest.id)

    def take_signed(self, manifest: Manifest, content: bytes, blobs: Mapping[str, bytes], record: Record) -> Artifact:
        return self.push(manifest, content, blobs, record)

    def whole(self, artifact_id: str) -> tuple[Record, bytes, Manifest, dict[str, bytes]]:
        self.load(artifact_id)
        return super().whole(artifact_id)

    def set_status(
        self,
        artifact_id: str,
        status: KernelStatus,
        report: bytes | None = None,
        *,
        tags: Iterable[str] | None = None,
        figures: Figures | None = None,
    ) -> Artifact:
        body: dict[str, Any] = {"status": KernelStatus(status).value}
        if report is not None:
            check_size("the report", report, BLOB_LIMIT_BYTES)
            body["report"] = sha256(report)
            self._put(sha256(report), report)
        if tags is not None:
            body["tags"] = list(tags)
        if figures is not None:
            body["figures"] = figures.model_dump(mode="json")
        path = f"/v1/artifacts/{quote(artifact_id, safe='')}/status"
        answer = self._server.ask("POST", path, json.dumps(body).encode())
        self._take(artifact_id, answer.json())
        return self.get(artifact_id)

    def sign(self, artifact_id: str) -> Artifact:
        raise InvalidCommit(f"artifact {artifact_id!r}: sign it where the store is; {self._server.url} does not")

    # ---- inside

    def _put(self, digest: str, content: bytes) -> None:
        path = f"/v1/objects/{digest}"
        with contextlib.suppress(ArtifactNotFound, CorruptObject, StoreUnavailable):
            if self._server.ask("HEAD", path).status == 200:
                return
        self._server.ask("PUT", path, content)

    def _fetch(self, artifact_id: str, *, again: bool = False) -> None:
        """Makes the cache's record of an artifact the server's, with all that it names."""
        now = time.monotonic()
        if not again and now - self._asked.get(artifact_id, -1e9) < self._fresh_s and super().__contains__(artifact_id):
            return
        path = f"/v1/artifacts/{quote(artifact_id, safe='')}"
        cached = None if again else self._shelf.head(artifact_id) if super().__contains__(artifact_id) else None
        headers = {} if cached is None else {"If-None-Match": f'"{cached}"'}
        try:
            answer = self._server.ask("GET", path, headers=headers, accept=(200, 304))
            if answer.status != 304:
                self._take(artifact_id, answer.json(), again=again)
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
            raise
        self._asked[artifact_id] = now

    def _take(self, artifact_id: str, answer: Any, *, again: bool = False) -> None:
        """Fetches what the server's answer of an artifact names, checks all of it, and puts it into the cache."""
        about = f"{self._server.url}: artifact {artifact_id!r}"
        try:
            content = Record.model_validate_json(json.dumps(answer["record"])).canonical_bytes()
            record = parse_record(content, artifact_id)
        except (ValueError, KeyError, TypeError) as error:
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
            raise UntrustedArtifact(f"{self._server.url}: {error}") from error
        blobs = {digest: self._object(digest, BLOB_LIMIT_BYTES) for digest in manifest.blobs}
        try:
            self.take(manifest, stored, blobs, record)
        except InvalidCommit as error:  # another build under the id, which the server has removed since
            self.drop(artifact_id)
            self.take(manifest, stored, blobs, record)
            del error
        self._asked[artifact_id] = time.monotonic()
        self._keep_within(sum(map(len, blobs.values())))

    def _object(self, digest: str, limit_bytes: int) -> bytes:
        with contextlib.suppress(Damage):
            return self.directory.read_object(digest, "object", limit_bytes=limit_bytes)
        if not self._swept:
            self._swept = True
            sweep(self.directory, _ABANDONED_S)
        with Incoming(self.directory, digest) as incoming:
            try:
                return self.directory.read_object(digest, "object", limit_bytes=limit_bytes)  # another was faster
            except Damage as damage:
                if not damage.missing:
                    with self._shelf.lock():
                        self.directory.set_aside(damage, None)
            self._server.download(digest, incoming, limit_bytes)
            incoming.finish()
        return self.directory.read_object(digest, "object", limit_bytes=limit_bytes)

    def _know_keys(self) -> None:
        """Where the trust policy has `local`: keeps the server's public keys when it is first asked, and raises
        UntrustedArtifact where it has others than were kept."""
        if self._keys_known or not self.trust.local:
            return
        try:
            keys = {Role(role): str(key) for role, key in self._server.ask("GET", "/health").json()["keys"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreUnavailable(f"{self._server.url}: it does not say which keys it has: {error}") from error
        if set(keys) != set(Role):
            return  # it has none yet
        with self._shelf.lock():
            known = self._keys.public()
            if known and known != keys:
                raise UntrustedArtifact(
                    f"{self._server.url} has other keys than when it was first asked ({keys[Role.FORGE][:16]}, "
                    f"{self._keys.path / 'public'} has {known[Role.FORGE][:16]}); if that is meant, remove that file"
                )
            if not known:
                lines = "".join(f"{role} {keys[role]}\n" for role in Role)
                self.directory.write(("keys", "public"), lines.encode())
                if self._keys.public() != keys:
                    self.directory.remove(("keys", "public"))
                    raise StoreUnavailable(f"{self._server.url}: its public keys are not of 64 hex digits")
        self._keys_known = True

    def _offline(self, error: Unreachable) -> None:
        if not self.root.exists():
            raise error  # no answer is not the answer that there is nothing
        self._degraded("offline", f"the cache is used alone: {error}")


def cache_root(url: str) -> Path:
    """The cache of a URL: `urza-<12 hex>` in `$ESPER_CACHE`, else in `~/.cache/esper`."""
    folder = Path(os.environ.get("ESPER_CACHE") or "~/.cache/esper").expanduser()
    return folder / f"urza-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def _remake(url: str, options: Mapping[str, Any]) -> RemoteUrza:
    return RemoteUrza(url, **options)
