"""What the CPU backend raises on purpose. None of these depends on the rest of Esper.

Triton keeps a deep copy of an error that a kernel raised when it was loaded and raises that copy on later launches, so
every class here survives `copy.deepcopy` and `pickle` with its attributes.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CPUBackendError",
    "DeviceAssertionError",
    "IntegerDivisionByZero",
    "KernelTimeout",
    "KernelTrap",
    "LaunchError",
    "MLIRSyntaxError",
    "ObjectRefused",
    "OutOfBounds",
    "UnsupportedOperation",
    "UsageError",
    "WriteRace",
]


class CPUBackendError(RuntimeError):
    """Base of every error of the CPU backend. The message is one line."""


class MLIRSyntaxError(CPUBackendError):
    """Triton's printer gave text that is not the generic form of MLIR which the backend reads."""


class LaunchError(CPUBackendError):
    """A launch was refused before anything ran (grid, arity, type or place of an argument), or ran out of memory."""


class UsageError(CPUBackendError):
    """What was asked for on the command line cannot be done as it was asked for."""


class ObjectRefused(CPUBackendError):
    """Object code is malformed, for another machine, lacks its entry point, or refers to a symbol it may not call."""


class UnsupportedOperation(CPUBackendError):
    """The kernel uses an operation, or a form of one, that the CPU backend does not have yet.

    Attributes:
        operation: name of the operation, such as `tt.histogram`. kernel: name of the kernel or None.
        file, line: where the kernel's source uses it, or None. reason: what is missing, or None.
    """

    def __init__(
        self,
        operation: str,
        *,
        kernel: str | None = None,
        file: str | None = None,
        line: int | None = None,
        reason: str | None = None,
    ) -> None:
        self.operation, self.kernel, self.file, self.line, self.reason = operation, kernel, file, line, reason
        place = [f"kernel {kernel!r}"] if kernel else []
        if file:
            place.append(f"{file}:{line}" if line is not None else file)
        message = f"{operation} is not supported by the CPU backend yet"
        message += f" ({', '.join(place)})" if place else ""
        super().__init__(message + (f": {reason}" if reason else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # the default would pass the message as `operation`
        return _unsupported, (self.operation, self.kernel, self.file, self.line, self.reason)


def _unsupported(
    operation: str, kernel: str | None, file: str | None, line: int | None, reason: str | None
) -> UnsupportedOperation:
    return UnsupportedOperation(operation, kernel=kernel, file=file, line=line, reason=reason)


class KernelTrap(CPUBackendError):
    """A program of a launch failed a check, and the launch was stopped there. What its programs had written stays.

    Attributes:
        message: what failed. kernel: name of the kernel. program: program id (x, y, z) of the first one that failed.
        file, line: where the kernel's source has the check, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str,
        program: tuple[int, int, int] | None = None,
        file: str | None = None,
        line: int | None = None,
    ) -> None:
        self.message, self.kernel, self.program, self.file, self.line = message, kernel, program, file, line
        place = [f"kernel {kernel!r}"]
        if file:
            place.append(f"{file}:{line}" if line is not None else file)
        if program is not None:
            place.append(f"program {program}")
        text = " ".join(f"{self._summary}: {message}".split()) if message else self._summary
        super().__init__(f"{text} ({', '.join(place)})")

    _summary = "a check failed"

    def __reduce__(self) -> tuple[Any, ...]:
        return _trap, (type(self), self.message, self.kernel, self.program, self.file, self.line), self.__dict__


def _trap(kind: type[KernelTrap], message: str, kernel: str, program: Any, file: Any, line: Any) -> KernelTrap:
    return kind(message, kernel=kernel, program=program, file=file, line=line)


class DeviceAssertionError(KernelTrap, AssertionError):
    """A `tl.device_assert` of a kernel does not hold. `message` is the assertion's own."""

    _summary = "device assertion failed"


class KernelTimeout(KernelTrap):
    """A launch was stopped by its deadline. `file` and `line` are those of a loop that was running, or the kernel's."""

    _summary = "the launch ran past its deadline"


class IntegerDivisionByZero(KernelTrap, ZeroDivisionError):
    """An integer was divided by zero, or the remainder of that was taken, and the result was used."""

    _summary = "integer division by zero"


class OutOfBounds(KernelTrap, IndexError):
    """The sanitizer: an access that is not masked off lies outside of the storages passed to the launch.

    Attributes:
        access: `"load"`, `"store"` or `"atomic"`. width: bytes that it takes.
        argument: name of the pointer argument, None where it is not known which one the address was computed from.
        offset: bytes from the start of the argument's storage, negative before it; None without an argument.
        size: bytes that the storage has; None without an argument.
    """

    access: str
    argument: str | None
    offset: int | None
    width: int
    size: int | None

    _summary = "out of bounds"


class WriteRace(KernelTrap):
    """The sanitizer: two programs of a launch store to the same element, and neither does so by an atomic.

    Attributes:
        argument, offset, width: as in `OutOfBounds`. other: id (x, y, z) of the program that wrote there before.
    """

    argument: str | None
    offset: int
    width: int
    other: tuple[int, int, int]

    _summary = "write race"


def out_of_bounds(access: str, argument: str | None, offset: int, width: int, size: int, **at: Any) -> OutOfBounds:
    """`offset` is the address where there is no argument. `at`: what `KernelTrap` takes."""
    if argument is None:
        message = f"{access} of {width} bytes at address {offset:#x}, which is in no storage of the launch"
        error = OutOfBounds(message, **at)
        error.offset = error.size = None
    else:
        offset -= 2**64 if offset >= 2**63 else 0
        message = f"{access} of {width} bytes at offset {offset} of {argument!r}, whose storage has {size} bytes"
        error = OutOfBounds(message, **at)
        error.offset, error.size = offset, size
    error.access, error.argument, error.width = access, argument, width
    return error


def write_race(argument: str | None, offset: int, width: int, other: tuple[int, int, int], **at: Any) -> WriteRace:
    """`at`: what `KernelTrap` takes."""
    where = f"of {argument!r}" if argument else "of a storage"
    error = WriteRace(f"{width} bytes at offset {offset} {where} were written by program {other} as well", **at)
    error.argument, error.offset, error.width, error.other = argument, offset, width, other
    return error
