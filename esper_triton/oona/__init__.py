"""The bus: in one process by default, over a WebSocket hub or Redis Streams between machines."""

from esper_triton.oona.bus import Oona
from esper_triton.oona.exchange import Limits
from esper_triton.oona.subscription import Delivery, Gap, Subscription

__all__ = ["Delivery", "Gap", "Limits", "Oona", "Subscription"]
