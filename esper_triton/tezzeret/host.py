"""Functions at the end of an emitted source that launch its kernels: it runs alone, without this package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from esper_triton.tezzeret.rows import KernelSource

if TYPE_CHECKING:
    from esper_triton.tezzeret.emission import Design, Emitted, Intermediate, Launch

__all__ = ["host_functions"]


def host_functions(design: Design, sources: Sequence[KernelSource], emitted: Emitted) -> str:
    """`forward` and `backward` in plain torch and Triton."""
    texts = {source.name: source for source in sources}
    inputs = list(dict.fromkeys(["h", *design.inputs]))
    extra = {"rows": [], "sequence": ["length"], "image": ["image_height", "image_width"]}[design.layout]
    if any("dropout_seed" in source.text for source in sources):
        extra = [*extra, "training", "dropout_seed"]
    extents = {
        "rows": [],
        "sequence": ["batch = rows // length"],
        "image": ["length = image_height * image_width", "batch = rows // length"],
    }[design.layout]
    given = [*inputs, *design.parameters, "alpha", *extra]
    saved = [one.name for one in emitted.saved]
    shapes = ", ".join(f"{name} {list(node.shape)}" for name, node in design.parameters.items())
    lines = [
        f"def forward({', '.join(given)}):",
        f'    """out [rows, {design.k.width}] = h + alpha * (k - h), and what backward needs.',
        "",
        f"    {', '.join(inputs)}: [rows, features], contiguous rows. alpha: [1], float32."
        + (f" {shapes}." if shapes else ""),
        '    """',
        "    rows = h.shape[0]",
        *(f"    {line}" for line in extents),
        "    out = torch.empty_like(h)",
        *(f"    {_allocated(one, 'h')}" for one in emitted.saved),
        *_launches(emitted.forward, texts, emitted.constexprs),
        f"    return out, ({', '.join(saved)}{',' if saved else ''})",
        "",
        "",
        f"def backward({', '.join(['grad_out', *given, 'saved'])}):",
        f'    """Gradients at {", ".join([*design.inputs, *design.parameters])}, as a dictionary."""',
        "    rows = h.shape[0]",
        *(f"    {line}" for line in extents),
        f"    ({', '.join(saved)}{',' if saved else ''}) = saved" if saved else "    assert not saved",
        *(f"    {_allocated(one, 'h')}" for one in emitted.scratch),
        *(f"    grad_{name} = torch.empty_like({name})" for name in [*design.inputs, *design.parameters]),
        *_launches(emitted.backward, texts, emitted.constexprs),
        "    return {" + ", ".join(f'"{n}": grad_{n}' for n in [*design.inputs, *design.parameters]) + "}",
    ]
    return "\n".join([*lines, ""])


def _allocated(one: Intermediate, like: str) -> str:
    shape = one.level if one.size == 1 else f"{one.level}, {one.size}"
    dtype = "" if one.is_input_dtype else ", dtype=torch.float32"
    return f"{one.name} = {like}.new_empty(({shape},){dtype})"


def _launches(launches: Iterable[Launch], texts: dict[str, KernelSource], constexprs: dict[str, int]) -> Iterable[str]:
    for launch in launches:
        source = texts[launch.kernel]
        arguments = []
        for line in source.text.split("\n")[2:]:
            if line == "):":
                break
            name = line.strip().rstrip(",").partition(":")[0]
            if name.endswith("_ptr"):
                arguments.append(name.removesuffix("_ptr"))
            elif name.endswith("_row_stride"):
                arguments.append(f"{name.removesuffix('_row_stride')}.stride(0)")
            elif name in constexprs:
                arguments.append(f"{name}={constexprs[name]}")
            else:
                arguments.append(name)
        grid = ", ".join(_numbers(text, constexprs) for text in launch.grid)
        call = f"{launch.kernel}[({grid},)]({', '.join(arguments)})"
        if any("rows" in text or "batch" in text for text in launch.grid):  # else nothing depends on there being rows
            yield "    if rows > 0:"
            call = f"    {call}"
        yield f"    {call}"


def _numbers(text: str, constexprs: dict[str, int]) -> str:
    for name in sorted(constexprs, key=len, reverse=True):
        text = text.replace(name, str(constexprs[name]))
    return text.replace("cdiv(", "triton.cdiv(")
