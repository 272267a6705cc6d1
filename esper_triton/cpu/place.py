"""Places object code in memory.

For x86-64 it does what LLVM's own loader does, at a tenth of its time and without loading LLVM; other processors' code,
and what is not known here, goes through LLVM.

The file's sections are copied into private anonymous memory in three runs of pages (code; constants; variables), each
relocation is applied, and the pages get their final protection. No page is ever writable and executable at once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

from esper_triton.cpu import elf

__all__ = [
    "GLOBAL_OFFSET_TABLE",
    "Placed",
    "PlacedByLLVM",
    "PlacedObject",
    "Unplaceable",
    "address_in_process",
    "place",
]

# System V ABI for AMD64, table "Relocation Types": S is the symbol, A the addend, P the place.
_R_64, _R_PC32, _R_PLT32, _R_PC64 = 1, 2, 4, 24  # S + A; S + A - P in 32 bits (twice); S + A - P in 64 bits
_SHT_UNWIND, _SHF_TLS, _SHN_LORESERVE = 0x70000001, 0x400, 0xFF00
_PROT_READ, _PROT_EXEC = 1, 4
# jmp *(%rip); then the address: for a call of 32 bits to a library that is farther away.
_STUB = struct.Struct("<6sQ2x")
_JUMP = b"\xff\x25\x00\x00\x00\x00"
# Position-independent code may name it; every loader makes its own.
GLOBAL_OFFSET_TABLE = "_GLOBAL_OFFSET_TABLE_"
_WORD, _HALF = struct.Struct("<Q"), struct.Struct("<i")

_mcjit_lock = threading.Lock()


def _new_lock() -> None:
    global _mcjit_lock
    _mcjit_lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held it


class Unplaceable(ValueError):
    """The object is well-formed, but uses something that this loader does not know."""


class Placed(Protocol):
    """Object code in this process's memory, which is given back with the last reference to this.

    Attributes:
        addresses: of symbols that the object defines, by name.
    """

    addresses: dict[str, int]


def place(object_code: bytes, names: Sequence[str]) -> Placed:
    """Place a relocatable of this machine's processor. Safe to call from several threads.

    Args:
        names: the symbols whose addresses are wanted.

    Raises:
        ValueError: malformed file, or it does not define one of `names`. KeyError: it needs a symbol that this process
            lacks.
    """
    placed: Placed
    try:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise Unplaceable("not for x86-64")
        placed = PlacedObject(object_code, address_in_process)
    except Unplaceable:
        placed = PlacedByLLVM(object_code, names)
    missing = [name for name in names if not placed.addresses.get(name)]
    if missing:
        raise ValueError(f"no address for {', '.join(missing)}")
    return placed


class PlacedByLLVM:
    """An object file placed by MCJIT, which knows every relocation of every processor."""

    def __init__(self, object_code: bytes, names: Sequence[str]) -> None:
        import llvmlite.binding as llvm

        for symbol in elf.symbols(object_code):
            # MCJIT would resolve it to address zero and the call would crash.
            if not symbol.defined and symbol.name != GLOBAL_OFFSET_TABLE and address_in_process(symbol.name) is None:
                raise KeyError(symbol.name)
        with _mcjit_lock:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            machine = llvm.Target.from_default_triple().create_target_machine()
            # The first engine also makes the process's own symbols known to LLVM.
            self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
            self._engine.finalize_object()
            self.addresses = {name: int(self._engine.get_function_address(name)) for name in names}


class PlacedObject:
    """One object file in this process's memory, which is given back with the last reference to this.

    Attributes:
        addresses: of every named symbol that the file defines.
    """

    def __init__(self, object_code: bytes, resolve: Callable[[str], int | None]) -> None:
        """Place an x86-64 relocatable.

        Args:
            resolve: the address of a symbol that the file does not define, or None.

        Raises:
            ValueError: malformed file. Unplaceable: an unknown relocation or kind of section. KeyError: a symbol that
                `resolve` does not have.
        """
        sections, table = elf.sections(object_code), elf.symbol_table(object_code)
        relocations = [r for r in elf.relocations(object_code) if sections[r.target].type != _SHT_UNWIND]
        # The order of the runs; where each begins, and which sections are in it.
        starts, runs, size = [], [], 0
        offsets: dict[int, int] = {}
        kinds: list[list[int]] = [[], [], []]
        for index, section in enumerate(sections):
            if not section.in_memory or not section.size or section.type == _SHT_UNWIND:
                continue
            if section.flags & _SHF_TLS or (section.writable and section.executable):
                raise Unplaceable(f"section {index} has flags {section.flags:#x}")
            kinds[0 if section.executable else 2 if section.writable else 1].append(index)
        called = sorted({r.symbol for r in relocations if r.type in (_R_PC32, _R_PLT32)})
        far = [index for index in called if index < len(table) and not table[index].defined]
        stubs: dict[int, int] = {}
        for number, kind in enumerate(kinds):
            starts.append(size)
            for index in kind:
                alignment = max(sections[index].alignment, 1)
                if alignment > mmap.PAGESIZE:
                    raise Unplaceable(f"section {index} is aligned to {alignment}")
                size = -(-size // alignment) * alignment
                offsets[index] = size
                size += sections[index].size
            if number == 0 and far:
                size = -(-size // 16) * 16
                stubs = {index: size + _STUB.size * k for k, index in enumerate(far)}
                size += _STUB.size * len(far)
            runs.append((starts[-1], size))
            size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # Private: a forked child has variables of its own.
        self._memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pin: Any = ctypes.c_char.from_buffer(self._memory)
        base = ctypes.addressof(self._pin)
        memory = self._memory
        for index, offset in offsets.items():
            data = elf.content(object_code, sections[index])
            memory[offset : offset + len(data)] = data

        def address_of(index: int) -> int:
            if index >= len(table):
                raise ValueError(f"ELF relocation names symbol {index} of {len(table)}")
            symbol = table[index]
            if not symbol.defined:
                found = resolve(symbol.name)
                if found is None:
                    raise KeyError(symbol.name)
                return found
            if symbol.section >= _SHN_LORESERVE:
                raise Unplaceable(f"symbol {symbol.name!r} is in the reserved section {symbol.section:#x}")
            if symbol.section not in offsets:  # empty, so nothing is read there
                return base
            if symbol.value > sections[symbol.section].size:
                raise ValueError(f"ELF symbol {symbol.name!r} lies outside section {symbol.section}")
            return base + offsets[symbol.section] + symbol.value

        for index, offset in stubs.items():
            _STUB.pack_into(memory, offset, _JUMP, address_of(index))
        for relocation in relocations:
            word = _WORD if relocation.type in (_R_64, _R_PC64) else _HALF
            if relocation.target not in offsets or relocation.offset + word.size > sections[relocation.target].size:
                raise ValueError(f"ELF relocation at {relocation.offset} lies outside section {relocation.target}")
            place = offsets[relocation.target] + relocation.offset
            if relocation.type in (_R_64, _R_PC64):
                value = address_of(relocation.symbol) + relocation.addend
                if relocation.type == _R_PC64:
                    value -= base + place
                _WORD.pack_into(memory, place, value % 2**64)
            elif relocation.type in (_R_PC32, _R_PLT32):
                stub = stubs.get(relocation.symbol)
                if stub is not None and relocation.type == _R_PC32:
                    raise Unplaceable(f"data {table[relocation.symbol].name!r} of a library within 2 GiB")
                target = base + stub if stub is not None else address_of(relocation.symbol)
                value = target + relocation.addend - (base + place)
                if not -(2**31) <= value < 2**31:
                    raise Unplaceable(f"relocation over a distance of {value} bytes")
                _HALF.pack_into(memory, place, value)
            else:
                raise Unplaceable(f"relocation of type {relocation.type}")
        for (start, end), protection in zip(runs, (_PROT_READ | _PROT_EXEC, _PROT_READ), strict=False):
            if end > start and _mprotect()(base + start, end - start, protection):
                raise OSError(ctypes.get_errno(), "mprotect of object code failed")
        self.addresses = {s.name: address_of(k) for k, s in enumerate(table) if s.name and s.section in offsets}


@lru_cache(maxsize=1)
def _mprotect() -> Any:
    function = ctypes.CDLL(None, use_errno=True).mprotect
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@lru_cache(maxsize=256)
def address_in_process(name: str) -> int | None:
    """Where a function or variable of the libraries in this process is: libc's, libm's, Python's own."""
    for library in _libraries():
        try:
            return ctypes.addressof(ctypes.c_char.in_dll(library, name))
        except ValueError:  # it has none of this name
            continue
    return None


@lru_cache(maxsize=1)
def _libraries() -> list[Any]:
    found: list[Any] = [ctypes.pythonapi, ctypes.CDLL(None)]
    for name in ("libm.so.6", "libc.so.6"):
        try:
            found.append(ctypes.CDLL(name))
        except OSError:  # another C library, whose functions the process has anyway
            continue
    return found
