"""What can be said of an artifact's binaries without running them."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

from esper_triton.contracts.manifest import KernelRecord, Manifest
from esper_triton.cpu import elf
from esper_triton.cpu.native import ALLOWED_SYMBOLS
from esper_triton.cpu.place import GLOBAL_OFFSET_TABLE
from esper_triton.tezzeret.targets import shared_memory_limit
from esper_triton.tezzeret.tuning import figures_of

__all__ = ["static_faults"]

_EM_AMDGPU = 224
_CPU_MACHINES = {"x86_64": elf.EM_X86_64, "AMD64": elf.EM_X86_64, "aarch64": elf.EM_AARCH64, "arm64": elf.EM_AARCH64}
_KIND = {"cpu": "o", "cuda": "cubin", "hip": "hsaco"}
_MOST_REGISTERS = {"cuda": 255, "hip": 512}  # of a thread
_REGISTERS_OF_A_BLOCK = {"cuda": 65536}
_MOST_THREADS = 1024  # of a block
_FLAGS_AT = 0x30
# ELF flags of AMD GPUs: https://llvm.org/docs/AMDGPUUsage.html, table "AMDGPU ELF Header Enumeration Values".
_GFX = {
    0x3F: "gfx90a",
    0x4C: "gfx942",
    0x4F: "gfx950",
    0x41: "gfx1100",
    0x46: "gfx1101",
    0x47: "gfx1102",
    0x43: "gfx1150",
    0x4A: "gfx1151",
    0x48: "gfx1200",
    0x4E: "gfx1201",
}


def static_faults(manifest: Manifest, blobs: Mapping[str, bytes]) -> list[str]:
    """What is wrong with the binaries for the target that the manifest names; nothing where they may be run there.

    Of a CPU's: an object file of this machine with the entry point, that refers to nothing which object code may not
    use (`cpu.native.ALLOWED_SYMBOLS`), and has no memory that is both writable and executable. Of a GPU's: an ELF file
    of that architecture with the entry point, and registers and shared memory within the device's limits.
    """
    faults = []
    for name, record in manifest.kernels.items():
        try:
            faults += [f"kernel {name!r} {fault}" for fault in _faults(manifest, record, blobs[record.binary])]
        except (ValueError, IndexError, KeyError, TypeError) as error:  # bytes from anywhere
            faults.append(f"kernel {name!r} has a binary that is malformed: {error}")
        except Exception as error:
            if type(error).__module__ not in ("struct", "msgpack.exceptions"):
                raise
            faults.append(f"kernel {name!r} has a binary that is malformed: {error}")
    return faults


def _faults(manifest: Manifest, record: KernelRecord, binary: bytes) -> Iterator[str]:
    target = manifest.target
    if record.binary_kind != _KIND[target.backend]:
        yield f"is a {record.binary_kind}, and {target.label} takes a {_KIND[target.backend]}"
        return
    machine = elf.machine(binary)
    table = elf.symbols(binary)
    if not any(s.name == record.symbol and s.defined and s.is_function for s in table):
        yield f"has no function {record.symbol!r}"
    if target.backend == "cpu":
        yield from _of_cpu(machine, binary, table)
    else:
        yield from _of_gpu(manifest, record, machine, binary)


def _of_cpu(machine: int, binary: bytes, table: list[elf.Symbol]) -> Iterator[str]:
    expected = _CPU_MACHINES.get(platform.machine())
    if machine != expected:
        yield f"is for ELF machine {machine}, expected {expected} ({platform.machine()})"
    if not elf.is_relocatable(binary):
        yield "is not a relocatable object file"
    imports = {s.name for s in table if not s.defined and s.name != GLOBAL_OFFSET_TABLE}
    for name in sorted(imports - ALLOWED_SYMBOLS):
        yield f"refers to {name!r}, which object code may not use"
    for index, section in enumerate(elf.sections(binary)):
        if section.in_memory and section.writable and section.executable:
            yield f"has a section, {index}, that is both writable and executable"


def _of_gpu(manifest: Manifest, record: KernelRecord, machine: int, binary: bytes) -> Iterator[str]:
    target = manifest.target
    expected = elf.EM_CUDA if target.backend == "cuda" else _EM_AMDGPU
    if machine != expected:
        yield f"is for ELF machine {machine}, expected {expected} ({target.backend})"
        return
    flags = int.from_bytes(binary[_FLAGS_AT : _FLAGS_AT + 4], "little")
    if target.backend == "cuda":
        # The capability is in the lowest byte, or, since CUDA 13's version of the ABI, in the one above.
        found = {str(flags & 0xFF), str(flags >> 8 & 0xFF)}
    else:
        found = {_GFX.get(flags & 0xFF, f"ELF flags {flags:#x}")}
    if target.arch not in found:
        yield f"is for {' or '.join(sorted(found))}, expected {target.arch}"
    figures = figures_of(record, binary)
    limit = shared_memory_limit(target)
    if limit is not None and figures.shared_bytes > limit:
        yield f"needs {figures.shared_bytes} bytes of shared memory, a program on {target.label} can have {limit}"
    threads = record.num_warps * (64 if target.arch.startswith("gfx9") else 32)
    if threads > _MOST_THREADS:
        yield f"runs {threads} threads a program, {target.label} can have {_MOST_THREADS}"
    if figures.registers is not None:
        most = _MOST_REGISTERS[target.backend]
        if figures.registers > most:
            yield f"needs {figures.registers} registers a thread, {target.label} has {most}"
        total = _REGISTERS_OF_A_BLOCK.get(target.backend)
        if total is not None and figures.registers * threads > total:
            yield f"needs {figures.registers * threads} registers a program, {target.label} has {total}"
