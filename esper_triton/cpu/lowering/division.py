"""Checks for integer divisions by zero, added to a parsed module before it is lowered.

A scalar division is checked where it stands. In a tile a zero divisor may be quite right: a masked load gives zero
where its mask is off, and what is divided by it is not stored, or not chosen by a `tl.where`. So the tile gets a
*shadow*, a tile of i1 that says which of its elements are not defined, and all that is computed from it has one too, up
to where the elements matter: what a mask lets a store, an atomic or a load use, any mask, and all that goes into a
reduction, a scan, a product or a call. There an operation of our own, `esper.divided_by_zero`, ends the program.

Shadows are ordinary operations on tiles and cost what those cost; where all divisors of a tile are one scalar, so is
the shadow. Divisions inside the combine function of a reduction or scan are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from esper_triton.cpu.lowering.elementwise import TABLE
from esper_triton.cpu.lowering.memory import load_operands
from esper_triton.cpu.lowering.nest import is_tile
from esper_triton.cpu.mlir import Block, Dense, Module, Operation, Region, ScalarType, TensorType, Type, Value

TRAP = "esper.divided_by_zero"

_DIVISIONS = {"arith.divsi", "arith.divui", "arith.remsi", "arith.remui"}
# Zero exactly where their operand is.
_KEEP_ZERO = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.extui"}
_MOVES = {"tt.broadcast", "tt.cat", "tt.expand_dims", "tt.join", "tt.reshape", "tt.split", "tt.trans"}
_UNTOUCHED = {"tt.assert", "tt.print", "scf.yield", "scf.condition"}
_I1 = ScalarType("i1")
_EQUAL = 0


@dataclass(frozen=True)
class _Shadow:
    """`value` (i1, or a tile of i1) is true where an element is not defined. `division` is where that comes from."""

    value: Value
    division: Operation

    @property
    def is_tile(self) -> bool:
        return is_tile(self.value)


_Maybe = _Shadow | None


def check_divisions(module: Module) -> None:
    """Add the checks to `module`, in place; a second time does nothing."""
    for function in module.functions.values():
        names = set()
        unsafe = False
        for op in function.walk():
            names.add(op.name)
            unsafe = unsafe or (op.name in _DIVISIONS and not _is_never_zero(op.operands[1]))
        if unsafe and TRAP not in names:
            checks = _Checks()
            for block in function.regions[0].blocks:
                checks.block(block)


def _origin(value: Value) -> Value:
    """The value that is zero where `value` is, as small as it can be had."""
    while (op := value.defining_op) is not None and op.name in _KEEP_ZERO:
        value = op.operands[0]
    return value


def _is_never_zero(divisor: Value) -> bool:
    op = _origin(divisor).defining_op
    if op is None or op.name != "arith.constant":
        return False
    dense = op.attributes["value"]
    if not isinstance(dense, Dense):
        return bool(dense)
    return bool(dense.value) if dense.splat else all(dense.value)


class _Checks:
    """Walks one function in order. `_shadows` has the values that may not be defined, so far."""

    def __init__(self) -> None:
        self._shadows: dict[Value, _Shadow] = {}
        self._zero: dict[Value, Value] = {}  # i1 that says whether a divisor is zero
        self._trapped: set[tuple[Value, Value | None]] = set()
        self._output: list[Operation] = []
        self._block: Block | None = None
        # While shadows carried around a loop are being found out, nothing is added to the module.
        self._trial = False

    def block(self, block: Block) -> None:
        """Check all operations of a block."""
        with self._into(block):
            for op in block.operations:
                self._visit(op)

    @contextmanager
    def _into(self, block: Block) -> Iterator[None]:
        """What follows goes to `block`; what is known inside is not known after it."""
        before = self._block, self._output, dict(self._zero), set(self._trapped)
        self._block, self._output = block, []
        yield
        if not self._trial:
            block.operations[:] = self._output
        self._block, self._output, self._zero, self._trapped = before

    # ------------------------------------------------------------------------------------------------------- operations

    def _visit(self, op: Operation) -> None:
        match op.name:
            case "scf.if":
                self._if(op)
            case "scf.for":
                self._for(op)
            case "scf.while":
                self._while(op)
            case "tt.store" | "tt.atomic_rmw" | "tt.atomic_store":
                self._access(op, op.operands[:2], op.operands[2:])
            case "tt.atomic_load":
                self._access(op, op.operands[:1], op.operands[1:])
            case "tt.load":
                self._load(op)
            case name if name in _DIVISIONS:
                self._division(op)
            case "arith.select" | "arith.andi" | "arith.ori" if is_tile(op.result) and self._any(op):
                self._output.append(op)
                self._set(op.result, self._select(op) if op.name == "arith.select" else self._logic(op))
            case name if name in TABLE or name == "tt.addptr":
                self._output.append(op)
                if is_tile(op.result):
                    self._set(op.result, self._either(op, *map(self._shadows.get, op.operands)))
            case name if name in _MOVES and self._any(op):
                self._output.append(op)
                self._move(op)
            case _:
                if op.name not in _UNTOUCHED:
                    for value in op.operands:
                        self._trap(op, self._shadows.get(value))
                self._output.append(op)

    def _any(self, op: Operation) -> bool:
        return any(value in self._shadows for value in op.operands)

    def _set(self, value: Value, shadow: _Maybe) -> None:
        if shadow is not None:
            self._shadows[value] = shadow

    def _division(self, op: Operation) -> None:
        divisor = op.operands[1]
        own = None
        if not _is_never_zero(divisor):
            origin = _origin(divisor)
            small = is_tile(origin) and is_tile(divisor) and origin.type != divisor.type
            source = divisor if small else origin  # a smaller tile would need its moves again; a scalar does not
            if source not in self._zero:
                zero = self._constant(op, source.type, 0)
                self._zero[source] = self._make(op, "arith.cmpi", [source, zero], _like(source.type), predicate=_EQUAL)
            own = _Shadow(self._zero[source], op)
        if not is_tile(op.result):
            self._trap(op, own)
            self._output.append(op)
            return
        self._output.append(op)
        self._set(op.result, self._either(op, own, *map(self._shadows.get, op.operands)))

    def _access(self, op: Operation, used: Sequence[Value], mask: Sequence[Value]) -> None:
        """A store or an atomic: what its mask lets through must be defined."""
        condition = mask[0] if mask else None
        if condition is not None:
            self._trap(op, self._shadows.get(condition))
        for value in used:
            self._trap(op, self._shadows.get(value), condition)
        self._output.append(op)

    def _load(self, op: Operation) -> None:
        pointers, mask, other = load_operands(op)
        if mask is not None:
            self._trap(op, self._shadows.get(mask))
        self._trap(op, self._shadows.get(pointers), mask)
        self._output.append(op)
        instead = self._shadows.get(other) if other is not None else None
        if instead is not None and mask is not None:
            self._set(op.result, self._and(op, self._not(op, mask), instead))

    def _select(self, op: Operation) -> _Maybe:
        condition, first, second = op.operands
        chosen = self._and(op, condition, self._shadows.get(first))
        not_chosen = self._shadows.get(second)
        rejected = self._and(op, self._not(op, condition), not_chosen) if not_chosen else None
        return self._either(op, self._shadows.get(condition), chosen, rejected)

    def _logic(self, op: Operation) -> _Maybe:
        """`and` and `or` of bits: the result is defined where one side alone decides it."""
        shadows = [self._shadows.get(value) for value in op.operands]
        assert isinstance(op.result.type, TensorType)
        if op.result.type.element != _I1:
            return self._either(op, *shadows)
        undecided = []
        for value, own, other in zip(op.operands, shadows, reversed(shadows), strict=True):
            if other is not None:
                open_ = value if op.name == "arith.andi" else self._not(op, value)
                if own is not None:
                    open_ = self._make(op, "arith.ori", [open_, self._as_tile(op, own, op.result.type)], open_.type)
                undecided.append(self._and(op, open_, other))
        return self._either(op, *undecided)

    def _move(self, op: Operation) -> None:
        shadows = [self._shadows.get(value) for value in op.operands]
        if not any(shadow.is_tile for shadow in shadows if shadow):
            either = self._either(op, *shadows)
            for result in op.results:
                self._set(result, either)
            return
        given = [
            self._as_tile(op, shadow, value.type) if shadow else self._constant(op, _like(value.type), 0)
            for shadow, value in zip(shadows, op.operands, strict=True)
        ]
        moved = self._clone(op, given)
        division = next(shadow.division for shadow in shadows if shadow)
        for result, value in zip(op.results, moved, strict=True):
            self._set(result, _Shadow(value, division))

    # ------------------------------------------------------------------------------------------------------------ loops

    def _region(self, region: Region, skip: int = 0, carried: Sequence[_Maybe] | None = None) -> list[_Maybe]:
        """Check a region; the shadows that its terminator passes on, after its first `skip` operands.

        With `carried`, it passes on a shadow of that kind for each that is not None.
        """
        if not region.blocks:
            return []
        block = region.block
        with self._into(block):
            for op in block.operations[:-1]:
                self._visit(op)
            end = block.terminator
            passed = end.operands[skip:]
            shadows = [self._shadows.get(value) for value in passed]
            for value, shadow, kind in zip(passed, shadows, carried or [None] * len(passed), strict=True):
                if kind is not None:
                    self._append(end, self._as_kind(end, shadow, kind, value.type))
            self._output.append(end)
        return shadows

    def _if(self, op: Operation) -> None:
        with self._on_trial():
            ways = [self._region(region) for region in op.regions]
        kinds = [self._wider(*pair) for pair in zip(*ways, strict=True)] if all(ways) else []
        for region in op.regions:
            self._region(region, carried=kinds if region.blocks and kinds else None)
        self._output.append(op)
        self._add_results(op, kinds)

    def _for(self, op: Operation) -> None:
        body = op.regions[0].block
        first = op.operands[3:]
        kinds: list[_Maybe] = [self._shadows.get(value) for value in first]
        while True:
            with self._on_trial():
                self._bind(body.arguments[1:], kinds)
                passed = self._region(op.regions[0])
            known, kinds = kinds, [self._wider(*pair) for pair in zip(kinds, passed, strict=True)]
            if _kinds(kinds) == _kinds(known):
                break
        self._pass_in(op, first, kinds)
        self._add_arguments(body, body.arguments[1:], kinds)
        self._region(op.regions[0], carried=kinds)
        self._output.append(op)
        self._add_results(op, kinds)

    def _while(self, op: Operation) -> None:
        before, body = (region.block for region in op.regions)
        first = list(op.operands)
        kinds: list[_Maybe] = [self._shadows.get(value) for value in first]
        while True:
            with self._on_trial():
                self._bind(before.arguments, kinds)
                tested = self._region(op.regions[0], skip=1)
                self._bind(body.arguments, tested)
                passed = self._region(op.regions[1])
            known, kinds = kinds, [self._wider(*pair) for pair in zip(kinds, passed, strict=True)]
            if _kinds(kinds) == _kinds(known):
                break
        self._pass_in(op, first, kinds)
        self._add_arguments(before, list(before.arguments), kinds)
        self._region(op.regions[0], skip=1, carried=tested)
        self._add_arguments(body, list(body.arguments), tested)
        self._region(op.regions[1], carried=kinds)
        self._output.append(op)
        self._add_results(op, tested)

    @contextmanager
    def _on_trial(self) -> Iterator[None]:
        before = self._trial, dict(self._shadows), list(self._output)
        self._trial = True
        yield
        self._trial, self._shadows, self._output = before

    @staticmethod
    def _wider(first: _Maybe, second: _Maybe) -> _Maybe:
        return first if second is None or (first is not None and first.is_tile) else second

    def _bind(self, arguments: Sequence[Value], kinds: Sequence[_Maybe]) -> None:
        for argument, kind in zip(arguments, kinds, strict=True):
            if kind is not None:
                stand_in = Value("%trial", kind.value.type)
                self._shadows[argument] = _Shadow(stand_in, kind.division)

    def _pass_in(self, op: Operation, first: Sequence[Value], kinds: Sequence[_Maybe]) -> None:
        for value, kind in zip(first, kinds, strict=True):
            if kind is not None:
                self._append(op, self._as_kind(op, self._shadows.get(value), kind, value.type))

    def _add_arguments(self, block: Block, arguments: Sequence[Value], kinds: Sequence[_Maybe]) -> None:
        for argument, kind in zip(arguments, kinds, strict=True):
            if kind is not None:
                name, type_ = f"{argument.name}.undefined", kind.value.type
                value = Value(name, type_, block=block, index=len(block.arguments))
                if not self._trial:
                    block.arguments.append(value)
                self._shadows[argument] = _Shadow(value, kind.division)

    def _add_results(self, op: Operation, kinds: Sequence[_Maybe]) -> None:
        for result, kind in zip(list(op.results), kinds, strict=False):  # no kinds: no results have a shadow
            if kind is not None:
                name, type_ = f"{result.name}.undefined", kind.value.type
                value = Value(name, type_, defining_op=op, index=len(op.results))
                if not self._trial:
                    op.results.append(value)
                self._shadows[result] = _Shadow(value, kind.division)

    # -------------------------------------------------------------------------------------------------------- emissions

    def _make(self, at: Operation, name: str, operands: Sequence[Value], type_: Type, **attributes: Any) -> Value:
        """The result of a new operation, placed behind what has been visited, on the line of `at`."""
        (value,) = self._insert(at, name, operands, [type_], attributes)
        return value

    def _insert(
        self, at: Operation, name: str, operands: Sequence[Value], types: Sequence[Type], attributes: dict[str, Any]
    ) -> list[Value]:
        op = Operation(name, [], [], attributes, [], [], [], at.location, self._block)
        op.results = [Value(f"%undefined.{id(op)}", t, defining_op=op, index=k) for k, t in enumerate(types)]
        for value in operands:
            self._append(op, value)
        if not self._trial:
            self._output.append(op)
        return op.results

    def _append(self, op: Operation, operand: Value) -> None:
        """Make `operand` the last operand of an operation."""
        if self._trial:
            return
        op.operands.append(operand)
        if op not in operand.users:
            operand.users.append(op)

    def _clone(self, op: Operation, operands: Sequence[Value]) -> list[Value]:
        return self._insert(op, op.name, operands, [_like(result.type) for result in op.results], op.attributes)

    def _constant(self, at: Operation, type_: Type, number: int) -> Value:
        value = Dense(type_, number, splat=True) if isinstance(type_, TensorType) else number
        return self._make(at, "arith.constant", [], type_, value=value)

    def _as_tile(self, at: Operation, shadow: _Shadow, like: Type) -> Value:
        return shadow.value if shadow.is_tile else self._make(at, "tt.splat", [shadow.value], _like(like))

    def _as_kind(self, at: Operation, shadow: _Maybe, kind: _Shadow, like: Type) -> Value:
        if shadow is None:
            return self._constant(at, kind.value.type, 0)
        return self._as_tile(at, shadow, like) if kind.is_tile else shadow.value

    def _not(self, at: Operation, bits: Value) -> Value:
        return self._make(at, "arith.xori", [bits, self._constant(at, bits.type, 1)], bits.type)

    def _either(self, at: Operation, *shadows: _Maybe) -> _Maybe:
        """Undefined where any of the shadows is."""
        result: _Maybe = None
        for shadow in shadows:
            if shadow is None or (result is not None and shadow.value is result.value):
                continue
            if result is None:
                result = shadow
                continue
            first, second = result.value, shadow.value
            if result.is_tile != shadow.is_tile:
                like = first.type if result.is_tile else second.type
                first, second = self._as_tile(at, result, like), self._as_tile(at, shadow, like)
            result = _Shadow(self._make(at, "arith.ori", [first, second], first.type), result.division)
        return result

    def _and(self, at: Operation, condition: Value, shadow: _Maybe) -> _Maybe:
        """Undefined where the shadow is and `condition` holds."""
        if shadow is None:
            return None
        first, second = condition, shadow.value
        if is_tile(first) and not shadow.is_tile:
            second = self._as_tile(at, shadow, first.type)
        elif shadow.is_tile and not is_tile(first):
            first = self._make(at, "tt.splat", [first], second.type)
        return _Shadow(self._make(at, "arith.andi", [first, second], first.type), shadow.division)

    def _trap(self, at: Operation, shadow: _Maybe, mask: Value | None = None) -> None:
        """End the program where an element is not defined and `mask` holds."""
        if shadow is None or self._trial or (shadow.value, mask) in self._trapped:
            return
        self._trapped.add((shadow.value, mask))
        if mask is None:
            bad = shadow.value
        elif shadow.is_tile or not is_tile(mask):
            used = self._and(shadow.division, mask, shadow)
            assert used is not None
            bad = used.value
        else:  # only where all elements are undefined is the mask looked at
            self._trap_if(shadow, mask)
            return
        self._insert(shadow.division, TRAP, [bad], [], {})

    def _trap_if(self, shadow: _Shadow, mask: Value) -> None:
        branch = Operation("scf.if", [], [], {}, [], [], [], shadow.division.location, self._block)
        self._append(branch, shadow.value)
        branch.regions = [Region(branch), Region(branch)]
        block = Block("^undefined", branch.regions[0])
        branch.regions[0].blocks.append(block)
        with self._into(block):
            self._insert(shadow.division, TRAP, [mask], [], {})
            self._insert(shadow.division, "scf.yield", [], [], {})
        self._output.append(branch)


def _like(type_: Type) -> Type:
    """The type of a shadow of something of that type, element by element."""
    return TensorType(type_.shape, _I1) if isinstance(type_, TensorType) else _I1


def _kinds(shadows: Sequence[_Maybe]) -> list[bool | None]:
    return [None if shadow is None else shadow.is_tile for shadow in shadows]
