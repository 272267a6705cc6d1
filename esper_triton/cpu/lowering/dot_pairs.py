"""Products of bfloat16 and of 8-bit integers two steps of K at a time, where the processor has instructions for it.

They multiply pairs of neighbours in K and add both products to a sum of 32 bits, which is twice the work of an
instruction that multiplies numbers of 32 bits.

- `vdpbf16ps` (AVX512_BF16) adds one product after the other to a float32, each rounded once as in a fused
  multiplication. What is below the normal range (2**-126) counts as zero, operands and sums alike.
- `vpdpwssd` (AVX512_VNNI) multiplies 16-bit integers, to which those of 8 bits are widened; sums wrap in 32 bits.
"""

from __future__ import annotations

from llvmlite import ir

from esper_triton.cpu.host import cpu_features
from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.types import F32, I32
from esper_triton.cpu.lowering.vmath import Value, call
from esper_triton.cpu.mlir import ScalarType, Type

_LANES = 16  # sums that one instruction adds to
_STEPS = 2  # of K


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's `bfloat`, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


# By the type of the sums: the instruction, and what it takes pairs as.
_INSTRUCTIONS = {
    F32: ("llvm.x86.avx512bf16.dpbf16ps.512", ir.VectorType(_BFloat(), _LANES * _STEPS)),
    I32: ("llvm.x86.avx512.vpdpwssd.512", ir.VectorType(I32, _LANES)),
}
# By the type of the operands: the type that they are paired in, and the feature it takes.
_PAIRED = {"bf16": ("bf16", "avx512bf16"), "i8": ("i16", "avx512vnni")}


def paired_type(left: str, right: str, sums: ScalarType, width: int, depth: int) -> ScalarType | None:
    """The type in which elements of these types are multiplied in pairs and added to `width` neighbouring sums, in
    `depth` steps of K; None where they cannot be."""
    name, feature = _PAIRED.get(left, ("", ""))
    possible = left == right and feature in cpu_features() and sums.bits == 32
    return ScalarType(name) if possible and width % _LANES == 0 and depth % _STEPS == 0 else None


def is_paired(element: Type) -> bool:
    """Whether operands of this type are multiplied in pairs."""
    return any(str(element) == name for name, _ in _PAIRED.values())


def interleaved(b: ir.IRBuilder, even: Value, odd: Value) -> list[Value]:
    """Two lines of the right operand, elements of 16 bits, as pairs of neighbours in K (i32): a vector for 16 lanes."""
    width, vectors = even.type.count, []
    for start in range(0, width, _LANES):
        order = [lane + side * width for lane in range(start, start + _LANES) for side in range(_STEPS)]
        vectors.append(b.bitcast(b.shuffle_vector(even, odd, _numbers(order)), ir.VectorType(I32, _LANES)))
    return vectors


def add_pairs(b: ir.IRBuilder, factor: Value, pairs: list[Value], total: Value) -> Value:
    """`total` and the products of one row's pair (i32: the earlier step is in the low half) with `pairs`."""
    name, taken = _INSTRUCTIONS[total.type.element]
    factors = b.bitcast(c.splat(b, factor, _LANES), taken)
    parts = []
    for number, values in enumerate(pairs):
        lanes = range(number * _LANES, (number + 1) * _LANES)
        part = b.shuffle_vector(total, total, _numbers(lanes))
        parts.append(call(b, name, part.type, [part, factors, b.bitcast(values, taken)]))
    while len(parts) > 1:
        both = _numbers(range(2 * parts[0].type.count))
        parts = [b.shuffle_vector(low, high, both) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _numbers(lanes: list[int] | range) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
