"""That an artifact computes what a module of torch computes, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.manifest import Manifest
from esper_triton.contracts.report import Level, ValidationReport
from esper_triton.kasmina.kinds import Kind, kind_of
from esper_triton.kasmina.launcher import TORCH_DTYPE
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.urabrask.gauntlet import examine
from esper_triton.urabrask.oracle import LocalOracle
from esper_triton.urza import Artifact, Urza
from esper_triton.urza.library import default_root

__all__ = ["assert_equivalent"]


def assert_equivalent(
    module: nn.Module,
    artifact: Artifact | str,
    *,
    urza: Urza | None = None,
    names: Mapping[str, str] | None = None,
    level: Level = "fast",
    seed: int = 0,
) -> ValidationReport:
    """Asserts that an artifact's kernels compute what `module` does, with the module in the place of the blueprint's
    reference: everything that the gauntlet does with an artifact, in its sandbox, on drawn inputs and parameters, for
    the output and every gradient. Where it fails, the assertion shows the simplest call found that does.

    The module is taken in eval mode; its parameters are replaced by drawn ones, and it is left as it was.

    Args:
        module: a layer that Kasmina knows (of a KasminaLayer, the host), or any module of one tensor, two for an
            artifact that reads the layer's input and the host's output, with features last.
        artifact: or its id. urza: where it is stored; by default the user's own store.
        names: of the module's parameters, by those of the artifact, where they are not the same but for `.` and `_`.
        level: how much is tried, as of `esper_triton.urabrask.validate`. seed: of what is drawn.

    Raises AssertionError; ValueError where parameters have no counterpart or another shape; as `Urza.load` does.
    """
    store = urza or Urza(default_root())
    stored, blobs = store.load(artifact if isinstance(artifact, str) else artifact.id)
    manifest = stored.manifest
    oracle = LocalOracle(_function_of(module, manifest, names or {}), manifest.layout, TORCH_DTYPE[manifest.dtype])
    report = examine(manifest, blobs, oracle, level=level, seed=seed)
    if report.verdict != "REJECTED":
        return report
    found = report.counterexample
    what = f"\nsimplest call: {found.case}: {found.what}" if found is not None else ""
    reasons = "\n".join(f"- {reason}" for reason in report.reasons)
    raise AssertionError(
        f"artifact {manifest.id} is not equivalent to {type(module).__name__} (seed {seed}):\n{reasons}{what}"
    )


def _function_of(module: nn.Module, manifest: Manifest, names: Mapping[str, str]) -> Callable[..., Tensor]:
    """The module as a function of the artifact's inputs and parameters by keyword, features last."""
    host = copy.deepcopy(module).eval()
    kind = _kind(host)
    caller = _Caller(host)
    own = dict(host.named_parameters())
    found = {name: names.get(name) or _counterpart(name, own) for name in manifest.parameters}
    _check(type(module).__name__, manifest, found, own)
    buffers = dict(caller.named_buffers())

    def function(**given: Tensor) -> Tensor:
        tensors = [given[name] for name in ("x", "h") if name in given and name not in manifest.parameters]
        dtype = tensors[0].dtype
        state = {f"host.{found[name]}": given[name].view(own[found[name]].shape) for name in manifest.parameters}
        state |= {name: b.to(dtype) if b.is_floating_point() else b for name, b in buffers.items()}
        arranged = [_arranged(tensor, kind, manifest.layout) for tensor in tensors]
        if kind is not None and kind.first_of_tuple:
            arranged = [arranged[0]] * 3
        out = torch.func.functional_call(caller, state, tuple(arranged))
        return _restored(out[0] if isinstance(out, tuple) else out, kind, manifest.layout)

    return function


class _Caller(nn.Module):
    """What a layer's host computes, whatever its seeds do."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, *inputs: Tensor) -> Any:
        if isinstance(self.host, KasminaLayer):
            return self.host.default_transform(*inputs)
        return self.host(*inputs)


def _kind(module: nn.Module) -> Kind | None:
    try:
        return kind_of(module)
    except TypeError:  # of the user's own: features are last
        return None


def _counterpart(name: str, own: Mapping[str, nn.Parameter]) -> str:
    return next((theirs for theirs in own if theirs.replace(".", "_") == name), name)


def _check(who: str, manifest: Manifest, found: Mapping[str, str], own: Mapping[str, nn.Parameter]) -> None:
    for name, record in manifest.parameters.items():
        theirs = own.get(found[name])
        if theirs is None:
            raise ValueError(
                f"parameter {name!r} of artifact {manifest.id} is none of {who}{nearest(found[name], own)}; "
                "say in names which it is"
            )
        shape = tuple(theirs.shape)
        # A 1x1 convolution's weight is a matrix.
        if shape != record.shape and [n for n in shape if n > 1] != [n for n in record.shape if n > 1]:
            raise ValueError(
                f"parameter {found[name]!r} of {who} is {shape}, artifact {manifest.id} has {record.shape}"
            )
    if left := sorted(set(own) - set(found.values())):
        raise ValueError(f"artifact {manifest.id} has no counterpart of {who}'s {', '.join(map(repr, left))}")


def _arranged(value: Tensor, kind: Kind | None, layout: str) -> Tensor:
    """Rows, or items of positions, with features last, as the module takes them."""
    if kind is None:
        return value
    if layout == "rows":
        spatial = kind.positions or 0
        return value.reshape(*value.shape, *[1] * spatial) if kind.feature_dim != -1 else value
    if kind.feature_dim != -1:
        return value.movedim(-1, 1)
    return value.transpose(0, 1) if kind.length_first else value


def _restored(value: Tensor, kind: Kind | None, layout: str) -> Tensor:
    if kind is None:
        return value
    if layout == "rows":
        return value.reshape(value.shape[0], -1) if kind.feature_dim != -1 else value
    if kind.feature_dim != -1:
        return value.movedim(1, -1)
    return value.transpose(0, 1) if kind.length_first else value
