"""Arithmetic on indices, addresses and the masks that bound them, in the scalar forms that `chunks` has for these."""

from __future__ import annotations

from dataclasses import replace

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import Affine, Chunk, Lanes, Prefix, Uniform
from esper_triton.cpu.lowering.elementwise import I1, I64, register_type
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.lowering.vmath import intrinsic
from esper_triton.cpu.mlir import Operation


def add(b: ir.IRBuilder, x: Chunk, y: Chunk, sign: int, width: int) -> Chunk:
    """x + y, or x - y where `sign` is -1, for chunks of `width` lanes."""
    assert not isinstance(x, Prefix)
    assert not isinstance(y, Prefix)
    if isinstance(x, Lanes) or isinstance(y, Lanes):
        combine = b.add if sign > 0 else b.sub
        moved = y if isinstance(x, Lanes) else x
        run = x.run if isinstance(x, Lanes) else y.run if isinstance(y, Lanes) and sign > 0 else None
        if run is not None:
            run = replace(run, base=combine(run.base, moved.value)) if isinstance(moved, Uniform) else None
        return Lanes(combine(c.as_vector(b, x, width), c.as_vector(b, y, width)), run)
    base_x, base_y = (v.value if isinstance(v, Uniform) else v.base for v in (x, y))
    step = (x.step if isinstance(x, Affine) else 0) + sign * (y.step if isinstance(y, Affine) else 0)
    base = (b.add if sign > 0 else b.sub)(base_x, base_y)
    assumed = [v for v in (x, y) if isinstance(v, Affine) and v.assumed]
    # With steps that cancel, what was assumed may still not hold: it stays in a form that remembers it.
    if not step and not assumed:
        return Uniform(base)
    return Affine(base, step, assumed=bool(assumed), certain=assumed[0].certain if len(assumed) == 1 else None)


def add_pointer(b: ir.IRBuilder, pointer: Chunk, offset: Chunk, size: int, width: int) -> Chunk:
    """Addresses `offset` elements of `size` bytes further on."""
    scale = ir.Constant(I64, size)
    assert not isinstance(offset, Prefix)
    if isinstance(offset, Lanes):
        wide = offset.value
        run = offset.run
        if wide.type.element != I64:
            wide = b.sext(wide, ir.VectorType(I64, width))
            run = run and replace(run, base=b.sext(run.base, I64))
        run = run and replace(run, base=b.mul(run.base, scale), step=run.step * size)
        return add(b, pointer, Lanes(b.mul(wide, c.splat(b, scale, width)), run), 1, width)
    base = offset.value if isinstance(offset, Uniform) else offset.base
    widened = base.type != I64
    base = b.mul(b.sext(base, I64) if widened else base, scale)
    scaled: Chunk = Uniform(base)
    if isinstance(offset, Affine):
        scaled = Affine(base, offset.step * size, assumed=offset.assumed or (widened and not offset.fits))
    return add(b, pointer, scaled, 1, width)


def affine(op: Operation, operands: list[Chunk], b: ir.IRBuilder, width: int) -> Chunk | None:
    """Index arithmetic that keeps its scalar form; None where it cannot."""
    if any(isinstance(operand, Lanes) for operand in operands):
        return _with_run(op, operands, b, width)
    first = operands[0]
    match op.name:
        case "arith.addi" | "arith.subi" if register_type(op.result.type) != I1:
            return add(b, first, operands[1], 1 if op.name == "arith.addi" else -1, width)
        case "arith.muli":
            for x, y in (operands, reversed(operands)):
                if isinstance(x, Affine) and isinstance(y, Uniform) and isinstance(y.value, ir.Constant):
                    step = x.step * y.value.constant
                    # Steps that cancelled leave an assumed tile with step 0, and a base that counts.
                    if step or x.assumed:
                        return Affine(b.mul(x.base, y.value), step, assumed=x.assumed, certain=x.certain)
                    return Uniform(y.value)
        case "arith.cmpi":
            return _prefix(op.attributes["predicate"], first, operands[1], b)
        case "arith.andi" if register_type(op.result.type) == I1:
            for x, y in (operands, reversed(operands)):
                if isinstance(x, Prefix) and isinstance(y, Prefix):
                    return x.both(b, y)
                if isinstance(x, Prefix) and isinstance(y, Uniform):
                    return Prefix(b.select(y.value, x.count, ir.Constant(I64, 0)), x.certain)
        case "arith.extsi" if isinstance(first, Affine):
            wide = b.sext(first.base, register_type(op.result.type))
            if first.fits:
                return Affine(wide, first.step, fits=True)
            certain = None if first.assumed or first.step != 1 else _before_wrap(first, b)
            return Affine(wide, first.step, assumed=True, certain=certain)
    return None


def _with_run(op: Operation, operands: list[Chunk], b: ir.IRBuilder, width: int) -> Chunk | None:
    """Index arithmetic on what may turn out to count up; None for any other."""
    first = operands[0]
    if op.name == "arith.extsi" and isinstance(first, Lanes) and first.run is not None:
        wide = register_type(op.result.type)
        run = replace(first.run, base=b.sext(first.run.base, wide))
        return Lanes(b.sext(first.value, ir.VectorType(wide, width)), run)
    if op.name == "arith.addi" and register_type(op.result.type) != I1:
        for x, y in (operands, reversed(operands)):
            if isinstance(x, Lanes) and x.run is not None and isinstance(y, Uniform):
                return add(b, x, y, 1, width)
    return None


def _prefix(predicate: int, first: Chunk, second: Chunk, b: ir.IRBuilder) -> Chunk | None:
    """The comparison of indices that count up by one with a bound; None for any other."""
    if predicate in (4, 5):  # bound > index, bound >= index
        predicate, first, second = predicate - 2, second, first
    if predicate not in (2, 3) or not (isinstance(first, Affine) and first.step == 1 and isinstance(second, Uniform)):
        return None
    bound, base = (v if v.type == I64 else b.sext(v, I64) for v in (second.value, first.base))
    saturated = second.value.type == I64  # might wrap, and a mask must not come on by that
    count = intrinsic(b, "ssub.sat", (bound, base)) if saturated else b.sub(bound, base)
    if predicate == 3:
        one = ir.Constant(I64, 1)
        count = intrinsic(b, "sadd.sat", (count, one)) if saturated else b.add(count, one)
    if first.fits:
        return Prefix(count)
    if first.assumed:
        return Prefix(count, ir.Constant(I64, 0) if first.certain is None else first.certain)
    return Prefix(count, _before_wrap(first, b))


def _before_wrap(chunk: Affine, b: ir.IRBuilder) -> LLVMValue:
    """How many lanes (i64) of a chunk that counts up by one come before its type's largest value."""
    bits = chunk.base.type.width
    largest = ir.Constant(I64, (1 << (bits - 1)) - 1)
    return intrinsic(b, "ssub.sat", (largest, chunk.base if bits == 64 else b.sext(chunk.base, I64)))


def is_inexact(chunk: Chunk) -> bool:
    """Whether lanes that wrapped around would not be what the chunk says."""
    return isinstance(chunk, Prefix) or (isinstance(chunk, Affine) and chunk.assumed)
