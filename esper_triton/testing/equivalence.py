"""That an artifact computes what a module of torch computes, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from esper_triton.contracts.errors import nearest
from esper_triton.contracts.manifest import Manifest
from esper_triton.kasmina.kinds import Kind, kind_of
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.urabrask.equivalence import compare_with
from esper_triton.urabrask.layers import module_reference
from esper_triton.urza import Artifact, Urza, default_root

__all__ = ["assert_equivalent"]


def assert_equivalent(
    module: nn.Module,
    artifact: Artifact | str,
    *,
    urza: Urza | None = None,
    names: Mapping[str, str] | None = None,
    groups: int = 50,
    seconds: float = 60.0,
    seed: int = 0,
) -> None:
    """Asserts that an artifact computes what `module` does: `out`, blended at drawn alphas, and every gradient,
    on drawn inputs and parameters, in the prover's sandbox, within the prover's tolerances. Where they do not, the
    assertion shows the simplest call found that tells.

    The module is taken in eval mode; its parameters are replaced by drawn ones, and it is left as it was.

    Args:
        module: a layer that Kasmina knows (of a KasminaLayer, the host), or any module of one tensor, or of two (`x`
            and `h`) for an artifact that reads both, with features last.
        artifact: or its id. urza: where it is stored; by default the user's own store.
        names: of the module's parameters, by those of the artifact, where they are not the same but for `.` and `_`.
        groups: how many inputs are drawn, each of which is tried about four times. seconds: after which no more are.
        seed: of what is drawn.

    Raises AssertionError; ValueError where parameters have no counterpart or another shape; as `Urza.load` does.
    """
    store = urza or Urza(default_root())
    stored, blobs = store.load(artifact if isinstance(artifact, str) else artifact.id)
    manifest = stored.manifest
    host = copy.deepcopy(module).eval()
    own = dict(host.named_parameters())
    found = {name: (names or {}).get(name) or _counterpart(name, own) for name in manifest.parameters}
    _check(type(module).__name__, manifest, found, own)
    reference = module_reference(host, tuple(manifest.parameters), found, _Caller(manifest, _kind(host)))
    record, counterexample = compare_with(reference, manifest, blobs, seed=seed, groups=groups, seconds=seconds)
    if record.failures:
        simplest = f"\nsimplest call: {counterexample.case}: {counterexample.what}" if counterexample else ""
        raise AssertionError(
            f"artifact {manifest.id} is not equivalent to {type(module).__name__} (seed {seed}):\n"
            f"{record.failures[0]}{simplest}"
        )


class _Caller:
    """Calls a module with inputs whose features are last: the host, where it is a KasminaLayer."""

    def __init__(self, manifest: Manifest, kind: Kind | None) -> None:
        self.inputs = ("x", "h") if manifest.input == "xh" else (manifest.input,)
        self.layout, self.kind = manifest.layout, kind
        self.turns = kind is not None and kind.length_first and manifest.layout != "rows"

    def __call__(self, module: nn.Module, **inputs: Tensor) -> Tensor:
        given = [self._arranged(inputs[name]) for name in self.inputs]
        if self.kind is not None and self.kind.first_of_tuple:
            given = [given[0]] * 3
        out: Any = module.default_transform(*given) if isinstance(module, KasminaLayer) else module(*given)
        return self._restored(out[0] if isinstance(out, tuple) else out)

    def _arranged(self, value: Tensor) -> Tensor:
        if self.kind is None or self.kind.feature_dim == -1:
            return value.transpose(0, 1) if self.turns else value
        if self.layout == "rows":  # of a kernel of one position, wherever they lie
            return value.reshape(*value.shape, *[1] * (self.kind.positions or 0))
        return value.movedim(-1, 1)

    def _restored(self, value: Tensor) -> Tensor:
        if self.kind is None or self.kind.feature_dim == -1:
            return value.transpose(0, 1) if self.turns else value
        return value.reshape(value.shape[0], -1) if self.layout == "rows" else value.movedim(1, -1)


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
