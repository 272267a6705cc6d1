"""Blueprints from ordinary PyTorch: a module is traced by torch.export, and what it does becomes a graph."""

from __future__ import annotations

import keyword
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from esper_triton.contracts.blueprint import INPUTS, Blueprint, ParameterSpec
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.graph import RESERVED, X_DIM, Op, expressions_of
from esper_triton.tezzeret.import_axes import Atom, Group, Refused, Sizes, Tracked, inner_of, size_of
from esper_triton.tezzeret.import_graph import Growing
from esper_triton.tezzeret.import_ops import HANDLERS, Arguments

__all__ = ["from_module", "module_parameters"]

Input = Literal["x", "h", "xh"]
_DEFAULT_MAX = 65536
_LARGEST_KERNEL = 12  # of a parameter that is used as a kernel though it is no convolution's
_ROUNDS = 8  # of decompositions; each takes apart what the one before has left


def from_module(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    name: str | None = None,
    input: Input = "x",
    feature_axis: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Blueprint:
    """The blueprint that computes what the module computes.

    Args:
        example_inputs: one tensor, or several; the same tensor twice is one input (self-attention). [rows, d], [batch,
            length, d] or, as PyTorch has images, [batch, d, height, width]. Only shapes and dtypes are looked at.
        name: of the blueprint; without one, the module's class. input: whether the tensor is the layer's input `x` or
            the host's output `h`; `xh` for a module of both, in this order.
        feature_axis: which axis holds the features: without it the last one, but the second of an image. For
        `nn.Conv1d`
            it is 1.
        kwargs: further arguments of the module that are no tensors. fields: others of the blueprint, as `description`.

    Dims. The width of the output is `d`, that of `x` `d_in` where it is another, and every further extent of a
    parameter becomes a dim that is named after it. Extents that are equal in this module are one dim; one that has to
    be a multiple of another (3 d of packed q, k and v) is written so. Where no general dims fit, they are fixed to the
    module's own. The module's sizes are the defaults.

    Parameters keep their names, with underscores for dots and `p_` in front where that is no name; `module_parameters`
    has their values. A parameter that is all zeros, all ones or constant starts so. Others start as PyTorch's own
    `reset_parameters` draws them: weights of linear layers and convolutions `kaiming_uniform` and their biases within
    the same bound, attention's packed weights `xavier_uniform`, embeddings `normal:1`; any other tensor
    `kaiming_uniform`, or `uniform` within the largest value that it has if it has one dimension. Buffers have to be
    single numbers.

    `nn.Dropout` is taken as dropout whatever mode the module is in. The module is not changed.

    Raises BlueprintError for what the graph's operations cannot say, with the module's own line of source.
    """
    tensors = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    different = list({id(tensor): tensor for tensor in tensors}.values())
    who = f"module {type(module).__name__}"
    if input not in INPUTS or len(different) != len(INPUTS[input]):
        expected = len(INPUTS[input]) if input in INPUTS else "x, h or xh"
        raise BlueprintError(
            f"{who}: {len(different)} different example inputs for input={input!r}, expected {expected}"
        )
    options = dict(kwargs or {})
    if isinstance(module, nn.MultiheadAttention):
        options.setdefault("need_weights", False)
    frame = _Frame.of(who, module, different, feature_axis)
    examples = {id(tensor): frame.example(tensor) for tensor in different}
    program = _exported(who, module, tuple(examples[id(tensor)] for tensor in tensors), options)
    _refuse_unknown(who, program)
    names = _parameter_names(module)
    attempts: list[BlueprintError] = []
    for fixed, multiples in ((False, False), (False, True), (True, True)):
        taking = _Taking(who, module, frame, program, names, input, tensors, fixed=fixed, multiples=multiples)
        try:
            return taking.blueprint(name or _snake(type(module).__name__), fields)
        except BlueprintError as error:
            attempts.append(error)
    raise attempts[-1]


def module_parameters(module: nn.Module, blueprint: Blueprint) -> dict[str, Tensor]:
    """The module's parameters by their names in the blueprint that was taken from it, in its shapes: a depthwise kernel
    [d, 1, k] is [d, k] there. They share memory with the module's."""
    found = {}
    names = _parameter_names(module)
    for own, tensor in module.named_parameters():
        if names[own] in blueprint.parameters:
            found[names[own]] = tensor.reshape(_squeezed(module, own, tensor))
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")


def _parameter_names(module: nn.Module) -> dict[str, str]:
    """The name in the blueprint of each parameter."""
    names: dict[str, str] = {}
    for own, _ in module.named_parameters():
        name = re.sub(r"[^a-z0-9_]", "_", _snake(own.replace(".", "_")))[:58]
        if not name[:1].isalpha() or name in RESERVED or keyword.iskeyword(name) or name.startswith("grad_"):
            name = f"p_{name}"
        base, count = name, 1
        while name in names.values():
            count += 1
            name = f"{base}_{count}"
        names[own] = name
    return names


def _owner(module: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return module.get_submodule(path), name


def _squeezed(module: nn.Module, parameter: str, tensor: Tensor) -> list[int]:
    """Its shape in a blueprint: the 1 of depthwise and pointwise kernels left out."""
    owner, name = _owner(module, parameter)
    shape = list(tensor.shape)
    if isinstance(owner, nn.Conv1d | nn.Conv2d) and name == "weight":
        if all(extent == 1 for extent in owner.kernel_size) and owner.groups == 1:
            return shape[:2]
        if owner.groups > 1 and shape[1] == 1:
            return [shape[0], *shape[2:]]
    return shape


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """How the rows lie: sizes that stand for the batch and its positions while the module is traced. They are primes
    that divide no size of the module, so that no axis of it can be taken for one of them."""

    who: str
    leading: tuple[Atom, ...]
    feature_axis: int

    @classmethod
    def of(cls, who: str, module: nn.Module, tensors: Sequence[Tensor], feature_axis: int | None) -> _Frame:
        rank = tensors[0].dim()
        if not 2 <= rank <= 4 or any(tensor.dim() != rank for tensor in tensors):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise BlueprintError(f"{who}: example inputs are {shapes}, expected one rank, of 2, 3 or 4")
        axis = feature_axis if feature_axis is not None else 1 if rank == 4 else rank - 1
        axis += rank if axis < 0 else 0
        if not 1 <= axis < rank:
            raise BlueprintError(f"{who}: feature_axis is {feature_axis}, expected 1 to {rank - 1}")
        sizes = {extent for tensor in (*module.parameters(), *module.buffers()) for extent in tensor.shape}
        sizes |= {tensor.shape[axis] for tensor in tensors}
        primes = (n for n in range(11, 100_000) if all(n % k for k in range(2, int(n**0.5) + 1)))
        free = (n for n in primes if all(extent % n for extent in sizes if extent))
        kinds = ["batch"] + ["position"] * (rank - 2)
        return cls(who=who, leading=tuple(Atom(next(free), kind, kind) for kind in kinds), feature_axis=axis)

    def axes(self, features: Group) -> tuple[Group, ...]:
        """Of a tensor with these features."""
        groups: list[Group] = [(atom,) for atom in self.leading]
        groups.insert(self.feature_axis, features)
        return tuple(groups)

    def example(self, tensor: Tensor) -> Tensor:
        """Another one of the same width and dtype, with the sizes that stand for the batch and its positions."""
        shape = [atom.size for atom in self.leading]
        shape.insert(self.feature_axis, tensor.shape[self.feature_axis])
        return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)


@contextmanager
def _dropping(module: nn.Module) -> Iterator[None]:
    """With dropout in training mode, or it would leave no trace."""
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    modes = [m.training for m in dropouts]
    try:
        for dropout in dropouts:
            dropout.training = True
        yield
    finally:
        for dropout, mode in zip(dropouts, modes, strict=True):
            dropout.training = mode


def _exported(
    who: str, module: nn.Module, examples: tuple[Tensor, ...], options: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    """The module's operations, functional, taken apart only where the graph has none of that name."""
    with warnings.catch_warnings(), _dropping(module), torch.enable_grad():
        warnings.simplefilter("ignore")  # of torch's own use of its tree functions
        try:
            program = torch.export.export(module, examples, dict(options)).run_decompositions({})
        except Exception as error:  # whatever tracing a stranger's code raises
            shapes = ", ".join(str(list(example.shape)) for example in examples)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BlueprintError(
                f"{who}: torch.export cannot trace it with inputs {shapes} (the batch and its positions may be of any "
                f"size): {type(error).__name__}: {reason[0]}"
            ) from error
        table = torch.export.default_decompositions()
        for _ in range(_ROUNDS):
            unknown = {node.target for node in _calls(program) if _handler(node) is None}
            known = {target: table[target] for target in unknown if target in table}
            if not known:
                break
            program = program.run_decompositions(known)
    return cast(torch.export.ExportedProgram, program)


def _calls(program: torch.export.ExportedProgram) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and _gives(node)]


def _gives(node: fx.Node) -> bool:
    """Whether it is an operation with a result: what has none asserts something of shapes and dtypes."""
    schema = _schema(node)
    return schema is not None and bool(schema.returns)


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _handler(node: fx.Node) -> Any:
    name = _schema(node).name.removeprefix("aten::")
    return HANDLERS.get(f"{name}.{_schema(node).overload_name}") or HANDLERS.get(name)


def _keeps_dtype(node: fx.Node, results: Sequence[Tensor]) -> bool:
    first = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
    return isinstance(first, Tensor) and all(result.dtype == first.dtype for result in results)


def _line(node: fx.Node) -> str:
    """Where the module's author wrote it: the innermost frame that is not torch's, or else the innermost."""
    frames = re.findall(r'File "(.*?)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    if not own:
        return "an unknown line"
    path, line, code = own[-1]
    return f"{path}:{line} `{code.strip()}`"


def _refuse_unknown(who: str, program: torch.export.ExportedProgram) -> None:
    unknown = [node for node in _calls(program) if _handler(node) is None]
    if unknown:
        known = ", ".join(sorted({name.partition(".")[0] for name in HANDLERS if not name.startswith("_")}))
        found = "; ".join(f"{node.target} at {_line(node)}" for node in unknown)
        raise BlueprintError(f"{who}: no operation of a graph says {found}. Known are: {known}")


class _Taking:
    """One attempt, with one way to write sizes as expressions."""

    def __init__(
        self,
        who: str,
        module: nn.Module,
        frame: _Frame,
        program: torch.export.ExportedProgram,
        names: Mapping[str, str],
        input: Input,
        tensors: Sequence[Tensor],
        *,
        fixed: bool,
        multiples: bool,
    ) -> None:
        self.who, self.module, self.frame, self.program, self.names = who, module, frame, program, names
        self.input, self.fixed = input, fixed
        output = self._output_shape()
        width = output[frame.feature_axis] if len(output) == len(frame.leading) + 1 else 0
        widths = {name: t.shape[frame.feature_axis] for name, t in zip(INPUTS[input], _different(tensors), strict=True)}
        dims = {"d": width}
        if widths.get("x", width) != width:
            dims[X_DIM] = widths["x"]
        if "h" in widths and widths["h"] != width:
            raise BlueprintError(f"{who}: gives {width} features for h of {widths['h']}; k has the width of h")
        self.sizes = Sizes(dims, multiples=multiples)
        self.inputs = {
            name: Atom(size, X_DIM if name == "x" and X_DIM in dims else "d") for name, size in widths.items()
        }
        if multiples:  # the smaller ones first, of which others are multiples
            extents = [extent for own, _ in module.named_parameters() for extent in self._extents(own)]
            for extent, name in sorted(extents, key=lambda item: item[0]):
                self.sizes.add(extent, name)
        self.parameters: dict[str, ParameterSpec] = {}
        self.graph = Growing([*names.values(), *self.inputs], self.sizes, frame.leading)

    def _output_shape(self) -> list[int]:
        outputs = [node for node in self._outputs() if node is not None]
        if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
            raise BlueprintError(f"{self.who}: returns {len(outputs)} tensors, expected one")
        return list(outputs[0].meta["val"].shape)

    def _outputs(self) -> list[Any]:
        (node,) = (node for node in self.program.graph.nodes if node.op == "output")
        return list(node.args[0])

    def blueprint(self, name: str, fields: Mapping[str, Any]) -> Blueprint:
        """Raises BlueprintError."""
        values = self._placeholders()
        for node in self.program.graph.nodes:
            if node.op == "call_function" and (_gives(node) or _schema(node) is None):
                values[node] = self._taken(node, values)
        output = self._output(values)
        ops = _alive(self.graph.ops, output)
        read = {item for op in ops for item in op.names}
        parameters = {name: spec for name, spec in self.parameters.items() if name in read}
        used = {"d", X_DIM}.union(*(e.symbols for e in expressions_of(parameters, ops)))
        body = {
            "name": name,
            "input": self.input,
            "dims": {dim: self._limits(size) for dim, size in self.sizes.dims.items() if dim in used},
            "parameters": parameters,
            "ops": ops,
            "output": output,
            "equivalent_to": _qualified(self.module),
        }
        return Blueprint.validated(self.who, body | dict(fields))

    def _limits(self, size: int) -> dict[str, int]:
        if self.fixed:
            return {"min": size, "max": size, "default": size}
        return {"max": max(size, _DEFAULT_MAX), "default": size}

    def _placeholders(self) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        inputs: dict[int, Tracked] = {}
        free = iter(self.inputs.items())
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind is InputKind.PARAMETER:
                values[node] = self._parameter(cast(str, spec.target))
            elif spec.kind is InputKind.USER_INPUT:
                if not isinstance(node.meta.get("val"), Tensor) or not (node.users or self._is_output(node)):
                    continue  # no tensor, or the same one as another input
                try:
                    name, atom = next(free)
                except StopIteration:
                    raise BlueprintError(f"{self.who}: has more inputs than input={self.input!r} says") from None
                group = (atom,) if atom.size > 1 else ()
                axes = self.frame.axes(group)
                inputs[id(node)] = Tracked(name=name, level="rows", inner=(group,), axes=axes)
                values[node] = inputs[id(node)]
            else:
                values[node] = self._constant(cast(str, spec.target))
        return values

    def _is_output(self, node: fx.Node) -> bool:
        return node in self._outputs()

    def _parameter(self, own: str) -> Tracked:
        tensor = self.module.get_parameter(own)
        name = self.names[self._first_name(own, tensor)]
        original, shape = list(tensor.shape), _squeezed(self.module, own, tensor)
        extents = self._extents(own)
        texts = [self.sizes.add(extent, name) for extent, name in extents] + list(map(str, shape[len(extents) :]))
        groups = [(Atom(extent, text),) if extent > 1 else () for extent, text in zip(shape, texts, strict=True)]
        self.parameters.setdefault(name, ParameterSpec(shape=tuple(texts), init=self._init(own, tensor)))
        inner: tuple[Group, ...] = tuple(groups)
        # The 1 that a squeezed kernel has in torch.
        kept = iter(inner)
        axes = inner if shape == original else tuple(() if e == 1 else next(kept) for e in original)
        return Tracked(name=name, level=None, inner=inner, axes=axes)

    def _extents(self, own: str) -> list[tuple[int, str]]:
        """Of a parameter, each with what its dim is called if it needs one of its own; without the taps of a kernel."""
        tensor = self.module.get_parameter(own)
        shape = _squeezed(self.module, own, tensor)
        owner, _ = _owner(self.module, own)
        if isinstance(owner, nn.Conv1d | nn.Conv2d) and tensor.dim() > 1 and shape != list(tensor.shape[:2]):
            shape = shape[: len(shape) - len(owner.kernel_size)]
        elif tensor.dim() > 2 and all(extent % 2 and extent < _LARGEST_KERNEL for extent in shape[2:]):
            shape = shape[:2]
        base = re.sub(r"_(weight|bias)$", "", self.names[self._first_name(own, tensor)])
        return [(extent, f"d_{base}") for extent in shape]

    def _first_name(self, own: str, tensor: Tensor) -> str:
        """Of a tensor that has several names."""
        return next((name for name, other in self.module.named_parameters() if other is tensor), own)

    def _init(self, own: str, tensor: Tensor) -> str:
        values = tensor.detach()
        first = values.flatten()[0].item() if values.numel() else 0.0
        if bool((values == first).all()):
            return {0.0: "zeros", 1.0: "ones"}.get(first, f"constant:{first!r}")
        owner, name = _owner(self.module, own)
        if isinstance(owner, nn.Embedding):
            return "normal:1"
        if isinstance(owner, nn.MultiheadAttention) and name.endswith("proj_weight"):
            return "xavier_uniform"
        if isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d) and name == "bias":
            weight = owner.weight
            fan_in = int(weight[0].numel())
            return f"kaiming_uniform:{self.sizes.known(fan_in) or self._fan_in(weight)}"
        if values.dim() < 2:
            return f"uniform:{values.abs().max().item()!r}"
        return "kaiming_uniform"

    def _fan_in(self, weight: Tensor) -> str:
        taps = int(weight[0, 0].numel())
        return f"{taps} * {self.sizes.of(weight.shape[1])}" if weight.shape[1] > 1 else str(taps)

    def _constant(self, target: str) -> Any:
        tensor = self.program.state_dict.get(target, self.program.constants.get(target))
        if isinstance(tensor, Tensor) and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            number = float(tensor.flatten()[0].item())
            return Tracked(name=number, level=None, inner=(), axes=())
        return _Buffer(target)

    def _taken(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        def value(item: Any) -> Any:
            if isinstance(item, fx.Node):
                found = values[item]
                if isinstance(found, _Buffer):
                    raise Refused(
                        f"buffer {found.name!r} is no single number, and only parameters are tensors of a seed"
                    )
                return found
            if isinstance(item, list | tuple):
                return [value(one) for one in item]
            return item

        schema = _schema(node)
        if schema is None:  # operator.getitem of a result of several
            several, index = node.args
            parts = values[cast(fx.Node, several)]
            if cast(int, index) >= len(parts):
                raise BlueprintError(f"{self.who}: result {index} of {several} is not taken, at {_line(node)}")
            return parts[cast(int, index)]
        self.graph.node = node.name
        results = node.meta["val"]
        results = [results] if isinstance(results, Tensor) else [r for r in results if isinstance(r, Tensor)]
        try:
            given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
            ordered = {a.name: value(item) for a, item in zip(schema.arguments, node.args, strict=False)}
            ordered |= {name: value(item) for name, item in node.kwargs.items()}
            arguments = ordered | {name: default for name, default in given.items() if name not in ordered}
            shapes = [list(result.shape) for result in results]
            return _handler(node)(self.graph, Arguments(arguments, shapes, same_dtype=_keeps_dtype(node, results)))
        except Refused as error:
            raise BlueprintError(f"{self.who}: {node.target} is refused: {error}; at {_line(node)}") from error

    def _output(self, values: Mapping[fx.Node, Any]) -> str:
        (node,) = (node for node in self._outputs() if node is not None)
        value = values[node]
        features = value.axes[self.frame.feature_axis] if len(value.axes) == len(self.frame.leading) + 1 else ()
        others = [group for i, group in enumerate(value.axes) if i != self.frame.feature_axis]
        if others != [(atom,) for atom in self.frame.leading] or inner_of(features) != features:
            shape = [size_of(group) for group in value.axes]
            raise BlueprintError(
                f"{self.who}: its output {shape} does not lie as its input does, one value for each row"
            )
        try:
            name = self.graph.arranged(value, (features,))
        except Refused as error:
            raise BlueprintError(f"{self.who}: its output is refused: {error}") from error
        if name not in {op.name for op in self.graph.ops}:
            self.graph.node = "k"
            name = self.graph.add("identity", name)
        return str(name)


@dataclass(frozen=True)
class _Buffer:
    """One that is no single number; an error only where it is used."""

    name: str


def _different(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _alive(ops: Sequence[Op], output: str) -> tuple[Op, ...]:
    """Those that the output needs."""
    needed, found = {output}, []
    for op in reversed(ops):
        if op.name in needed:
            needed.update(op.names)
            found.append(op)
    return tuple(reversed(found))


def _qualified(module: nn.Module) -> str | None:
    """Of a module of torch's own."""
    kind = type(module)
    return f"torch.nn.{kind.__name__}" if getattr(nn, kind.__name__, None) is kind else None
