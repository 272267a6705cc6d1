"""Giving a module a class of its own, and taking it back.

As FSDP2 and `torch.nn.utils.parametrize` do: the module stays the same object, and its class becomes a subclass of the
class it had, with a mixin in front. One class is made per (mixin, host class) of a process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["adopt_class", "host_class", "release_class"]

_classes: dict[tuple[type, type], type] = {}
_classes_lock = threading.Lock()


class Adopted(nn.Module):
    """What every mixin of this kind shares: it is never constructed, and it survives deepcopy, pickle and
    `torch.save`."""

    _esper_host: type[nn.Module]
    _esper_mixin: type[Adopted]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Host code such as `type(self)(in_features, out_features)` means a host layer. Python calls no __init__ on it
        # again.
        return cls._esper_host(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no importable name; the host class and the mixin have.
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            raise TypeError(f"{type(self).__name__} cannot be pickled: its host reduces to a name")
        function, args, *rest = reduced
        host = host_class(self)
        args = tuple(host if argument is type(self) else argument for argument in args)
        if rest and isinstance(rest[0], dict):
            rest[0] = self._esper_state_to_keep(rest[0])
        return (_rebuild, (self._esper_mixin, function, args), *rest)

    def _esper_state_to_keep(self, state: dict[str, Any]) -> dict[str, Any]:
        """The instance dictionary as it is copied or pickled."""
        return state


def _rebuild(mixin: type[Adopted], function: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = function(*args)
    module.__class__ = _class_for(mixin, type(module))
    return module


def host_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` has, or had before it was adopted."""
    host: type[nn.Module] = vars(type(module)).get("_esper_host", type(module))
    return host


def _class_for(mixin: type[Adopted], host: type[nn.Module]) -> type[nn.Module]:
    with _classes_lock:
        if (mixin, host) not in _classes:
            prefix = mixin.__name__.removesuffix("Layer").removesuffix("Model")
            body = {"_esper_host": host, "_esper_mixin": mixin, "__module__": mixin.__module__, "__doc__": host.__doc__}
            _classes[mixin, host] = type(f"{prefix}{host.__name__}", (mixin, host), body)
        return _classes[mixin, host]


def adopt_class(module: nn.Module, mixin: type[Adopted]) -> None:
    """Makes `module` an instance of `mixin` too. Raises TypeError, changing nothing, where its class cannot be extended
    or already uses a name that the mixin brings."""
    host = host_class(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{host.__name__} is a TorchScript module: its forward is fixed; adopt it before scripting")
    if host is type(module):
        taken = sorted(
            n for n in dir(mixin) if not n.startswith("__") and n not in dir(nn.Module) and hasattr(module, n)
        )
        if taken:
            raise TypeError(f"{host.__name__} already has {', '.join(taken)}, which {mixin.__name__} would hide")
    try:
        module.__class__ = _class_for(mixin, host)
    except TypeError as error:
        raise TypeError(f"{host.__name__} cannot be given a subclass: {error}") from error


def release_class(module: nn.Module) -> None:
    """Puts back the class that the module had. Raises TypeError where another library has put its own class on top."""
    if "_esper_host" not in vars(type(module)):
        raise TypeError(f"{type(module).__name__} was made from an adopted class by something else; undo that first")
    module.__class__ = host_class(module)
