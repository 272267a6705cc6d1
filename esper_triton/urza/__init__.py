"""Urza, the library: a directory, addressed by content, of compiled artifacts."""

from esper_triton.urza.library import Artifact, Urza, default_root

__all__ = ["Artifact", "Urza", "default_root"]
