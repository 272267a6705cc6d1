"""The ELF reader against objects made by LLVM, and against bytes that mean nothing."""

from __future__ import annotations

import contextlib
import struct
from functools import lru_cache

import llvmlite.binding as llvm
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_triton.cpu import elf

SOURCE = """
declare float @expf(float)
define float @entry(float %x) { %y = call float @expf(float %x)
  ret float %y }
define internal void @inner() { ret void }
@table = constant [4 x i32] [i32 1, i32 2, i32 3, i32 4], section ".esper"
"""


@lru_cache(maxsize=2)
def made_by_llvm(triple: str = "x86_64-unknown-linux-gnu") -> bytes:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(SOURCE, llvm.create_context())
    module.triple = triple
    return llvm.Target.from_triple(triple).create_target_machine(codemodel="small").emit_object(module)


def test_the_machine_is_the_one_compiled_for():
    assert elf.machine(made_by_llvm()) == elf.EM_X86_64 == 62
    assert elf.machine(made_by_llvm("aarch64-unknown-linux-gnu")) == elf.EM_AARCH64 == 183
    assert elf.is_relocatable(made_by_llvm())


def test_symbols_tell_what_is_defined_and_what_is_wanted():
    table = {symbol.name: symbol for symbol in elf.symbols(made_by_llvm())}
    assert table["entry"].defined
    assert table["entry"].is_function
    assert table["entry"].size > 0
    assert not table["expf"].defined
    assert table["table"].defined
    assert not table["table"].is_function
    assert table["table"].size == 16


def test_a_section_is_found_by_name():
    assert elf.section(made_by_llvm(), ".esper") == struct.pack("<4i", 1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"no section '\.nothing'"):
        elf.section(made_by_llvm(), ".nothing")


def test_section_contents_agree_with_llvms_own_reader():
    data = made_by_llvm()
    # The sections of LLVM's iterator are all the same moving cursor: take what is wanted from each at once.
    contents = {s.name(): s.data() for s in llvm.ObjectFileRef.from_data(data).sections() if s.name() and s.size()}
    assert contents[b".text"]
    for name in (b".text", b".esper", b".strtab"):
        assert elf.section(data, name.decode()) == contents[name]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "too few"),
        (b"MZ" + bytes(100), "ELF magic expected"),
        (b"\x7fELF\x01\x01" + bytes(100), "not 64-bit little-endian"),
        (b"\x7fELF\x02\x02" + bytes(100), "not 64-bit little-endian"),
    ],
)
def test_what_is_not_a_64_bit_little_endian_elf_file_is_refused(data, complaint):
    with pytest.raises(ValueError, match=complaint):
        elf.machine(data)


@given(st.integers(0, len(made_by_llvm()) - 1))
def test_a_file_cut_short_is_refused(length):
    data = made_by_llvm()[:length]
    with pytest.raises(ValueError, match="ELF"):
        elf.symbols(data)


def read_everything(data: bytes) -> None:
    for read in (elf.machine, elf.is_relocatable, elf.symbols, lambda data: elf.section(data, ".text")):
        with contextlib.suppress(ValueError):
            read(data)


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_raise_nothing_but_value_error(data, with_magic):
    read_everything(b"\x7fELF\x02\x01" + data if with_magic else data)


@given(
    st.lists(
        st.tuples(st.integers(0, len(made_by_llvm()) - 8), st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 4, 8])),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_objects_raise_nothing_but_value_error(edits):
    data = bytearray(made_by_llvm())
    for offset, value, width in edits:
        data[offset : offset + width] = (value % 256**width).to_bytes(width, "little")
    read_everything(bytes(data))


@given(st.integers(0, 63), st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 4, 8]))
def test_mutated_headers_raise_nothing_but_value_error(offset, value, width):
    data = bytearray(made_by_llvm())
    data[offset : offset + width] = (value % 256**width).to_bytes(width, "little")
    read_everything(bytes(data))
