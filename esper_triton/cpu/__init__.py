"""A native CPU backend for stock Triton: TTIR to LLVM IR to machine code. Usable without the rest of Esper."""

# Triton looks for its backends while it is itself being imported, and imports `.compiler` and `.driver` from here. With
# one of these imported first, it would find that one half-initialised; so Triton always goes first.
import triton as _triton  # noqa: F401

from esper_triton.cpu.watchdog import deadline

__all__ = ["deadline"]
