"""Where each element of a torch tensor lies in a graph's value, while a module is taken.

A traced tensor [batch * heads, length, 16] and a graph's value [rows; heads * 16] may hold the same elements. What
relates them are atoms: axes that are never cut further, such as the batch, the positions and the heads. A tensor's axis
is a product of atoms in row-major order, and so is an inner dim of the value. Views and permutations of a tensor then
change the tensor's axes alone; ops of the graph that rearrange a value are added only where an operation needs its
elements otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from esper_triton.contracts.values import Level

__all__ = ["Atom", "Group", "Refused", "Sizes", "Tracked", "inner_of", "scaled", "size_of", "viewed"]


class Refused(Exception):
    """The graph's operations cannot say it; the text says why."""


@dataclass(frozen=True, eq=False)
class Atom:
    """One axis of `size` elements; `text` is the size as an expression over dims. `leading` ones are the batch and its
    positions, which a graph's value has not in its inner dims."""

    size: int
    text: str
    leading: str = ""  # "batch", "position", or nothing


Group = tuple[Atom, ...]  # an axis as the product of atoms; of size 1 without any


def size_of(group: Group) -> int:
    return math.prod(atom.size for atom in group)


def inner_of(group: Group) -> Group:
    return tuple(atom for atom in group if not atom.leading)


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A traced tensor: which value of the graph it is (a number where `name` is one), and how its axes lie there."""

    name: str | float
    level: Level | None
    inner: tuple[Group, ...]
    axes: tuple[Group, ...]

    @property
    def atoms(self) -> Group:
        """The inner ones, in the order of the value's elements."""
        return tuple(atom for group in self.inner for atom in group)

    def axis(self, index: int) -> int:
        """An index counted from the end, counted from the start."""
        return index + len(self.axes) if index < 0 else index

    def substituted(self, atom: Atom, parts: Group) -> Tracked:
        """With an atom cut into several."""

        def cut(groups: Iterable[Group]) -> tuple[Group, ...]:
            return tuple(tuple(p for a in group for p in (parts if a is atom else (a,))) for group in groups)

        return replace(self, inner=cut(self.inner), axes=cut(self.axes))


class Sizes:
    """Numbers of a traced module as expressions over dims.

    Args:
        dims: the size of each dim. multiples: whether the size of a dim that is a multiple of an earlier one is written
            as such (`3 * d`).
    """

    def __init__(self, dims: dict[str, int], *, multiples: bool) -> None:
        self.dims = dims
        self.multiples = multiples

    def known(self, size: int) -> str | None:
        """The dim of this size."""
        return next((name for name, value in self.dims.items() if value == size and size > 1), None)

    def of(self, size: int) -> str:
        """A dim, a multiple or a part of one, or else the number."""
        if size < 2:
            return str(size)
        exact = self.known(size)
        if exact is not None:
            return exact
        for name, value in self.dims.items():
            if value > 1 and size % value == 0:
                return f"{size // value} * {name}"
        for name, value in self.dims.items():
            if value % size == 0:
                return f"{name} // {value // size}"
        return str(size)

    def add(self, size: int, name: str) -> str:
        """The expression of a parameter's extent; a dim is made for one that there is none for."""
        if size < 2:
            return str(size)
        exact = self.known(size)
        if exact is not None:
            return exact
        if self.multiples:
            for dim, value in self.dims.items():
                if value > 1 and size % value == 0:
                    return f"{size // value} * {dim}"
        base, count = name, 1
        while name in self.dims:
            count += 1
            name = f"{base}_{count}"
        self.dims[name] = size
        return name


def viewed(value: Tracked, shape: Sequence[int], sizes: Sizes) -> Tracked:
    """The tensor with its elements in the same order and another shape. Raises Refused where the batch or its positions
    would be cut."""
    axes: list[Group] = []
    left = [atom for group in value.axes for atom in group]
    for size in shape:
        group: list[Atom] = []
        wanted = size
        while wanted > 1:
            if not left:
                raise Refused(f"shape {list(shape)} has more elements than what it is made of")
            atom = left.pop(0)
            if wanted % atom.size == 0:
                group.append(atom)
                wanted //= atom.size
                continue
            if atom.leading or atom.size % wanted:
                raise Refused(f"shape {list(shape)} cuts an axis of {atom.size} that is a whole")
            parts = _cut(atom, wanted, sizes)
            value = value.substituted(atom, parts)
            axes = [tuple(p for a in done for p in (parts if a is atom else (a,))) for done in axes]
            group.append(parts[0])
            left.insert(0, parts[1])
            wanted = 1
        axes.append(tuple(group))
    return replace(value, axes=tuple(axes))


def _cut(atom: Atom, first: int, sizes: Sizes) -> Group:
    """An atom in two, the outer one of size `first`. What is no dim is a constant, the outer one where both are none:
    the number of heads, and then the width of a head follows from it."""
    second = atom.size // first
    outer, inner = sizes.known(first), sizes.known(second)
    if inner is not None and outer is None:
        outer = _divided(atom.text, inner, first)
    outer = outer or str(first)
    return Atom(first, outer), Atom(second, inner or _divided(atom.text, outer, second))


def _divided(text: str, divisor: str, size: int) -> str:
    """The quotient of two extents, which comes to `size`: `3 * d` by 6 is `d // 2`."""
    if text.isdigit():
        return str(size)
    if divisor.isdigit():
        return scaled(text, Fraction(1, int(divisor))) or f"({text}) // {divisor}"
    one = scaled(divisor, Fraction(size))
    return str(size) if one == text else f"({text}) // {divisor}"


def scaled(text: str, times: Fraction) -> str | None:
    """The multiple of `3 * d` or `d // 2` and the like, in the same form; None for another expression. A part of `d` is
    taken as one without a rest, as it has to be."""
    match = re.fullmatch(r"(?:(\d+) \* )?\(?([a-z]\w*)(?: // (\d+))?\)?", text)
    if match is None:
        return None
    times *= Fraction(int(match[1] or 1), int(match[3] or 1))
    part = match[2] if times.denominator == 1 else f"{match[2]} // {times.denominator}"
    if times.numerator == 1:
        return part
    return f"{times.numerator} * {part}" if times.denominator == 1 else f"{times.numerator} * ({part})"
