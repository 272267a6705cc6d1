"""A native CPU backend for stock Triton: TTIR to LLVM IR to machine code. Usable without the rest of Esper.

With no GPU in use there is nothing to do: `kernel[grid](...)` on CPU tensors runs here. On a machine with a GPU Triton
keeps to the GPU until asked: `ESPER_TRITON_CPU=1` in the environment, `enable()`, or `with active():`.
"""

from typing import TYPE_CHECKING, Any

# Triton looks for its backends while it is itself being imported, and imports `.compiler` and `.driver` from here. With
# one of these imported first, it would find that one half-initialised; so Triton always goes first.
import triton as _triton  # noqa: F401

from esper_triton.cpu.enabling import active, disable, enable

if TYPE_CHECKING:
    from esper_triton.cpu.stock import prepare
    from esper_triton.cpu.watchdog import deadline

__all__ = ["active", "deadline", "disable", "enable", "prepare"]

# Imported when they are first asked for: every `import triton` comes through here.
_HOMES = {"deadline": "esper_triton.cpu.watchdog", "prepare": "esper_triton.cpu.stock"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
