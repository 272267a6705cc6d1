"""A grown model made fixed: permanent seeds merged into weights, or run by their kernels with nothing around them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina import loading
from esper_triton.kasmina.fixed import fetch_program, fixed_seeds, keep_program
from esper_triton.kasmina.kinds import Kind
from esper_triton.kasmina.launcher import KernelProgram
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.pending import load_request
from esper_triton.kasmina.plan import axes_for, draw_dropout_seeds
from esper_triton.kasmina.seed import LoadTicket, Seed
from esper_triton.model.merging import merge
from esper_triton.model.morphable import unwrap
from esper_triton.urza import Urza

__all__ = ["BakedLayer", "FixedSeed", "bake"]

_S = SeedLifecycleState
# Hooks that see a layer's output or its gradient must see it with the seeds. Those before forward see the same input
# wherever they are, and some (of weight_norm and its like) belong to the host's weights.
_HOOKS_OF_THE_OUTPUT = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def bake(model: nn.Module, urza: Urza | None = None) -> nn.Module:
    """A fixed copy of a wrapped model whose seeds are all DORMANT or FOSSILIZED; `model` stays as it is.

    Its modules are of the classes that they had before wrapping. A permanent seed is merged into its host's weights
    where its blueprint is affine, row by row, and the host an nn.Linear, an nn.Embedding, or a convolution without
    groups (with a kernel of one place, where the seed reads its input), whose weight no other module uses. In every
    other layer with permanent seeds, a `BakedLayer` stands in the host's place: the host, and the seeds' kernels with
    constant alpha and frozen parameters. Results are those of `model`, to the bit where kernels run. A seed with a
    dropout drops while the copy is in training mode, as in `model`.

    The copy can be copied, pickled and exported. Unpickling a model with kernels fetches them from the store again,
    and verifies them (law 4).

    Args:
        urza: where kernels are fetched; by default the store that each layer was wrapped with.

    Raises ValueError for a model without seeds, and for seeds in any other state, with their names and states;
    ArtifactRefused, or another EsperError, for a kernel that cannot be had, naming its seed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KasminaLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no seeds, so there is nothing to bake")
    unfinished = [
        f"seed {seed.index} of layer {name!r} is {'failing' if seed.pending_faults else seed.state.name}"
        for name, layer in layers.items()
        for seed in layer._kasmina.seeds
        if seed.state not in (_S.DORMANT, _S.FOSSILIZED) or seed.pending_faults
    ]
    if unfinished:
        raise ValueError("only DORMANT and FOSSILIZED seeds can be baked: " + "; ".join(unfinished))
    fixed = {
        name: [
            FixedSeed(seed, _fetched(name, layer, seed, urza), urza or layer._kasmina.urza)
            for seed in layer._kasmina.seeds
            if seed.state is _S.FOSSILIZED
        ]
        for name, layer in layers.items()
    }
    baked = unwrap(copy.deepcopy(model))
    places = dict(baked.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for _, p in baked.named_parameters(remove_duplicate=False))
    for name, seeds in fixed.items():
        host = places[name]
        own_weight_uses = sum(module is host for module in places.values())
        if seeds and not merge(host, seeds, unshared=uses[id(getattr(host, "weight", None))] == own_weight_uses):
            baked = _replaced(baked, host, BakedLayer(host, seeds, layers[name]._kasmina.kind))
    return baked


def _fetched(name: str, layer: KasminaLayer, seed: Seed, urza: Urza | None) -> KernelProgram:
    who = f"seed {seed.index} of layer {name!r}"
    store = urza or layer._kasmina.urza
    assert seed.kernel is not None  # a FOSSILIZED seed has one, or has failed and is not FOSSILIZED any more
    artifact_id, expected = seed.kernel.manifest.id, seed.kernel.digest
    if store is None:
        raise ArtifactRefused(f"{who}: there is no Urza to fetch artifact {artifact_id!r} from; give one to bake")
    ticket = LoadTicket()
    try:
        loaded = loading.load(load_request(layer, seed, artifact_id, holder=ticket), store)
    except Exception as error:
        raise ArtifactRefused(f"{who}: artifact {artifact_id!r} cannot be baked: {error}") from error
    if loaded.digest != expected:
        raise ArtifactRefused(
            f"{who}: artifact {artifact_id!r} has a manifest of digest {loaded.digest} in {store}, the seed runs "
            f"{expected}; bake from the store that it was loaded from"
        )
    return keep_program(expected, loaded.program)


def _replaced(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The root with `new` wherever `old` was a child, or `new` itself."""
    if root is old:
        return new
    for module in root.modules():
        if module is not new:
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new
    return root


class FixedSeed(nn.Module):
    """A permanent seed of a `BakedLayer`: frozen parameters (`weights`), constant alpha, and the loaded kernel."""

    def __init__(self, seed: Seed, program: KernelProgram, urza: Urza | None) -> None:
        super().__init__()
        assert seed.kernel is not None
        assert urza is not None
        self.artifact_id, self.manifest_digest = seed.kernel.manifest.id, seed.kernel.digest
        self.span, self.alpha, self.urza = seed.span, seed.alpha, urza
        names = sorted(seed.parameters)
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(seed.parameters[name].detach().clone(), requires_grad=False) for name in names}
        )
        self.program = program

    @property
    def _device(self) -> torch.device:
        # A seed without parameters has no tensor to tell where it is.
        return next((tensor.device for tensor in self.weights.values()), torch.device("cpu"))

    def tensors(self) -> list[Tensor]:
        """The parameters in the order of their names, as the operator takes them."""
        return [self.weights[name] for name in sorted(self.weights)]

    def extra_repr(self) -> str:
        return f"artifact_id={self.artifact_id!r}, span={self.span}, alpha={self.alpha}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedSeed:
        other = FixedSeed.__new__(FixedSeed)
        memo[id(self)] = other
        memo[id(self.program)] = self.program  # immutable, and shared
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "program"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.program = fetch_program(self.urza, self.artifact_id, self.manifest_digest, self._device)


def _keep_fast_path_closed(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing: `nn.TransformerEncoderLayer` passes over a child without one in eval mode."""


class BakedLayer(nn.Module):
    """A host and its permanent seeds. Attributes that it does not have are the host's: `layer.weight` is
    `layer.host.weight`."""

    def __init__(self, host: nn.Module, seeds: Sequence[FixedSeed], kind: Kind) -> None:
        super().__init__()
        for name in _HOOKS_OF_THE_OUTPUT:
            self.__dict__[name], host.__dict__[name] = host.__dict__[name], self.__dict__[name]
        self.register_forward_hook(_keep_fast_path_closed)
        self.training = host.training
        self.host = host
        self.seeds = nn.ModuleList(seeds)
        self.kind = kind
        programs = [seed.program for seed in seeds]
        self._reads_x = any("x" in program.inputs for program in programs)
        self._axes = axes_for(kind, programs)
        self._draws = any(program.draws for program in programs)
        self._follows_mode = any(program.follows_mode for program in programs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's result with the seeds blended into it. Raises ValueError where a kernel is not for it."""
        result = self.host(*args, **kwargs)
        x = (args[0] if args else kwargs.get(self.kind.x_name)) if self._reads_x else None
        if self.kind.first_of_tuple and type(result) is tuple:
            return (self._blended(result[0], x), *result[1:])
        return self._blended(result, x)

    def _blended(self, h: Tensor, x: Tensor | None) -> Tensor:
        if h.is_nested:
            # nn.TransformerEncoder packs padded batches so in eval mode; every sequence of the pack is a matrix.
            parts = h.unbind()
            inputs = [None] * len(parts) if x is None else x.unbind()
            return torch.nested.as_nested_tensor([self._blended(*part) for part in zip(parts, inputs, strict=True)])
        seeds: list[FixedSeed] = list(self.seeds)  # type: ignore[arg-type]
        axes = self._axes
        return fixed_seeds(
            h,
            x,
            [tensor for seed in seeds for tensor in seed.tensors()],
            [seed.alpha for seed in seeds],
            [seed.manifest_digest for seed in seeds],
            [seed.span[0] for seed in seeds],
            self.kind.width,
            axes.feature_dim,
            axes.length_first,
            self._follows_mode and self.training,
            draw_dropout_seeds(len(seeds), h.device) if self._draws and self.training else None,
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("host")  # absent while it is unpickled
            if host is None:
                raise
            return getattr(host, name)
