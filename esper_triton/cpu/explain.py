"""`python -m esper_triton.cpu --explain FILE:KERNEL`: what a kernel is compiled to, and how it accesses memory."""

from __future__ import annotations

import linecache
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from esper_triton.cpu.errors import CPUBackendError, UsageError
from esper_triton.cpu.lowering.accesses import OPERATIONS, Form
from esper_triton.cpu.mlir import Module, Operation
from esper_triton.cpu.signature import Argument, Kernel, arguments_of, find_kernel, nearest

__all__ = ["SECTIONS", "Access", "Explanation", "explain", "sections"]

SECTIONS = {"ttir": "TTIR", "llir": "LLVM IR", "asm": "assembly", "accesses": "accesses"}


@dataclass(frozen=True, kw_only=True)
class Access:
    """One load, store or atomic of the kernel, in the order of its TTIR.

    Attributes:
        file, line, source: where it stands and that line's text; None where the IR does not say.
        operation: `load`, `store` or `atomic`. type: of what is accessed, such as `tensor<1024xf32>`.
        forms: in which it was emitted, in that order; none where nothing uses it.
    """

    file: str | None
    line: int | None
    source: str | None
    operation: str
    type: str
    forms: tuple[Form, ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A kernel's arguments, code (TTIR, LLVM IR and assembly as text) and accesses."""

    kernel: str
    file: str
    line: int
    arguments: tuple[Argument, ...]
    ttir: str
    llir: str
    asm: str
    accesses: tuple[Access, ...]

    def as_json(self, chosen: Iterable[str]) -> dict[str, Any]:
        """What `json.dumps` takes: the kernel, its arguments, and the chosen of `SECTIONS`."""
        found: dict[str, Any] = {"kernel": self.kernel, "file": self.file, "line": self.line}
        found["arguments"] = [{**asdict(argument), "value": _plain(argument.value)} for argument in self.arguments]
        for section in chosen:
            found[section] = getattr(self, section)
        if "accesses" in found:
            found["accesses"] = [
                {**asdict(access), "forms": [{**asdict(form), "text": str(form)} for form in access.forms]}
                for access in self.accesses
            ]
        return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def sections(text: str | None) -> list[str]:
    """The sections that `--show` lists, all where it is None, in the order of `SECTIONS`.

    Raises:
        UsageError: one of them is none.
    """
    if text is None:
        return list(SECTIONS)
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in SECTIONS:
            raise UsageError(f"--show {name!r} is not a section{nearest(name, SECTIONS)}")
    return [name for name in SECTIONS if name in asked]


def explain(target: str, args: Iterable[str] = (), constexprs: Iterable[str] = ()) -> Explanation:
    """Compiles the kernel that `FILE:KERNEL` names, on this machine's CPU, and tells what came out.

    Args:
        args: `NAME=TYPE` or `NAME=VALUE` for parameters that are not constexprs. constexprs: `NAME=VALUE`.

    Raises:
        UsageError: see `find_kernel` and `arguments_of`. CPUBackendError: the kernel does not compile.
    """
    kernel = find_kernel(target)
    arguments = arguments_of(kernel, args, constexprs)
    function = kernel.function
    file, line = function.fn.__code__.co_filename, function.fn.__code__.co_firstlineno
    ttir, options = _compiled(kernel, arguments)
    module = _parsed(ttir)
    operations = [op for op in module.operation.walk() if op.name in OPERATIONS]
    forms: dict[Operation, dict[Form, None]] = {op: {} for op in operations}

    def record(op: Operation, form: Form) -> None:
        forms.setdefault(op, {})[form] = None

    from esper_triton.cpu.compiler import assembly, lower_module

    symbol, _, work, llir = lower_module(module, options.sanitize, record)
    return Explanation(
        kernel=function.__name__,
        file=file,
        line=line,
        arguments=tuple(arguments),
        ttir=ttir,
        llir=llir,
        asm=assembly(llir, symbol, work, options),
        accesses=tuple(_access(op, tuple(forms[op])) for op in operations),
    )


def _access(op: Operation, forms: tuple[Form, ...]) -> Access:
    place = op.location
    # What a poll gives is whether it saw the value that it was to wait for.
    accessed = op.results[0] if op.results and op.name != "tt.atomic_poll" else op.operands[1]
    return Access(
        file=place.file if place else None,
        line=place.line if place else None,
        source=linecache.getline(place.file, place.line).strip() or None if place else None,
        operation=OPERATIONS[op.name],
        type=str(accessed.type),
        forms=forms,
    )


def _compiled(kernel: Kernel, arguments: list[Argument]) -> tuple[str, Any]:
    """(TTIR, options) of a compilation by Triton, to the end, so that whatever is wrong with the kernel shows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.compiler.errors import CompilationError

    from esper_triton.cpu.enabling import active

    source = ASTSource(
        kernel.function,
        {argument.name: argument.type for argument in arguments},
        {(k,): argument.value for k, argument in enumerate(arguments) if argument.type == "constexpr"},
        {(k,): [["tt.divisibility", 16]] for k, argument in enumerate(arguments) if argument.aligned},
    )
    target = GPUTarget("cpu", "native", 1)
    try:
        with active():
            options = make_backend(target).parse_options(dict(kernel.options))
            compiled = triton.compile(source, target, dict(kernel.options))
    except CPUBackendError:
        raise
    except CompilationError as error:
        raise CPUBackendError(_compilation_message(kernel.function, error) + _guesses(arguments)) from error
    except RuntimeError as error:  # of MLIR's passes
        raise CPUBackendError(f"kernel {kernel.function.__name__!r} does not compile: {error}") from error
    return str(compiled.asm["ttir"]), options


def _compilation_message(function: Any, error: Any) -> str:
    """What Triton's frontend says, without the lines of source around it."""
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    decorators = next((k for k, line in enumerate(function.raw_src) if line.lstrip().startswith("def ")), 0)
    line = function.starting_line_number + decorators + getattr(error.node, "lineno", 1) - 1
    message = getattr(innermost, "error_message", None) or str(innermost)
    place = f"{function.fn.__code__.co_filename}:{line}"
    return f"kernel {function.__name__!r} does not compile ({place}): {message}"


def _guesses(arguments: list[Argument]) -> str:
    """The types that nobody gave, which may be what is wrong."""
    guessed = [f"{argument.name}={argument.type}" for argument in arguments if argument.why.startswith("default of")]
    return f"; taken by default, unless --arg says otherwise: {', '.join(guessed)}" if guessed else ""


def _parsed(ttir: str) -> Module:
    """TTIR in its custom form, as Triton keeps it, through MLIR to its generic form."""
    from triton._C.libtriton import ir

    from esper_triton.cpu import mlir

    context = ir.context()
    ir.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ttir")
        with open(path, "w", encoding="utf-8") as file:
            file.write(ttir)
        module = ir.parse_mlir_module(path, context)
    module.context = context
    return mlir.parse(mlir.generic_text(module, context))
