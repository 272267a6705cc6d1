"""The blend of a plan as operators that `torch.compile` and `torch.export` can put into a graph.

`esper_triton::blend` and `esper_triton::blend_backward` do what an uncompiled call does, the general way; torch is told
their shapes and their derivative. A plan is named by a text, which is a constant of the graph: a transition makes a new
plan, and with it a new graph; a change of alpha does not, since kernels read it from memory.
"""

from __future__ import annotations

import itertools
import uuid
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_triton.kasmina.blending import Contribution, add_gradients, run_seeds, sample
from esper_triton.kasmina.plan import ActiveSeed, Call, Plan
from esper_triton.kasmina.views import empty_output, extents_of, from_matrix, matrix, settle

__all__ = ["blend", "name_plan"]

_library: Any = torch.library.Library("esper_triton", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own
# Drawn numbers come as an argument: the operators are functions of theirs, and may be run again at any time.
_library.define(
    "blend(Tensor h, Tensor? x, Tensor[] alphas, Tensor[] parameters, Tensor? dropout_seeds, str plan, bool training) "
    "-> (Tensor, Tensor[])"
)
_library.define(
    "blend_backward(Tensor grad_out, Tensor h, Tensor? x, Tensor[] alphas, Tensor[] parameters, Tensor[] saved, "
    "str plan, bool training) -> (Tensor, Tensor, Tensor[])"
)
_plans: weakref.WeakValueDictionary[str, Plan] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
# Of this process alone: what torch caches of a compiled graph must not be found by another's plan of the same number.
_process = uuid.uuid4().hex


def name_plan(plan: Plan) -> str:
    """A name for a plan, under which the operators find it for as long as it is alive."""
    name = f"{_process}-{next(_numbers)}"
    _plans[name] = plan
    return name


def blend(plan: Plan, name: str, h: Tensor, x: Tensor | None, dropout_seeds: Tensor | None, training: bool) -> Tensor:
    """The blended output of a call that is being compiled, whose tensors fit the plan's seeds. `dropout_seeds` as in
    `Call`."""
    alphas = [active.alpha for active in plan.seeds]
    parameters = [parameter for active in plan.seeds for parameter in active.parameters.values()]
    out: Tensor = torch.ops.esper_triton.blend(h, x, alphas, parameters, dropout_seeds, name, training)[0]
    return out


def _plan(name: str) -> Plan:
    plan = _plans.get(name)
    if plan is None:
        raise RuntimeError(
            f"plan {name} of a compiled graph is gone: its layer has had a transition, or was in another process; "
            "compile or export the model again, or use esper_triton.bake for a model that stands alone"
        )
    return plan


def _saved_shapes(plan: Plan, h: Tensor) -> Iterator[tuple[ActiveSeed, str, tuple[int, ...], torch.dtype]]:
    extents = extents_of(h.shape, plan.axes)
    for active in plan.seeds:
        for name, (shape, dtype) in active.program.saved_shapes(extents).items():
            yield active, name, shape, dtype
        if plan.guard:
            yield active, "rejected", (), torch.bool


def _forward(
    h: Tensor,
    x: Tensor | None,
    alphas: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dropout_seeds: Tensor | None,
    name: str,
    training: bool,
) -> tuple[Tensor, list[Tensor]]:
    plan = _plan(name)
    axes = plan.axes
    h2, x2 = matrix(h, axes), None if x is None else matrix(x, axes)
    out, out2 = empty_output(h, axes)
    call = Call(extents_of(h.shape, axes), training, dropout_seeds)
    ran = run_seeds(plan, plan.seeds, x2, h2, out2, call)
    if plan.sampler is not None and plan.sampler.due:
        sample(plan, ran, x2, h2)
    contributions = {id(c.active): c for c in ran}
    settle(out, out2, axes)
    saved = []
    for active, tensor, shape, dtype in _saved_shapes(plan, h):
        contribution = contributions.get(id(active))
        if contribution is None:  # it failed, which backward will see too
            saved.append(torch.zeros(shape, dtype=dtype, device=h.device))
        elif tensor == "rejected":
            assert contribution.rejected is not None
            saved.append(contribution.rejected)
        elif tensor == "dropout_seed":
            saved.append(contribution.saved[tensor].clone())  # an operator's results are no views of its arguments
        else:
            saved.append(contribution.saved[tensor])
    return out, saved


def _forward_fake(
    h: Tensor,
    x: Tensor | None,
    alphas: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dropout_seeds: Tensor | None,
    name: str,
    training: bool,
) -> tuple[Tensor, list[Tensor]]:
    shapes = _saved_shapes(_plan(name), h)
    saved = [torch.empty(shape, dtype=dtype, device=h.device) for _, _, shape, dtype in shapes]
    return torch.empty_like(h), saved


def _backward(
    grad_out: Tensor,
    h: Tensor,
    x: Tensor | None,
    alphas: Sequence[Tensor],
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    name: str,
    training: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    plan = _plan(name)
    axes = plan.axes
    extents = extents_of(h.shape, axes)
    g, h2, x2 = matrix(grad_out, axes), matrix(h, axes), None if x is None else matrix(x, axes)
    grad_h = g.clone(memory_format=torch.contiguous_format)
    grad_x = h.new_empty(0) if x2 is None else torch.zeros_like(x2, memory_format=torch.contiguous_format)
    grads: list[Tensor] = []
    values, kept = iter(parameters), iter(saved)
    own: dict[int, dict[str, Tensor]] = {}
    for active, tensor, _, _ in _saved_shapes(plan, h):
        own.setdefault(id(active), {})[tensor] = next(kept)
    for active in plan.seeds:
        named = {parameter: next(values) for parameter in active.parameters}
        stored = own.get(id(active), {})
        contribution = Contribution(active, stored, stored.pop("rejected", None), extents, training)
        to_parameters = None
        if not active.seed.pending_faults:  # one that has failed since the last boundary contributes nothing
            to_parameters = add_gradients(plan, contribution, g, h2, x2, named, grad_h, None if x2 is None else grad_x)
        if to_parameters is None:
            to_parameters = {n: torch.zeros_like(v, memory_format=torch.contiguous_format) for n, v in named.items()}
        grads += [to_parameters[parameter] for parameter in named]
    return from_matrix(grad_h, h, axes), grad_x if x is None else from_matrix(grad_x, x, axes), grads


def _backward_fake(
    grad_out: Tensor,
    h: Tensor,
    x: Tensor | None,
    alphas: Sequence[Tensor],
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    name: str,
    training: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    plan = _plan(name)

    def empty(like: Tensor) -> Tensor:
        width = like.shape[plan.axes.feature_dim]
        matrix = torch.empty((like.numel() // width, width), dtype=like.dtype, device=like.device)
        return from_matrix(matrix, like, plan.axes)

    grads = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    return empty(h), h.new_empty(0) if x is None else empty(x), grads


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    h, x, alphas, parameters, _, ctx.plan, ctx.training = inputs
    ctx.counts = (len(alphas), len(parameters))
    ctx.save_for_backward(h, x, *alphas, *parameters, *output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    h, x, *rest = ctx.saved_tensors
    alphas, parameters = ctx.counts
    grad_h, grad_x, grads = torch.ops.esper_triton.blend_backward(
        grad_out,
        h,
        x,
        rest[:alphas],
        rest[alphas : alphas + parameters],
        rest[alphas + parameters :],
        ctx.plan,
        ctx.training,
    )
    return grad_h, None if x is None else grad_x, [None] * alphas, grads, None, None, None


_library.impl("blend", _forward, "CompositeExplicitAutograd")
_library.impl("blend_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("esper_triton::blend", _forward_fake, lib=_library)
torch.library.register_fake("esper_triton::blend_backward", _backward_fake, lib=_library)
torch.library.register_autograd("esper_triton::blend", _differentiate, setup_context=_keep_for_backward, lib=_library)
