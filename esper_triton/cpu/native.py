"""Loads the object code of a kernel into this process and runs it over a grid.

The entry point has the C signature `void symbol(Frame *)`. A frame is sixteen 8-byte slots:

| slot | type | content |
| --- | --- | --- |
| 0 | `uint64 *` | one 8-byte slot for each run-time argument, see `NativeKernel` |
| 1, 2, 3 | `int64` | grid x, y, z |
| 4 | `int32 (*)(void)` | `omp_get_thread_num`, or null: the calling thread runs every program |
| 5 | `int32 (*)(void)` | `omp_get_num_threads`, or null |
| 6 | `int64` | 0, and stays 0 when all went well; no program is begun once it is not. Lower half: `trap.Status` |
| 7, 8, 9 | `int64` | report of the first program that trapped: its id x, y, z |
| 10 | `char *` | where in the source it trapped: line, file, message |
| 11 to 14 | `int64` | numbers that belong to the status |

With more than one thread, `GOMP_parallel` of the libgomp that torch brought along calls the entry point once on each
thread of torch's own pool, and each thread takes its share of the programs.
"""

from __future__ import annotations

import ctypes
import operator
import os
import platform
import struct
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

from esper_triton.cpu import elf
from esper_triton.cpu.errors import LaunchError, ObjectRefused
from esper_triton.cpu.place import PlacedObject, Unplaceable, address_in_process
from esper_triton.cpu.trap import FRAME_SLOTS, FRAME_STATUS, Status, failure
from esper_triton.cpu.watchdog import WATCHED, limit_s, watch

__all__ = ["LoadedCode", "NativeKernel", "PreparedLaunch"]

_MATH = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp10 exp2 expm1 fabs fdim "
    "floor fma fmax fmin fmod frexp hypot ilogb j0 j1 ldexp lgamma llrint llround log log10 log1p log2 logb lrint "
    "lround modf nearbyint nextafter pow remainder remquo rint round roundeven scalbn sin sincos sinh sqrt tan tanh "
    "tgamma trunc y0 y1"
).split()
# What object code may call.
ALLOWED_SYMBOLS = frozenset(
    [
        *_MATH,
        *(f"{name}f" for name in _MATH),
        *("malloc", "calloc", "free", "aligned_alloc", "posix_memalign"),
        *("memcpy", "memset", "memmove", "memcmp", "dprintf"),
    ]
)
# Position-independent code may name it; the JIT makes its own.
_GLOBAL_OFFSET_TABLE = "_GLOBAL_OFFSET_TABLE_"
_MACHINES = {"x86_64": elf.EM_X86_64, "AMD64": elf.EM_X86_64, "aarch64": elf.EM_AARCH64, "arm64": elf.EM_AARCH64}
_MACHINE_NAMES = {elf.EM_X86_64: "x86-64", elf.EM_AARCH64: "aarch64", elf.EM_CUDA: "CUDA"}
_MAX_EXTENT = 2**31

_Entry: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_load_lock = threading.Lock()
# libgomp's threads do not survive a fork, and its pool in the child waits for them for ever.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


class LoadedCode:
    """The machine code of one object file, placed in this process; freed with the last reference to it.

    Attributes:
        symbol: name of the entry point. address: where it is. code_bytes: size of the object file.
    """

    def __init__(self, placed: PlacedObject | _PlacedByLLVM, symbol: str, code_bytes: int) -> None:
        self._placed = placed
        self.symbol, self.address, self.code_bytes = symbol, placed.addresses[symbol], code_bytes
        self.entry = _Entry(self.address)
        self.entry.placed = placed  # so that the function alone keeps its code

    @classmethod
    def load(cls, object_code: bytes, *, symbol: str) -> LoadedCode:
        """Check and place an object file. Safe to call from several threads.

        Raises:
            ObjectRefused: not an ELF relocatable of this machine, no function `symbol`, or a reference to a symbol that
                object code may not use.
        """
        for name in _check_object(object_code, symbol):
            if name not in ALLOWED_SYMBOLS:
                raise ObjectRefused(f"object code of {symbol!r} refers to {name!r}, which it may not use")
            if address_in_process(name) is None:
                raise ObjectRefused(f"object code of {symbol!r} refers to {name!r}, which is not in this process")
        return cls(_place(object_code, symbol), symbol, len(object_code))


def _place(object_code: bytes, symbol: str) -> PlacedObject | _PlacedByLLVM:
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            return PlacedObject(object_code, address_in_process)
        except Unplaceable:
            pass  # other compilers' objects, perhaps
        except ValueError as error:
            raise ObjectRefused(f"object code of {symbol!r} is malformed: {error}") from error
    return _PlacedByLLVM(object_code, symbol)


class _PlacedByLLVM:
    """An object file placed by MCJIT, which knows every relocation of every processor."""

    def __init__(self, object_code: bytes, symbol: str) -> None:
        import llvmlite.binding as llvm

        with _load_lock:
            # The first engine also makes the process's own symbols known to LLVM.
            self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target().create_target_machine())
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
            self._engine.finalize_object()
            address = self._engine.get_function_address(symbol)
        if not address:
            raise ObjectRefused(f"object code of {symbol!r} could not be placed in memory")
        self.addresses = {symbol: int(address)}


class NativeKernel:
    """A kernel that can be launched on CPU memory. Immutable; may be launched from several threads at once.

    Each run-time argument travels in one 8-byte slot, little-endian: pointers and integers zero- or sign-extended,
    fp64 as it is, fp32, fp16 and bf16 as fp32 in the low half.

    Attributes:
        address: of the entry point. code_bytes: size of the object file. symbol: name of the entry point.
        signature: Triton's type strings of the run-time arguments.
    """

    def __init__(self, code: LoadedCode, signature: Sequence[str]) -> None:
        self._code = code
        self.symbol, self.address, self.code_bytes = code.symbol, code.address, code.code_bytes
        self.signature = tuple(signature)
        try:
            self._slots = tuple(_slot(type) for type in self.signature)
        except KeyError as error:
            raise LaunchError(f"kernel {self.symbol!r} has an argument of unknown type {error.args[0]!r}") from None
        self._packing = struct.Struct("<" + "".join(slot.packing for slot in self._slots))
        whole = [(index, slot.low, slot.high) for index, slot in enumerate(self._slots) if not slot.float_bits]
        self._narrow = [(index, low, high) for index, low, high in whole if high < 2**63 - 1]

    @classmethod
    def load(cls, object_code: bytes, *, symbol: str, signature: Sequence[str]) -> NativeKernel:
        """Check object code and place it in this process.

        Args:
            signature: Triton's type strings of the run-time arguments, such as `"*fp32"`, `"i32"`; no constexprs.

        Raises:
            ObjectRefused: see `LoadedCode.load`. LaunchError: an unknown type string.
        """
        return cls(LoadedCode.load(object_code, symbol=symbol), signature)

    def prepare(self) -> PreparedLaunch:
        """A launch whose arguments are bound one by one and kept between runs."""
        return PreparedLaunch(self)

    def launch(self, grid: tuple[int, int, int], args: Sequence[int | float], num_threads: int | None = None) -> None:
        """Run every program of `grid` and return when all are done. The global interpreter lock is released meanwhile.

        Args:
            args: one for each entry of `signature`, pointers as integers.
            num_threads: at most this many; default is torch's number of threads.

        Raises:
            LaunchError: wrong grid, number, type or range of arguments, before anything ran; or no memory for scratch.
            KernelTrap: a check failed in one of the programs.
        """
        if len(args) != len(self._slots):
            expected = f"{len(self._slots)} ({', '.join(self.signature)})"
            raise LaunchError(f"kernel {self.symbol!r} was given {len(args)} arguments, expected {expected}")
        prepared = PreparedLaunch(self)
        prepared.set_all(args)
        prepared.launch(grid, num_threads)


class PreparedLaunch:
    """The packed arguments of one kernel, for launching it again and again with little done in Python.

    Pointers are kept as numbers: whoever binds them keeps the memory alive. For one thread at a time.
    """

    __slots__ = ("_address", "_entry", "_floats", "_frame", "_kernel", "_slots", "_unbound", "_words")

    def __init__(self, kernel: NativeKernel) -> None:
        count = max(len(kernel.signature), 1)
        self._kernel = kernel
        self._slots = kernel._slots
        self._entry = kernel._code.entry
        self._words = (ctypes.c_uint64 * count)()
        self._floats = (ctypes.c_float * (2 * count)).from_buffer(self._words)
        self._frame = (ctypes.c_int64 * FRAME_SLOTS)(ctypes.addressof(self._words))
        self._address = ctypes.addressof(self._frame)
        self._unbound = set(range(len(kernel.signature)))

    def set(self, index: int, value: int | float) -> None:
        """Bind argument `index`, a position in the kernel's signature.

        Raises:
            LaunchError: no such argument, or `value` is not of its type or out of its range.
        """
        if not 0 <= index < len(self._slots):
            raise LaunchError(f"kernel {self._kernel.symbol!r} has no argument {index}, only {len(self._slots)}")
        slot = self._slots[index]
        try:
            if slot.float_bits:
                if slot.float_bits == 32:
                    self._floats[2 * index] = value
                else:
                    self._words[index] = int.from_bytes(ctypes.c_double(value), "little")
            else:
                whole = operator.index(value)  # type: ignore[arg-type]  # a float is what the except clause is for
                if not slot.low <= whole <= slot.high:
                    raise OverflowError
                self._words[index] = whole
        except (TypeError, OverflowError):
            type = self._kernel.signature[index]
            expected = "a number" if slot.float_bits else f"an integer from {slot.low} to {slot.high}"
            raise LaunchError(
                f"argument {index} of kernel {self._kernel.symbol!r} is {value!r}, expected {expected} ({type})"
            ) from None
        self._unbound.discard(index)

    def set_all(self, values: Sequence[int | float]) -> None:
        """Bind every argument, one value for each entry of the signature, at once. Raises LaunchError as `set` does."""
        kernel = self._kernel
        try:
            kernel._packing.pack_into(self._words, 0, *values)
            fit = all(low <= values[index] <= high for index, low, high in kernel._narrow)
        except (struct.error, TypeError, OverflowError):
            fit = False
        if not fit:  # one of them is not of its type: `set` says which
            for index, value in enumerate(values):
                self.set(index, value)
        self._unbound.clear()

    def launch(self, grid: tuple[int, int, int], num_threads: int | None = None) -> None:
        """Run every program of `grid` with what is bound; see `NativeKernel.launch`."""
        name = self._kernel.symbol
        if self._unbound:
            raise LaunchError(f"argument {min(self._unbound)} of kernel {name!r} was never bound")
        x, y, z = _extents(grid, name)
        programs = x * y * z
        if num_threads is not None and num_threads < 1:
            raise LaunchError(f"kernel {name!r} was asked to run on {num_threads} threads, expected at least 1")
        if not programs:
            return
        frame = self._frame
        frame[1], frame[2], frame[3] = x, y, z
        frame[FRAME_STATUS] = Status.RUNNING
        openmp = None
        if programs > 1 and num_threads != 1 and not _forked and "torch" in sys.modules:
            num_threads = min(num_threads or sys.modules["torch"].get_num_threads(), programs)
            openmp = _openmp() if num_threads > 1 else None
        with watch(frame, limit) if (limit := WATCHED.value and limit_s()) else nullcontext():
            if openmp is None:
                frame[4] = frame[5] = 0
                self._entry(self._address)
            else:
                parallel, frame[4], frame[5] = openmp
                parallel(self._kernel.address, self._address, num_threads, 0)
        if frame[FRAME_STATUS]:
            raise failure(frame[:], name)


class _Slot:
    """How one argument is checked and packed: a float of `float_bits`, or an integer from `low` to `high`. `packing` is
    struct's code for its eight bytes, which refuses what does not fit these."""

    __slots__ = ("float_bits", "high", "low", "packing")

    def __init__(self, float_bits: int, low: int, high: int, packing: str) -> None:
        self.float_bits, self.low, self.high, self.packing = float_bits, low, high, packing


def _slot(type: str) -> _Slot:
    return _POINTER if type.startswith("*") else _SCALARS[type]


_POINTER = _Slot(0, 0, 2**64 - 1, "Q")
_SCALARS = {
    **{name: _Slot(32, 0, 0, "f4x") for name in ("fp32", "f32", "fp16", "bf16")},
    **{name: _Slot(64, 0, 0, "d") for name in ("fp64", "f64")},
    **{f"i{bits}": _Slot(0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, "q") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": _Slot(0, 0, 2**bits - 1, "Q") for bits in (8, 16, 32, 64)},
    **{name: _Slot(0, 0, 1, "Q") for name in ("i1", "u1")},
}


def _extents(grid: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    """A grid as three checked integers."""
    try:
        x, y, z = map(operator.index, grid)
    except (TypeError, ValueError):
        raise LaunchError(f"grid of kernel {name!r} is {grid!r}, expected three integers") from None
    if not (0 <= x < _MAX_EXTENT and 0 <= y < _MAX_EXTENT and 0 <= z < _MAX_EXTENT):
        raise LaunchError(f"grid of kernel {name!r} is {(x, y, z)}, expected each from 0 to 2**31 - 1")
    if x * y * z >= 2**63:
        raise LaunchError(f"grid of kernel {name!r} is {(x, y, z)}, expected fewer than 2**63 programs")
    return x, y, z


@lru_cache(maxsize=1)
def _openmp() -> tuple[Any, int, int] | None:
    """`GOMP_parallel` and the addresses of the two thread functions, from the libgomp that torch has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    except OSError:
        return None
    # torch's own copy comes first when another package brought one too: only then are the threads torch's.
    for path in sorted(paths, key=lambda path: "/torch/" not in path):
        library = ctypes.CDLL(path)
        parallel = library.GOMP_parallel
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        thread, count = library.omp_get_thread_num, library.omp_get_num_threads
        return parallel, _address_of(thread), _address_of(count)
    return None


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@lru_cache(maxsize=1)
def _target() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _check_object(object_code: bytes, symbol: str) -> list[str]:
    """The names of the functions that the object code takes from this process."""
    try:
        machine = elf.machine(object_code)
        relocatable = elf.is_relocatable(object_code)
        table = elf.symbols(object_code)
    except ValueError as error:
        raise ObjectRefused(f"object code of {symbol!r} is malformed: {error}") from error
    expected = _MACHINES.get(platform.machine())
    if machine != expected:
        found = _MACHINE_NAMES.get(machine, f"ELF machine {machine}")
        raise ObjectRefused(f"object code of {symbol!r} is for {found}, expected {platform.machine()}")
    if not relocatable:
        raise ObjectRefused(f"object code of {symbol!r} is not a relocatable object file")
    functions = [s.name for s in table if s.defined and s.is_function]
    if symbol not in functions:
        raise ObjectRefused(f"object code has no function {symbol!r}; it has: {', '.join(functions) or 'none'}")
    return [s.name for s in table if not s.defined and s.name != _GLOBAL_OFFSET_TABLE]
