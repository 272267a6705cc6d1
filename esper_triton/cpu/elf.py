"""A small reader of 64-bit little-endian ELF files: machine, symbols, sections, relocations.

Every offset and count is checked against the file before it is followed, so that bytes from anywhere raise `ValueError`
and nothing else.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "EM_AARCH64",
    "EM_CUDA",
    "EM_X86_64",
    "Relocation",
    "Section",
    "Symbol",
    "content",
    "is_relocatable",
    "machine",
    "relocations",
    "section",
    "sections",
    "symbol_table",
    "symbols",
]

EM_X86_64 = 62
EM_AARCH64 = 183
EM_CUDA = 190

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS, _SHT_REL, _SHN_UNDEF, _SHN_XINDEX, _STT_FUNC, _ET_REL = 2, 4, 8, 9, 0, 0xFFFF, 2, 1
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4


class Symbol(NamedTuple):
    """One entry of the symbol table.

    Attributes:
        defined: False for a name that another object must supply. value: offset in its section for a relocatable file.
        size: bytes. section: index of its section, where it has one.
    """

    name: str
    defined: bool
    is_function: bool
    value: int
    size: int
    section: int = 0


class Section(NamedTuple):
    """One section header. `info` and `link` mean what the type says; sizes and offsets are in bytes."""

    name_offset: int
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int

    @property
    def in_memory(self) -> bool:
        """True for what a running program needs."""
        return bool(self.flags & _SHF_ALLOC)

    @property
    def writable(self) -> bool:
        return bool(self.flags & _SHF_WRITE)

    @property
    def executable(self) -> bool:
        return bool(self.flags & _SHF_EXECINSTR)


class Relocation(NamedTuple):
    """A place that an address is to be written to: `offset` bytes into section `target`, as `type` says."""

    target: int
    offset: int
    type: int
    symbol: int
    addend: int


def machine(data: bytes) -> int:
    """The ELF machine number, such as `EM_X86_64`.

    Raises:
        ValueError: `data` is not a 64-bit little-endian ELF file.
    """
    return int(_header(data)[2])


def is_relocatable(data: bytes) -> bool:
    """True for an object file that a linker, or a JIT, can still place.

    Raises:
        ValueError: `data` is not a 64-bit little-endian ELF file.
    """
    return bool(_header(data)[1] == _ET_REL)


def symbols(data: bytes) -> list[Symbol]:
    """The named symbols of the symbol table in their order; empty when there is no table.

    Raises:
        ValueError: malformed file.
    """
    return [symbol for symbol in symbol_table(data) if symbol.name]


# Whoever loads an object asks for its tables several times.
@lru_cache(maxsize=4)
def symbol_table(data: bytes) -> tuple[Symbol, ...]:
    """The whole symbol table, so that relocations can index it; empty when there is none.

    Raises:
        ValueError: malformed file.
    """
    found_sections = sections(data)
    table = next((s for s in found_sections if s.type == _SHT_SYMTAB), None)
    if table is None:
        return ()
    if table.entry_size != _SYMBOL.size or table.size % _SYMBOL.size:
        raise ValueError(f"ELF symbol table has entries of {table.entry_size} bytes, expected {_SYMBOL.size}")
    if table.link >= len(found_sections):
        raise ValueError(f"ELF symbol table names section {table.link} of {len(found_sections)}")
    names = content(data, found_sections[table.link])
    return tuple(
        Symbol(_string(names, name_offset), home != _SHN_UNDEF, info & 15 == _STT_FUNC, value, size, home)
        for name_offset, info, _, home, value, size in _SYMBOL.iter_unpack(content(data, table))
    )


def relocations(data: bytes) -> list[Relocation]:
    """Every relocation of a section that a running program needs.

    Raises:
        ValueError: malformed file, or relocations without addends, which no known compiler writes here.
    """
    found_sections = sections(data)
    found = []
    for table in found_sections:
        if table.type not in (_SHT_RELA, _SHT_REL):
            continue
        if table.info >= len(found_sections):
            raise ValueError(f"ELF relocations are for section {table.info} of {len(found_sections)}")
        if not found_sections[table.info].in_memory:
            continue
        if table.type == _SHT_REL or table.entry_size != _RELOCATION.size or table.size % _RELOCATION.size:
            raise ValueError(f"ELF relocations have entries of {table.entry_size} bytes, expected {_RELOCATION.size}")
        found += [
            Relocation(table.info, offset, info & 0xFFFFFFFF, info >> 32, addend)
            for offset, info, addend in _RELOCATION.iter_unpack(content(data, table))
        ]
    return found


def section(data: bytes, name: str) -> bytes:
    """The content of the first section called `name`.

    Raises:
        ValueError: malformed file, or no section has this name.
    """
    found_sections = sections(data)
    index = _header(data)[-1]
    if index == _SHN_XINDEX and found_sections:
        index = found_sections[0].link
    if index >= len(found_sections):
        raise ValueError(f"ELF section names are in section {index} of {len(found_sections)}")
    names = content(data, found_sections[index])
    for candidate in found_sections:
        if _string(names, candidate.name_offset) == name:
            return content(data, candidate)
    raise ValueError(f"ELF file has no section {name!r}")


def _header(data: bytes) -> tuple[int, ...]:
    """All fields of the file header, `e_ident` first."""
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are too few for an ELF header of {_HEADER.size}")
    fields = _HEADER.unpack_from(data)
    if fields[0][:4] != b"\x7fELF":
        raise ValueError(f"ELF magic expected, found {bytes(data[:4])!r}")
    if fields[0][4:6] != b"\x02\x01":
        raise ValueError("ELF file is not 64-bit little-endian")
    return fields


@lru_cache(maxsize=4)
def sections(data: bytes) -> tuple[Section, ...]:
    """Every section header, in the file's order.

    Raises:
        ValueError: malformed file.
    """
    header = _header(data)
    offset, entry_size, count = header[6], header[11], header[12]
    if not offset:
        return ()
    if entry_size != _SECTION.size:
        raise ValueError(f"ELF section headers are {entry_size} bytes each, expected {_SECTION.size}")
    if not count:  # the count did not fit 16 bits; the first header has it in its size
        if offset + _SECTION.size > len(data):
            raise ValueError("ELF section headers lie outside the file")
        count = _SECTION.unpack_from(data, offset)[5]
    if offset + count * _SECTION.size > len(data):
        raise ValueError(f"ELF file of {len(data)} bytes cannot hold {count} section headers at {offset}")
    return tuple(
        Section(name, kind, flags, start, size, link, info, alignment, entry)
        for name, kind, flags, _, start, size, link, info, alignment, entry in _SECTION.iter_unpack(
            data[offset : offset + count * _SECTION.size]
        )
    )


def content(data: bytes, part: Section) -> bytes:
    """The bytes of a section; none for one that is only reserved.

    Raises:
        ValueError: it lies outside of the file.
    """
    if part.type == _SHT_NOBITS:
        return b""
    if part.offset + part.size > len(data):
        raise ValueError(f"ELF section of {part.size} bytes at {part.offset} lies outside a file of {len(data)}")
    return bytes(data[part.offset : part.offset + part.size])


def _string(names: bytes, offset: int) -> str:
    end = names.find(b"\0", offset)
    if offset > len(names) or end < 0:
        raise ValueError(f"ELF name at {offset} lies outside a string table of {len(names)} bytes")
    try:
        return names[offset:end].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"ELF name at {offset} is not UTF-8") from error
