"""Who may say what of an artifact: the keys of a store, and the policy that names whose signatures count."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from esper_triton.contracts.errors import NotAuthorized, StoreUnavailable, UntrustedArtifact, nearest
from esper_triton.contracts.manifest import Manifest
from esper_triton.contracts.record import AuditEntry, Record, Role, Signature, roles_for
from esper_triton.urza.directory import Damage, Directory

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["Keys", "Signer", "Trust", "is_signed", "signed"]

_PUBLIC = "public"
_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_PUBLIC_FORM = re.compile(r"forge ([0-9a-f]{64})\nprover ([0-9a-f]{64})\n")
_KEY_LIMIT_BYTES = 4096
_Signable = TypeVar("_Signable", Record, AuditEntry)


class Signer(NamedTuple):
    """A role, its private key, and its public key in hex."""

    role: Role
    private: Ed25519PrivateKey
    public: str


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signatures count. `local`: those of the store's own keys. `keys`: those of these public keys (hex), by
    role. `unsigned`: records without a signature, too; one that is there must still be right.

    Parsed from text by `Trust.parse`: `local`, `unsigned-ok`, or `keys:prover=HEX,forge=HEX,local`.
    """

    local: bool = False
    unsigned: bool = False
    keys: Mapping[Role, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Trust:
        """Raises ValueError that says what is wrong and what would be right."""
        if text == "local":
            return cls(local=True)
        if text == "unsigned-ok":
            return cls(local=True, unsigned=True)
        if not text.startswith("keys:"):
            raise ValueError(
                f"trust policy {text!r} is none of 'local', 'unsigned-ok' and 'keys:ROLE=HEX,...'"
                f"{nearest(text, ('local', 'unsigned-ok', 'keys:'))}"
            )
        local, keys = False, dict[Role, set[str]]()
        for item in text.removeprefix("keys:").split(","):
            role, equals, key = item.strip().partition("=")
            if not equals and role == "local":
                local = True
            elif role not in list(Role) or not _HEX_KEY.fullmatch(key):
                raise ValueError(
                    f"trust policy {text!r}: {item.strip()!r} is neither 'local' nor a role ({', '.join(Role)}), '=' "
                    "and a public key of 64 hex digits"
                )
            else:
                keys.setdefault(Role(role), set()).add(key)
        return cls(local=local, keys={role: frozenset(known) for role, known in keys.items()})

    def as_json(self) -> dict[str, Any]:
        """What `from_json` makes an equal one of."""
        keys = {role.value: sorted(known) for role, known in self.keys.items()}
        return {"local": self.local, "unsigned": self.unsigned, "keys": keys}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Trust:
        """What `as_json` was of."""
        keys = {Role(role): frozenset(known) for role, known in body["keys"].items()}
        return cls(local=body["local"], unsigned=body["unsigned"], keys=keys)

    def trusted(self, own: Mapping[Role, str]) -> dict[Role, frozenset[str]]:
        """The public keys that count by role, where `own` are the store's."""
        return {
            role: self.keys.get(role, frozenset()) | ({own[role]} if self.local and role in own else frozenset())
            for role in Role
        }

    def check(self, record: Record, manifest: Manifest, trusted: Mapping[Role, Collection[str]]) -> None:
        """Raises UntrustedArtifact where the policy does not take `record` for a manifest with this status.

        The signature itself is not checked here: `is_signed` does that, and a wrong one is damage, whatever is trusted.
        """
        about = f"artifact {record.id!r} ({manifest.status.value})"
        signature = record.signature
        if signature is None:
            if not self.unsigned:
                raise UntrustedArtifact(
                    f"{about} is not signed; compile it again, or sign what this store holds, if you trust it, with "
                    "`python -m esper_triton.urza sign`"
                )
            return
        roles = roles_for(manifest.status)
        if record.is_characterized:
            roles = tuple(role for role in roles if role is Role.PROVER)
            if not roles:
                raise UntrustedArtifact(f"{about} has tags or figures, which come from a proof, and was not proven")
        if signature.role not in roles:
            raise UntrustedArtifact(
                f"{about} is signed by the {signature.role.value}, and what it says may be signed by the "
                f"{' or the '.join(roles)} only"
            )
        if signature.key not in trusted[signature.role]:
            known = ", ".join(sorted(key[:16] for key in trusted[signature.role])) or "none"
            raise UntrustedArtifact(
                f"{about} is signed by {signature.role.value} key {signature.key[:16]}, which the trust policy does "
                f"not name (it names {known}); compile it again, or trust that key with "
                f"'keys:{signature.role.value}={signature.key}'"
            )


class Keys:
    """The two key pairs of a store, made when something is first signed.

        forge.key, prover.key   the private keys: 32 bytes in hex, readable by their owner only
        public                  both public keys, for whoever reads the store

    They lie in `keys/` of the store, or in a folder outside of it. Private keys never leave this folder: nothing that
    serves or exports a store reads it. Whoever can write there can sign as this store; with `keys/` inside of the
    store, `local` therefore guards against what comes from elsewhere and not against those who can write the store.
    """

    def __init__(self, directory: Directory, folder: Path | None = None, roles: Iterable[Role] = Role) -> None:
        """`roles`: the only ones to sign as."""
        self._directory = directory if folder is None else Directory(folder)
        self._parts: tuple[str, ...] = ("keys",) if folder is None else ()
        self._outside = folder is not None
        self.roles = tuple(Role(role) for role in roles)
        self._private: dict[Role, tuple[bytes, Ed25519PrivateKey]] = {}

    @property
    def path(self) -> Path:
        """The folder."""
        return self._directory.root.joinpath(*self._parts)

    def public_bytes(self) -> bytes:
        """The file of public keys as it is now; empty where there is none. Raises Damage, StoreUnavailable."""
        try:
            return self._directory.read((*self._parts, _PUBLIC), "public keys", limit_bytes=_KEY_LIMIT_BYTES)
        except FileNotFoundError:
            return b""

    def public(self, content: bytes | None = None) -> dict[Role, str]:
        """The public keys (hex) by role, none where they have not been made. Raises StoreUnavailable."""
        try:
            content = self.public_bytes() if content is None else content
        except Damage as damage:
            raise StoreUnavailable(f"store {self._directory.root}: {self.path}: {damage}") from damage
        if not content:
            return {}
        found = _PUBLIC_FORM.fullmatch(content.decode("ascii", "replace"))
        if found is None:
            raise StoreUnavailable(
                f"{self.path / _PUBLIC} does not have the form 'forge HEX', 'prover HEX'; put it back from a copy, or "
                "remove it, to have it written again from the private keys"
            )
        return {Role.FORGE: found[1], Role.PROVER: found[2]}

    def make(self) -> None:
        """Makes the keys that are not there yet. Only inside the store's lock. Raises NotAuthorized where a private key
        is there and cannot be used, StoreUnavailable."""
        if self.public():
            return
        lock = None
        if self._outside:  # it may be the folder of several stores
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = self._directory.hold(("lock",))
        try:
            if self.public():
                return
            keys = {}
            for role in Role:
                if self._directory.stat((*self._parts, f"{role}.key")) is None:
                    content = f"{os.urandom(32).hex()}\n".encode()
                    self._directory.write((*self._parts, f"{role}.key"), content, mode=0o600)
                keys[role] = self._load(role)
            # Last: who finds this file finds the private keys as well.
            lines = "".join(f"{role} {_public_hex(key)}\n" for role, key in keys.items())
            self._directory.write((*self._parts, _PUBLIC), lines.encode())
        finally:
            if lock is not None:
                lock.release()

    def signer(self, roles: Sequence[Role]) -> Signer:
        """The first of `roles` that can sign here. Raises NotAuthorized, StoreUnavailable."""
        reasons = []
        public = self.public()
        for role in roles:
            if role not in self.roles:
                reasons.append(f"this store was opened to sign as {' and '.join(self.roles) or 'nobody'} only")
                continue
            try:
                private = self._load(role)
            except NotAuthorized as error:
                reasons.append(str(error))
                continue
            key = _public_hex(private)
            if public.get(role) != key:
                reasons.append(f"{self.path / _PUBLIC} does not name the public key of {role}.key ({key})")
                continue
            return Signer(role, private, key)
        needed = " or ".join(roles)
        raise NotAuthorized(f"{self._directory.root}: this must be signed by the {needed}: {'; '.join(reasons)}")

    def _load(self, role: Role) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        parts = (*self._parts, f"{role}.key")
        try:
            content = self._directory.read(parts, f"{role} key", limit_bytes=_KEY_LIMIT_BYTES)
        except FileNotFoundError:
            raise NotAuthorized(f"there is no {self.path / parts[-1]}") from None
        except Damage as damage:
            raise NotAuthorized(f"{self.path / parts[-1]}: {damage}") from damage
        except StoreUnavailable as error:
            if isinstance(error.__cause__, PermissionError):  # a store of several people: the keys are one's
                raise NotAuthorized(f"{self.path / parts[-1]} may not be read here") from error
            raise
        known = self._private.get(role)
        if known is not None and known[0] == content:
            return known[1]
        found = self._directory.stat(parts)
        if found is not None and stat.S_IMODE(found.st_mode) & 0o077:
            raise NotAuthorized(
                f"{self.path / parts[-1]} can be read by others (mode {stat.S_IMODE(found.st_mode):o}, 600 was "
                "expected); chmod it, if nobody has"
            )
        if not re.fullmatch(rb"[0-9a-f]{64}\n", content):
            raise NotAuthorized(f"{self.path / parts[-1]} does not hold 64 hex digits")
        private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(content.decode()))
        self._private[role] = (content, private)
        return private


def signed(value: _Signable, signer: Signer) -> _Signable:
    """The value with a signature by `signer`."""
    signature = signer.private.sign(value.signed_bytes(signer.role, signer.public)).hex()
    return value.model_copy(update={"signature": Signature(role=signer.role, key=signer.public, value=signature)})


def is_signed(value: Record | AuditEntry) -> bool:
    """Whether the signature is right for the key that it names (about 70 us). Whose key that is, is not asked."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signature = value.signature
    if signature is None:
        return False
    content = value.signed_bytes(signature.role, signature.key)
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key)).verify(bytes.fromhex(signature.value), content)
    except (InvalidSignature, ValueError):  # ValueError: not a point of the curve
        return False
    return True


def _public_hex(private: Ed25519PrivateKey) -> str:
    return private.public_key().public_bytes_raw().hex()
