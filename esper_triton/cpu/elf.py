"""A small reader of 64-bit little-endian ELF files: machine, symbols, sections.

Every offset and count is checked against the file before it is followed, so that bytes from anywhere raise `ValueError`
and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["EM_AARCH64", "EM_CUDA", "EM_X86_64", "Symbol", "is_relocatable", "machine", "section", "symbols"]

EM_X86_64 = 62
EM_AARCH64 = 183
EM_CUDA = 190

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_SYMTAB, _SHT_NOBITS, _SHN_UNDEF, _SHN_XINDEX, _STT_FUNC, _ET_REL = 2, 8, 0, 0xFFFF, 2, 1


@dataclass(frozen=True)
class Symbol:
    """One entry of the symbol table.

    Attributes:
        defined: False for a name that another object must supply. value: offset in its section for a relocatable file.
        size: bytes.
    """

    name: str
    defined: bool
    is_function: bool
    value: int
    size: int


@dataclass(frozen=True)
class _Section:
    name_offset: int
    type: int
    offset: int
    size: int
    link: int
    entry_size: int


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
    sections = _sections(data)
    table = next((s for s in sections if s.type == _SHT_SYMTAB), None)
    if table is None:
        return []
    if table.entry_size != _SYMBOL.size or table.size % _SYMBOL.size:
        raise ValueError(f"ELF symbol table has entries of {table.entry_size} bytes, expected {_SYMBOL.size}")
    if table.link >= len(sections):
        raise ValueError(f"ELF symbol table names section {table.link} of {len(sections)}")
    names = _content(data, sections[table.link])
    found = []
    for name_offset, info, _, home, value, size in _SYMBOL.iter_unpack(_content(data, table)):
        if name := _string(names, name_offset):
            found.append(Symbol(name, home != _SHN_UNDEF, info & 15 == _STT_FUNC, value, size))
    return found


def section(data: bytes, name: str) -> bytes:
    """The content of the first section called `name`.

    Raises:
        ValueError: malformed file, or no section has this name.
    """
    sections = _sections(data)
    index = _header(data)[-1]
    if index == _SHN_XINDEX and sections:
        index = sections[0].link
    if index >= len(sections):
        raise ValueError(f"ELF section names are in section {index} of {len(sections)}")
    names = _content(data, sections[index])
    for candidate in sections:
        if _string(names, candidate.name_offset) == name:
            return _content(data, candidate)
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


def _sections(data: bytes) -> list[_Section]:
    header = _header(data)
    offset, entry_size, count = header[6], header[11], header[12]
    if not offset:
        return []
    if entry_size != _SECTION.size:
        raise ValueError(f"ELF section headers are {entry_size} bytes each, expected {_SECTION.size}")
    if not count:  # the count did not fit 16 bits; the first header has it in its size
        if offset + _SECTION.size > len(data):
            raise ValueError("ELF section headers lie outside the file")
        count = _SECTION.unpack_from(data, offset)[5]
    if offset + count * _SECTION.size > len(data):
        raise ValueError(f"ELF file of {len(data)} bytes cannot hold {count} section headers at {offset}")
    found = []
    for name, kind, _, _, start, size, link, _, _, entry in _SECTION.iter_unpack(
        data[offset : offset + count * _SECTION.size]
    ):
        found.append(_Section(name, kind, start, size, link, entry))
    return found


def _content(data: bytes, part: _Section) -> bytes:
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
