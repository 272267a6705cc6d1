"""What a store tells whoever listens: a bus, a log, a test."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Event", "Events"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a store, after it has happened.

    kind: `committed`, `status` and `characterized` (a new record of an artifact), `removed`, `quarantined` (a file was
        set aside), or `degraded` (something that the store does without: the index on disk, leases, the quarantine).
    artifact_id: None where it is of none. message: one sentence. details: plain values, such as `status` and `file`.
    """

    kind: Literal["committed", "status", "characterized", "removed", "quarantined", "degraded"]
    artifact_id: str | None
    message: str
    details: dict[str, str] = field(default_factory=dict)


class Events:
    """Calls every listener in the thread where something happened. One that raises is logged and called again."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], object]] = []

    def listen(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Returns a function that ends it; called twice, the second call does nothing."""
        self._listeners.append(listener)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return end

    def tell(self, event: Event) -> None:
        """Never raises: who listens must not break who works."""
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                _logger.exception("a listener of a store raised on %s", event)
