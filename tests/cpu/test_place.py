"""Object code placed in memory without LLVM: relocations, protection, and files that are not what they should be."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import struct
import subprocess
import sys

import llvmlite.binding as llvm
import pytest

from esper_triton.cpu import elf, place
from esper_triton.cpu.errors import ObjectRefused
from esper_triton.cpu.native import LoadedCode
from esper_triton.cpu.place import PlacedObject, Unplaceable, address_in_process

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="relocations of x86-64")

# One function for each section and direction that an address can take.
SOURCE = """
@counter = global i64 41
@table = constant [4 x i64] [i64 10, i64 20, i64 30, i64 40]
@zeros = global [1000 x i64] zeroinitializer
@pointer = global ptr getelementptr (i64, ptr @table, i64 2)
declare i64 @labs(i64)
define i64 @count() {
  %old = load i64, ptr @counter
  %new = add i64 %old, 1
  store i64 %new, ptr @counter
  ret i64 %new
}
define i64 @through_pointer() {
  %p = load ptr, ptr @pointer
  %v = load i64, ptr %p
  ret i64 %v
}
define i64 @last_zero() {
  %p = getelementptr i64, ptr @zeros, i64 999
  %v = load i64, ptr %p
  ret i64 %v
}
define internal i64 @twice(i64 %x) noinline {
  %v = call i64 @labs(i64 %x)
  %y = add i64 %v, %v
  ret i64 %y
}
define i64 @calls() {
  %c = call i64 @twice(i64 -21)
  ret i64 %c
}
"""


def assemble(source: str = SOURCE, reloc: str = "static", codemodel: str = "large") -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(source, llvm.create_context())
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(
        reloc=reloc, codemodel=codemodel
    )
    return machine.emit_object(module)


def call(placed: PlacedObject, name: str) -> int:
    return ctypes.CFUNCTYPE(ctypes.c_int64)(placed.addresses[name])()


def pages(address: int) -> str:
    """Protection of the page at an address, as the kernel reports it; "" where nothing is mapped."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, protection, *_ = line.split()
            start, end = (int(text, 16) for text in span.split("-"))
            if start <= address < end:
                return protection
    return ""


def test_code_reaches_its_constants_its_variables_and_the_process():
    placed = PlacedObject(assemble(), address_in_process)
    assert call(placed, "count") == 42
    assert call(placed, "count") == 43
    assert call(placed, "through_pointer") == 30
    assert call(placed, "last_zero") == 0
    assert call(placed, "calls") == 42


def test_a_short_call_reaches_a_library_at_any_distance():
    source = "declare i64 @labs(i64)\ndefine i64 @k() {\n %v = call i64 @labs(i64 -7)\n ret i64 %v\n}"
    code = assemble(source, reloc="pic", codemodel="small")
    assert {r.type for r in elf.relocations(code)} >= {4}  # R_X86_64_PLT32: 32 bits
    assert call(PlacedObject(code, address_in_process), "k") == 7


def test_no_page_is_writable_and_executable():
    placed = PlacedObject(assemble(), address_in_process)
    assert pages(placed.addresses["count"]) == "r-xp"
    assert pages(placed.addresses["table"]) == "r--p"
    assert pages(placed.addresses["counter"]) == "rw-p"
    assert pages(placed.addresses["zeros"]) == "rw-p"


def test_memory_is_given_back_with_the_object():
    code = assemble()
    addresses = {PlacedObject(code, address_in_process).addresses["count"] for _ in range(200)}
    gc.collect()
    assert len(addresses) < 10


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_variables_of_a_forked_child_are_its_own():
    placed = PlacedObject(assemble(), address_in_process)
    child = os.fork()
    if not child:
        os._exit(call(placed, "count"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert call(placed, "count") == 42


def test_a_symbol_that_nobody_has_is_named():
    with pytest.raises(KeyError, match="labs"):
        PlacedObject(assemble(), lambda name: None)
    assert address_in_process("esper_no_such_function") is None
    assert address_in_process("labs")


def patched(code: bytes, number: int, **changes: int) -> bytes:
    """The object with fields of its first relocation of section `number` changed."""
    sections = elf.sections(code)
    table = next(s for s in sections if s.type == 4 and s.info == number)
    offset, info, addend = struct.unpack_from("<QQq", code, table.offset)
    new = {"offset": offset, "type": info & 0xFFFFFFFF, "symbol": info >> 32, **changes}
    entry = struct.pack("<QQq", new["offset"], new["symbol"] << 32 | new["type"], addend)
    return code[: table.offset] + entry + code[table.offset + len(entry) :]


def text_section(code: bytes) -> int:
    return next(r.target for r in elf.relocations(code) if elf.sections(code)[r.target].executable)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"offset": 2**40}, "relocation at 1099511627776 lies outside"), ({"symbol": 9999}, "names symbol 9999 of")],
)
def test_a_relocation_that_points_nowhere_is_refused(changes, message):
    code = assemble()
    with pytest.raises(ValueError, match=message):
        PlacedObject(patched(code, text_section(code), **changes), address_in_process)
    kernel = assemble("@t = global i64 5\ndefine void @k(ptr %f) {\n store i64 7, ptr @t\n ret void\n}")
    with pytest.raises(ObjectRefused, match=f"object code of 'k' is malformed: .*{message}"):
        LoadedCode.load(patched(kernel, text_section(kernel), **changes), symbol="k")


def test_what_is_not_known_here_is_left_to_llvm(monkeypatch):
    source = "define void @k(ptr %frame) {\n ret void\n}"
    got = patched(assemble(), text_section(assemble()), type=9)  # through a global offset table
    with pytest.raises(Unplaceable, match="relocation of type 9"):
        PlacedObject(got, address_in_process)
    asked = []
    original = place.PlacedByLLVM
    monkeypatch.setattr(place, "PlacedByLLVM", lambda *args: asked.append(args[1]) or original(*args))
    code = assemble(source)
    LoadedCode.load(code, symbol="k").entry(0)
    assert asked == []

    def unplaceable(*args):
        raise Unplaceable("relocation of type 99")

    monkeypatch.setattr(place, "PlacedObject", unplaceable)
    loaded = LoadedCode.load(code, symbol="k")
    assert asked == [["k"]]
    loaded.entry(0)


def test_loading_a_kernel_does_not_load_llvm(tmp_path):
    (tmp_path / "k.o").write_bytes(assemble("define void @k(ptr %frame) {\n ret void\n}"))
    code = (
        "import sys; from pathlib import Path; from esper_triton.cpu.native import NativeKernel;"
        f"kernel = NativeKernel.load(Path({str(tmp_path / 'k.o')!r}).read_bytes(), symbol='k', signature=[]);"
        "kernel.launch((1, 1, 1), []); print('llvmlite' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "False", done.stderr
