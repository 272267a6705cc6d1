"""Urza, the library: a directory, addressed by content, of compiled artifacts."""

from esper_triton.urza.events import Event
from esper_triton.urza.library import Artifact, Urza, default_root
from esper_triton.urza.trust import Trust

__all__ = ["Artifact", "Event", "Trust", "Urza", "default_root"]
