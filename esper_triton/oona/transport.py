"""What is behind a bus: where messages go, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from esper_triton.oona.exchange import Start
from esper_triton.oona.subscription import Delivery, Subscription

__all__ = ["Outgoing", "Transport"]


class Outgoing(NamedTuple):
    """A message on its way out: the packed envelope where the transport `packs`, the Envelope itself otherwise."""

    topic: str
    sender_id: str
    sequence: int
    content: Any


class Transport(Protocol):
    """Every method may be called from any thread, `send` from one only.

    Attributes:
        packs: whether messages go out as bytes.
    """

    packs: bool

    def wants(self, topic: str) -> bool:
        """Whether there is a reason to send messages of a topic at all."""

    def send(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Returns when each message is in safe hands or refused, with the reason for each that was refused. Raises
        ConnectionError (BusUnavailable is one) where that is not known; what is sent again then counts once."""

    def subscribe(self, subscription: Subscription, start: Start) -> None:
        """Lets a subscription have messages from now on, also after the connection was lost and is back."""

    def acknowledge(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
        """The subscription's group is done with these."""

    def unsubscribe(self, subscription: Subscription) -> None:
        """The subscription has left."""

    def stats(self) -> dict[str, Any]:
        """Counters of the transport's own."""

    def server_stats(self) -> dict[str, Any]:
        """Counters of the hub or server, which is asked. Raises BusUnavailable."""

    def close(self) -> None:
        """Lets go of connections and threads."""
