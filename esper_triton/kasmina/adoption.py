"""Giving a module a class of its own, and taking it back.

As FSDP2 and `torch.nn.utils.parametrize` do: the module stays the same object, and its class becomes a subclass of the
class it had, with a mixin in front. One class is made per (mixin, host class) of a process.

`parametrize` gives each module that it touches a class of its own, and takes it away by the first of its bases. So that
class stays on top, and ours goes under it, whichever came first: either can be undone without the other.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        hosts = getattr(super(), "__deepcopy__", None)
        replica: Any
        state: Any
        if hosts is not None:
            # It may make its copy by the class, which makes a host, and it knows nothing of what is not to be copied.
            replica = hosts(memo)
            _set_class(replica, _class_for(self._esper_mixin, host_class(replica)))
            replica.__setstate__({})
            return replica
        if _is_on_top(type(self)):
            # It refuses to be pickled, and is copied like this by torch too: the copy has the same class.
            replica, state = object.__new__(type(self)), self._esper_state_to_keep(self.__dict__)
        else:
            make, args, *rest = self.__reduce_ex__(4)
            replica, state = make(*copy.deepcopy(args, memo)), rest[0] if rest else None
        memo[id(self)] = replica
        if state is not None:
            replica.__setstate__(copy.deepcopy(state, memo))
        return replica

    def _esper_state_to_keep(self, state: dict[str, Any]) -> dict[str, Any]:
        """The instance dictionary as it is copied or pickled."""
        return state


def _rebuild(mixin: type[Adopted], function: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = function(*args)
    module.__class__ = _class_for(mixin, type(module))
    return module


def _is_on_top(cls: type) -> bool:
    """Whether `parametrize` made this class for one module."""
    return getattr(vars(cls).get("__getstate__"), "__module__", None) == parametrize.__name__


def _class_beneath(module: nn.Module) -> type[nn.Module]:
    """The class of `module` without what `parametrize` puts on top."""
    cls = type(module)
    return cls.__bases__[0] if _is_on_top(cls) else cls


def host_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` has, or had before it was adopted, without what `parametrize` puts on top."""
    beneath = _class_beneath(module)
    host: type[nn.Module] = vars(beneath).get("_esper_host", beneath)
    return host


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives `module` the class `cls`, or one on top of it where `parametrize` has one."""
    on_top = type(module)
    module.__class__ = cls
    if not _is_on_top(on_top):
        return
    assert isinstance(module.parametrizations, nn.ModuleDict)  # what the class is there for
    names = set(module.parametrizations)
    original = vars(on_top).get("_esper_replaces", on_top)
    if original.__bases__[0] is cls and names == {n for n, v in vars(original).items() if isinstance(v, property)}:
        module.__class__ = original
        return
    parametrize._inject_new_class(module)
    for name in names:
        setattr(type(module), name, vars(on_top)[name])
    type(module)._esper_replaces = original  # type: ignore[attr-defined]


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
    if host is _class_beneath(module):
        taken = sorted(
            n for n in dir(mixin) if not n.startswith("__") and n not in dir(nn.Module) and hasattr(module, n)
        )
        if taken:
            raise TypeError(f"{host.__name__} already has {', '.join(taken)}, which {mixin.__name__} would hide")
    try:
        _set_class(module, _class_for(mixin, host))
    except TypeError as error:
        raise TypeError(f"{host.__name__} cannot be given a subclass: {error}") from error


def release_class(module: nn.Module) -> None:
    """Puts back the class that the module had. Raises TypeError where another library has put its own class on top."""
    if "_esper_host" not in vars(_class_beneath(module)):
        raise TypeError(f"{type(module).__name__} was made from an adopted class by something else; undo that first")
    _set_class(module, host_class(module))
