"""From a stored artifact to something that runs: what may run here (law 4), and the launches of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from esper_triton.contracts.blueprint import TensorSpec
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.expressions import Expression
from esper_triton.contracts.manifest import LAUNCH_FORMAT, KernelStatus, LaunchStep, Manifest
from esper_triton.kasmina.gpu import GPUKernel, check_gpu

__all__ = ["X_DIM", "Bound", "BoundLaunch", "KernelProgram", "check_machine", "check_runs_here"]

X_DIM = "d_in"
"""Symbol of the width of `x`, in blueprints that read it."""

TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_POINTEE = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*i8": torch.int8,
    "*i32": torch.int32,
    "*i64": torch.int64,
}
_INT32_LIMIT = 2**31
_CPU = torch.device("cpu")
_BINARY_KIND = {"cpu": "o", "cuda": "cubin", "hip": "hsaco"}
_ROWS_REMEMBERED = 64  # batch sizes in use at once are few: the usual one, the last of an epoch, evaluation


class _Launchable(Protocol):
    @property
    def code_bytes(self) -> int: ...

    def launcher(self) -> Callable[..., None]: ...  # (x, y, z, *args), pointers as tensors or addresses


def check_machine(manifest: Manifest, device: torch.device) -> torch.device:
    """The machine's side of law 4, whatever the status: the artifact is for this CPU, or for the GPU `device`.

    Returns where it would run, a GPU with its index. Raises ArtifactRefused with the way out.
    """
    if manifest.launch_format != LAUNCH_FORMAT:
        raise ArtifactRefused(
            f"artifact {manifest.id} has launch format {manifest.launch_format}, this release reads {LAUNCH_FORMAT}; "
            f"compile blueprint {manifest.blueprint_name!r} again with this release"
        )
    target = manifest.target
    if target.backend != "cpu":
        return check_gpu(manifest, device)
    if device.type != "cpu":
        raise ArtifactRefused(
            f"artifact {manifest.id} is for cpu and cannot run on {device}; "
            f"compile blueprint {manifest.blueprint_name!r} for it"
        )
    from esper_triton.cpu.host import cpu_features, cpu_name  # here: llvmlite is loaded with the first cpu artifact

    missing = sorted(set(target.features) - set(cpu_features()))
    if missing:
        raise ArtifactRefused(
            f"artifact {manifest.id} was compiled for {target.arch} and uses CPU features that this machine "
            f"({cpu_name()}) does not have: {', '.join(missing)}; "
            f"compile blueprint {manifest.blueprint_name!r} on this machine"
        )
    return _CPU


def check_runs_here(manifest: Manifest, device: torch.device) -> None:
    """Law 4 but for the bytes, which Urza has verified: proven, of a known format, and for this CPU or GPU.

    Raises ArtifactRefused with the way out.
    """
    if manifest.status is not KernelStatus.VALIDATED:
        raise ArtifactRefused(
            f"artifact {manifest.id} is {manifest.status.value} and only VALIDATED ones run; "
            "compile it again, or see its report for why it was not validated"
        )
    check_machine(manifest, device)


@dataclass(frozen=True)
class _Argument:
    """One run-time argument of one launch. `kind` is the tensor's address, its row stride, or the number of rows."""

    kind: str  # "pointer", "stride32", "stride64" or "rows"
    tensor: str


class _Extent:
    """An expression over `rows`, parsed once: a batch size that was never seen needs no parser in forward."""

    def __init__(self, text: str, dims: Mapping[str, int]) -> None:
        self._expression, self._dims = Expression(text), dims
        self(1)  # an unknown symbol is an error now, not in forward

    def __call__(self, rows: int) -> int:
        return self._expression({**self._dims, "rows": rows})


@dataclass(frozen=True)
class _Launch:
    run: Callable[..., None]
    arguments: tuple[_Argument, ...]
    grid: tuple[_Extent, _Extent, _Extent]


class BoundLaunch(NamedTuple):
    """One launch for a fixed number of rows. `pick` takes its arguments from the values of a call; with the grid before
    them they are what `run` takes."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    pick: Callable[[Sequence[int]], tuple[int, ...]]


@dataclass(frozen=True)
class Bound:
    """The launches of one direction for a fixed number of rows and fixed row strides.

    A call's values are `constants` and then the addresses of the tensors `order`, as integers. `shapes` and `dtypes`
    say what the caller is to allocate: what forward saves, or what backward writes and its scratch memory.
    """

    launches: tuple[BoundLaunch, ...]
    constants: tuple[int, ...]
    order: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]


@dataclass(frozen=True)
class _Sizes:
    """Everything of a call that depends on the number of rows alone."""

    forward_grids: tuple[tuple[int, int, int], ...]
    backward_grids: tuple[tuple[int, int, int], ...]
    saved: dict[str, tuple[int, ...]]
    scratch: dict[str, tuple[int, ...]]


class KernelProgram:
    """The loaded kernels of one artifact with their launch plans bound; immutable, shared by every seed that uses it.

    Activations are [rows, width] with unit stride in the last dimension and any row stride, in the artifact's dtype, on
    its device. `forward` and `backward` check what they are given before any launch and raise TypeError or ValueError;
    they read no tensor's contents on the host. With no rows nothing is launched.
    """

    def __init__(self, manifest: Manifest, kernels: Mapping[str, _Launchable], device: torch.device = _CPU) -> None:
        self.manifest = manifest
        self.device = device
        self.dtype = TORCH_DTYPE[manifest.dtype]
        self.width = manifest.width
        self.code_bytes = sum(kernel.code_bytes for kernel in kernels.values())
        self.inputs: tuple[str, ...] = {"x": ("x",), "h": ("h",), "xh": ("x", "h")}[manifest.input]
        # `h` is blended with even where the kernel computes from `x` alone.
        self.tensors_read = ("h", "x") if "x" in self.inputs else ("h",)
        self._widths = {"h": manifest.width, "out": manifest.width, "grad_out": manifest.width}
        self.x_width = _x_width(manifest) if "x" in self.inputs else None
        if self.x_width is not None:
            self._widths["x"] = self.x_width
        self._dtypes = _tensor_dtypes(manifest)
        self._saved = self._shapes(manifest.saved)
        self._scratch = self._shapes(manifest.scratch)
        self._forward = self._bind(manifest.forward, kernels, backward=False)
        self._backward = self._bind(manifest.backward, kernels, backward=True)
        named = {a.tensor for launch in self._backward for a in launch.arguments}
        self.input_grads = tuple(name for name in ("h", "x") if f"grad_{name}" in named)
        unlearnable = sorted(name for name in manifest.parameters if f"grad_{name}" not in named)
        if self._backward and unlearnable:
            raise ArtifactRefused(f"artifact {manifest.id}: backward computes no gradient of {', '.join(unlearnable)}")
        self._sizes: dict[int, _Sizes] = {}

    @classmethod
    def load(cls, manifest: Manifest, blobs: Mapping[str, bytes], device: torch.device = _CPU) -> KernelProgram:
        """Loads every kernel of an artifact whose blobs (by SHA-256) have been verified.

        Whether the artifact is proven is not asked here, so that it can be proven; `check_runs_here` asks it. Raises
        ArtifactRefused where it cannot run on `device` of this machine or its plan is not consistent with its kernels.
        """
        device = check_machine(manifest, device)
        target = manifest.target
        loaded: dict[str, _Launchable] = {}
        for name, record in manifest.kernels.items():
            binary, expected = blobs[record.binary], _BINARY_KIND[target.backend]
            if record.binary_kind != expected:
                raise ArtifactRefused(
                    f"artifact {manifest.id}: kernel {name!r} is a {record.binary_kind} and its target is "
                    f"{target.label}, which takes {expected}"
                )
            if device.type == "cuda":
                loaded[name] = GPUKernel.load(binary, record, target, device)
            else:
                from esper_triton.cpu.native import NativeKernel

                loaded[name] = NativeKernel.load(binary, symbol=record.symbol, signature=record.signature)
        return cls(manifest, loaded, device)

    @property
    def has_backward(self) -> bool:
        """Whether gradients can flow through it."""
        return bool(self._backward)

    def forward(
        self, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor], alpha: Tensor, out: Tensor
    ) -> dict[str, Tensor]:
        """Writes `h + alpha * (k - h)` into `out`, [rows, width].

        Args:
            inputs: `h` always (what is blended with), and `x` where the blueprint reads it.
            parameters: by name, contiguous, in the artifact's dtype.
            alpha: one float32 on the device; the kernel reads it there.
            out: may be a view with a row stride of its own; must not overlap an input.

        Returns the tensors that backward needs, by name.
        """
        tensors = self._check(inputs, parameters, alpha, out, "out")
        rows = out.shape[0]
        sizes = self._sizes_for(rows)
        saved = self._allocate(sizes.saved, out)
        tensors |= saved
        if rows:
            self._run(self._forward, sizes.forward_grids, tensors, rows)
        return saved

    def backward(
        self,
        grad_out: Tensor,
        inputs: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        alpha: Tensor,
        saved: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of a loss with respect to the inputs that the kernels differentiate, [rows, width of the input],
        and to every parameter, given `grad_out`, [rows, width], and what `forward` saved. Zeros for parameters with no
        rows.
        """
        tensors = self._check(inputs, parameters, alpha, grad_out, "grad_out")
        rows = grad_out.shape[0]
        sizes = self._sizes_for(rows)
        input_grads = {name: grad_out.new_empty(rows, self._widths[name]) for name in self.input_grads}
        parameter_grads = {
            name: torch.empty_like(parameter, dtype=self._dtypes[f"grad_{name}"])
            for name, parameter in parameters.items()
        }
        if rows:
            tensors |= {f"grad_{name}": grad for name, grad in (input_grads | parameter_grads).items()}
            tensors |= saved
            tensors |= self._allocate(sizes.scratch, grad_out)
            self._run(self._backward, sizes.backward_grids, tensors, rows)
        else:
            for grad in parameter_grads.values():
                grad.zero_()
        return input_grads, {name: grad.to(self.dtype) for name, grad in parameter_grads.items()}

    def saved_shapes(self, rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that `forward` saves; `rows` may be symbolic."""
        return {
            name: (tuple(extent(rows) for extent in shape), self._dtypes[name]) for name, shape in self._saved.items()
        }

    def bind_forward(self, rows: int, strides: Mapping[str, int]) -> Bound:
        """The launches of `forward` with everything settled that does not change from call to call, for a caller that
        has checked its tensors: [rows, width] in the artifact's dtype with unit stride in the last dimension.

        Args:
            rows: at least 1.
            strides: row strides, in elements, of `h`, `out` and, where it is read, `x`.

        Raises ValueError for a tensor that is too long for a kernel that indexes with 32 bits.
        """
        sizes = self._sizes_for(rows)
        order = (*self.tensors_read, "out", "alpha", *self.manifest.parameters, *sizes.saved)
        return self._bound(self._forward, sizes.forward_grids, rows, strides, order, sizes.saved)

    def bind_backward(self, rows: int, strides: Mapping[str, int]) -> Bound:
        """As `bind_forward`, of `backward`. `strides`: of `h`, `grad_out` and `x`; gradients are contiguous."""
        sizes = self._sizes_for(rows)
        shapes: dict[str, tuple[int, ...]] = {f"grad_{name}": (rows, self._widths[name]) for name in self.input_grads}
        shapes |= {f"grad_{name}": record.shape for name, record in self.manifest.parameters.items()}
        shapes |= sizes.scratch
        order = (*self.tensors_read, "grad_out", "alpha", *self.manifest.parameters, *sizes.saved, *shapes)
        strides = {**strides, **{f"grad_{name}": self._widths[name] for name in self.input_grads}}
        return self._bound(self._backward, sizes.backward_grids, rows, strides, order, shapes, sizes.saved)

    def _bound(
        self,
        launches: Sequence[_Launch],
        grids: Sequence[tuple[int, int, int]],
        rows: int,
        strides: Mapping[str, int],
        order: tuple[str, ...],
        shapes: Mapping[str, tuple[int, ...]],
        saved: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> Bound:
        contiguous = {name: math.prod(shape[1:]) for name, shape in (*shapes.items(), *saved.items())}
        strides = {**contiguous, **strides}
        constants = [rows]
        picks = []
        for launch in launches:
            pick: list[int] = []
            for argument in launch.arguments:
                if argument.kind == "rows":
                    pick.append(0)
                elif argument.kind == "pointer":
                    pick.append(-len(order) + order.index(argument.tensor))
                else:
                    stride = strides[argument.tensor]
                    _check_reach(argument, rows, stride)
                    pick.append(len(constants))
                    constants.append(stride)
            picks.append(_picking(pick))
        bound = tuple(
            BoundLaunch(launch.run, grid, pick)
            for launch, grid, pick in zip(launches, grids, picks, strict=True)
            if min(grid) > 0
        )
        return Bound(bound, tuple(constants), order, dict(shapes), {name: self._dtypes[name] for name in shapes})

    def _shapes(self, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[_Extent, ...]]:
        dims = self.manifest.dims
        return {name: tuple(_Extent(text, dims) for text in spec.shape) for name, spec in specs.items()}

    def _bind(
        self, steps: Sequence[LaunchStep], kernels: Mapping[str, _Launchable], *, backward: bool
    ) -> list[_Launch]:
        manifest = self.manifest
        known = {"h", "x", "out", "alpha", *manifest.parameters, *manifest.saved}
        if backward:
            known |= {"grad_out", "grad_h", "grad_x", *manifest.scratch, *(f"grad_{p}" for p in manifest.parameters)}
            known -= {"out"}
        if "x" not in self.inputs:
            known -= {"x", "grad_x"}
        launches = []
        for step in steps:
            where = f"artifact {manifest.id}: launch of {step.kernel!r}"
            if step.kernel not in kernels:
                raise ArtifactRefused(f"{where}: it has no such kernel")
            record = manifest.kernels[step.kernel]
            if len(record.signature) != len(step.arguments):
                raise ArtifactRefused(
                    f"{where} binds {len(step.arguments)} arguments, the kernel takes {len(record.signature)}"
                )
            arguments = tuple(
                self._argument(where, text, kind, known)
                for text, kind in zip(step.arguments, record.signature, strict=True)
            )
            x, y, z = (_Extent(text, manifest.dims) for text in step.grid)
            launches.append(_Launch(kernels[step.kernel].launcher(), arguments, (x, y, z)))
        return launches

    def _argument(self, where: str, text: str, kind: str, known: set[str]) -> _Argument:
        tensor, _, suffix = text.partition(".")
        if text == "rows":
            if kind not in ("i32", "i64"):
                raise ArtifactRefused(f"{where}: rows is {kind} in the signature, an integer is expected")
            return _Argument("rows", "")
        if tensor not in known or suffix not in ("", "row_stride"):
            raise ArtifactRefused(
                f"{where}: argument {text!r} is not a tensor of this artifact, its row_stride or rows"
            )
        if suffix:
            if kind not in ("i32", "i64"):
                raise ArtifactRefused(f"{where}: {text} is {kind} in the signature, an integer is expected")
            return _Argument("stride64" if kind == "i64" else "stride32", tensor)
        if kind not in _POINTEE:
            raise ArtifactRefused(f"{where}: {text} is {kind} in the signature, a pointer is expected")
        expected = self._dtypes.setdefault(tensor, _POINTEE[kind])  # of a gradient, the kernel decides
        if _POINTEE[kind] != expected:
            raise ArtifactRefused(f"{where}: {text} is {kind} in the signature, {expected} is expected")
        return _Argument("pointer", tensor)

    def _sizes_for(self, rows: int) -> _Sizes:
        sizes = self._sizes.get(rows)
        if sizes is None:
            if rows >= _INT32_LIMIT:  # a launcher would take the low 32 bits
                raise ValueError(f"{rows} rows are more than a kernel can be told of, 2**31 - 1")

            def grids(launches: Sequence[_Launch]) -> tuple[tuple[int, int, int], ...]:
                return tuple((x(rows), y(rows), z(rows)) for x, y, z in (launch.grid for launch in launches))

            sizes = _Sizes(
                forward_grids=grids(self._forward),
                backward_grids=grids(self._backward),
                saved={name: tuple(extent(rows) for extent in shape) for name, shape in self._saved.items()},
                scratch={name: tuple(extent(rows) for extent in shape) for name, shape in self._scratch.items()},
            )
            if len(self._sizes) >= _ROWS_REMEMBERED:
                self._sizes.clear()
            self._sizes[rows] = sizes
        return sizes

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> dict[str, Tensor]:
        return {name: like.new_empty(shape, dtype=self._dtypes[name]) for name, shape in shapes.items()}

    def _check(
        self,
        inputs: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        alpha: Tensor,
        last: Tensor,
        last_name: str,
    ) -> dict[str, Tensor]:
        rows = last.shape[0] if last.dim() == 2 else -1
        tensors: dict[str, Tensor] = {last_name: last, "h": inputs["h"]}
        if "x" in self.inputs:
            tensors["x"] = inputs["x"]
        for name, tensor in tensors.items():
            width = self._widths[name]
            if tensor.shape != (rows, width) or tensor.dtype != self.dtype or tensor.device != self.device:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, artifact {self.manifest.id} "
                    f"takes [rows, {width}] {self.dtype} on {self.device}"
                )
            if width > 1 and tensor.stride(1) != 1:
                raise ValueError(f"{name} has stride {tensor.stride(1)} in its last dimension, 1 is expected")
        if alpha.dtype != torch.float32 or alpha.numel() != 1 or alpha.device != self.device:
            raise ValueError(f"alpha is {tuple(alpha.shape)} {alpha.dtype} on {alpha.device}, one float32 is expected")
        tensors["alpha"] = alpha
        for name, record in self.manifest.parameters.items():
            parameter = parameters[name]
            if (
                parameter.shape != record.shape
                or parameter.dtype != self.dtype
                or parameter.device != self.device
                or not parameter.is_contiguous()
            ):
                raise ValueError(
                    f"parameter {name} is {tuple(parameter.shape)} {parameter.dtype} on {parameter.device}, contiguous "
                    f"{record.shape} {self.dtype} on {self.device} is expected"
                )
            tensors[name] = parameter
        return tensors

    @staticmethod
    def _run(
        launches: Sequence[_Launch], grids: Sequence[tuple[int, int, int]], tensors: Mapping[str, Tensor], rows: int
    ) -> None:
        for launch, grid in zip(launches, grids, strict=True):
            values: list[Tensor | int] = []
            for argument in launch.arguments:
                if argument.kind == "pointer":
                    values.append(tensors[argument.tensor])
                elif argument.kind == "rows":
                    values.append(rows)
                else:
                    stride = tensors[argument.tensor].stride(0)
                    _check_reach(argument, rows, stride)
                    values.append(stride)
            if min(grid) > 0:
                launch.run(*grid, *values)


def _check_reach(argument: _Argument, rows: int, stride: int) -> None:
    """A kernel that indexes with 32 bits would wrap around and write outside of the tensor."""
    if argument.kind == "stride32" and rows * stride >= _INT32_LIMIT:
        raise ValueError(f"{argument.tensor} spans {rows} rows of stride {stride}, more than 2**31 elements")


def _picking(indices: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple(values[index] for index in indices)


def _x_width(manifest: Manifest) -> int:
    if X_DIM not in manifest.dims:
        raise ArtifactRefused(
            f"artifact {manifest.id} reads x and has no dim {X_DIM!r} for its width; dims: {', '.join(manifest.dims)}"
        )
    return manifest.dims[X_DIM]


def _tensor_dtypes(manifest: Manifest) -> dict[str, torch.dtype]:
    """Dtypes that the executor fixes; gradients of parameters have whatever their kernel writes."""
    dtype = TORCH_DTYPE[manifest.dtype]
    dtypes = dict.fromkeys(["h", "x", "out", "grad_out", "grad_h", "grad_x", *manifest.parameters], dtype)
    dtypes["alpha"] = torch.float32
    for name, spec in (manifest.saved | manifest.scratch).items():
        dtypes[name] = dtype if spec.dtype == "input" else torch.float32
    return dtypes
