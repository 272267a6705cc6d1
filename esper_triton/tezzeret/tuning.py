"""How good compiled candidates are: measured where they can run, and judged by what their binaries say elsewhere."""

from __future__ import annotations

import math
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from esper_triton.contracts.manifest import KernelRecord, Manifest
from esper_triton.tezzeret.forge import Forged
from esper_triton.tezzeret.targets import shared_memory_limit
from esper_triton.tezzeret.writing import Choice

if TYPE_CHECKING:
    import torch

__all__ = ["ROWS", "Figures", "Measured", "figures_of", "measure", "static_cost"]

ROWS = (32, 512, 4096)
"""Rows of a call that are measured: few, a usual batch, and a long one."""
_LARGEST_TENSOR = 1 << 24  # elements of an activation; calls with longer ones are left out
_ROUNDS = (5, 40)
_POSITIONS = {32: (1, 32, 4, 8), 512: (2, 256, 16, 16), 4096: (16, 256, 16, 16)}  # batch, length, height, width


class Measured(NamedTuple):
    """Of one candidate: medians of the time of forward and backward in microseconds, by rows, and how long it takes as
    a part of what the first candidate does: the geometric mean, over rows, of the median of that ratio."""

    rows_us: dict[int, float]
    ratio: float


def measure(candidates: Sequence[Forged], device: torch.device, seconds: float) -> list[Measured]:
    """Times candidates through the program that runs in a layer, with inputs drawn for this.

    One call of each after the other, and each is compared with the first one's call beside it, so that what disturbs
    the machine disturbs both. Takes `seconds`, and longer where five calls of each take longer.
    """
    import torch

    from esper_triton.kasmina.launcher import KernelProgram

    programs = [KernelProgram.load(one.manifest, one.blobs, device) for one in candidates]
    widest = max(programs[0].width, programs[0].x_width or 0)
    sizes = [rows for rows in ROWS if rows * widest <= _LARGEST_TENSOR] or [ROWS[0]]
    medians: list[dict[int, float]] = [{} for _ in programs]
    logarithms: list[list[float]] = [[] for _ in programs]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for rows in sizes:
        calls = [_call(program, rows, device) for program in programs]
        for call in calls:
            call()
        samples: list[list[float]] = [[] for _ in calls]
        end = time.perf_counter() + seconds / len(sizes)
        for done in range(_ROUNDS[1]):
            if done >= _ROUNDS[0] and time.perf_counter() > end:
                break
            for call, times in zip(calls, samples, strict=True):
                wait()
                started = time.perf_counter()
                call()
                wait()
                times.append(time.perf_counter() - started)
        for times, found, ratios in zip(samples, medians, logarithms, strict=True):
            found[rows] = statistics.median(times) * 1e6
            ratios.append(statistics.median(math.log(t / first) for t, first in zip(times, samples[0], strict=True)))
    return [
        Measured(found, math.exp(statistics.fmean(ratios))) for found, ratios in zip(medians, logarithms, strict=True)
    ]


def _call(program: Any, rows: int, device: torch.device) -> Callable[[], None]:
    import torch

    from esper_triton.kasmina.views import Extents

    manifest: Manifest = program.manifest
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 and shape[0] != rows else 1.0
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=program.dtype)

    widths = {"h": program.width, "x": program.x_width}
    inputs = {name: draw(rows, widths[name]) for name in program.tensors_read}
    parameters = {name: draw(*record.shape) for name, record in manifest.parameters.items()}
    grad_out, out = draw(rows, program.width), draw(rows, program.width)
    alpha = torch.full((1,), 0.5, device=device)
    batch, length, height, width = _POSITIONS[rows]
    extents = {
        "rows": None,
        "sequence": Extents(rows, batch, length),
        "image": Extents(rows, batch, length, height, width),
    }[program.layout]

    def call() -> None:
        saved = program.forward(inputs, parameters, alpha, out, extents=extents)
        if program.has_backward:
            program.backward(grad_out, inputs, parameters, alpha, saved, extents=extents)

    return call


# ---- without the device


class Figures:
    """What a GPU binary says of one kernel. None where it does not say."""

    def __init__(self, registers: int | None, spilled_bytes: int | None, shared_bytes: int) -> None:
        self.registers, self.spilled_bytes, self.shared_bytes = registers, spilled_bytes, shared_bytes


def static_cost(one: Forged, choice: Choice) -> float:
    """How much a program waits, on a scale of its own: less is better. Without a device this is all there is.

    An operand's tile is read once for each tile of the result, so traffic goes with 1/rows + 1/cols; fewer than eight
    resident warps on a multiprocessor do not hide it, and a spilled register is read again from memory.
    """
    limit = shared_memory_limit(one.manifest.target) or 0
    traffic = 1 / choice.tiles.rows + 1 / choice.tiles.cols
    total = 0.0
    for record in one.manifest.kernels.values():
        found = figures_of(record, one.blobs[record.binary])
        programs = 16.0
        if found.shared_bytes:
            programs = min(programs, limit / found.shared_bytes)
        if found.registers:
            lanes = 64 if record.binary_kind == "hsaco" else 32
            registers = 131072 if record.binary_kind == "hsaco" else 65536  # of a multiprocessor
            programs = min(programs, registers / (found.registers * record.num_warps * lanes))
        warps = max(1.0, math.floor(programs)) * record.num_warps
        total += traffic * max(1.0, 8 / warps) * (1 + (found.spilled_bytes or 0) / 64)
    return total


def figures_of(record: KernelRecord, binary: bytes) -> Figures:
    """Registers a thread and bytes that were spilled, read from a cubin's `.nv.info` or an hsaco's metadata."""
    registers = spilled = None
    if record.binary_kind == "cubin":
        for name, _, content in _sections(binary):
            if name.startswith(".nv.info"):
                for attribute, value in _nv_info(content):
                    if attribute == 0x2F:  # EIATTR_REGCOUNT
                        registers = max(registers or 0, value)
                    elif attribute == 0x11:  # EIATTR_FRAME_SIZE: the local memory of a thread, which is spills
                        spilled = max(spilled or 0, value)
    elif record.binary_kind == "hsaco":
        kernel = _amd_kernel(binary)
        registers = kernel.get(".vgpr_count")
        if ".vgpr_spill_count" in kernel:
            spilled = 4 * kernel[".vgpr_spill_count"]
    return Figures(registers, spilled, record.shared_bytes)


def _sections(elf: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Name, type and content of every section of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    start = headers[names][4]
    for name, kind, _, _, offset, length in headers:
        text = elf[start + name : elf.index(b"\0", start + name)].decode("ascii", "replace")
        yield text, kind, elf[offset : offset + length] if kind != 8 else b""  # 8 (NOBITS) has no bytes


def _nv_info(content: bytes) -> Iterator[tuple[int, int]]:
    """Attributes that have a number for a symbol."""
    at = 0
    while at + 4 <= len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == 4:  # the third field is the size of a value; in the other forms it is the value
            if size == 8:
                yield attribute, struct.unpack_from("<II", content, at)[1]
            at += size


def _amd_kernel(elf: bytes) -> dict[str, int]:
    import msgpack

    for _, kind, content in _sections(elf):
        if kind == 7 and content[12:18] == b"AMDGPU":  # a note
            name_size, size, note = struct.unpack_from("<III", content)
            start = 12 + (name_size + 3) // 4 * 4
            if note == 32:  # NT_AMDGPU_METADATA
                found: dict[str, int] = msgpack.unpackb(content[start : start + size])["amdhsa.kernels"][0]
                return found
    return {}
