"""The compiler half of the Triton plugin: TTIR, LLVM IR, object code.

Triton imports this module while it is itself being imported, in every process of every user. So it imports neither
torch nor llvmlite, and whatever is missing is reported when a kernel is first compiled.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton.backends.compiler import BaseBackend, GPUTarget

from esper_triton.cpu.errors import CPUBackendError, UnsupportedOperation

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.accesses import Record
    from esper_triton.cpu.mlir import Module

__all__ = ["CPUBackend", "CPUOptions"]

# Triton compiles a kernel anew for arguments that 16 divides, of which the lowering makes nothing.
_KNOWN_OF_ARGUMENTS = re.compile(r"arg_attrs = \[(?:\{(?:tt\.divisibility = \d+ : i32)?\}(?:, )?)+\], ")


@dataclass(frozen=True, kw_only=True)
class CPUOptions:
    """Options of a compilation, under the names that Triton's users and frontend know.

    A CPU has no warps, stages, clusters or register limits: those options are taken and have no effect, so that one
    source runs on every target.

    Attributes:
        debug: keep `tl.device_assert`. sanitize_overflow: with `debug`, check 32-bit integer arithmetic.
        opt_level: 0 for none of LLVM's optimisations, 1 for the few that pay after this lowering, 2 and 3 for LLVM's
            own pipelines of that level. slp_vectorize: with those, join scalar operations into vectors.
        sanitize: `"bounds"` or True to check every access against the storages of the launch's tensors, `"race"` to
            look for two programs that store to one element as well, on one thread. The default is what the environment
            variable `ESPER_TRITON_SANITIZE` (1, race, or nothing) says when the kernel is compiled.
    """

    num_warps: int = 1
    num_stages: int = 1
    num_ctas: int = 1
    warp_size: int = 1
    maxnreg: int | None = None
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 1
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    ir_override: str | None = None
    enable_fp_fusion: bool = True
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    extern_libs: Any = ()
    debug: bool = False
    sanitize_overflow: bool = True
    backend_name: str = "cpu"
    arch: str = ""
    instrumentation_mode: str = ""
    fpsan_homomorphic_casts: bool = False  # triton 3.9 passes it to every backend
    opt_level: int = 1
    slp_vectorize: bool = False
    sanitize: str | bool = ""

    def __post_init__(self) -> None:
        names = {"": "", "0": "", "False": "", "1": "bounds", "True": "bounds", "bounds": "bounds", "race": "race"}
        if str(self.sanitize) not in names:
            raise ValueError(f"sanitize is {self.sanitize!r}, expected False, True, 'bounds' or 'race'")
        object.__setattr__(self, "sanitize", names[str(self.sanitize)])
        if not 0 <= self.opt_level <= 3:
            raise ValueError(f"opt_level is {self.opt_level}, expected 0 to 3")
        if isinstance(self.extern_libs, dict):  # a frozen dataclass must be hashable
            object.__setattr__(self, "extern_libs", tuple(sorted(self.extern_libs.items())))

    def hash(self) -> str:
        """Part of Triton's cache key."""
        text = "_".join(f"{field.name}-{getattr(self, field.name)!r}" for field in fields(self))
        return hashlib.sha256(text.encode()).hexdigest()


class CPUBackend(BaseBackend):  # type: ignore[misc]  # triton carries no types
    """Compiles Triton kernels to object code for the processor of this machine."""

    binary_ext = "o"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        """Everything outside kernel and options that object code depends on: it must not run on another processor."""
        return _toolchain_hash()

    def parse_options(self, opts: dict[str, Any]) -> CPUOptions:
        """Options from the keyword arguments of a launch; names that are not options are left to Triton.

        Raises:
            CPUBackendError: the target is another processor than this machine's.
        """
        from esper_triton.cpu.host import BASELINES, cpu_name

        baselines = BASELINES if platform.machine() in ("x86_64", "AMD64") else ()
        if self.target.arch not in ("", "native", cpu_name(), *baselines):
            raise CPUBackendError(
                f"cannot compile for the processor {self.target.arch!r} here: expected 'native', {cpu_name()!r}"
                + (f" or one of {', '.join(baselines)}" if baselines else "")
            )
        known = {field.name for field in fields(CPUOptions)}
        chosen = {name: value for name, value in opts.items() if name in known and value is not None}
        if "enable_fp_fusion" not in chosen:
            from triton import knobs

            chosen["enable_fp_fusion"] = knobs.language.default_fp_fusion
        chosen.setdefault("sanitize", os.environ.get("ESPER_TRITON_SANITIZE", ""))
        return CPUOptions(**{**chosen, "arch": self.target.arch if self.target.arch in baselines else cpu_name()})

    def pack_metadata(self, metadata: Any) -> tuple[int, int, int]:
        return metadata.num_warps, metadata.num_ctas, metadata.shared

    def get_target_name(self, options: CPUOptions) -> str:
        return f"cpu:{options.arch}"

    def get_codegen_implementation(self, options: CPUOptions) -> dict[str, Any]:
        return {"min_dot_size": lambda _lhs, _rhs: (1, 1, 1)}

    def get_module_map(self) -> dict[str, Any]:
        """`libdevice` resolves to the externs of CUDA's (`__nv_tanhf` and so on), which the lowering knows by name."""
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, ctx: Any) -> None:
        """Nothing: TTIR needs no dialect of this backend's own."""

    def add_stages(self, stages: dict[str, Callable[..., Any]], options: CPUOptions, *language: Any) -> None:
        """Fill in the stages `ttir`, `llir`, `o`. Wheels before 3.7 may pass no language.

        Raises:
            UnsupportedOperation: the source is Gluon, which is written against the layout of a GPU.
        """
        if language and getattr(language[0], "name", "") == "GLUON":
            raise UnsupportedOperation("Gluon", reason="its layouts are those of a GPU; write the kernel in Triton")
        stages["ttir"] = _make_ttir
        stages["llir"] = lambda module, metadata: _make_llir(module, metadata, options)
        stages["o"] = lambda source, metadata: _make_object(source, metadata, options)


@lru_cache(maxsize=1)
def _toolchain_hash() -> str:
    import llvmlite

    from esper_triton.cpu.host import cpu_name, feature_string, last_level_cache_bytes

    machine = (cpu_name(), feature_string(), str(last_level_cache_bytes()))
    digest = hashlib.sha256("\n".join(("cpu", llvmlite.__version__, *machine)).encode())
    # The backend's own text, so that no change of it can be served by code compiled before it.
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _make_ttir(module: Any, metadata: dict[str, Any]) -> Any:
    """Upstream's passes that do not ask for a GPU; afterwards only `noinline` calls are left."""
    from triton._C.libtriton import ir, passes

    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    passes.common.add_inliner(manager)
    for name in ("add_rewrite_tensor_pointer", "add_rewrite_tensor_descriptor_to_pointer"):
        if add := getattr(passes.ttir, name, None):  # wheels differ in which of them they need
            add(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    passes.common.add_licm(manager)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    manager.run(module, "make_ttir")
    return module


def _make_llir(module: Any, metadata: dict[str, Any], options: CPUOptions) -> str:
    """LLVM IR as text. The last use of `module`: `mlir.generic_text` leaves it unfit for MLIR."""
    from esper_triton.cpu import mlir
    from esper_triton.cpu.host import compiling_for, cpu_name

    text = _KNOWN_OF_ARGUMENTS.sub("", mlir.generic_text(module, module.context))
    with compiling_for(options.arch), _no_collections():
        lowered = _lower(text, str(options.sanitize), cpu_name())
    metadata["name"], metadata["slots"], metadata["work"], source = lowered
    metadata["shared"] = 0
    return source


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage collection waits. A kernel in the making is some hundred thousand objects that live until it is text, and
    looking through these and all others again and again took a quarter of a compile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# Remembered, like `_object`: autotuning compiles a kernel again for each number of warps and stages, and Triton for
# strides and addresses that 16 divides, and here these are one and the same kernel.
@lru_cache(maxsize=8)
def _lower(text: str, sanitize: str, processor: str) -> tuple[str, int, int | None, str]:
    """(symbol, number of run-time arguments, work of a program, LLVM IR) of a module in MLIR's generic form, for the
    processor that `host` speaks of."""
    from esper_triton.cpu import mlir

    return lower_module(mlir.parse(text), sanitize)


def lower_module(parsed: Module, sanitize: str = "", record: Record | None = None) -> tuple[str, int, int | None, str]:
    """`_lower` of a parsed module, which is changed; `record` is told of every access that is emitted.

    Raises:
        UnsupportedOperation: the kernel uses something that has no lowering.
    """
    from esper_triton.cpu.lowering import lower
    from esper_triton.cpu.native import ALLOWED_SYMBOLS
    from esper_triton.cpu.work import element_operations

    public = [name for name, op in parsed.functions.items() if op.attributes.get("sym_visibility") != "private"]
    if len(public) != 1:
        raise CPUBackendError(f"expected one public function in the module, found {public}")
    # A kernel called `exp` must not be what the machine code of another, or its own, calls for libm's.
    symbol = f"{public[0]}.kernel" if public[0] in ALLOWED_SYMBOLS else public[0]
    slots = len(parsed.functions[public[0]].attributes["function_type"].inputs)
    work = element_operations(parsed, public[0])
    return symbol, slots, work, str(lower(parsed, public[0], symbol=symbol, sanitize=sanitize, record=record))


def _make_object(source: str, metadata: dict[str, Any], options: CPUOptions) -> bytes:
    """An ELF relocatable for the processor of the options.

    Raises:
        CPUBackendError: LLVM refuses the IR, which is an error of the lowering.
    """
    from esper_triton.cpu.host import compiling_for, cpu_name

    with compiling_for(options.arch):
        return _object(source, metadata["name"], metadata["work"], options.opt_level, options.slp_vectorize, cpu_name())


@lru_cache(maxsize=8)
def _object(source: str, name: str, work: int | None, opt_level: int, slp_vectorize: bool, processor: str) -> bytes:
    machine, module = _optimised(source, name, work, opt_level, slp_vectorize)
    return bytes(machine.emit_object(module))


def assembly(source: str, name: str, work: int | None, options: CPUOptions) -> str:
    """The object code of `_make_object` as the text that an assembler would make it of."""
    machine, module = _optimised(source, name, work, options.opt_level, options.slp_vectorize)
    return str(machine.emit_assembly(module))


def _optimised(source: str, name: str, work: int | None, opt_level: int, slp_vectorize: bool) -> tuple[Any, Any]:
    """(llvmlite's target machine, its module after LLVM's passes), of which code can be emitted."""
    import llvmlite.binding as llvm

    from esper_triton.cpu.host import cpu_features, cpu_name, feature_string

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    # 64-bit addresses everywhere: MCJIT may place code and constants, and has the libraries, more than 2 GiB apart in a
    # process with large tensors, which a 32-bit relocation answers by aborting the process.
    machine = target.create_target_machine(
        cpu=cpu_name(), features=feature_string(), opt=3 if opt_level else 0, reloc="static", codemodel="large"
    )
    # A context of its own, so that kernels compiled in different threads do not meet, and types are freed.
    context = llvm.create_context()
    try:
        module = llvm.parse_assembly(source + _note(cpu_name(), cpu_features(), work), context)
        module.triple = target.triple
        module.data_layout = str(machine.target_data)
        module.verify()
    except RuntimeError as error:
        raise CPUBackendError(f"the lowering of kernel {name!r} is not valid LLVM IR: {str(error).strip()}") from error
    tuning = llvm.create_pipeline_tuning_options(speed_level=opt_level)
    # The lowering has already chosen its vectors; LLVM's loop vectoriser makes its remainder loops slower.
    tuning.loop_vectorization = False
    tuning.slp_vectorization = slp_vectorize
    builder = llvm.create_pass_builder(machine, tuning)
    if opt_level > 1:
        builder.getModulePassManager().run(module, builder)
    elif opt_level == 1:
        # The lowering emits rotated loops with what is invariant outside of them, so LLVM's own pipelines find little
        # more to do than this, and take five to twenty times as long for it.
        manager = llvm.create_new_function_pass_manager()
        manager.add_simplify_cfg_pass()
        manager.add_sroa_pass()
        manager.add_instruction_combine_pass()
        manager.add_new_gvn_pass()
        manager.add_simplify_cfg_pass()
        for function in module.functions:
            if not function.is_declaration:
                manager.run(function, builder)
    return machine, module


def _note(cpu: str, features: tuple[str, ...], work: int | None) -> str:
    """LLVM IR that puts what is known of the code into its object file, in a section that is not loaded."""
    from esper_triton.cpu.native import NOTE_SECTION

    text = json.dumps({"cpu": cpu, "features": features, "work": work}).encode()
    escaped = "".join(f"\\{byte:02x}" for byte in text)
    return f'\n@esper.note = constant [{len(text)} x i8] c"{escaped}", section "{NOTE_SECTION}", !exclude !{{}}\n'
