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

from esper_triton.kasmina.autograd import add_gradients
from esper_triton.kasmina.plan import ActiveSeed, Contribution, Plan
from esper_triton.kasmina.views import empty_output, from_matrix, matrix, settle

__all__ = ["blend", "name_plan"]

_library: Any = torch.library.Library("esper_triton", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own
_library.define("blend(Tensor h, Tensor? x, Tensor[] alphas, Tensor[] parameters, str plan) -> (Tensor, Tensor[])")
_library.define(
    "blend_backward(Tensor grad_out, Tensor h, Tensor? x, Tensor[] alphas, Tensor[] parameters, Tensor[] saved, "
    "str plan) -> (Tensor, Tensor, Tensor[])"
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


def blend(plan: Plan, name: str, h: Tensor, x: Tensor | None) -> Tensor:
    """The blended output of a call that is being compiled, whose tensors fit the plan's seeds."""
    alphas = [active.alpha for active in plan.seeds]
    parameters = [parameter for active in plan.seeds for parameter in active.parameters.values()]
    out: Tensor = torch.ops.esper_triton.blend(h, x, alphas, parameters, name)[0]
    return out


def _plan(name: str) -> Plan:
    plan = _plans.get(name)
    if plan is None:
        raise RuntimeError(
            f"plan {name} of a compiled graph is gone: its layer has had a transition, or was in another process; "
            "compile or export the model again, or use esper_triton.bake for a model that stands alone"
        )
    return plan


def _saved_shapes(plan: Plan, rows: int) -> Iterator[tuple[ActiveSeed, str, tuple[int, ...], torch.dtype]]:
    for active in plan.seeds:
        for name, (shape, dtype) in active.program.saved_shapes(rows).items():
            yield active, name, shape, dtype
        if plan.guard:
            yield active, "rejected", (), torch.bool


def _forward(
    h: Tensor, x: Tensor | None, alphas: Sequence[Tensor], parameters: Sequence[Tensor], name: str
) -> tuple[Tensor, list[Tensor]]:
    from esper_triton.kasmina.dispatch import run_seeds  # which imports this module

    plan = _plan(name)
    dim = plan.feature_dim
    h2, x2 = matrix(h, dim), None if x is None else matrix(x, dim)
    out, out2 = empty_output(h, dim)
    contributions = {id(c.active): c for c in run_seeds(plan, plan.seeds, x2, h2, out2)}
    settle(out, out2, dim)
    saved = []
    for active, tensor, shape, dtype in _saved_shapes(plan, h2.shape[0]):
        contribution = contributions.get(id(active))
        if contribution is None:  # it failed, which backward will see too
            saved.append(torch.zeros(shape, dtype=dtype, device=h.device))
        elif tensor == "rejected":
            assert contribution.rejected is not None
            saved.append(contribution.rejected)
        else:
            saved.append(contribution.saved[tensor])
    return out, saved


def _forward_fake(
    h: Tensor, x: Tensor | None, alphas: Sequence[Tensor], parameters: Sequence[Tensor], name: str
) -> tuple[Tensor, list[Tensor]]:
    plan = _plan(name)
    saved = [
        torch.empty(shape, dtype=dtype, device=h.device)
        for _, _, shape, dtype in _saved_shapes(plan, h.numel() // plan.width)
    ]
    return torch.empty_like(h), saved


def _backward(
    grad_out: Tensor,
    h: Tensor,
    x: Tensor | None,
    alphas: Sequence[Tensor],
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    name: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    plan = _plan(name)
    dim = plan.feature_dim
    g, h2, x2 = matrix(grad_out, dim), matrix(h, dim), None if x is None else matrix(x, dim)
    grad_h = g.clone(memory_format=torch.contiguous_format)
    grad_x = h.new_empty(0) if x2 is None else torch.zeros_like(x2, memory_format=torch.contiguous_format)
    grads: list[Tensor] = []
    values, kept = iter(parameters), iter(saved)
    own: dict[int, dict[str, Tensor]] = {}
    for active, tensor, _, _ in _saved_shapes(plan, h2.shape[0]):
        own.setdefault(id(active), {})[tensor] = next(kept)
    for active in plan.seeds:
        named = {parameter: next(values) for parameter in active.parameters}
        stored = own.get(id(active), {})
        contribution = Contribution(active, {}, stored.pop("rejected", None))
        to_parameters = None
        if not active.seed.pending_faults:  # one that has failed since the last boundary contributes nothing
            to_parameters = add_gradients(
                plan, contribution, g, h2, x2, named, stored, grad_h, None if x2 is None else grad_x
            )
        if to_parameters is None:
            to_parameters = {n: torch.zeros_like(v, memory_format=torch.contiguous_format) for n, v in named.items()}
        grads += [to_parameters[parameter] for parameter in named]
    return from_matrix(grad_h, h, dim), grad_x if x is None else from_matrix(grad_x, x, dim), grads


def _backward_fake(
    grad_out: Tensor,
    h: Tensor,
    x: Tensor | None,
    alphas: Sequence[Tensor],
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    name: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    plan = _plan(name)

    def empty(like: Tensor) -> Tensor:
        width = like.shape[plan.feature_dim]
        matrix = torch.empty((like.numel() // width, width), dtype=like.dtype, device=like.device)
        return from_matrix(matrix, like, plan.feature_dim)

    grads = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    return empty(h), h.new_empty(0) if x is None else empty(x), grads


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    h, x, alphas, parameters, ctx.plan = inputs
    ctx.counts = (len(alphas), len(parameters))
    ctx.save_for_backward(h, x, *alphas, *parameters, *output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    h, x, *rest = ctx.saved_tensors
    alphas, parameters = ctx.counts
    grad_h, grad_x, grads = torch.ops.esper_triton.blend_backward(
        grad_out, h, x, rest[:alphas], rest[alphas : alphas + parameters], rest[alphas + parameters :], ctx.plan
    )
    return grad_h, None if x is None else grad_x, [None] * alphas, grads, None


_library.impl("blend", _forward, "CompositeExplicitAutograd")
_library.impl("blend_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("esper_triton::blend", _forward_fake, lib=_library)
torch.library.register_fake("esper_triton::blend_backward", _backward_fake, lib=_library)
torch.library.register_autograd("esper_triton::blend", _differentiate, setup_context=_keep_for_backward, lib=_library)
