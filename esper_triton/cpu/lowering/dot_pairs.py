"""Products of bfloat16 two steps of K at a time, where the processor has an instruction for it (AVX512_BF16).

`vdpbf16ps` multiplies pairs of neighbouring bfloat16 numbers and adds both products, each rounded once as a fused
multiplication would, to a float32: twice the work of an instruction that multiplies float32. What is below the normal
range (2**-126) counts as zero in it, operands and sums alike.
"""

from __future__ import annotations

from llvmlite import ir

from esper_triton.cpu.host import cpu_features
from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.types import F32, I32
from esper_triton.cpu.lowering.vmath import Value, call

_LANES = 16  # sums that one instruction adds to
_STEPS = 2  # of K


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's `bfloat`, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat(), _LANES * _STEPS)


def can_pair(operands: list[str], width: int, depth: int) -> bool:
    """Whether products of these types of elements can be added in pairs to `width` sums, `depth` steps deep."""
    return (
        operands == ["bf16", "bf16"] and "avx512bf16" in cpu_features() and width % _LANES == 0 and depth % _STEPS == 0
    )


def interleaved(b: ir.IRBuilder, even: Value, odd: Value) -> list[Value]:
    """Two lines of the right operand, bits of bfloat16 (i16), as pairs of neighbours in K: a vector for 16 lanes."""
    width, vectors = even.type.count, []
    for start in range(0, width, _LANES):
        order = [lane + side * width for lane in range(start, start + _LANES) for side in range(_STEPS)]
        vectors.append(b.bitcast(b.shuffle_vector(even, odd, _numbers(order)), _PAIRS))
    return vectors


def add_pairs(b: ir.IRBuilder, factor: Value, pairs: list[Value], total: Value) -> Value:
    """`total`, float32, and the products of one row's pair (i32: the earlier step is in the low half) with `pairs`."""
    factors = b.bitcast(c.splat(b, factor, _LANES), _PAIRS)
    parts = []
    for number, values in enumerate(pairs):
        lanes = range(number * _LANES, (number + 1) * _LANES)
        part = b.shuffle_vector(total, total, _numbers(lanes))
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        parts.append(call(b, name, ir.VectorType(F32, _LANES), [part, factors, values]))
    while len(parts) > 1:
        both = _numbers(range(2 * parts[0].type.count))
        parts = [b.shuffle_vector(low, high, both) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _numbers(lanes: list[int] | range) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
