"""`Urza("https://...")`: a store on another machine, with a directory here that keeps what was loaded from it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
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
from esper_triton.urza.cached import CachedUrza, Unreachable, cache_root
from esper_triton.urza.checks import check_commit, check_size
from esper_triton.urza.incoming import Incoming
from esper_triton.urza.shelf import (
    BLOB_LIMIT_BYTES,
    Artifact,
)
from esper_triton.urza.trust import Trust
from esper_triton.urza.wire import Answer, MissingThere, Patience, Server

__all__ = ["RemoteUrza", "cache_root"]


class RemoteUrza(CachedUrza):
    """A store behind a server; see CachedUrza for what is kept here.

    A pickle of it has no token: whoever opens that finds one in `$ESPER_URZA_TOKEN`.

    `commit`, `set_status` and what is made of them are done by the server, which signs them if the token allows.
    `query`, `history`, `ids` and `pins` ask it, and the cache while it cannot be reached. What is pinned, or named by a
    lineage, stays at the server and in the cache. Leases and `verify` are of the cache: what a process has loaded lies
    there, so that it needs nothing of the server any more.
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
        patience: Patience | Mapping[str, Any] | None = None,
        fresh_s: float = 5.0,
    ) -> None:
        """Asks nothing yet.

        Args:
            url: `https://HOST[:PORT][/PREFIX]`; `http` is taken for this machine only.
            trust: as of a directory. `local` are the keys that the server named when it was first asked; they are kept
                in the cache, and a server that names others later is refused.
            max_bytes: what the cache may hold.
            cache: its directory; by default one in `~/.cache/esper/` by the URL.
            token: '' for none, else `$ESPER_URZA_TOKEN`. ca: certificates to trust instead of the system's.
            patience: or its fields by name.

        Raises ValueError, and StoreUnavailable where `ca` cannot be read.
        """
        if keys is not None:
            raise ValueError(f"{url!r}: a server signs with its own keys; keys= is for a directory")
        token = os.environ.get("ESPER_URZA_TOKEN") if token is None else token
        patience = Patience(**patience) if isinstance(patience, Mapping) else patience
        self._server = Server(url, token=token or None, ca=ca, patience=patience)
        self._begin(self._server.url, fresh_s)
        self._keys_known = False
        super().__init__(cache or cache_root(self._server.url), trust=trust, roles=(), max_bytes=max_bytes)
        self._options = {
            "trust": self.trust.as_json(),
            "max_bytes": max_bytes,
            "cache": str(self.root),
            "token": token or "",
            "ca": None if ca is None else os.path.abspath(ca),
            "patience": asdict(self._server.patience),
            "fresh_s": fresh_s,
        }

    def _sent_without_secrets(self) -> dict[str, Any]:
        return {name: value for name, value in self.sent().items() if name != "token"}

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
        self._take(manifest.id, self._record_of(answer))
        return self.get(manifest.id)

    def take_signed(self, manifest: Manifest, content: bytes, blobs: Mapping[str, bytes], record: Record) -> Artifact:
        return self.push(manifest, content, blobs, record)

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
        self._take(artifact_id, self._record_of(answer))
        return self.get(artifact_id)

    # ---- space

    def pin(self, artifact_id: str) -> bool:
        try:
            changed = self._ask_pin(artifact_id, pinned=True)
        except InvalidCommit as error:  # no id
            raise ArtifactNotFound(str(error)) from None
        with contextlib.suppress(ArtifactRefused, CorruptObject, Unreachable):  # what may not be loaded here
            super().pin(artifact_id)
        return changed

    def unpin(self, artifact_id: str) -> bool:
        try:
            changed = self._ask_pin(artifact_id, pinned=False)
        except InvalidCommit:
            return False
        super().unpin(artifact_id)
        return changed

    def pins(self) -> list[str]:
        try:
            return sorted(map(str, self._server.ask("GET", "/v1/pins").json()["pins"]))
        except Unreachable as error:
            self._offline(error)
            return super().pins()
        except (KeyError, TypeError) as error:
            raise StoreUnavailable(f"{self._server.url}: its answer has no pins: {error}") from error

    def keep_named(self, name: str, artifact_ids: Iterable[str]) -> None:
        ids = sorted(set(artifact_ids))
        try:
            super().keep_named(name, filter(self._shelf.contains, ids))
        finally:
            self._ask_named(name, ids)

    def forget_lineage(self, name: str) -> bool:
        try:
            return super().forget_lineage(name)
        finally:
            with contextlib.suppress(InvalidCommit):  # no name
                self._ask_named(name, [])

    def _ask_pin(self, artifact_id: str, *, pinned: bool) -> bool:
        path = f"/v1/artifacts/{quote(artifact_id, safe='')}/pin"
        answer = self._server.ask("POST", path, json.dumps({"pinned": pinned}).encode()).json()
        try:
            return bool(answer["changed"])
        except (KeyError, TypeError) as error:
            raise StoreUnavailable(f"{self._server.url}: it does not say what became of a pin: {error}") from error

    def _ask_named(self, name: str, ids: list[str]) -> None:
        body = json.dumps({"artifacts": ids}).encode()
        self._server.ask("POST", f"/v1/lineages/{quote(name, safe='')}", body)

    # ---- inside

    @property
    def _how_to_shrink(self) -> str:
        return f"{self._where} collects its garbage where its directory is, by `gc` there"

    def _put(self, digest: str, content: bytes) -> None:
        path = f"/v1/objects/{digest}"
        with contextlib.suppress(ArtifactNotFound, CorruptObject, StoreUnavailable):
            if self._server.ask("HEAD", path).status == 200:
                return
        self._server.ask("PUT", path, content)

    def _ask_record(self, artifact_id: str, known: str | None) -> bytes | None:
        headers = {} if known is None else {"If-None-Match": f'"{known}"'}
        path = f"/v1/artifacts/{quote(artifact_id, safe='')}"
        answer = self._server.ask("GET", path, headers=headers, accept=(200, 304))
        return None if answer.status == 304 else self._record_of(answer)

    def _record_of(self, answer: Answer) -> bytes:
        try:
            return Record.model_validate_json(json.dumps(answer.json()["record"])).canonical_bytes()
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptObject(f"{self._server.url}: a record in its answer is corrupt: {error}") from error

    def _download(self, digest: str, incoming: Incoming, limit_bytes: int) -> None:
        self._server.download(digest, incoming, limit_bytes)

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
