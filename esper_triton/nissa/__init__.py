"""What people look at: metrics, a page, the terminal. All show what has come over the bus, and invent nothing."""

from esper_triton.nissa.pages import Dashboard, dashboard
from esper_triton.nissa.view import View
from esper_triton.nissa.watcher import Watcher

__all__ = ["Dashboard", "View", "Watcher", "dashboard"]
