"""Who may ask what of a server: bearer tokens with roles, and how often."""

from __future__ import annotations

import enum
import hashlib
import hmac
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from esper_triton.contracts.errors import StoreUnavailable, nearest

__all__ = ["Access", "Rate", "Token", "find", "read_tokens"]

_SHORTEST = 20
_MOST_TOKENS = 1000


class Access(enum.StrEnum):
    """What a token allows. Each of `write` and `validate` allows `read`, too, and neither allows the other."""

    READ = "read"
    WRITE = "write"
    VALIDATE = "validate"


@dataclass(frozen=True)
class Token:
    """SHA-256 of a token's text, and what it allows. The text itself is not kept."""

    digest: bytes
    access: frozenset[Access]


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file that has `ROLE[,ROLE] TOKEN` on each line; `#` begins a comment line.

    Raises StoreUnavailable where it cannot be read or others can read it, and ValueError with the line at fault.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreUnavailable(f"token file {path} cannot be read: {error}") from error
    if mode & 0o077:
        raise StoreUnavailable(f"token file {path} can be read by others (mode {mode:o}, 600 was expected); chmod it")
    tokens = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 2:
            raise ValueError(f"token file {path}, line {number}: 'ROLE[,ROLE] TOKEN' was expected")
        roles = fields[0].split(",")
        for role in roles:
            if role not in list(Access):
                raise ValueError(f"token file {path}, line {number}: {role!r} is not a role{nearest(role, Access)}")
        if len(fields[1]) < _SHORTEST:
            raise ValueError(
                f"token file {path}, line {number}: the token has {len(fields[1])} characters; at least {_SHORTEST} "
                'are needed, such as those of `python -c "import secrets; print(secrets.token_urlsafe(32))"`'
            )
        tokens.append(Token(_digest(fields[1]), frozenset({Access.READ, *map(Access, roles)})))
    if not tokens or len(tokens) > _MOST_TOKENS:
        raise ValueError(f"token file {path} has {len(tokens)} tokens; 1 to {_MOST_TOKENS} were expected")
    return tuple(tokens)


def find(tokens: Sequence[Token], text: str) -> Token | None:
    """The token with this text. Takes the same time for every text of a length: all are compared, each in full."""
    digest, found = _digest(text), None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token
    return found


class Rate:
    """A token bucket for each caller: `per_second` requests on average, `burst` at once."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._callers: OrderedDict[object, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: object) -> float:
        """0 where the caller may ask now, which counts; else the seconds until it may."""
        now = self._clock()
        left, then = self._callers.pop(caller, (float(self._burst), now))
        left = min(self._burst, left + (now - then) * self._per_second)
        allowed = left >= 1
        self._callers[caller] = (left - allowed, now)
        if len(self._callers) > 10_000:
            self._callers.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_second


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
