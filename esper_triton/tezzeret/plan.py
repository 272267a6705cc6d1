"""A build before it is made: the request checked, kernels' parameters bound to tensors, and the artifact's id."""

from __future__ import annotations

import ast
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import esper_triton
from esper_triton.contracts.blueprint import EXTENTS, Blueprint, DTypeName, LaunchSpec
from esper_triton.contracts.dims import dim_faults
from esper_triton.contracts.errors import BlueprintError, CompileError, nearest
from esper_triton.contracts.expressions import ExpressionError, evaluate, symbols
from esper_triton.contracts.manifest import (
    LAUNCH_FORMAT,
    LaunchStep,
    ParameterRecord,
    TargetSpec,
    Toolchain,
    build_digest,
    parameter_records,
    sha256,
)
from esper_triton.tezzeret.source import load_source
from esper_triton.tezzeret.targets import triton_target
from esper_triton.tezzeret.writing import Choice, first_choice, write

__all__ = ["PIPELINES", "KernelPlan", "Pipeline", "Plan", "compiler_key", "plan_build", "substitute", "toolchain_of"]

Pipeline = Literal["fast", "standard", "aggressive"]
TRITON_TYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PIPELINES: tuple[Pipeline, ...] = get_args(Pipeline)


@dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """One `@triton.jit` function: its run-time parameters in order, and the constexprs that it takes."""

    function: Any
    name: str
    signature: dict[str, str]  # parameter -> Triton type
    arguments: tuple[str, ...]  # as in LaunchStep, one for each parameter of the signature
    constexprs: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked request. Two equal requests have one `artifact_id`, in every process with the same toolchain."""

    blueprint: Blueprint
    written: Blueprint  # the blueprint itself, or what its graph was written as
    dims: dict[str, int]
    dtype: DTypeName
    target: TargetSpec
    pipeline: Pipeline
    toolchain: Toolchain
    parameters: dict[str, ParameterRecord]
    kernels: dict[str, KernelPlan]
    forward: tuple[LaunchStep, ...]
    backward: tuple[LaunchStep, ...]
    options: dict[str, int]
    artifact_id: str


def plan_build(
    blueprint: Blueprint,
    dims: Mapping[str, int],
    dtype: str,
    target: TargetSpec,
    pipeline: str,
    choice: Choice | None = None,
) -> Plan:
    """Checks a request and works out what would be built: writes the kernels of a graph, runs the source, compiles
    nothing.

    Args:
        dims: an integer for every dim of the blueprint. dtype: a name of `DTypeName`. pipeline: one of `PIPELINES`.
        choice: what the pipeline has decided; `first_choice` without one.

    Raises BlueprintError that lists every fault of the request at once; CompileError where Triton only interprets.
    """
    import triton

    faults = [*_pipeline_faults(pipeline), *dim_faults(blueprint.dims, dims), *_dtype_faults(dtype)]
    _raise(blueprint, faults)  # what follows needs the numbers
    request = blueprint
    choice = choice or first_choice(request, target, pipeline)
    if request.ops:
        blueprint = write(request, dims, dtype, choice.tiles)
    constexprs, parameters = _sizes(blueprint, dims, faults)
    if triton.knobs.runtime.interpret:
        raise CompileError("TRITON_INTERPRET is set, so kernels would be interpreted and not compiled; unset it")
    module = load_source(blueprint)
    kernels: dict[str, KernelPlan] = {}
    forward = _bind(blueprint, module.__dict__, blueprint.forward, dtype, constexprs, kernels, faults, backward=False)
    backward = _bind(blueprint, module.__dict__, blueprint.backward, dtype, constexprs, kernels, faults, backward=True)
    faults += _unwritten(blueprint, forward, backward)
    if not request.ops and not callable(getattr(module, "reference", None)):
        faults.append(f"{blueprint.source} defines no function 'reference' to prove the kernels against")
    steps_of = {
        group: tuple(
            _step(f"{group}[{i}]", launch, kernels, {**dims, **constexprs}, EXTENTS[blueprint.layout], faults)
            for i, launch in specs
        )
        for group, specs in (("forward", enumerate(blueprint.forward)), ("backward", enumerate(blueprint.backward)))
    }
    _raise(blueprint, faults)
    is_gpu = target.backend != "cpu"
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages} if is_gpu else {}
    toolchain = toolchain_of(target)
    build = build_digest(
        {
            "blueprint": request.id,
            "source": sha256(blueprint.source_text.encode()),
            "dims": dict(dims),
            "dtype": dtype,
            "constexprs": constexprs,
            "options": options,
            "pipeline": pipeline,
            "target": target.model_dump(mode="json"),
            "toolchain": toolchain.model_dump(mode="json"),
            "compiler": compiler_key(target),
            "launch_format": LAUNCH_FORMAT,
        }
    )
    return Plan(
        blueprint=request,
        written=blueprint,
        dims=dict(dims),
        dtype=cast(DTypeName, dtype),  # _dtype_faults and _pipeline_faults have looked at these two
        target=target,
        pipeline=cast(Pipeline, pipeline),
        toolchain=toolchain,
        parameters=parameters,
        kernels=kernels,
        forward=steps_of["forward"],
        backward=steps_of["backward"],
        options=options,
        artifact_id=f"{request.id[:12]}-{target.label}-{pipeline}-{build[:12]}",
    )


def substitute(text: str, values: Mapping[str, int]) -> str:
    """The expression with numbers for the symbols of `values`; a plain number where no symbol is left.

    >>> substitute("cdiv(rows, BLOCK) * cdiv(d, 64)", {"BLOCK": 32, "d": 100})
    'cdiv(rows, 32) * cdiv(100, 64)'
    >>> substitute("cdiv(d, 64)", {"d": 100})
    '2'
    """
    if not symbols(text) - set(values):
        return str(evaluate(text, values))

    class Numbers(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.Constant(values[node.id]) if node.id in values else node

    return ast.unparse(Numbers().visit(ast.parse(text, mode="eval")))


def _raise(blueprint: Blueprint, faults: list[str]) -> None:
    if faults:
        raise BlueprintError(f"blueprint {blueprint.name!r} cannot be compiled: " + "; ".join(faults))


def _pipeline_faults(pipeline: str) -> list[str]:
    return [] if pipeline in PIPELINES else [f"unknown pipeline {pipeline!r}{nearest(pipeline, PIPELINES)}"]


def _dtype_faults(dtype: str) -> list[str]:
    names = get_args(DTypeName)
    return [] if dtype in names else [f"unknown dtype {dtype!r}{nearest(dtype, names)}"]


def _sizes(
    blueprint: Blueprint, dims: Mapping[str, int], faults: list[str]
) -> tuple[dict[str, int], dict[str, ParameterRecord]]:
    constexprs: dict[str, int] = {}
    for name, text in blueprint.constexprs.items():
        try:
            constexprs[name] = evaluate(text, dims)
        except ExpressionError as error:
            faults.append(f"constexprs.{name}: {error}")
    try:
        parameters = parameter_records(blueprint.parameters, dict(dims))
    except ExpressionError as error:
        faults.append(f"parameters: {error}")
        return constexprs, {}
    faults += [
        f"parameter {n!r} has shape {list(p.shape)}" for n, p in parameters.items() if min(p.shape, default=1) < 1
    ]
    return constexprs, parameters


def _bindable(blueprint: Blueprint, dtype: str, *, backward: bool) -> dict[str, tuple[str, str]]:
    """What a kernel parameter may be called, with its argument in a LaunchStep and its Triton type."""
    element = {"input": TRITON_TYPE[dtype], "float32": "fp32"}
    inputs = dict.fromkeys(("h", *blueprint.inputs))  # what is blended with is there in any case
    tensors = dict.fromkeys(inputs, (element["input"], 2))
    tensors |= {name: (element["input"], len(p.shape)) for name, p in blueprint.parameters.items()}
    tensors |= {name: (element[t.dtype], len(t.shape)) for name, t in blueprint.saved.items()}
    if backward:
        tensors |= {f"grad_{name}": tensors[name] for name in (*inputs, *blueprint.parameters)}
        tensors["grad_out"] = (element["input"], 2)
        tensors |= {name: (element[t.dtype], len(t.shape)) for name, t in blueprint.scratch.items()}
    else:
        tensors["out"] = (element["input"], 2)
    tensors |= {"alpha": ("fp32", 1), "dropout_seed": ("i64", 1)}
    bindable = {name: (name, "i32") for name in (*EXTENTS[blueprint.layout], "training")}
    for name, (kind, rank) in tensors.items():
        bindable[f"{name}_ptr"] = (name, f"*{kind}")
        if rank == 2:
            bindable[f"{name}_row_stride"] = (f"{name}.row_stride", "i64")
    return bindable


def _bind(
    blueprint: Blueprint,
    namespace: Mapping[str, Any],
    launches: Iterable[LaunchSpec],
    dtype: str,
    constexprs: Mapping[str, int],
    kernels: dict[str, KernelPlan],
    faults: list[str],
    *,
    backward: bool,
) -> set[str]:
    """Adds the kernels of `launches` to `kernels`; returns every argument that one of them takes."""
    from triton.runtime.jit import JITFunction

    available = {name: f for name, f in namespace.items() if isinstance(f, JITFunction)}
    bindable = _bindable(blueprint, dtype, backward=backward)
    bound: set[str] = set()
    for name in dict.fromkeys(launch.kernel for launch in launches):
        if name not in available:
            faults.append(f"{blueprint.source} has no @triton.jit function {name!r}{nearest(name, available)}")
            continue
        signature: dict[str, str] = {}
        arguments: list[str] = []
        taken: dict[str, int] = {}
        for parameter in available[name].params:
            if parameter.is_constexpr:
                if parameter.name in constexprs:
                    taken[parameter.name] = constexprs[parameter.name]
                elif parameter.name not in blueprint.constexprs:
                    faults.append(
                        f"kernel {name!r}: constexpr {parameter.name!r} is not in [constexprs]"
                        f"{nearest(parameter.name, blueprint.constexprs)}"
                    )
            elif parameter.name in bindable:
                argument, kind = bindable[parameter.name]
                signature[parameter.name] = kind
                arguments.append(argument)
            else:
                faults.append(
                    f"kernel {name!r}: parameter {parameter.name!r} is bound to nothing"
                    f"{nearest(parameter.name, bindable)}"
                )
        bound.update(arguments)
        kernels[name] = KernelPlan(
            function=available[name],
            name=name,
            signature=signature,
            arguments=tuple(arguments),
            constexprs=taken,
        )
    return bound


def _unwritten(blueprint: Blueprint, forward: set[str], backward: set[str]) -> list[str]:
    faults = [f"no forward kernel takes {name}_ptr" for name in ("out", "alpha") if name not in forward]
    if blueprint.backward:
        expected = ["alpha", "grad_out", *(f"grad_{name}" for name in (*blueprint.inputs, *blueprint.parameters))]
        faults += [f"no backward kernel takes {name}_ptr" for name in expected if name not in backward]
    return faults


def _step(
    where: str,
    launch: LaunchSpec,
    kernels: Mapping[str, KernelPlan],
    values: Mapping[str, int],
    extents: tuple[str, ...],
    faults: list[str],
) -> LaunchStep:
    grid = list(launch.grid) + ["1"] * (3 - len(launch.grid))
    try:
        grid = [substitute(text, values) for text in grid]
        for text in grid:
            evaluate(text, dict.fromkeys(extents, 1))
    except ExpressionError as error:
        faults.append(f"{where}.grid: {error}")
    kernel = kernels.get(launch.kernel)
    arguments = kernel.arguments if kernel else ()
    return LaunchStep(kernel=launch.kernel, arguments=arguments, grid=(grid[0], grid[1], grid[2]))


def toolchain_of(target: TargetSpec) -> Toolchain:
    """Versions of everything that makes binaries for the target."""
    import torch
    import triton

    if target.backend == "cpu":
        from llvmlite.binding import llvm_version_info

        llvm = ".".join(str(part) for part in llvm_version_info)
    else:
        llvm = "triton-bundled"
    return Toolchain(
        triton=triton.__version__,
        llvm=llvm,
        torch=str(torch.__version__),
        python=platform.python_version(),
        esper_triton=esper_triton.__version__,
    )


def compiler_key(target: TargetSpec) -> dict[str, Any]:
    """What else decides about the code: the backend's own key, and environment variables that Triton obeys."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend

    return {"backend": make_backend(triton_target(target)).hash(), "environment": get_cache_invalidating_env_vars()}
