"""What listens to the bus for a View."""

from __future__ import annotations

import json
import logging
import threading
import time

from esper_triton.contracts import envelope as topics
from esper_triton.contracts.errors import BusUnavailable, MalformedMessage
from esper_triton.nissa.view import View
from esper_triton.oona import Oona, Subscription

__all__ = ["Watcher"]

_ASK_EVERY_S = 5.0
_log = logging.getLogger("esper_triton.nissa")


class Watcher:
    """Gives a View every message of the bus, from two threads: one takes messages, one asks the hub or server for its
    counters every few seconds. It begins with the earliest messages that are kept, and with telemetry from now on.

    It joins no group: nobody gets a message less for it, and nothing waits for it.
    """

    def __init__(self, bus: Oona, view: View) -> None:
        self.bus, self.view = bus, view
        self._ending = threading.Event()
        self._kept = [topic for topic in topics.TOPICS if not topics.is_telemetry(topic)]
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins. Raises BusUnavailable from a hub that refuses."""
        self._past = self.bus.subscribe(self._kept, start="earliest")
        self._telemetry = self.bus.subscribe(topics.HEALTH, window=64)
        for name, run in (("kept", self._take_kept), ("telemetry", self._take_telemetry), ("server", self._ask_server)):
            thread = threading.Thread(target=run, name=f"nissa-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Listens no more."""
        self._ending.set()
        if self._threads:
            self._past.close()
            self._telemetry.close()
        for thread in self._threads:
            thread.join(5.0)

    def _take_kept(self) -> None:
        self._take(self._past)

    def _take_telemetry(self) -> None:
        self._take(self._telemetry)

    def _take(self, subscription: Subscription) -> None:
        for delivery in subscription:
            try:
                self.view.take(delivery.envelope, delivery.parse())
            except MalformedMessage as error:
                self.view.note(delivery.envelope.timestamp, "malformed", str(error)[:500], failure=True)
            except Exception as error:  # one message must not end what shows all others
                _log.exception("%s", json.dumps({"event": "message_failed", "error": type(error).__name__}))

    def _ask_server(self) -> None:
        is_away = False
        while not self._ending.is_set():
            try:
                found = self.bus.server_stats()
            except BusUnavailable as error:
                found = {}
                if not is_away:
                    self.view.note(time.time(), "bus", f"away: {error}", failure=True)
            if found and is_away:
                self.view.note(time.time(), "bus", "is back")
            is_away = not found
            own = self.bus.stats()
            with self.view.lock:
                self.view.server, self.view.bus = found, own
                self.view.version += 1
            self._ending.wait(_ASK_EVERY_S)
