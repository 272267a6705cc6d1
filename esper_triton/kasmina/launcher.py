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

from esper_triton.contracts.blueprint import EXTENTS, TensorSpec
from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.contracts.expressions import Expression
from esper_triton.contracts.manifest import LAUNCH_FORMAT, KernelStatus, LaunchStep, Manifest
from esper_triton.kasmina.gpu import GPUKernel, check_gpu
from esper_triton.kasmina.views import Extents

__all__ = ["X_DIM", "Bound", "BoundLaunch", "KernelProgram", "check_machine", "check_runs_here", "x_width_of"]

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
_SIZES_REMEMBERED = 64  # batch sizes in use at once are few: the usual one, the last of an epoch, evaluation


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
        way = {
            KernelStatus.REJECTED: f"`python -m esper_triton.urabrask report {manifest.id}` says why it was rejected",
            KernelStatus.ARCHIVED: f"compile blueprint {manifest.blueprint_name!r} again",
        }.get(manifest.status, f"`python -m esper_triton.urabrask validate {manifest.id}` proves it")
        raise ArtifactRefused(
            f"artifact {manifest.id} is {manifest.status.value} and only VALIDATED ones run; {way} (with --urza, where "
            "the store is not the default one)"
        )
    check_machine(manifest, device)


@dataclass(frozen=True)
class _Argument:
    """One run-time argument of one launch: a tensor's address, its row stride, an extent, or whether the layer is in
    training mode."""

    kind: str  # "pointer", "stride32", "stride64", "extent" or "training"
    name: str  # of the tensor or the extent


class _Size:
    """An expression over a call's extents, parsed once: a batch size that was never seen needs no parser in forward."""

    def __init__(self, text: str, dims: Mapping[str, int], extents: Sequence[str]) -> None:
        self._expression, self._dims, self._extents = Expression(text), dims, extents
        self(Extents(1, 1, 1, 1, 1))  # an unknown symbol is an error now, not in forward

    def __call__(self, extents: Extents) -> int:
        return self._expression({**self._dims, **{name: getattr(extents, name) for name in self._extents}})


@dataclass(frozen=True)
class _Launch:
    run: Callable[..., None]
    arguments: tuple[_Argument, ...]
    grid: tuple[_Size, _Size, _Size]


class BoundLaunch(NamedTuple):
    """One launch for fixed extents. `pick` takes its arguments from the values of a call; with the grid before
    them they are what `run` takes."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    pick: Callable[[Sequence[int]], tuple[int, ...]]


@dataclass(frozen=True)
class Bound:
    """The launches of one direction for fixed extents and fixed row strides.

    A call's values are `constants` and then the addresses of the tensors `order`, as integers; of a program that
    `follows_mode`, the last two are the address of the dropout seed and 1 in training mode, else 0. `shapes` and
    `dtypes` say what the caller is to allocate: what forward saves, or what backward writes and its scratch memory.
    """

    launches: tuple[BoundLaunch, ...]
    constants: tuple[int, ...]
    order: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]


@dataclass(frozen=True)
class _Sizes:
    """Everything of a call that depends on its extents alone."""

    forward_grids: tuple[tuple[int, int, int], ...]
    backward_grids: tuple[tuple[int, int, int], ...]
    saved: dict[str, tuple[int, ...]]
    scratch: dict[str, tuple[int, ...]]


class KernelProgram:
    """The loaded kernels of one artifact with their launch plans bound; immutable, shared by every seed that uses it.

    Activations are [rows, width] with unit stride in the last dimension and any row stride, in the artifact's dtype, on
    its device. `forward` and `backward` check what they are given before any launch and raise TypeError or ValueError;
    they read no tensor's contents on the host. With no rows nothing is launched.

    Attributes:
        layout: what the rows are, as in `Blueprint`; with any but `rows` a call gives its extents.
        draws: whether it takes a dropout seed. follows_mode: whether it does, or is told of training mode.
        no_dropout_seed: where it draws, int64 [1] on the device, 0: what it is given in eval mode. Written by nobody.
    """

    def __init__(self, manifest: Manifest, kernels: Mapping[str, _Launchable], device: torch.device = _CPU) -> None:
        self.manifest = manifest
        self.device = device
        self.dtype = TORCH_DTYPE[manifest.dtype]
        self.width = manifest.width
        self.layout = manifest.layout
        self._extents = EXTENTS[manifest.layout]
        self.code_bytes = sum(kernel.code_bytes for kernel in kernels.values())
        self.inputs: tuple[str, ...] = {"x": ("x",), "h": ("h",), "xh": ("x", "h")}[manifest.input]
        # `h` is blended with even where the kernel computes from `x` alone.
        self.tensors_read = ("h", "x") if "x" in self.inputs else ("h",)
        self._widths = {"h": manifest.width, "out": manifest.width, "grad_out": manifest.width}
        self.x_width = x_width_of(manifest) if "x" in self.inputs else None
        if self.x_width is not None:
            self._widths["x"] = self.x_width
        self._dtypes = _tensor_dtypes(manifest)
        self._saved = self._shapes(manifest.saved)
        self._scratch = self._shapes(manifest.scratch)
        self._forward = self._bind(manifest.forward, kernels, backward=False)
        self._backward = self._bind(manifest.backward, kernels, backward=True)
        named = {a.name for launch in self._backward for a in launch.arguments}
        every = [a for launch in (*self._forward, *self._backward) for a in launch.arguments]
        self.draws = any(a.name == "dropout_seed" for a in every)
        self.follows_mode = self.draws or any(a.kind == "training" for a in every)
        self.no_dropout_seed: Tensor | None = None
        if self.draws:
            with torch.inference_mode(False):  # or no backward could keep it
                self.no_dropout_seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.input_grads = tuple(name for name in ("h", "x") if f"grad_{name}" in named)
        unlearnable = sorted(name for name in manifest.parameters if f"grad_{name}" not in named)
        if self._backward and unlearnable:
            raise ArtifactRefused(f"artifact {manifest.id}: backward computes no gradient of {', '.join(unlearnable)}")
        self._sizes: dict[Extents, _Sizes] = {}

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
        self,
        inputs: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        alpha: Tensor,
        out: Tensor,
        *,
        extents: Extents | None = None,
        training: bool = False,
        dropout_seed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Writes `h + alpha * (k - h)` into `out`, [rows, width].

        Args:
            inputs: `h` always (what is blended with), and `x` where the blueprint reads it.
            parameters: by name, contiguous, in the artifact's dtype.
            alpha: one float32 on the device; the kernel reads it there.
            out: may be a view with a row stride of its own; must not overlap an input.
            extents: of the call, for a layout with positions.
            training: whether the layer is in training mode, for a program that `follows_mode`.
            dropout_seed: int64 [1] on the device, for a program that `draws`, in training mode.

        Returns the tensors that backward needs, by name.
        """
        tensors = self._check(inputs, parameters, alpha, out, "out")
        extents = self._check_extents(extents, out.shape[0])
        sizes = self._sizes_for(extents)
        saved = self._allocate(sizes.saved, out)
        if self.draws:
            saved["dropout_seed"] = self._check_dropout_seed(dropout_seed if training else self.no_dropout_seed)
        tensors |= saved
        if extents.rows:
            self._run(self._forward, sizes.forward_grids, tensors, extents, training)
        return saved

    def backward(
        self,
        grad_out: Tensor,
        inputs: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        alpha: Tensor,
        saved: Mapping[str, Tensor],
        *,
        extents: Extents | None = None,
        training: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of a loss with respect to the inputs that the kernels differentiate, [rows, width of the input],
        and to every parameter, given `grad_out`, [rows, width], and what `forward` saved for the same `extents` and
        `training`. Zeros for parameters with no rows.
        """
        tensors = self._check(inputs, parameters, alpha, grad_out, "grad_out")
        rows = grad_out.shape[0]
        extents = self._check_extents(extents, rows)
        sizes = self._sizes_for(extents)
        input_grads = {name: grad_out.new_empty(rows, self._widths[name]) for name in self.input_grads}
        parameter_grads = {
            name: torch.empty_like(parameter, dtype=self._dtypes[f"grad_{name}"])
            for name, parameter in parameters.items()
        }
        if rows:
            tensors |= {f"grad_{name}": grad for name, grad in (input_grads | parameter_grads).items()}
            tensors |= saved
            tensors |= self._allocate(sizes.scratch, grad_out)
            self._run(self._backward, sizes.backward_grids, tensors, extents, training)
        else:
            for grad in parameter_grads.values():
                grad.zero_()
        return input_grads, {name: grad.to(self.dtype) for name, grad in parameter_grads.items()}

    def saved_shapes(self, extents: Extents) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that `forward` saves; the extents may be symbolic."""
        shapes = {name: tuple(size(extents) for size in shape) for name, shape in self._saved.items()}
        saved = {name: (shape, self._dtypes[name]) for name, shape in shapes.items()}
        return saved | ({"dropout_seed": ((1,), torch.int64)} if self.draws else {})

    def bind_forward(self, extents: Extents, strides: Mapping[str, int]) -> Bound:
        """The launches of `forward` with everything settled that does not change from call to call, for a caller that
        has checked its tensors: [rows, width] in the artifact's dtype with unit stride in the last dimension.

        Args:
            extents: of at least 1 row.
            strides: row strides, in elements, of `h`, `out` and, where it is read, `x`.

        Raises ValueError for a tensor that is too long for a kernel that indexes with 32 bits.
        """
        sizes = self._sizes_for(extents)
        order = (*self.tensors_read, "out", "alpha", *self.manifest.parameters, *sizes.saved)
        return self._bound(self._forward, sizes.forward_grids, extents, strides, order, sizes.saved)

    def bind_backward(self, extents: Extents, strides: Mapping[str, int]) -> Bound:
        """As `bind_forward`, of `backward`. `strides`: of `h`, `grad_out` and `x`; gradients are contiguous."""
        sizes = self._sizes_for(extents)
        shapes: dict[str, tuple[int, ...]] = {
            f"grad_{name}": (extents.rows, self._widths[name]) for name in self.input_grads
        }
        shapes |= {f"grad_{name}": record.shape for name, record in self.manifest.parameters.items()}
        shapes |= sizes.scratch
        order = (*self.tensors_read, "grad_out", "alpha", *self.manifest.parameters, *sizes.saved, *shapes)
        strides = {**strides, **{f"grad_{name}": self._widths[name] for name in self.input_grads}}
        return self._bound(self._backward, sizes.backward_grids, extents, strides, order, shapes, sizes.saved)

    def _bound(
        self,
        launches: Sequence[_Launch],
        grids: Sequence[tuple[int, int, int]],
        extents: Extents,
        strides: Mapping[str, int],
        order: tuple[str, ...],
        shapes: Mapping[str, tuple[int, ...]],
        saved: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> Bound:
        contiguous = {name: math.prod(shape[1:]) for name, shape in (*shapes.items(), *saved.items())}
        strides = {**contiguous, **strides}
        if self.follows_mode:
            order = (*order, "dropout_seed", "training")
        every = [argument for launch in launches for argument in launch.arguments]
        asked_for = list(dict.fromkeys(argument.name for argument in every if argument.kind == "extent"))
        constants: list[int] = [getattr(extents, name) for name in asked_for]
        picks = []
        for launch in launches:
            pick: list[int] = []
            for argument in launch.arguments:
                if argument.kind == "extent":
                    pick.append(asked_for.index(argument.name))
                elif argument.kind in ("pointer", "training"):
                    pick.append(-len(order) + order.index(argument.name))
                else:
                    stride = strides[argument.name]
                    _check_reach(argument, extents.rows, stride)
                    pick.append(len(constants))
                    constants.append(stride)
            picks.append(_picking(pick))
        bound = tuple(
            BoundLaunch(launch.run, grid, pick)
            for launch, grid, pick in zip(launches, grids, picks, strict=True)
            if min(grid) > 0
        )
        return Bound(bound, tuple(constants), order, dict(shapes), {name: self._dtypes[name] for name in shapes})

    def _shapes(self, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[_Size, ...]]:
        return {name: tuple(self._size(text) for text in spec.shape) for name, spec in specs.items()}

    def _size(self, text: str) -> _Size:
        return _Size(text, self.manifest.dims, self._extents)

    def _bind(
        self, steps: Sequence[LaunchStep], kernels: Mapping[str, _Launchable], *, backward: bool
    ) -> list[_Launch]:
        manifest = self.manifest
        known = {"h", "x", "out", "alpha", "dropout_seed", *manifest.parameters, *manifest.saved}
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
            x, y, z = (self._size(text) for text in step.grid)
            launches.append(_Launch(kernels[step.kernel].launcher(), arguments, (x, y, z)))
        return launches

    def _argument(self, where: str, text: str, kind: str, known: set[str]) -> _Argument:
        tensor, _, suffix = text.partition(".")
        if text in self._extents or text == "training":
            if kind not in ("i32", "i64"):
                raise ArtifactRefused(f"{where}: {text} is {kind} in the signature, an integer is expected")
            return _Argument("training" if text == "training" else "extent", text)
        if tensor not in known or suffix not in ("", "row_stride"):
            raise ArtifactRefused(
                f"{where}: argument {text!r} is not a tensor of this artifact, its row_stride, training, or an extent "
                f"of layout {self.layout!r} ({', '.join(self._extents)})"
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

    def _check_extents(self, extents: Extents | None, rows: int) -> Extents:
        if self.layout == "rows":
            return Extents.of_rows(rows)
        if extents is None or extents.rows != rows or not self.takes(extents):
            raise ValueError(
                f"artifact {self.manifest.id} works on a batch of items of layout {self.layout!r}, found {rows} rows "
                f"and {extents}"
            )
        return extents

    def takes(self, extents: Extents) -> bool:
        """Whether the positions of such a call are of this program's layout."""
        return self.layout != "image" or extents.image_height > 0

    def _check_dropout_seed(self, seed: Tensor | None) -> Tensor:
        if seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != self.device:
            found = "none" if seed is None else f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
            raise ValueError(
                f"dropout_seed is {found}, artifact {self.manifest.id} takes one int64 on {self.device} in training"
            )
        return seed

    def _sizes_for(self, extents: Extents) -> _Sizes:
        sizes = self._sizes.get(extents)
        if sizes is None:
            if extents.rows >= _INT32_LIMIT:  # a launcher would take the low 32 bits
                raise ValueError(f"{extents.rows} rows are more than a kernel can be told of, 2**31 - 1")

            def grids(launches: Sequence[_Launch]) -> tuple[tuple[int, int, int], ...]:
                return tuple((x(extents), y(extents), z(extents)) for x, y, z in (launch.grid for launch in launches))

            sizes = _Sizes(
                forward_grids=grids(self._forward),
                backward_grids=grids(self._backward),
                saved={name: tuple(size(extents) for size in shape) for name, shape in self._saved.items()},
                scratch={name: tuple(size(extents) for size in shape) for name, shape in self._scratch.items()},
            )
            if len(self._sizes) >= _SIZES_REMEMBERED:
                self._sizes.clear()
            self._sizes[extents] = sizes
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
        launches: Sequence[_Launch],
        grids: Sequence[tuple[int, int, int]],
        tensors: Mapping[str, Tensor],
        extents: Extents,
        training: bool,
    ) -> None:
        for launch, grid in zip(launches, grids, strict=True):
            values: list[Tensor | int] = []
            for argument in launch.arguments:
                if argument.kind == "pointer":
                    values.append(tensors[argument.name])
                elif argument.kind == "extent":
                    values.append(getattr(extents, argument.name))
                elif argument.kind == "training":
                    values.append(int(training))
                else:
                    stride = tensors[argument.name].stride(0)
                    _check_reach(argument, extents.rows, stride)
                    values.append(stride)
            if min(grid) > 0:
                launch.run(*grid, *values)


def _check_reach(argument: _Argument, rows: int, stride: int) -> None:
    """A kernel that indexes with 32 bits would wrap around and write outside of the tensor."""
    if argument.kind == "stride32" and rows * stride >= _INT32_LIMIT:
        raise ValueError(f"{argument.name} spans {rows} rows of stride {stride}, more than 2**31 elements")


def _picking(indices: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple(values[index] for index in indices)


def x_width_of(manifest: Manifest) -> int:
    """Width of the input that it reads: the dim `d_in`, or as wide as the output where it has none."""
    return manifest.dims.get(X_DIM, manifest.width)


def _tensor_dtypes(manifest: Manifest) -> dict[str, torch.dtype]:
    """Dtypes that the executor fixes; gradients of parameters have whatever their kernel writes."""
    dtype = TORCH_DTYPE[manifest.dtype]
    dtypes = dict.fromkeys(["h", "x", "out", "grad_out", "grad_h", "grad_x", *manifest.parameters], dtype)
    dtypes |= {"alpha": torch.float32, "dropout_seed": torch.int64}
    for name, spec in (manifest.saved | manifest.scratch).items():
        dtypes[name] = dtype if spec.dtype == "input" else torch.float32
    return dtypes
