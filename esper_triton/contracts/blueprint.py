"""Blueprint: the design of a seed's kernel, with symbolic dims, before anything is compiled."""

from __future__ import annotations

import hashlib
import importlib
import json
import keyword
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from esper_triton.contracts.canonical import canonical_extent, canonical_ops
from esper_triton.contracts.dims import Dim
from esper_triton.contracts.errors import BlueprintError, nearest
from esper_triton.contracts.expressions import ExpressionError, symbols
from esper_triton.contracts.files import read_body, write_toml
from esper_triton.contracts.graph import RESERVED, Layout, Op, check, is_affine, layout_of
from esper_triton.contracts.graph_text import read_graph, write_graph
from esper_triton.contracts.initial import init_symbols, normalize_init

if TYPE_CHECKING:
    from esper_triton.contracts.building import GraphBuilder

__all__ = ["Blueprint", "DTypeName", "Dim", "LaunchSpec", "Layout", "Op", "ParameterSpec", "TensorSpec"]

SCHEMA_VERSION = "1.1"
TEXT_LIMIT_BYTES = 1 << 20  # of a blueprint's canonical text; far above any honest design
DTypeName = Literal["float32", "float16", "bfloat16"]
Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Grid = Annotated[tuple[str, ...], Field(min_length=1, max_length=3)]

# Tensors that the executor brings; every other tensor that a kernel names is a parameter, saved or scratch.
INPUTS = {"x": ("x",), "h": ("h",), "xh": ("x", "h")}
# What a blueprint says of itself, and what does not change what it computes.
_PROSE = {"name", "description", "introduced_by", "equivalent_to", "source", "schema_version"}
# Of hand-written sources and of graphs alone.
_SOURCE_KEYS = ("source", "saved", "scratch", "constexprs", "forward", "backward")
_FILLED_IN = ("source_text", "path")
# Sizes of a call that kernels, grids and shapes may name, by layout.
EXTENTS: dict[Layout, tuple[str, ...]] = {
    "rows": ("rows",),
    "sequence": ("rows", "batch", "length"),
    "image": ("rows", "batch", "length", "image_height", "image_width"),
}


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ParameterSpec(_Value):
    """A trainable tensor of the seed. `shape` holds expressions over dims; `init` is `zeros`, `ones`, `constant:VALUE`,
    `normal:STD`, `uniform:BOUND`, `kaiming_uniform`, `kaiming_uniform:FAN_IN` or `xavier_uniform`, as
    `contracts.initial.Init` says."""

    shape: tuple[str, ...]
    init: Annotated[str, AfterValidator(normalize_init)] = "zeros"


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
    """A kernel design over `x` (the layer's input), `h` (the host's output span) or both. It has `k`, what the seed
    says the output should be, in one of two forms.

    **A graph**: `ops` in SSA form and the name of their `output`, k. In TOML and JSON it may be written as text,
    `graph`: one assignment a line, the last being the output. `contracts.operations` has the operations and what values
    are; it is checked here, so that a graph that exists is right whatever its dims are, up to what `check(blueprint,
    dims)` says of certain ones. `x` is as wide as the dim `d_in` says, or as `h` where there is no such dim.

    **A hand-written Triton source**: `source` and its launches. Kernels take their arguments by name:
    `<tensor>_ptr` is the tensor's address, `<tensor>_row_stride` the element stride of its first dimension, `rows` the
    number of rows (int32), and `tl.constexpr` parameters are the keys of `constexprs`. Tensors are `h` and `x` as
    `input` says, `out`, `alpha` (one float32, read from device memory), the parameters, `saved`; and in backward also
    `grad_out`, `grad_h`, `grad_x`, `grad_<parameter>` and `scratch`. All matrices are row-major with unit stride in the
    last dimension. A blueprint that reads `x` has a dim `d_in`, the width of `x`. The forward writes
    `out = h + alpha * (k - h)`, the blend of law 2.

    `layout` says what the rows are, and with it which further int32 a kernel may take by name: `rows` are of no order;
    in a `sequence` they are `batch` items of `length` positions, one item after the other; in an `image` each item's
    `length` positions are `image_height` lines of `image_width`. A kernel may also take `training`, int32, 1 when the
    layer is in training mode, and `dropout_seed_ptr`, the address of one int64 that is drawn for each forward in
    training mode and is the same in its backward (0 in eval mode).

    The source also defines `reference(...)` in plain torch, which returns `k` for inputs and parameters given by
    keyword; the kernels are proven against it. Inputs and k are [rows, width], in a `sequence` [batch, length, width],
    and in an `image` [batch, image_height, image_width, width]. Of a kernel that behaves otherwise in training mode, it
    is what holds in eval mode; if it has an argument `rand`, it is called for training mode too, with what `tl.rand`
    gives for the call's dropout seed and int64 offsets.

    Of a graph, the layout follows from its ops; `layout = "image"` may be written where they take a sequence or an
    image (pooling, attention).

    `affine` says that k is an affine function of the inputs, whatever the parameters: such a seed may be merged into
    its host's weights when it has become permanent. Of a source it is written, and the proof sees to it that the
    reference is one; of a graph it is derived.

    Two blueprints that differ in prose, names of values, the order of ops or in spelling have one `id`.
    """

    schema_version: str = SCHEMA_VERSION
    name: Identifier
    description: str = ""
    introduced_by: str = Field(default="", description="who introduced the idea: a paper")
    equivalent_to: str | None = Field(default=None, description="qualified name of the torch module that it equals")
    input: Literal["x", "h", "xh"]
    layout: Layout = "rows"
    affine: bool = False
    feature_dim: str = Field(
        default="d", description="symbol of the width of the span: the last dimension of h and out"
    )
    dims: dict[Identifier, Dim]
    parameters: dict[Identifier, ParameterSpec] = Field(default_factory=dict)
    ops: tuple[Op, ...] = ()
    output: str = ""
    source: str = Field(default="", description="file name of the Triton source, relative to the blueprint")
    saved: dict[Identifier, TensorSpec] = Field(default_factory=dict)
    scratch: dict[Identifier, TensorSpec] = Field(default_factory=dict)
    constexprs: dict[str, str] = Field(default_factory=dict)
    forward: tuple[LaunchSpec, ...] = ()
    backward: tuple[LaunchSpec, ...] = ()
    source_text: str = Field(default="", description="the source itself, filled in by `load`")
    path: Path | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _read_graph(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        body = dict(body)
        if "graph" in body:
            if body.get("ops"):
                raise ValueError("has both 'graph' and 'ops'; they are two spellings of one thing")
            text = body.pop("graph")
            if not isinstance(text, str):
                raise ValueError(f"graph is {type(text).__name__}, expected text")
            body["ops"] = read_graph(text)
            if not body["ops"]:
                raise ValueError("graph has no assignment")
        ops = body.get("ops")
        if "output" not in body and isinstance(ops, list | tuple) and ops:
            last = ops[-1]
            body["output"] = (
                last.name if isinstance(last, Op) else last.get("name") if isinstance(last, Mapping) else None
            )
        return body

    @model_validator(mode="after")
    def _check(self) -> Blueprint:
        faults: list[str] = []
        if self.schema_version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            major = SCHEMA_VERSION.split(".")[0]
            faults.append(f"schema_version {self.schema_version!r}: this release reads {major}.x")
        if self.feature_dim not in self.dims:
            faults.append(f"feature_dim {self.feature_dim!r} is not a dim{nearest(self.feature_dim, self.dims)}")
        faults += self._form_faults()

        def known(where: str, text: str, names: set[str]) -> None:
            try:
                for name in sorted(symbols(text) - names):
                    faults.append(f"{where}: unknown symbol {name!r} in {text!r}{nearest(name, names)}")
            except ExpressionError as error:
                faults.append(f"{where}: {error}")

        dims, extents = set(self.dims), set(EXTENTS[self.layout])
        for name, parameter in self.parameters.items():
            for text in parameter.shape:
                known(f"parameters.{name}.shape", text, dims)
            for symbol in sorted(init_symbols(parameter.init) - dims):
                faults.append(f"parameters.{name}.init: unknown symbol {symbol!r}{nearest(symbol, dims)}")
        for group, tensors in (("saved", self.saved), ("scratch", self.scratch)):
            for name, tensor in tensors.items():
                for text in tensor.shape:
                    known(f"{group}.{name}.shape", text, dims | extents)
        for name, text in self.constexprs.items():
            known(f"constexprs.{name}", text, dims)
        for group, launches in (("forward", self.forward), ("backward", self.backward)):
            for index, launch in enumerate(launches):
                for text in launch.grid:
                    known(f"{group}[{index}].grid", text, dims | extents | set(self.constexprs))
        faults += [f"dim {name!r} is the name of an extent" for name in sorted(dims & set(EXTENTS["image"]))]
        names = [*self.parameters, *self.saved, *self.scratch]
        for name in sorted(set(names) & RESERVED | {n for n in names if names.count(n) > 1 or n.startswith("grad_")}):
            faults.append(f"tensor name {name!r} is taken twice or reserved")
        if self.ops:
            faults += [f"dim name {name!r} is reserved" for name in sorted(dims & RESERVED)]
            taken = filter(keyword.iskeyword, self.parameters)
            faults += [f"parameter name {name!r} is a keyword of Python, in which graphs are written" for name in taken]
            if self.feature_dim in self.dims:
                faults += check(self)
        if not faults and self.ops:
            affine = is_affine(self)
            if "affine" in self.model_fields_set and self.affine != affine:
                faults.append(
                    f"affine is {self.affine}, but it follows from the graph, where it is {affine}: leave it out"
                )
            self.__dict__["affine"] = affine
            needed = layout_of(self.ops)
            if "layout" in self.model_fields_set and (needed, self.layout) not in {
                (needed, needed),
                ("sequence", "image"),
            }:
                faults.append(f"layout is {self.layout!r}, but it follows from the graph: leave it out")
            elif "layout" not in self.model_fields_set:
                self.__dict__["layout"] = needed
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _form_faults(self) -> list[str]:
        given = [key for key in _SOURCE_KEYS if getattr(self, key)]
        if self.ops:
            return [f"has a graph, and so no {', '.join(map(repr, given))}"] if given else []
        if not self.source:
            return ["has neither a graph nor a source: missing key 'graph', 'ops' or 'source'"]
        faults = [] if self.forward else ["missing key 'forward': a source has at least one launch"]
        return faults + (["output is of graphs; a source writes `out`"] if self.output else [])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the activations it reads, of `x` and `h`."""
        return INPUTS[self.input]

    @property
    def id(self) -> str:
        """SHA-256 (hex) of the canonical form: everything but names and prose, keys sorted."""
        body = self.model_dump(mode="json", exclude=_PROSE | ({*_SOURCE_KEYS, *_FILLED_IN} if self.ops else set()))
        for limits in body["dims"].values():
            del limits["default"]
        if self.ops:
            ops, output = canonical_ops(self.ops, self.output, self.parameters)
            body |= {"ops": [op.model_dump(mode="json") for op in ops], "output": output}
            for parameter in body["parameters"].values():
                parameter["shape"] = [canonical_extent(text) for text in parameter["shape"]]
        else:  # as ids were before there were graphs
            del body["ops"], body["output"]
        return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def canonical(self) -> Blueprint:
        """The same design with its graph in canonical form: sugar written out, no value computed twice, nothing named
        by its author. It has the same id. Raises BlueprintError for a source."""
        if not self.ops:
            raise BlueprintError(f"blueprint {self.name!r} is a hand-written source; only graphs have a canonical form")
        ops, output = canonical_ops(self.ops, self.output, self.parameters)
        return self.model_copy(update={"ops": ops, "output": output})

    def canonical_bytes(self) -> bytes:
        """The design as it is kept with an artifact: JSON in UTF-8 with sorted keys, a graph in canonical form; the
        text of a hand-written source is left out. `from_canonical_bytes` makes a blueprint with the same id of it."""
        body = (self.canonical() if self.ops else self)._body()
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_canonical_bytes(cls, content: bytes, source_text: str = "") -> Blueprint:
        """What `canonical_bytes` was made of, up to names of values; `source_text` is that of a hand-written source.
        The content may be anybody's. Raises BlueprintError with every fault found."""
        if len(content) > TEXT_LIMIT_BYTES:
            raise BlueprintError(f"blueprint: {len(content)} bytes; at most {TEXT_LIMIT_BYTES} are allowed")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BlueprintError(f"blueprint: not UTF-8: {error}") from error
        body = _read("blueprint", text, is_json=True)
        if body.get("source"):
            body["source_text"] = source_text
        return cls.validated("blueprint", body)

    @classmethod
    def load(cls, path: str | Path) -> Blueprint:
        """Reads a blueprint, TOML or JSON (`.json`), and the Triton source if it names one. Raises BlueprintError with
        every fault found."""
        path = Path(path)
        where = f"blueprint {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            siblings = [p.name for p in path.parent.glob("*.[tj][os][mo][ln]")] if path.parent.is_dir() else []
            raise BlueprintError(f"{where}: no such file{nearest(path.name, siblings)}") from error
        except OSError as error:
            raise BlueprintError(f"{where}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise BlueprintError(f"{where}: not valid TOML: {error}") from error
        body = _read(where, text, is_json=path.suffix == ".json")
        if body.get("source"):
            source = path.parent / str(body["source"])
            if source.name != body["source"]:
                raise BlueprintError(f"{where}: source {body['source']!r} must be a file beside the blueprint")
            try:
                body["source_text"] = source.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not a possible file name
                reason = getattr(error, "strerror", None) or error
                raise BlueprintError(f"{where}: source {str(source)!r} cannot be read ({reason})") from error
        return cls.validated(where, body | {"path": path.resolve()})

    @classmethod
    def from_text(cls, text: str) -> Blueprint:
        """A graph from the text of a TOML or JSON blueprint. Raises BlueprintError with every fault found."""
        body = _read("blueprint", text, is_json=text.lstrip().startswith("{"))
        if body.get("source"):
            raise BlueprintError(
                f"blueprint: its source {body['source']!r} is a file beside it; read it with Blueprint.load"
            )
        return cls.validated("blueprint", body)

    @classmethod
    def validated(cls, where: str, body: Mapping[str, Any]) -> Blueprint:
        """A blueprint of these fields. `where` begins the message of the BlueprintError that has every fault."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise BlueprintError(f"{where}: " + "; ".join(_faults(error))) from error

    def _body(self) -> dict[str, Any]:
        body = self.model_dump(mode="json", exclude={*_FILLED_IN, "affine"} if self.ops else {*_FILLED_IN})
        for name, field in type(self).model_fields.items():
            if name in body and not field.is_required() and body[name] in (field.default, [], {}, None):
                del body[name]
        if self.ops and self.layout == layout_of(self.ops):
            body.pop("layout", None)
        body = {"schema_version": self.schema_version} | body
        body["dims"] = {name: dim.model_dump(exclude_none=True) for name, dim in self.dims.items()}
        return body

    def to_json(self) -> str:
        """JSON that `from_text` and `load` read back as an equal blueprint (a source has to lie beside it)."""
        return json.dumps(self._body(), indent=1, ensure_ascii=False) + "\n"

    def to_toml(self) -> str:
        """TOML that `from_text` and `load` read back as an equal blueprint, its graph as text (a source has to lie
        beside it)."""
        body = self._body()
        if self.ops:
            del body["ops"]
            output = body.pop("output")
            tables = {name: body.pop(name) for name in ("dims", "parameters") if name in body}
            body |= {"graph": write_graph(self.ops), "output": output} | tables
        return write_toml(body)

    @classmethod
    def build(
        cls,
        name: str,
        *,
        input: Literal["x", "h", "xh"],
        dims: Mapping[str, Dim | Mapping[str, int] | tuple[int, int]],
        **fields: Any,
    ) -> GraphBuilder:
        """A builder of a graph, one call for each op; `contracts.building` says how it is used.

        `dims`: for each its limits, as a Dim, as (min, max) or as a mapping; {} for the defaults. `fields`: others of a
        blueprint, such as `description`. Raises BlueprintError.
        """
        from esper_triton.contracts.building import GraphBuilder

        return GraphBuilder(name, input=input, dims=dims, **fields)

    @classmethod
    def from_module(cls, module: Any, example_inputs: Any, **options: Any) -> Blueprint:
        """The graph of an ordinary `nn.Module`: see `esper_triton.tezzeret.importing.from_module`, which this calls."""
        importing = importlib.import_module("esper_triton.tezzeret.importing")  # contracts import no torch
        blueprint = importing.from_module(module, example_inputs, **options)
        assert isinstance(blueprint, Blueprint)
        return blueprint


def _read(where: str, text: str, *, is_json: bool) -> dict[str, Any]:
    try:
        body = read_body(text, is_json=is_json)
    except ValueError as error:
        raise BlueprintError(f"{where}: {error}") from error
    for filled in _FILLED_IN:
        if filled in body:
            raise BlueprintError(f"{where}: {filled!r} is filled in by the loader and cannot be given")
    return body


def _faults(error: ValidationError) -> list[str]:
    known = {*Blueprint.model_fields, "graph"} - {*_FILLED_IN}
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
