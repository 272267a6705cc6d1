"""Loads the object code of a kernel into this process and runs it over a grid.

The entry point has the C signature `void symbol(Frame *)`. A frame is seventeen 8-byte slots:

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
| 15 | `int64 *` | for code that checks its accesses: the storages it may reach, see `storages`; null: everything |
| 16 | `int64 *` | for each thread, how many programs of its range have been claimed so far: 0 to begin with |

With more than one thread, `GOMP_parallel` of the libgomp that torch brought along calls the entry point once on each
thread of torch's own pool, and the threads share the programs (see `lowering.entry`).
"""

from __future__ import annotations

import ctypes
import json
import operator
import platform
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import lru_cache
from typing import Any, NoReturn

from esper_triton.cpu import elf, host, launcher
from esper_triton.cpu.errors import LaunchError, ObjectRefused
from esper_triton.cpu.forking import forked
from esper_triton.cpu.launcher import KernelTable, Launch
from esper_triton.cpu.place import GLOBAL_OFFSET_TABLE, Placed, address_in_process, place
from esper_triton.cpu.storages import StorageTable
from esper_triton.cpu.trap import FRAME_CLAIMS, FRAME_SLOTS, FRAME_STATUS, FRAME_STORAGES, failure
from esper_triton.cpu.watchdog import WATCHED, limit_s, watch
from esper_triton.cpu.work import programs_per_thread

__all__ = ["ALLOWED_SYMBOLS", "NOTE_SECTION", "LoadedCode", "NativeKernel", "share_threads"]

_MATH = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp10 exp2 expm1 fabs fdim "
    "floor fma fmax fmin fmod frexp hypot ilogb j0 j1 ldexp lgamma llrint llround log log10 log1p log2 logb lrint "
    "jn lround modf nearbyint nextafter pow remainder remquo rint round roundeven scalbn sin sincos sinh sqrt tan tanh "
    "tgamma trunc y0 y1 yn"
).split()
# What object code may call.
ALLOWED_SYMBOLS = frozenset(
    [
        *_MATH,
        *(f"{name}f" for name in _MATH),
        *("malloc", "calloc", "free", "aligned_alloc", "posix_memalign"),
        *("memcpy", "memset", "memmove", "memcmp", "dprintf", "clock_gettime"),
    ]
)
_MACHINES = {"x86_64": elf.EM_X86_64, "AMD64": elf.EM_X86_64, "aarch64": elf.EM_AARCH64, "arm64": elf.EM_AARCH64}
_MACHINE_NAMES = {elf.EM_X86_64: "x86-64", elf.EM_AARCH64: "aarch64", elf.EM_CUDA: "CUDA"}
_MAX_EXTENT = 2**31
# Where an object file says, in JSON, which processor it was compiled for (`cpu`), which features of it, under LLVM's
# names, the code may use (`features`), and how much a program does (`work`, see `work.element_operations`).
NOTE_SECTION = ".esper.note"

_Entry: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class LoadedCode:
    """The machine code of one object file, placed in this process; freed with the last reference to it.

    Attributes:
        symbol: name of the entry point. address: where it is. code_bytes: size of the object file.
        programs_per_thread: so many programs keep a thread busy for long enough to be worth waking.
    """

    def __init__(self, placed: Placed, symbol: str, code_bytes: int, work: int | None) -> None:
        self._placed = placed
        self.programs_per_thread = programs_per_thread(work)
        self.symbol, self.address, self.code_bytes = symbol, placed.addresses[symbol], code_bytes
        self.entry = _Entry(self.address)
        self.entry.placed = placed  # so that the function alone keeps its code

    @classmethod
    def load(cls, object_code: bytes, *, symbol: str) -> LoadedCode:
        """Check and place an object file. Safe to call from several threads.

        Raises:
            ObjectRefused: not an ELF relocatable of this machine, no function `symbol`, a reference to a symbol that
                object code may not use, or compiled for features that this processor lacks.
        """
        imports = _check_object(object_code, symbol)
        work = _check_note(object_code, symbol)
        for name in imports:
            if name not in ALLOWED_SYMBOLS:
                raise ObjectRefused(f"object code of {symbol!r} refers to {name!r}, which it may not use")
            if address_in_process(name) is None:
                raise ObjectRefused(f"object code of {symbol!r} refers to {name!r}, which is not in this process")
        try:
            placed = place(object_code, [symbol])
        except ValueError as error:
            raise ObjectRefused(f"object code of {symbol!r} is malformed: {error}") from error
        return cls(placed, symbol, len(object_code), work)


class NativeKernel:
    """A kernel that can be launched on CPU memory. Immutable; may be launched from several threads at once.

    Each run-time argument travels in one 8-byte slot, little-endian: pointers and integers zero- or sign-extended,
    fp64 as it is, fp32, fp16 and bf16 as fp32 in the low half.

    Attributes:
        address: of the entry point. code_bytes: size of the object file. symbol: name of the entry point.
        signature: Triton's type strings of the run-time arguments.
    """

    def __init__(self, code: LoadedCode, signature: Sequence[str], sanitize: str = "") -> None:
        """`sanitize`: the option (see `CPUOptions`) with which the code was compiled; without it, code that checks its
        accesses lets all of them pass."""
        self._code, self._sanitize = code, sanitize
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

    def launcher(self, num_threads: int | None = None) -> Launch:
        """A function `(x, y, z, *args)` that does what `launch((x, y, z), args, num_threads)` does, as machine code:
        in well under a microsecond. It keeps the kernel's code.

        Raises:
            LaunchError: `num_threads` is below 1.
        """
        _check_threads(num_threads, self.symbol)
        share_threads()
        table = KernelTable(self.signature, num_threads)
        table.bind(self._code)

        def slow(*args: Any) -> None:
            if len(args) < 3:
                raise LaunchError(
                    f"kernel {self.symbol!r} was given {len(args)} arguments, expected a grid x, y, z first"
                )
            self.launch((args[0], args[1], args[2]), args[3:], num_threads)

        return slow if self._sanitize else table.direct_launch(slow, self.failed)

    def launch(self, grid: tuple[int, int, int], args: Sequence[Any], num_threads: int | None = None) -> None:
        """Run every program of `grid` and return when all are done. The global interpreter lock is released meanwhile.

        Args:
            args: one for each entry of `signature`. Pointers are tensors in this machine's memory, or addresses (the
                caller keeps the memory alive), or None for null.
            num_threads: at most this many; default is torch's number of threads.

        Raises:
            LaunchError: wrong grid, number, type, range or device of arguments, before anything ran; or no memory for
                scratch. KernelTrap: a check failed in one of the programs.
        """
        self.bind(grid, args, num_threads)()

    def bind(
        self, grid: tuple[int, int, int], args: Sequence[Any], num_threads: int | None = None
    ) -> Callable[[], None]:
        """One launch, checked and ready to run once: what `launch` does in two steps, each with its share of errors."""
        name = self.symbol
        if len(args) != len(self._slots):
            expected = f"{len(self._slots)} ({', '.join(self.signature)})"
            raise LaunchError(f"kernel {name!r} was given {len(args)} arguments, expected {expected}")
        words = self._pack(
            [
                _address(value, index, name) if self._slots[index] is _POINTER else value
                for index, value in enumerate(args)
            ]
        )
        x, y, z = _extents(grid, name)
        _check_threads(num_threads, name)
        programs = x * y * z
        # The frame points to the words and storages, so the function keeps them.
        frame = (ctypes.c_int64 * FRAME_SLOTS)(ctypes.addressof(words), x, y, z)
        storages = None
        if self._sanitize:
            race = self._sanitize == "race"
            storages = StorageTable(zip(self.signature, args, strict=True), programs=programs, race=race)
            frame[FRAME_STORAGES] = storages.address
            if race:
                num_threads = 1  # who wrote where is noted without atomics

        def run(words: Any = words) -> None:
            with nullcontext() if storages is None else closing(storages):
                if programs:
                    self._run(frame, programs, num_threads)

        return run

    def _run(self, frame: Any, programs: int, num_threads: int | None) -> None:
        openmp, threads = None, 1
        if programs > 1 and num_threads != 1 and not forked() and "torch" in sys.modules:
            worthwhile = programs // self._code.programs_per_thread + 1
            threads = min(num_threads or sys.modules["torch"].get_num_threads(), programs, worthwhile)
            openmp = _openmp() if threads > 1 else None
        with watch(frame, limit) if (limit := WATCHED.value and limit_s()) else nullcontext():
            if openmp is None:
                self._code.entry(ctypes.addressof(frame))
            else:
                parallel, frame[4], frame[5] = openmp
                claims = (ctypes.c_int64 * threads)()
                frame[FRAME_CLAIMS] = ctypes.addressof(claims)
                parallel(self.address, ctypes.addressof(frame), threads, 0)
        if frame[FRAME_STATUS]:
            self.failed(bytes(frame))

    def failed(self, frame: bytes) -> NoReturn:
        """Raise what the frame of a launch, whose status is not 0, says."""
        raise failure(struct.unpack(f"={FRAME_SLOTS}q", frame), self.symbol)

    def _pack(self, values: list[Any]) -> Any:
        """The argument slots, as a ctypes array."""
        words = (ctypes.c_uint64 * max(len(values), 1))()
        try:
            self._packing.pack_into(words, 0, *values)
            if all(low <= values[index] <= high for index, low, high in self._narrow):
                return words
        except (struct.error, TypeError, OverflowError):
            pass
        for index, (slot, value) in enumerate(zip(self._slots, values, strict=True)):  # one of them is not of its type
            try:
                words[index] = slot.word(value)
            except (TypeError, OverflowError):
                expected = "a number" if slot.float_bits else f"an integer from {slot.low} to {slot.high}"
                raise LaunchError(
                    f"argument {index} of kernel {self.symbol!r} is {value!r}, expected {expected} "
                    f"({self.signature[index]})"
                ) from None
        return words


class _Slot:
    """How one argument is checked and packed: a float of `float_bits`, or an integer from `low` to `high`. `packing` is
    struct's code for its eight bytes, which refuses what does not fit these."""

    __slots__ = ("float_bits", "high", "low", "packing")

    def __init__(self, float_bits: int, low: int, high: int, packing: str) -> None:
        self.float_bits, self.low, self.high, self.packing = float_bits, low, high, packing

    def word(self, value: Any) -> int:
        """The eight bytes of `value` as an unsigned number. TypeError or OverflowError: it is not of this type."""
        if self.float_bits:
            number = ctypes.c_float(value) if self.float_bits == 32 else ctypes.c_double(value)
            return int.from_bytes(number, "little")
        whole = operator.index(value)
        if not self.low <= whole <= self.high:
            raise OverflowError
        return whole % 2**64


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


def _address(value: Any, index: int, name: str) -> Any:
    """The address of a pointer argument; what is neither a tensor nor None is left as it is."""
    if value is None:
        return 0
    if not hasattr(value, "data_ptr"):
        return value
    device = getattr(value, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        raise LaunchError(f"argument {index} of kernel {name!r} is a tensor on {device}, expected cpu")
    return value.data_ptr()


def _check_threads(num_threads: int | None, name: str) -> None:
    if num_threads is not None and num_threads < 1:
        raise LaunchError(f"kernel {name!r} was asked to run on {num_threads} threads, expected at least 1")


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


def share_threads() -> None:
    """Let fast launches run on torch's threads, if torch is in this process by now."""
    torch = sys.modules.get("torch")
    if torch is not None and not forked() and (openmp := _openmp()):
        parallel, thread_num, num_threads = openmp
        launcher.use_threads((_address_of(parallel), thread_num, num_threads), torch.get_num_threads)


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


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
    return [s.name for s in table if not s.defined and s.name != GLOBAL_OFFSET_TABLE]


def _check_note(object_code: bytes, symbol: str) -> int | None:
    """The work of a program. Other compilers' objects carry no note, and are whoever made them's responsibility."""
    try:
        note = elf.section(object_code, NOTE_SECTION)
    except ValueError:
        return None
    try:
        content = json.loads(note)
        cpu, features, work = str(content["cpu"]), {str(name) for name in content["features"]}, content["work"]
        work = None if work is None else int(work)
    except (ValueError, KeyError, TypeError) as error:
        raise ObjectRefused(f"object code of {symbol!r} has a note that is malformed: {error}") from error
    missing = sorted(features - set(host.cpu_features()))
    if missing:
        raise ObjectRefused(
            f"object code of {symbol!r} was compiled for {cpu} and uses CPU features that this machine "
            f"({host.cpu_name()}) does not have: {', '.join(missing)}; compile it on this machine"
        )
    return work
