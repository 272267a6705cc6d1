"""Object code that no compiler of ours would write, with the entry point of a kernel, for x86-64 Linux."""

from __future__ import annotations

import platform

import llvmlite.binding as llvm
import pytest

SYMBOL = "hostile"
only_here = pytest.mark.skipif(platform.machine() != "x86_64", reason="hostile code is written for x86-64")
SYSCALLS = {"openat": 257, "socket": 41, "fork": 57, "kill": 62, "execve": 59, "exit_group": 231, "ptrace": 101}


def object_code(body: str, declarations: str = "", symbol: str = SYMBOL) -> bytes:
    """An object file whose entry point does `body`, LLVM IR that may use %frame."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=0, reloc="static", codemodel="large")
    module = llvm.parse_assembly(f"{declarations}\ndefine void @{symbol}(ptr %frame) {{\n{body}\n}}\n")
    module.triple, module.data_layout = llvm.get_default_triple(), str(machine.target_data)
    module.verify()
    return bytes(machine.emit_object(module))


def system_call(name: str, *arguments: int, symbol: str = SYMBOL) -> bytes:
    """Makes one system call and returns."""
    values = [*arguments, *(0,) * (4 - len(arguments))]
    given = ", ".join(f"i64 {value}" for value in (SYSCALLS[name], *values))
    asm = 'call i64 asm sideeffect "syscall", "={rax},{rax},{rdi},{rsi},{rdx},{r10},~{rcx},~{r11},~{memory}"'
    return object_code(f"  %found = {asm}({given})\n  ret void", symbol=symbol)


LOOP = '  br label %again\nagain:\n  call void asm sideeffect "pause", ""()\n  br label %again'
WILD_STORE = "  store i64 1, ptr inttoptr (i64 64 to ptr)\n  ret void"
HOARD = """  br label %again
again:
  %k = phi i64 [ 0, %0 ], [ %next, %again ]
  %p = call ptr @malloc(i64 1073741824)
  %n = ptrtoint ptr %p to i64
  %none = icmp eq i64 %n, 0
  %next = add i64 %k, 1
  br i1 %none, label %refused, label %again
refused:
  %at = getelementptr i64, ptr %frame, i64 6
  store i64 1, ptr %at
  ret void"""
