"""Makes the CPU Triton's active device on a machine whose Triton would choose another, and gives the choice back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["active", "disable", "enable"]


def enable() -> None:
    """Make the CPU Triton's active device, for all threads of this process, whatever else the machine has.

    Kernels that were compiled for another device stay compiled, and are used again after `disable`.
    """
    from esper_triton.cpu.driver import CPUDriver

    if not isinstance(_current(), CPUDriver):
        _registry().set_active(CPUDriver())


def disable() -> None:
    """Leave the choice of the active device to Triton again, which may well be the CPU: where there is no other."""
    _registry().set_active(None)  # chosen when it is next asked for, so that nothing is started for it here


@contextmanager
def active() -> Iterator[None]:
    """Within it the CPU is Triton's active device, for all threads of this process; then what was active before."""
    before = _current()
    enable()
    try:
        yield
    finally:
        _registry().set_active(before)


def _registry() -> Any:
    import triton

    return triton.runtime.driver


def _current() -> Any:
    """The active driver, or None where Triton has not had to choose. `registry.active` would make it choose, and raise
    where it cannot."""
    return _registry()._active
