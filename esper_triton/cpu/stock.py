"""Launches with the arguments that a kernel's source has: tuples, tensor descriptors and constexprs among them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from esper_triton.cpu.errors import LaunchError, UnsupportedOperation
from esper_triton.cpu.launcher import KernelTable, Launch
from esper_triton.cpu.native import LoadedCode, NativeKernel, share_threads
from esper_triton.cpu.trap import FRAME_SLOTS, failure

__all__ = ["prepare", "stock_launcher"]

_DESCRIPTOR = re.compile(r"tensordesc<([^\[>]*)\[([^\]]*)\]")


def stock_launcher(src: Any, metadata: Any) -> Callable[..., None]:
    """What Triton calls with the grid and all arguments of a launch: machine code, which falls back to `_Launcher`.

    Triton makes the launcher before it loads the object code, so the code comes with each call.
    """
    slow = _Launcher(src, metadata)
    return slow.table.stock_launch(slow, slow.failed)


def prepare(kernel: Any, num_threads: int | None = None) -> Launch:
    """A function that launches a compiled kernel at the lowest cost: well under a microsecond.

    It is called with the grid's x, y and z and then the kernel's arguments in their order, for which constexprs may be
    anything and may be left out at the end. Nothing is specialised any more: arguments must fit what the kernel was
    compiled for (types, integers that were 1 or divisible by 16, alignment of pointers), of which types are checked.
    It keeps the kernel's code. No launch hook is called.

    Args:
        kernel: what `kernel[grid](...)` or `kernel.warmup(..., grid=grid)` returned.
        num_threads: at most this many; default is torch's number of threads.

    Raises:
        LaunchError: the kernel was compiled for another backend, or `num_threads` is below 1.
    """
    if kernel.metadata.target.backend != "cpu":
        raise LaunchError(
            f"kernel {kernel.name!r} was compiled for {kernel.metadata.target.backend}, expected cpu: "
            "see esper_triton.cpu.enable"
        )
    if num_threads is not None and num_threads < 1:
        raise LaunchError(f"kernel {kernel.name!r} was asked to run on {num_threads} threads, expected at least 1")
    code = kernel.function
    if not isinstance(code, LoadedCode):  # never launched
        code = LoadedCode.load(kernel.asm["o"], symbol=kernel.metadata.name)
    slow = _Launcher(kernel.src, kernel.metadata, num_threads)
    slow.native(code)  # makes it known to the table

    def launch(*args: Any) -> None:
        if len(args) < 3:
            raise LaunchError(f"kernel {kernel.name!r} was given {len(args)} arguments, expected a grid x, y, z first")
        slow.launch(code, args[:3], args[3:], None, None, None)

    return launch if slow.sanitize else slow.table.direct_launch(launch, slow.failed)


class _Launcher:
    """Turns the arguments that Triton has bound into the slots of a `NativeKernel` and runs it.

    Attributes:
        table: what machine code has to know to do the same for plain arguments.
        sanitize: the option with which the kernel was compiled. Machine code knows no storages: it launches only those
            kernels that were compiled without.
    """

    def __init__(self, src: Any, metadata: Any, num_threads: int | None = None) -> None:
        self._name = metadata.name
        self.sanitize: str = getattr(metadata, "sanitize", "")
        self._names = tuple(map(str, src.signature))
        self._types = tuple(src.signature.values())
        self._num_threads = num_threads
        self._flags = self._flags_of_descriptors(metadata)
        self._signature = tuple(_slot_types(self._types, self._flags))
        self.table = KernelTable(self._types, num_threads)
        self._native: tuple[LoadedCode, NativeKernel] | None = None

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        code: LoadedCode,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], Any] | None,
        exit_hook: Callable[[Any], Any] | None,
        *args: Any,
    ) -> None:
        """Raises: LaunchError (wrong grid, number, type, range or device of arguments), before anything ran."""
        self.launch(code, (grid_x, grid_y, grid_z), args, launch_metadata, enter_hook, exit_hook)

    def launch(
        self,
        code: LoadedCode,
        grid: tuple[Any, ...],
        args: tuple[Any, ...],
        launch_metadata: Any,
        enter_hook: Callable[[Any], Any] | None,
        exit_hook: Callable[[Any], Any] | None,
    ) -> None:
        least = self.table.least_arguments
        if not least <= len(args) <= len(self._types):
            expected = f"{least} to {len(self._types)}" if least < len(self._types) else f"{least}"
            raise LaunchError(
                f"kernel {self._name!r} was given {len(args)} arguments, expected {expected}: " + ", ".join(self._names)
            )
        values = list(self._slot_values(self._types[: len(args)], args))
        run = self.native(code).bind(grid, values, self._num_threads)
        if enter_hook is not None:
            enter_hook(launch_metadata)
        run()
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def native(self, code: LoadedCode) -> NativeKernel:
        """The kernel of this code, kept until there is another."""
        known = self._native
        if known is None or known[0] is not code:
            known = self._native = code, NativeKernel(code, self._signature, self.sanitize)
            share_threads()
            if not self.sanitize:
                self.table.bind(code)
        return known[1]

    def failed(self, frame: bytes) -> None:
        """Raise what the frame of a failed launch says."""
        raise failure(struct.unpack(f"={FRAME_SLOTS}q", frame), self._name)

    def _flags_of_descriptors(self, metadata: Any) -> int:
        """How many flags follow a descriptor's address, shape and strides: that differs between versions of Triton, so
        it is counted in what was compiled."""
        least = sum(1 for _ in _slot_types(self._types, 0))
        count = sum(_is_descriptor(type) for type in _leaves(self._types))
        if not count:
            return 0
        flags, rest = divmod(int(metadata.slots) - least, count)
        if rest or not 0 <= flags <= len(_FLAGS):
            raise UnsupportedOperation(
                "a tensor descriptor as an argument",
                kernel=self._name,
                reason=f"{count} descriptors became {metadata.slots - least} more arguments than are known",
            )
        return flags

    def _slot_values(self, types: Sequence[Any], values: Sequence[Any]) -> Iterator[Any]:
        for type, value in zip(types, values, strict=True):
            if isinstance(type, tuple):
                if not isinstance(value, tuple) or len(value) != len(type):
                    found = f"a tuple of {len(value)}" if isinstance(value, tuple) else repr(value)
                    raise LaunchError(f"kernel {self._name!r} was given {found}, expected a tuple of {len(type)}")
                yield from self._slot_values(type, value)
            elif _is_descriptor(type):
                yield from self._descriptor(type, value)
            elif type != "constexpr":
                yield value

    def _descriptor(self, type: str, value: Any) -> list[Any]:
        """What Triton's pass that rewrites descriptors to pointers makes of one, and, again, what its frontend does."""
        _, rank = _parse_descriptor(type)
        try:
            shape, strides = list(value.shape), list(value.strides)
            flags = [flag(value) for flag in _FLAGS[: self._flags]]
            base = value.base
        except AttributeError:
            raise LaunchError(f"kernel {self._name!r} was given {value!r}, expected a tensor descriptor") from None
        if len(shape) != rank or len(strides) != rank:
            raise LaunchError(
                f"kernel {self._name!r} was given a tensor descriptor of rank {len(shape)}, expected {rank}: {type}"
            )
        return [base, *shape, *strides, *flags, *shape, *strides]


# In the order in which wheels came to pass them.
_FLAGS: tuple[Callable[[Any], bool], ...] = (
    lambda descriptor: descriptor.padding == "nan",
    lambda descriptor: bool(descriptor.round_f32_to_tf32),
)


def _is_descriptor(type: str) -> bool:
    return type.startswith("tensordesc")


def _parse_descriptor(type: str) -> tuple[str, int]:
    """(element type, rank) of, for instance, `tensordesc<fp32[16, 32]>`."""
    match = _DESCRIPTOR.match(type)
    if match is None:
        raise UnsupportedOperation("a tensor descriptor as an argument", reason=f"its type is {type!r}")
    return match[1], match[2].count(",") + 1


def _slot_types(types: Sequence[Any], flags: int) -> Iterator[str]:
    """Triton's type strings of the run-time arguments: no constexprs, tuples and descriptors opened up."""
    for type in _leaves(types):
        if _is_descriptor(type):
            dtype, rank = _parse_descriptor(type)
            yield f"*{dtype}"
            yield from ["i64"] * (2 * rank) + ["i1"] * flags + ["i32"] * rank + ["i64"] * rank
        elif type != "constexpr":
            yield type


def _leaves(types: Sequence[Any]) -> Iterator[str]:
    for type in types:
        if isinstance(type, tuple):
            yield from _leaves(type)
        else:
            yield type
