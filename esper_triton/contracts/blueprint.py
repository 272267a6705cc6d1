"""Blueprint: the design of a seed's kernel, with symbolic dims, before anything is compiled."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from esper_triton.contracts.errors import BlueprintError, nearest
from esper_triton.contracts.expressions import ExpressionError, symbols

__all__ = ["Blueprint", "DTypeName", "Dim", "LaunchSpec", "LayoutName", "ParameterSpec", "TensorSpec"]

SCHEMA_VERSION = "1.0"
DTypeName = Literal["float32", "float16", "bfloat16"]
LayoutName = Literal["rows", "sequence", "image"]
Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Grid = Annotated[tuple[str, ...], Field(min_length=1, max_length=3)]

# Tensors that the executor brings; every other tensor that a kernel names is a parameter, saved or scratch.
INPUTS = {"x": ("x",), "h": ("h",), "xh": ("x", "h")}
# Sizes of a call that kernels, grids and shapes may name, by layout.
EXTENTS: dict[LayoutName, tuple[str, ...]] = {
    "rows": ("rows",),
    "sequence": ("rows", "batch", "length"),
    "image": ("rows", "batch", "length", "image_height", "image_width"),
}
RESERVED = frozenset({"h", "x", "out", "alpha", "training", "dropout_seed", *EXTENTS["image"]})


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dim(_Value):
    """Limits of one symbolic dimension, both included."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=65536, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Dim:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class ParameterSpec(_Value):
    """A trainable tensor of the seed. `shape` holds expressions over dims; `kaiming_uniform` takes fan-in from the last
    dimension, as `nn.Linear` does (bound sqrt(1 / fan_in), He et al. 2015 with a = sqrt(5))."""

    shape: tuple[str, ...]
    init: Literal["zeros", "ones", "kaiming_uniform"] = "zeros"


class TensorSpec(_Value):
    """An intermediate tensor. `shape` holds expressions over dims and the layout's extents; dtype `input` is the
    layer's."""

    shape: tuple[str, ...]
    dtype: Literal["input", "float32"] = "float32"


class LaunchSpec(_Value):
    """One launch: a `@triton.jit` function of the source and its grid, expressions over dims, constexprs and the
    layout's extents."""

    kernel: str
    grid: Grid


class Blueprint(_Value):
    """A kernel design over `x` (the layer's input), `h` (the host's output span) or both.

    In this first version a blueprint names a hand-written Triton source. Kernels take their arguments by name:
    `<tensor>_ptr` is the tensor's address, `<tensor>_row_stride` the element stride of its first dimension, `rows` the
    number of rows (int32), and `tl.constexpr` parameters are the keys of `constexprs`. Tensors are `h` and `x` as
    `input` says, `out`, `alpha` (one float32, read from device memory), the parameters, `saved`; and in backward also
    `grad_out`, `grad_h`, `grad_x`, `grad_<parameter>` and `scratch`. All matrices are row-major with unit stride in the
    last dimension. A blueprint that reads `x` has a dim `d_in`, the width of `x`.

    `layout` says what the rows are, and with it which further int32 a kernel may take by name: `rows` are of no order;
    in a `sequence` they are `batch` items of `length` positions, one item after the other; in an `image` each item's
    `length` positions are `image_height` lines of `image_width`. A kernel may also take `training`, int32, 1 when the
    layer is in training mode, and `dropout_seed_ptr`, the address of one int64 that is drawn for each forward in
    training mode and is the same in its backward (0 in eval mode).

    The forward writes `out = h + alpha * (k - h)`, the blend of law 2. The source also defines `reference(...)` in
    plain torch, which returns `k` for inputs and parameters given by keyword; the kernels are proven against it. Inputs
    and k are [rows, width], in a `sequence` [batch, length, width], and in an `image` [batch, image_height,
    image_width, width]. Of a kernel that behaves otherwise in training mode, it is what holds in eval mode; if it has
    an argument `rand`, it is called for training mode too, with what `tl.rand` gives for the call's dropout seed and
    int64 offsets.

    `affine` says that k is an affine function of the inputs, whatever the parameters: such a seed may be merged into
    its host's weights when it has become permanent. The proof sees to it that the reference is one.
    """

    schema_version: str = SCHEMA_VERSION
    name: Identifier
    description: str
    input: Literal["x", "h", "xh"]
    layout: LayoutName = "rows"
    affine: bool = False
    feature_dim: str = Field(description="symbol of the width of the span: the last dimension of h and out")
    source: str = Field(description="file name of the Triton source, relative to the blueprint")
    dims: dict[Identifier, Dim]
    parameters: dict[Identifier, ParameterSpec] = Field(default_factory=dict)
    saved: dict[Identifier, TensorSpec] = Field(default_factory=dict)
    scratch: dict[Identifier, TensorSpec] = Field(default_factory=dict)
    constexprs: dict[str, str] = Field(default_factory=dict)
    forward: Annotated[tuple[LaunchSpec, ...], Field(min_length=1)]
    backward: tuple[LaunchSpec, ...] = ()
    source_text: str = Field(default="", description="the source itself, filled in by `load`")
    path: Path | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="after")
    def _check(self) -> Blueprint:
        faults: list[str] = []
        if self.schema_version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            major = SCHEMA_VERSION.split(".")[0]
            faults.append(f"schema_version {self.schema_version!r}: this release reads {major}.x")
        if self.feature_dim not in self.dims:
            faults.append(f"feature_dim {self.feature_dim!r} is not a dim{nearest(self.feature_dim, self.dims)}")

        def check(where: str, text: str, known: set[str]) -> None:
            try:
                for name in sorted(symbols(text) - known):
                    faults.append(f"{where}: unknown symbol {name!r} in {text!r}{nearest(name, known)}")
            except ExpressionError as error:
                faults.append(f"{where}: {error}")

        dims, extents = set(self.dims), set(EXTENTS[self.layout])
        for name, parameter in self.parameters.items():
            for text in parameter.shape:
                check(f"parameters.{name}.shape", text, dims)
        for group, tensors in (("saved", self.saved), ("scratch", self.scratch)):
            for name, tensor in tensors.items():
                for text in tensor.shape:
                    check(f"{group}.{name}.shape", text, dims | extents)
        for name, text in self.constexprs.items():
            check(f"constexprs.{name}", text, dims)
        for group, launches in (("forward", self.forward), ("backward", self.backward)):
            for index, launch in enumerate(launches):
                for text in launch.grid:
                    check(f"{group}[{index}].grid", text, dims | extents | set(self.constexprs))
        faults += [f"dim {name!r} is the name of an extent" for name in sorted(dims & set(EXTENTS["image"]))]
        names = [*self.parameters, *self.saved, *self.scratch]
        for name in sorted(set(names) & RESERVED | {n for n in names if names.count(n) > 1 or n.startswith("grad_")}):
            faults.append(f"tensor name {name!r} is taken twice or reserved")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the activations it reads, of `x` and `h`."""
        return INPUTS[self.input]

    @property
    def id(self) -> str:
        """SHA-256 (hex) of the canonical form: everything but names and prose, keys sorted."""
        body = self.model_dump(mode="json", exclude={"name", "description", "source", "schema_version"})
        return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Blueprint:
        """Reads a TOML blueprint and the Triton source that it names. Raises BlueprintError with every fault found."""
        path = Path(path)
        try:
            body = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            siblings = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
            raise BlueprintError(f"blueprint {path}: no such file{nearest(path.name, siblings)}") from error
        except OSError as error:
            raise BlueprintError(f"blueprint {path}: cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BlueprintError(f"blueprint {path}: not valid TOML: {error}") from error
        for filled in ("source_text", "path"):
            if filled in body:
                raise BlueprintError(f"blueprint {path}: {filled!r} is filled in by the loader and cannot be given")
        source = path.parent / str(body.get("source", ""))
        if "source" in body:
            if source.name != body["source"]:
                raise BlueprintError(f"blueprint {path}: source {body['source']!r} must be a file beside the blueprint")
            try:
                body["source_text"] = source.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not a possible file name
                reason = getattr(error, "strerror", None) or error
                raise BlueprintError(f"blueprint {path}: source {str(source)!r} cannot be read ({reason})") from error
        try:
            return cls.model_validate(body | {"path": path.resolve()})
        except ValidationError as error:
            raise BlueprintError(f"blueprint {path}: " + "; ".join(_faults(error))) from error


def _faults(error: ValidationError) -> list[str]:
    known = set(Blueprint.model_fields) - {"source_text", "path"}
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(where, known) if len(item["loc"]) == 1 else ""
            lines.append(f"unknown key {where!r}{hint}")
        elif item["type"] == "missing":
            lines.append(f"missing key {where!r}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {message}" if where else message)
    return lines
