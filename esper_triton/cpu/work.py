"""How much one program of a kernel does, so that a launch of little work is not spread over threads that take longer to
wake than it takes to run."""

from __future__ import annotations

from esper_triton.cpu.mlir import Module, Operation, TensorType

__all__ = ["THREAD_GRAIN", "element_operations", "programs_per_thread"]

# A thread is worth waking for about 20 microseconds of work. An operation on one element takes about 0.05 ns when it is
# one of a dozen on values in vector registers.
THREAD_GRAIN = 400_000

_FREE = ("arith.constant", "tt.return", "scf.yield", "tt.reduce.return", "tt.scan.return")
_COSTLY = (
    "math.",
    "tt.extern_elementwise",
    "tt.atomic",
    "arith.div",
    "arith.rem",
    "tt.precise",
    "tt.approx",
    "tt.histogram",
)
_COSTLY_FACTOR = 16
# What it costs to begin a program.
_PROGRAM_OPERATIONS = 500


def element_operations(module: Module, name: str) -> int | None:
    """Operations on single elements in one program of the function `name`; None where the source does not tell: loops
    of an unknown number of steps, branches back, calls."""
    blocks = module.functions[name].regions[0].blocks
    order = {id(block): index for index, block in enumerate(blocks)}
    for index, block in enumerate(blocks):
        if any(order[id(successor)] <= index for successor in block.terminator.successors):
            return None
    work = _sum([op for block in blocks for op in block.operations])
    return None if work is None else work + _PROGRAM_OPERATIONS


def programs_per_thread(work: int | None) -> int:
    """How many programs, each of `work` operations on elements, a thread must have to be worth waking."""
    return 1 if work is None else max(1, THREAD_GRAIN // max(work, 1))


def _sum(operations: list[Operation]) -> int | None:
    total = 0
    for op in operations:
        cost = _cost(op)
        if cost is None:
            return None
        total += cost
    return total


def _cost(op: Operation) -> int | None:
    if op.name in _FREE:
        return 0
    if op.name in ("tt.call", "scf.while", "tt.atomic_poll"):
        return None
    size = max((v.type.size for v in (*op.operands, *op.results) if isinstance(v.type, TensorType)), default=1)
    if op.name in ("scf.for", "scf.if"):
        costs = [_sum(region.block.operations) for region in op.regions if region.blocks]
        steps = _steps(op) if op.name == "scf.for" else 1
        if steps is None or None in costs:
            return None
        return steps * sum(cost for cost in costs if cost is not None)
    if op.name.startswith(("tt.dot", "tt.scan", "tt.map_elementwise")):
        depth = op.operands[0].type.shape[-1] if isinstance(op.operands[0].type, TensorType) else 1
        return size * (depth if op.name.startswith("tt.dot") else _COSTLY_FACTOR)
    return size * (_COSTLY_FACTOR if op.name.startswith(_COSTLY) else 1)


def _steps(loop: Operation) -> int | None:
    """How often a loop with constant bounds runs."""
    bounds = []
    for operand in loop.operands[:3]:
        constant = operand.defining_op
        value = constant.attributes.get("value") if constant is not None and constant.name == "arith.constant" else None
        if not isinstance(value, int):
            return None
        bounds.append(value)
    low, high, step = bounds
    return max(0, -(-(high - low) // step)) if step > 0 else None
