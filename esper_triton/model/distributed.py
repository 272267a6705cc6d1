"""Replicas of one model: the same transitions at the same step on every one of them (law 7).

The first rank decides. At every step boundary the ranks exchange what the first one was asked for and what each has
measured (failed calls, loads that have ended), where there is any; then each does the same with it. A load begins on
every rank at the boundary that assigns it, and takes effect at the first one at which every rank has the kernel; where
one rank fails, the seed is culled on all. A call that fails on one rank takes the seed out on all.

Trusts the other ranks, as torch's own collectives of objects do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper_triton.contracts.errors import ReplicaFailed
from esper_triton.kasmina.boundary import end_lost_loads, finish_step, is_silent, tell
from esper_triton.kasmina.layer import KasminaLayer
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.measuring import Measured, measure_step, take_in
from esper_triton.kasmina.moves import Made
from esper_triton.kasmina.pending import PendingLoad
from esper_triton.kasmina.record import LayerRecord
from esper_triton.kasmina.seed import LoadTicket
from esper_triton.kasmina.transitions import Assign, Loaded, LoadFailed, Request, Waiting

__all__ = ["Replicas", "replicate"]

_S = SeedLifecycleState


@dataclass(frozen=True)
class _Artifact:
    """An Assign, or a load that has ended, as it travels: without what is of one process alone."""

    seed: int
    artifact_id: str
    ended: bool
    reason: str | None = None  # why it failed


@dataclass
class _Report:
    """What one rank says of one layer. `requests` are the first rank's, in order."""

    measured: Measured
    ended: list[_Artifact]
    requests: list[Request | _Artifact] = field(default_factory=list)


@dataclass(frozen=True)
class _Load:
    """This rank's load for a seed: under way while `result` is None."""

    artifact_id: str
    ticket: LoadTicket
    result: Loaded | LoadFailed | None = None


class Replicas:
    """The boundaries of one rank's model. Made by `replicate`."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.layers = [module for module in model.modules() if isinstance(module, KasminaLayer)]
        self._loads: list[dict[int, _Load]] = [{} for _ in self.layers]
        for layer in self.layers:
            record = layer._kasmina
            record.deferred, record.follows, record.replicas = True, self.rank != 0, self

    def step_boundary(self, *, auto_advance: bool | None) -> None:
        """The boundary of every rank at once: a collective."""
        with contextlib.ExitStack() as locks:
            for layer in self.layers:
                locks.enter_context(layer._kasmina.queue.lock)
            sent: list[list[Waiting]] = []
            mine: dict[int, _Report] = {}
            for index, layer in enumerate(self.layers):
                waiting, report = self._report(index, layer)
                sent.append(waiting)
                if report is not None:
                    mine[index] = report
            reports = self._exchanged(mine)
            if not any(reports):
                for layer in self.layers:
                    layer._kasmina.step += 1
                return
            made: list[tuple[LayerRecord, list[Made]]] = []
            for index, layer in enumerate(self.layers):
                record = layer._kasmina
                said = [rank.get(index) for rank in reports]
                auto = record.auto_advance if auto_advance is None else auto_advance
                made.append((record, self._finish(index, layer, said, sent[index], auto)))
        for record, moves in made:
            tell(record, moves)

    def close(self) -> None:
        """Ends what `replicate` began, on this rank: requests take effect as in a model without replicas, and nothing
        here refers to the group any more."""
        for layer in self.layers:
            record = layer._kasmina
            record.deferred, record.follows, record.replicas = False, False, None
        self.group = None

    def forget_loads(self) -> None:
        """Drops the loads that this rank has begun. Call it on every rank, after all seeds have become those of a
        checkpoint, where none is LOADING."""
        self._loads = [{} for _ in self.layers]

    def all_reduce_gradients(self) -> None:
        """Averages the gradients of the seeds' parameters over the ranks: a collective, between backward and the
        optimizer's step. `DistributedDataParallel` does it for the host's and does not know the seeds'. A parameter
        that has a gradient on some ranks alone counts as zero on the others."""
        parameters = [p for layer in self.layers for _, p in layer.seed_parameters() if p.requires_grad]
        for device, dtype in dict.fromkeys((p.device, p.dtype) for p in parameters):
            ours = [p for p in parameters if (p.device, p.dtype) == (device, dtype)]
            present = torch.tensor([p.grad is not None for p in ours], device=device).to(dtype)
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in ours]
            flat = torch.cat([present, *(part.flatten() for part in parts)])
            dist.all_reduce(flat, group=self.group)
            some = flat[: len(ours)].tolist()
            for parameter, any_rank, grad in zip(ours, some, self._parts(flat[len(ours) :], ours), strict=True):
                if any_rank:
                    parameter.grad = grad.div_(self.size)

    @staticmethod
    def _parts(flat: Tensor, like: Iterable[nn.Parameter]) -> list[Tensor]:
        parts, offset = [], 0
        for parameter in like:
            parts.append(flat[offset : offset + parameter.numel()].view(parameter.shape).clone())
            offset += parameter.numel()
        return parts

    def _exchanged(self, mine: dict[int, _Report]) -> list[dict[int, _Report]]:
        """What every rank says, by layer. One number travels where none has anything to say, as at most steps: an
        exchange of objects takes ten times as long."""
        device = self.layers[0].state.storage.device if self.layers else None
        said = torch.tensor([len(mine)], device=device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.group)
        reports: list[dict[int, _Report]] = [{} for _ in range(self.size)]
        if said.item():
            dist.all_gather_object(reports, mine, group=self.group)
        return reports

    # ---- what this rank says

    def _report(self, index: int, layer: KasminaLayer) -> tuple[list[Waiting], _Report | None]:
        """The requests that travel, and what is said of the layer; None where there is nothing to say."""
        record = layer._kasmina
        if is_silent(record) and not self._loads[index]:
            return [], None
        measured = measure_step(record)
        end_lost_loads(record)
        requests: list[Request | _Artifact] = []
        sent: list[Waiting] = []
        for waiting in record.queue.take():
            travels = self._noted(index, waiting.request)
            if travels is not None and self.rank == 0:
                requests.append(travels)
                sent.append(waiting)
        ended = [
            _Artifact(seed, load.artifact_id, True, _reason(load.result))
            for seed, load in self._loads[index].items()
            if load.result is not None
        ]
        return sent, _Report(measured, ended, requests)

    def _noted(self, index: int, request: Request) -> Request | _Artifact | None:
        """Remembers what a request says of this rank's loads; returns how it travels, None where it does not."""
        loads = self._loads[index]
        match request:
            case Assign(seed=seed, artifact_id=artifact_id, ticket=ticket):
                known = loads.get(seed)
                if known is None or known.ticket is not ticket:
                    loads[seed] = _Load(artifact_id, ticket)
                return _Artifact(seed, artifact_id, False)
            case Loaded(seed=seed, ticket=ticket) | LoadFailed(seed=seed, ticket=ticket):
                known = loads.get(seed)
                if known is None or known.ticket is not ticket:
                    return None
                if known.result is not None and known.result is not request:
                    return None  # of the deadline and the load's own end the first counts
                loads[seed] = replace(known, result=request)
                return _Artifact(seed, known.artifact_id, True)
            case _:
                return request

    # ---- what every rank does with it

    def _finish(
        self, index: int, layer: KasminaLayer, said: Sequence[_Report | None], sent: list[Waiting], auto: bool
    ) -> list[Made]:
        record = layer._kasmina
        if not any(said) and is_silent(record):
            record.step += 1
            return []
        measured = _agreed_measurements(said)
        take_in(record, measured)
        first = said[0]
        requests, held = self._localised(index, layer, [] if first is None else first.requests, said)
        for request in requests:
            record.queue.order(request)
        made = finish_step(layer, measured, auto_advance=auto)
        for seed, load in list(self._loads[index].items()):
            if record.seeds[seed].ticket is not load.ticket:
                del self._loads[index][seed]  # it has taken effect, or nobody waits for it any more
        if self.rank == 0:
            record.queue.put_back([sent[position] for position in held])
        return made

    def _localised(
        self, index: int, layer: KasminaLayer, asked: Sequence[Request | _Artifact], said: Sequence[_Report | None]
    ) -> tuple[list[Request], list[int]]:
        """The first rank's requests with this rank's own loads in them, and the positions of those that must wait
        because a rank is still loading: the end of the load on the first rank, and what was asked for after it."""
        record = layer._kasmina
        requests: list[Request] = []
        held: list[int] = []
        loading_still: set[int] = set()
        assigned = {item.seed: item.artifact_id for item in asked if isinstance(item, _Artifact) and not item.ended}
        loading = {seed.index: seed.artifact_id for seed in record.seeds if seed.state is _S.LOADING} | assigned
        outcomes = {seed: _agreed_outcome(seed, artifact, said) for seed, artifact in loading.items()}
        for seed, outcome in outcomes.items():
            if seed not in assigned and outcome is not None:
                requests.append(self._result(index, layer, seed, outcome))
        for position, item in enumerate(asked):
            if isinstance(item, _Artifact) and item.ended and item.seed in loading and outcomes[item.seed] is None:
                loading_still.add(item.seed)
            if item.seed in loading_still:
                held.append(position)
            elif not isinstance(item, _Artifact):
                requests.append(item)
            elif not item.ended:
                requests.append(self._assign(index, layer, item))
                outcome = outcomes[item.seed]
                if outcome is not None:
                    requests.append(self._result(index, layer, item.seed, outcome))
        return requests, held

    def _assign(self, index: int, layer: KasminaLayer, item: _Artifact) -> Assign:
        """Of the load that this rank has begun for it already, or of one that begins now."""
        known = self._loads[index].get(item.seed)
        if known is None or known.artifact_id != item.artifact_id:
            load = PendingLoad.of(layer, item.seed, item.artifact_id, force=True, seconds=None)
            self._loads[index][item.seed] = known = _Load(item.artifact_id, load.ticket)
            load.start()
        return Assign(seed=item.seed, artifact_id=item.artifact_id, ticket=known.ticket)

    def _result(self, index: int, layer: KasminaLayer, seed: int, outcome: str) -> Request:
        known = self._loads[index][seed]
        if outcome == _EVERYWHERE or isinstance(known.result, LoadFailed):
            assert known.result is not None
            return known.result
        who = f"seed {seed} of layer {layer._kasmina.name!r}"
        return LoadFailed(seed=seed, ticket=known.ticket, error=ReplicaFailed(f"{who}: {outcome}"))


_EVERYWHERE = "loaded on every rank"


def _agreed_outcome(seed: int, artifact_id: str | None, said: Sequence[_Report | None]) -> str | None:
    """`_EVERYWHERE`, or why the load failed on the first rank on which it did, or None while a rank is loading."""
    ended = []
    for rank, report in enumerate(said):
        for end in [] if report is None else report.ended:
            if (end.seed, end.artifact_id) == (seed, artifact_id):
                if end.reason is not None:
                    return f"rank {rank} could not load {artifact_id}: {end.reason}"
                ended.append(rank)
    return _EVERYWHERE if len(ended) == len(said) else None


def _agreed_measurements(said: Sequence[_Report | None]) -> Measured:
    """The first rank's, and the failed calls of the rank that saw most of them."""
    first = Measured() if said[0] is None else said[0].measured
    faults: dict[int, tuple[int, str]] = {}
    for report in said:
        for seed, fault in ({} if report is None else report.measured.faults).items():
            faults[seed] = max(faults.get(seed, (0, "")), fault, key=lambda f: f[0])
    return replace(first, faults=faults)


def _reason(result: Loaded | LoadFailed | None) -> str | None:
    return f"{type(result.error).__name__}: {result.error}" if isinstance(result, LoadFailed) else None


def replicate(model: nn.Module, group: dist.ProcessGroup | None = None) -> Replicas:
    """Makes `model`, a wrapped model of which every rank of `group` has a replica, go through every transition at the
    same step on every rank. Call it on every rank, before `DistributedDataParallel(model)`.

    From now on every request waits for `model.step_boundary()`, which is a collective. The first rank's requests count;
    those of other ranks are ignored, except that a load that they make beforehand is at hand when the first rank's is
    agreed on. Call `all_reduce_gradients()` of what is returned between backward and the optimizer's step.

    A process that ends while a gloo group lives may abort ("terminate called without an active exception", with or
    without Esper): the group's threads let go of the last collective's tensors when there is no interpreter any more.
    They end with the last reference to the group, and `destroy_process_group` alone leaves that of DDP. So end with

        dist.barrier()
        replicas.close()
        del ddp, replicas
        gc.collect()
        dist.destroy_process_group()
    """
    from esper_triton.model.morphable import MorphableModel  # that module imports this one's neighbours

    if not isinstance(model, MorphableModel):
        raise TypeError(f"{type(model).__name__} is not wrapped; esper_triton.wrap(model, ...) first")
    replicas = Replicas(cast(nn.Module, model), group)
    # DDP would copy the first rank's state over the others', measured times and all, and their check would fail.
    ours = [name for name, _ in cast(nn.Module, model).named_buffers() if name.rpartition(".")[2] == "_kasmina_state"]
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *ours]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, ignored
    )
    return replicas
