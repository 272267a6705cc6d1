"""`esper.dashboard(model)`: the page of a model in this process."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from esper_triton.nissa.metrics import Metrics
from esper_triton.nissa.server import NissaServer
from esper_triton.nissa.view import View
from esper_triton.nissa.watcher import Watcher
from esper_triton.oona import Oona
from esper_triton.oona.tokens import Tokens
from esper_triton.urza import Urza

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DEFAULT_PORT", "Dashboard", "dashboard"]

DEFAULT_PORT = 8767
_HEALTH_EVERY_S = 1.0
_log = logging.getLogger("esper_triton.nissa")


class Dashboard:
    """A page that is served from a thread of this process, until `close`.

    Attributes:
        url: where it is. token: what an operator types in to command seeds from it; None where a token file says whose
            tokens may. view: what it shows.
    """

    def __init__(
        self,
        bus: Oona,
        *,
        urza: Urza | None = None,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        tokens: Tokens | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Starts it. Raises OSError where the port is taken, ValueError for an address that others can reach without
        tokens, BusUnavailable from a hub that refuses."""
        self.metrics = Metrics()
        self.view = View(self.metrics)
        self.metrics.show(self.view)
        self._server = NissaServer(self.view, self.metrics, bus, urza=urza, tokens=tokens)
        self._watcher = Watcher(bus, self.view)
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        started: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(host, port, tls, started), name="nissa-page", daemon=True
        )
        self._thread.start()
        try:
            port = started.result()
        except BaseException:
            self._thread.join()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'http' if tls is None else 'https'}://{shown}:{port}/"
        try:
            self._watcher.start()
        except BaseException:
            self.close()
            raise

    @property
    def token(self) -> str | None:
        """The operator's."""
        return self._server.operator_token

    def __repr__(self) -> str:
        return f"<Dashboard {self.url}>"

    def close(self) -> None:
        """Ends the page; whoever looks at it is told."""
        self._watcher.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(10.0)

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, host: str, port: int, tls: ssl.SSLContext | None, started: Future[int]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(host, port, tls, started))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    async def _serve(self, host: str, port: int, tls: ssl.SSLContext | None, started: Future[int]) -> None:
        try:
            started.set_result(await self._server.start(host, port, tls=tls))
        except BaseException as error:
            started.set_exception(error)
            return
        await self._ending.wait()
        await self._server.stop()


class ModelDashboard(Dashboard):
    """Of a model in this process: it is put on a bus if it is on none, and its health is published every second."""

    def __init__(self, model: nn.Module, *, name: str, **options: Any) -> None:
        from esper_triton.model import MorphableModel, connect
        from esper_triton.model.health import HealthReader
        from esper_triton.model.remote import Remote

        if not isinstance(model, MorphableModel):
            raise ValueError(f"{type(model).__name__} is not wrapped; esper_triton.wrap(model, ...) first")
        boundaries = [layer._kasmina.boundary for layer in model.kasmina_layers.values()]
        remote = next((one for one in boundaries if isinstance(one, Remote)), None)
        self._own_bus = Oona() if remote is None else None
        self._remote = None
        if self._own_bus is not None:
            self._remote = connect(model, self._own_bus, name=name)
        bus = self._own_bus if remote is None else remote.bus
        assert bus is not None
        shown = name if remote is None else remote.name
        self._reader = HealthReader(shown, model.kasmina_layers, latency_budget_us=1000.0)
        self._bus = bus
        self._resting = threading.Event()
        self._teller = threading.Thread(target=self._tell, name="nissa-health", daemon=True)
        try:
            super().__init__(bus, **options)
        except BaseException:
            self._let_go()
            raise
        self._teller.start()

    def close(self) -> None:
        """As of Dashboard; a model that was put on a bus for it is taken off."""
        self._resting.set()
        if self._teller.is_alive():
            self._teller.join(5.0)
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        if self._remote is not None:
            self._remote.close()
        if self._own_bus is not None:
            self._own_bus.close()

    def _tell(self) -> None:
        from esper_triton.contracts.envelope import HEALTH

        while not self._resting.is_set():
            try:
                self._bus.publish(HEALTH, self._reader.read())
            except Exception as error:  # the model may be unwrapped, or changed, in this very moment
                _log.debug("health was not read: %r", error)
            self._resting.wait(_HEALTH_EVERY_S)


def dashboard(
    model: nn.Module, *, urza: Urza | None = None, port: int = DEFAULT_PORT, name: str = "model"
) -> Dashboard:
    """Serves a live page of a wrapped model to this machine's browsers, and returns at once.

    Args:
        urza: where its artifacts are looked up; by default the store that it was wrapped with. port: 0 takes any free
            one. name: what the model is called, where it is on no bus yet; one that is keeps its name and bus.

    Raises ValueError for a model that is not wrapped, OSError where the port is taken.
    """
    if urza is None:
        layers = getattr(model, "kasmina_layers", {})
        urza = next((layer._kasmina.urza for layer in layers.values()), None)
    return ModelDashboard(model, name=name, urza=urza, port=port)
