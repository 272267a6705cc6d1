"""A kernel named on the command line: found in its file, and given the arguments that it is to be compiled for."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_triton.cpu.errors import UsageError

__all__ = ["Argument", "Kernel", "arguments_of", "find_kernel", "nearest"]

_SCALARS = (
    *("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64"),
    *("fp16", "bf16", "fp32", "fp64", "fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16"),
)
_OTHER_NAMES = {
    **{f"int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"fp{bits}" for bits in (16, 32, 64)},
    **{f"f{bits}": f"fp{bits}" for bits in (16, 32, 64)},
    "bfloat16": "bf16",
    "bool": "i1",
}
_ALIGNED = 16  # bytes, or a factor of an integer: what Triton specialises kernels for
_ACCESSES = {"load", "store", "make_block_ptr", "make_tensor_descriptor"}


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A phrase such as `; did you mean 'add' or 'adds'?` for the end of a message, or the list of what there is."""
    known = sorted(set(candidates))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(map(repr, close)) + "?"
    shown = ", ".join(map(repr, known[:8])) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    return f"; known: {shown}" if known else ""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel and the wrappers around it.

    Attributes:
        function: the `JITFunction`. config: constexprs of the autotuner's first configuration, and num_warps and its
            like in `options`. heuristics: what computes a constexpr from the other arguments.
    """

    function: Any
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    heuristics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One parameter of a kernel as it is compiled.

    Attributes:
        type: Triton's name, such as `*fp32`, or `constexpr`. value: of a constexpr. aligned: whether it is taken to be
            a multiple of 16. why: where all this comes from.
    """

    name: str
    type: str
    value: Any = None
    aligned: bool = False
    why: str

    def __str__(self) -> str:
        if self.type == "constexpr":
            return repr(self.value)
        return f"{self.type}, multiple of {_ALIGNED}" if self.aligned else self.type


def find_kernel(target: str) -> Kernel:
    """The kernel that `FILE:KERNEL` names; FILE is imported.

    Raises:
        UsageError: there is no such file or kernel, or the file cannot be imported.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not file:
        raise UsageError(f"{target!r} is not of the form FILE:KERNEL, such as kernels.py:add")
    path = Path(file)
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(file, beside, n=1)
        raise UsageError(f"there is no file {file!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    found = {key: _unwrapped(value) for key, value in vars(_imported(path)).items()}
    kernels = {key: kernel for key, kernel in found.items() if kernel is not None}
    if name not in kernels:
        what = f"is not a @triton.jit function of {file!r}" if name in found else f"is not in {file!r}"
        raise UsageError(f"{name!r} {what}{nearest(name, kernels) or ', which has no @triton.jit function'}")
    return kernels[name]


def _imported(path: Path) -> Any:
    """The module in a file: under its own name where it is part of a package, else much as a script would be."""
    parts, folder = [path.stem], path.resolve().parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    sys.path.insert(0, str(folder))
    try:
        if len(parts) > 1:
            return importlib.import_module(".".join(parts))
        name = f"explained_{path.stem}"  # not to hide, nor to be, another module of the file's name
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UsageError(f"{str(path)!r} is not a Python file")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
        return module
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{str(path)!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder))


def _unwrapped(value: Any) -> Kernel | None:
    """The kernel inside of `@triton.autotune` and `@triton.heuristics`; None for anything else."""
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.runtime.jit import JITFunction

    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    heuristics: dict[str, Any] = {}
    while isinstance(value, Autotuner | Heuristics):
        if isinstance(value, Heuristics):
            heuristics |= value.values
        elif value.configs:
            first = value.configs[0]
            config |= first.kwargs
            options |= {"num_warps": first.num_warps, "num_stages": first.num_stages}
        value = value.fn
    if not isinstance(value, JITFunction):
        return None
    return Kernel(function=value, config=config, options=options, heuristics=heuristics)


def arguments_of(kernel: Kernel, given: Iterable[str], constexprs: Iterable[str]) -> list[Argument]:
    """Every parameter's type or value, from `NAME=TYPE|VALUE` and `NAME=VALUE` pairs, the kernel, and defaults.

    Raises:
        UsageError: a pair is malformed or names no such parameter, or constexprs without a value are left over.
    """
    parameters = {parameter.name: parameter for parameter in kernel.function.params}
    chosen = _pairs("--arg", given, "x_ptr=*fp32")
    values = _pairs("--constexpr", constexprs, "BLOCK=1024")
    constant = {name for name, parameter in parameters.items() if parameter.is_constexpr}
    for option, names, valid, other in (
        ("--arg", chosen, parameters.keys() - constant, "--constexpr"),
        ("--constexpr", values, constant, "--arg"),
    ):
        for name in names:
            if name not in valid:
                where = f"; {name!r} takes {other}" if name in parameters else nearest(name, valid)
                raise UsageError(f"{option} {name!r} is not one of kernel {kernel.function.__name__!r}{where}")
    pointers = _pointers(kernel.function)
    arguments: dict[str, Argument] = {}
    for name, parameter in parameters.items():
        if not parameter.is_constexpr:
            arguments[name] = _runtime(parameter, chosen.get(name), name in pointers)
        elif name in values:
            arguments[name] = Argument(name=name, type="constexpr", value=_constant(values[name]), why="given")
        elif name in kernel.config:
            why = "first configuration of the autotuner"
            arguments[name] = Argument(name=name, type="constexpr", value=kernel.config[name], why=why)
        elif parameter.has_default and name not in kernel.heuristics:
            arguments[name] = Argument(name=name, type="constexpr", value=parameter.default, why="the kernel's default")
    known = {name: argument.value for name, argument in arguments.items() if argument.type == "constexpr"}
    known |= {name: _number(text) for name, text in chosen.items() if _number(text) is not None}
    for name, compute in kernel.heuristics.items():
        if name in parameters and name not in arguments:
            try:
                value = known[name] = compute(dict(known))
            except Exception:  # it wants what is not known here
                continue
            arguments[name] = Argument(name=name, type="constexpr", value=value, why="heuristic")
    missing = [name for name in parameters if name not in arguments]
    if missing:
        wanted = " ".join(f"--constexpr {name}=..." for name in missing)
        raise UsageError(f"kernel {kernel.function.__name__!r} has constexprs without a value: give {wanted}")
    return [arguments[name] for name in parameters]


def _pairs(option: str, pairs: Iterable[str], example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {pair!r} is not of the form NAME=..., such as {example}")
        if name in found:
            raise UsageError(f"{option} {name!r} is given twice")
        found[name] = value
    return found


def _runtime(parameter: Any, text: str | None, is_pointer: bool) -> Argument:
    name = parameter.name
    if text is not None:
        return _parsed(parameter, text)
    if annotated := str(parameter.annotation_type):
        return Argument(name=name, type=annotated, aligned=annotated.startswith("*"), why="annotation")
    if is_pointer:
        return Argument(name=name, type="*fp32", aligned=True, why="default of a pointer")
    if parameter.has_default and (known := _of_value(parameter, parameter.default, "the kernel's default")):
        return known
    return Argument(name=name, type="i32", why="default of a scalar")


def _parsed(parameter: Any, text: str) -> Argument:
    """An `--arg`: a type, perhaps followed by `:1` or `:16` for what it is a multiple of; or a value."""
    if text == "None" or _number(text) is not None:
        argument = _of_value(parameter, _number(text), "given")
        assert argument is not None
        return argument
    spelled, colon, factor = text.partition(":")
    star = "*" * (len(spelled) - len(spelled.lstrip("*")))
    const = "k" if star and spelled[1:2] == "k" else ""
    element = spelled[len(star) + len(const) :]
    element = _OTHER_NAMES.get(element, element)
    if element not in _SCALARS or (colon and factor not in ("1", str(_ALIGNED))) or len(star) > 1:
        valid = [*_SCALARS, *_OTHER_NAMES]
        close = nearest(element, valid) if element not in _SCALARS and difflib.get_close_matches(element, valid) else ""
        raise UsageError(
            f"--arg {parameter.name}={text}: expected a type such as *fp32, *fp32:1 or i32, or a number{close}"
        )
    aligned = factor == str(_ALIGNED) if colon else bool(star)
    return Argument(name=parameter.name, type=f"{star}{const}{element}", aligned=aligned, why="given")


def _of_value(parameter: Any, value: Any, why: str) -> Argument | None:
    """What Triton specialises a scalar for: 1 and None are constants, multiples of 16 are known as such."""
    name = parameter.name
    if value is None:
        return Argument(name=name, type="constexpr", value=None, why=why)
    if isinstance(value, bool):
        return Argument(name=name, type="u1", why=why)
    if isinstance(value, float):
        return Argument(name=name, type="fp32", why=why)
    if not isinstance(value, int):
        return None
    if value == 1 and not parameter.do_not_specialize:
        return Argument(name=name, type="constexpr", value=1, why=why)
    kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    closed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
    return Argument(name=name, type=kind, aligned=value % _ALIGNED == 0 and not closed, why=why)


def _number(text: str) -> int | float | None:
    """What a literal of a number or a bool says; None for any other text."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, int | float) else None


def _constant(text: str) -> Any:
    """A literal, a dtype as `tl.float32`, or the text itself."""
    import triton.language as tl

    if text.startswith("tl.") and isinstance(getattr(tl, text[3:], None), tl.dtype):
        return getattr(tl, text[3:])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _pointers(function: Any) -> set[str]:
    """Parameters that are pointers by their names, or by what the source accesses: the name at the far left of an
    address, through the names that it was assigned to."""
    names = {parameter.name for parameter in function.params}
    pointers = {name for name in names if name.lower().endswith(("ptr", "ptrs"))}
    bases: dict[str, str] = {}
    tree = ast.parse(function.src)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            base = _leftmost(node.value)
            if base is not None and node.targets[0].id not in names:
                bases.setdefault(node.targets[0].id, base)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.args and (node.func.attr in _ACCESSES or node.func.attr.startswith("atomic_")):
            base = _leftmost(node.args[0])
            for _ in bases:  # as many steps as there are names at most
                base = bases.get(base, base) if base is not None else None
            if base in names:
                pointers.add(str(base))
    return pointers


def _leftmost(node: ast.AST) -> str | None:
    while isinstance(node, ast.BinOp | ast.Subscript):
        node = node.left if isinstance(node, ast.BinOp) else node.value
    return node.id if isinstance(node, ast.Name) else None
