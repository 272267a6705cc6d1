"""The graph that grows while a module is taken, and what its values need before an operation can have them."""

from __future__ import annotations

import keyword
from collections.abc import Collection, Sequence
from dataclasses import replace
from fractions import Fraction

from esper_triton.contracts.graph import RESERVED, Op
from esper_triton.contracts.values import AttributeValue, Level
from esper_triton.tezzeret.import_axes import Atom, Group, Refused, Sizes, Tracked, inner_of, scaled, size_of

__all__ = ["Growing"]


class Growing:
    """Ops so far. Methods take and return traced tensors."""

    def __init__(self, taken: Collection[str], sizes: Sizes, leading: Group) -> None:
        """`taken`: names that no value may have. `leading`: the batch and its positions."""
        self.ops: list[Op] = []
        self.leading = leading
        self.sizes = sizes
        self.node = "v"  # what the value is called that comes next
        self._taken = {*taken, *RESERVED}

    def add(self, op: str, *inputs: str | float, **attrs: AttributeValue) -> str:
        """Adds an op and returns the name of its value. The same op on the same inputs is not added twice."""
        attrs = {name: value for name, value in attrs.items() if value is not None}
        body = {"op": op, "inputs": inputs, "attrs": attrs}
        added = Op.model_validate({"name": self._fresh(), **body})
        if op != "dropout":
            for known in self.ops:
                if (known.op, known.inputs, known.attrs) == (added.op, added.inputs, added.attrs):
                    return known.name
        self._taken.add(added.name)
        self.ops.append(added)
        return added.name

    def _fresh(self) -> str:
        base = self.node if self.node[:1].isalpha() and self.node.isidentifier() else "v"
        name, count = base, 1
        while name in self._taken or keyword.iskeyword(name) or name.startswith("grad_"):
            name, count = f"{base}_{count}", count + 1
        return name

    def arranged(self, value: Tracked, wanted: Sequence[Group], *, exact: bool = False) -> str | float:
        """The value with these inner dims, by a reshape, or by one exchange of its last two dims between two of them.

        Dims of extent 1 in front need not be there, since values broadcast right-aligned; they are if it is to be
        `exact`.
        """
        if isinstance(value.name, float):
            return value.name
        exact = exact and not wanted[0]
        have, want = (value.inner, tuple(wanted)) if exact else (_trimmed(value.inner), _trimmed(tuple(wanted)))
        if _same(have, want) and len(value.inner) <= max(len(wanted), 1):
            return value.name
        atoms = [atom for group in want for atom in group]
        name = value.name
        if not all(a is b for a, b in zip(value.atoms, atoms, strict=True)):
            name = self._exchanged(name, value.inner, atoms)
            have = ((), ())  # whatever it is now
        elif _same(have, want):
            have = ((), ())  # with dims of extent 1 in front that are too many
        if not _same(have, want or ((),)):
            name = self._reshaped(name, want or ((),))
        return name

    def _reshaped(self, name: str, groups: Sequence[Group]) -> str:
        return self.add("reshape", name, shape=tuple(self.text(group) for group in groups))

    def _exchanged(self, name: str, inner: tuple[Group, ...], atoms: Sequence[Atom]) -> str:
        have = [atom for group in inner for atom in group]
        start = next(i for i, (a, b) in enumerate(zip(have, atoms, strict=True)) if a is not b)
        middle = next(i for i, atom in enumerate(have) if atom is atoms[start])
        first, second = tuple(have[start:middle]), tuple(have[middle:])
        if [*have[:start], *second, *first] != list(atoms):
            raise Refused("it needs its features in an order that one transpose does not give")
        two = (*((atom,) for atom in have[:start]), first, second)
        if not _same(inner, two):
            name = self._reshaped(name, two)
        return self.add("transpose", name)

    def text(self, group: Group) -> str:
        """The extent of an axis as an expression."""
        numbers = [atom for atom in group if atom.text.isdigit()]
        symbols = [atom.text for atom in group if not atom.text.isdigit()]
        if not symbols:
            return str(size_of(group))
        if len(symbols) == 2:  # heads and `d // heads`
            for divisor, (base, slashes, by) in zip(
                symbols[::-1], (text.partition(" // ") for text in symbols), strict=True
            ):
                if slashes and by == divisor:
                    symbols = [base.strip("()")]
                    break
        whole = symbols[0] if len(symbols) == 1 else " * ".join(f"({text})" for text in symbols)
        number = size_of(tuple(numbers))
        return whole if number == 1 else scaled(whole, Fraction(number)) or f"{number} * ({whole})"

    def unary(self, value: Tracked, op: str, **attrs: AttributeValue) -> Tracked:
        """An element-wise operation, which every arrangement suits."""
        return replace(value, name=self.add(op, value.name, **attrs))

    def joint(self, op: str, *values: Tracked) -> Tracked:
        """An operation on tensors that broadcast as torch's do."""
        rank = max(len(value.axes) for value in values)
        padded = [((),) * (rank - len(value.axes)) + value.axes for value in values]
        axes: list[Group] = []
        for groups in zip(*padded, strict=True):
            group = max(groups, key=size_of)
            for other in groups:
                if other and not _alike(group, other):
                    raise Refused("it meets values whose axes are not the same")
            axes.append(group)
        wanted = [i for i, group in enumerate(axes) if inner_of(group)]
        names = [
            self.arranged(value, [inner_of(groups[i]) for i in wanted])
            for value, groups in zip(values, padded, strict=True)
        ]
        inner = tuple(inner_of(axes[i]) for i in wanted)
        return Tracked(name=self.add(op, *names), level=self.level(values), inner=inner, axes=tuple(axes))

    def last(self, value: Tracked, axis: int) -> Tracked:
        """With one axis, of features, as the last inner dim."""
        group = value.axes[axis]
        if any(atom.leading for atom in group):
            raise Refused("it works along the batch or its positions")
        others = [inner_of(other) for i, other in enumerate(value.axes) if i != axis and inner_of(other)]
        inner = (*others, group)
        return replace(value, name=self.arranged(value, inner), inner=inner)

    def sliced(self, value: Tracked, axis: int, start: int, stop: int) -> Tracked:
        """Indices of one axis, of features."""
        group = value.axes[axis]
        if any(atom.leading for atom in group):
            raise Refused("it takes a part of the batch or of its positions")
        if (start, stop) == (0, size_of(group)):
            return value
        atoms = list(value.atoms)
        first = next(i for i, atom in enumerate(atoms) if atom is group[0])
        if [*atoms[first : first + len(group)]] != list(group):
            raise Refused("it takes a part of an axis that is not one piece")
        before, after = tuple(atoms[:first]), tuple(atoms[first + len(group) :])
        dims = (*((atom,) for atom in before), (*group, *after))
        bounds = [self._times(index, after) for index in (start, stop)]
        name = self.add("slice", self.arranged(value, dims), start=bounds[0], stop=bounds[1])
        size = stop - start
        part: Group = () if size == 1 else (Atom(size, self.sizes.of(size)),)
        inner = (*((atom,) for atom in before), (*part, *after))
        axes = tuple(part if i == axis else other for i, other in enumerate(value.axes))
        return Tracked(name=name, level=value.level, inner=inner, axes=axes)

    def atom(self, size: int, text: str | None = None) -> Group:
        """A new axis of features."""
        return (Atom(size, text or self.sizes.of(size)),)

    def fresh(self, group: Group) -> Group:
        """Axes of the same extents that are not the same axes: of a product with a weight, say, and of the weight."""
        return tuple(Atom(atom.size, atom.text) for atom in group)

    def level(self, values: Sequence[Tracked]) -> Level | None:
        """The level of what is computed of these."""
        levels = {value.level for value in values}
        return "rows" if "rows" in levels else "batch" if "batch" in levels else None

    def _times(self, count: int, after: Group) -> str:
        """`count` times the extent of `after`, as an expression."""
        if not after or count == 0:
            return self.sizes.of(count)
        if count == 1:
            return self.text(after)
        known = self.sizes.known(count * size_of(after))
        number = self.sizes.of(count) if self.sizes.known(count) else str(count)
        return known or self.text((*after, Atom(count, number)))


def _trimmed(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    while groups and not groups[0]:
        groups = groups[1:]
    return groups


def _same(have: Sequence[Group], want: Sequence[Group]) -> bool:
    if len(have) != len(want):
        return False
    return all(
        len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True)) for a, b in zip(have, want, strict=True)
    )


def _alike(one: Group, other: Group) -> bool:
    """Whether two axes may meet: the same batch or positions, features of one size."""
    if size_of(one) != size_of(other):
        return False
    leading = [atom for atom in one if atom.leading], [atom for atom in other if atom.leading]
    if any(leading):
        pattern = [atom if atom.leading else atom.size for atom in one]
        return pattern == [atom if atom.leading else atom.size for atom in other]
    return True
