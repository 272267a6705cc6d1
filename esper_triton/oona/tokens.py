"""Who may do what on a hub: tokens with the topics that each may write and read."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_triton.contracts.envelope import topics_matching

__all__ = ["ANYBODY", "Role", "Tokens"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """What the holder of a token may do: globs of topics. `name` is for logs, and tells senders apart."""

    name: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    def may_publish(self, topic: str) -> bool:
        """Whether it may write to a topic."""
        return any(fnmatch.fnmatchcase(topic, pattern) for pattern in self.publish)

    def may_subscribe(self, topic: str) -> bool:
        """Whether it may read a topic."""
        return any(fnmatch.fnmatchcase(topic, pattern) for pattern in self.subscribe)


ANYBODY = Role(name="anybody", publish=("*",), subscribe=("*",))


class Tokens:
    """The tokens of a hub. Only their SHA-256 is kept.

    The file is TOML: a table `[[token]]` for each, with `name`, the `token` itself (at least 16 characters) or its
    `sha256`, and the lists `publish` and `subscribe` of topics or globs such as `telemetry.*`.
    """

    def __init__(self, entries: Iterable[tuple[str, Role]]) -> None:
        self._entries = [(bytes.fromhex(digest), role) for digest, role in entries]

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Raises ValueError that lists every fault of the file, OSError where it cannot be read."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not TOML: {error}") from error
        found: list[tuple[str, Role]] = []
        faults: list[str] = []
        tables = document.get("token")
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise ValueError(f"{path}: no [[token]] table")
        for k, table in enumerate(tables):
            try:
                found.append(_entry(table))
            except ValueError as error:
                faults.append(f"token {k} ({table.get('name')!r}): {error}")
        for what, values in (("name", [role.name for _, role in found]), ("token", [digest for digest, _ in found])):
            faults += [f"one {what} is there twice"] if len(set(values)) < len(values) else []
        if faults:
            raise ValueError(f"{path}: " + "; ".join(faults))
        return cls(found)

    def role(self, token: str) -> Role | None:
        """Whose token it is. The time does not tell how much of it was right, nor which one it was."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        matching: Role | None = None
        for known, role in self._entries:
            if hmac.compare_digest(known, digest):
                matching = role
        return matching


def _entry(table: dict[str, Any]) -> tuple[str, Role]:
    unknown = sorted(set(table) - {"name", "token", "sha256", "publish", "subscribe"})
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; known: name, token, sha256, publish, subscribe")
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("needs a name")
    token, digest = table.get("token"), table.get("sha256")
    if (token is None) == (digest is None):
        raise ValueError("needs one of token and sha256")
    if token is not None:
        if not isinstance(token, str) or len(token) < 16:
            raise ValueError("token must be a string of at least 16 characters")
        digest = hashlib.sha256(token.encode()).hexdigest()
    if not isinstance(digest, str) or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
        raise ValueError("sha256 must be 64 hexadecimal digits")
    patterns: dict[str, tuple[str, ...]] = {}
    for what in ("publish", "subscribe"):
        value = table.get(what, [])
        if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
            raise ValueError(f"{what} must be a list of topics")
        for pattern in value:
            topics_matching(pattern)
        patterns[what] = tuple(value)
    return digest.lower(), Role(name=name, publish=patterns["publish"], subscribe=patterns["subscribe"])
