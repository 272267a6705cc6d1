"""KasminaLayer: a host layer that holds seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from esper_triton.contracts.errors import ArtifactRefused
from esper_triton.kasmina.adoption import Adopted, adopt_class, host_class, release_class
from esper_triton.kasmina.boundary import (
    commit,
    commits_at_once,
    drop_dispatch,
    end_step,
    host_forward,
    install_dispatch,
    put,
    refresh,
    set_hook,
    state_storage,
    tell,
    write_state,
)
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.dispatch import Dispatch
from esper_triton.kasmina.events import MissObserver, Observer
from esper_triton.kasmina.gates import Policy
from esper_triton.kasmina.kinds import Chunking, kind_of, seed_spans
from esper_triton.kasmina.lifecycle import SeedLifecycleState
from esper_triton.kasmina.moves import Made, release, warn
from esper_triton.kasmina.pending import PendingLoad
from esper_triton.kasmina.record import LayerRecord, make_clock
from esper_triton.kasmina.restore import converted, restore_kernels
from esper_triton.kasmina.schedules import Schedule
from esper_triton.kasmina.seed import Seed, SeedLoss
from esper_triton.kasmina.state import KasminaStateLayout
from esper_triton.kasmina.training import seed_loss
from esper_triton.kasmina.transitions import Assign, Move, Outlook, Request, Reset, SetAlpha, Unload
from esper_triton.urza import Urza

__all__ = ["HostTransform", "KasminaLayer", "release_layer"]

_S = SeedLifecycleState
_STATE_BUFFER = "_kasmina_state"
_OWN_ATTRIBUTE = "_kasmina"


class HostTransform:
    """The host's own forward, bound to its layer. Every attribute is the layer's: `default_transform.weight is
    layer.weight`."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self._layer = layer
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The host's result, without hooks."""
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __repr__(self) -> str:
        return f"<default transform of {host_class(self._layer).__name__}>"


class KasminaLayer(Adopted):
    """A module from a tensor to a tensor that holds seeds. Made by `adopt` or `esper_triton.wrap`.

    Features are in the dimension of the host's kind: the last one, or that of the channels of a convolution or a norm.
    Seeds see one row a place, and which rows are of one item where the layout of their blueprint asks for it. Attention
    gives a tuple; seeds work on its first element.

    The module is the same object as before, of a class of its own. While every seed is dormant the host class's
    `forward` runs, with nothing in front of it. While a seed is active, the instance attribute `forward` holds the
    dispatch.

    Moves of a seed are checked at the call that asks for them, against the state that the seed will have after what was
    asked for before, and take effect at a boundary (law 7). A call from the training thread, between two steps, is a
    boundary itself: it has taken effect when it returns. The training thread is the one that adopted the layer, or the
    one that committed last. Requests from other threads wait for `commit` or `step_boundary`, and every request does so
    inside of `model.within_step()` and after `model.defer_transitions()`. Names that do not exist and moves that the
    lifecycle does not have raise at once and change nothing; a kernel that cannot be loaded does not raise (law 1).
    """

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        *,
        num_seeds: int = 4,
        urza: Urza | None = None,
        name: str = "",
        chunking: Chunking = "features",
        features: int | None = None,
        guard: bool = False,
        telemetry_enabled: bool = True,
        policy: Policy | None = None,
    ) -> KasminaLayer:
        """Turns `module` itself into a KasminaLayer and returns it.

        Args:
            num_seeds: seeds of the layer.
            urza: where `load_kernel` looks.
            name: qualified name, for messages and for drawing parameters.
            chunking: `features` divides the output's columns among the seeds; `whole` gives each seed all of them.
            features: the size of the output's last dimension, for a kind of module that is not known here.
            guard: select away non-finite outputs of a seed in every call, on the device.
            telemetry_enabled: measure the time of active calls, and sample what seeds put out.
            policy: gates and times of the lifecycle; the defaults of `Policy`.

        Raises TypeError for a module that cannot be adopted, with the reason, and ValueError for one that is adopted
        already or seeds that do not fit its width. Nothing is changed then.
        """
        if isinstance(module, KasminaLayer):
            raise ValueError(f"layer {module._kasmina.name!r} is already a KasminaLayer; unwrap it first")
        kind = kind_of(module, features)
        spans = seed_spans(kind.width, num_seeds, chunking)
        adopt_class(module, cls)
        layer = cast(KasminaLayer, module)
        layer._kasmina = LayerRecord(
            name=name,
            kind=kind,
            seeds=tuple(Seed(index, span) for index, span in enumerate(spans)),
            chunking=chunking,
            urza=urza,
            guard=guard,
            telemetry_enabled=telemetry_enabled,
            policy=policy or Policy(),
        )
        layer._kasmina.clock = make_clock(layer._kasmina)
        device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
        # A buffer, so that it follows .to(); not persistent, so that the host's state_dict keeps its keys (law 8).
        layer.register_buffer(_STATE_BUFFER, KasminaStateLayout(num_seeds, device=device).storage, persistent=False)
        write_state(layer)
        return layer

    _kasmina: LayerRecord

    @property
    def state(self) -> KasminaStateLayout:
        """The seeds' state on the layer's device."""
        return KasminaStateLayout(len(self._kasmina.seeds), storage=self._buffers[_STATE_BUFFER])

    @state.setter
    def state(self, state: KasminaStateLayout) -> None:
        # PEFT takes any `state` of a layer for that of bitsandbytes, and hands it to the layer, which is the same one.
        if not isinstance(state, KasminaStateLayout) or state.storage is not self._buffers[_STATE_BUFFER]:
            raise AttributeError(f"the state of layer {self._kasmina.name!r} follows its seeds and cannot be set")

    @property
    def default_transform(self) -> HostTransform:
        """The host's own forward, as a callable that shows the host's attributes."""
        return HostTransform(self, host_forward(self))

    def seed_state(self, seed: int) -> SeedLifecycleState:
        """The state of one seed. Raises IndexError."""
        return self._seed(seed).state

    def seed_span(self, seed: int) -> tuple[int, int]:
        """Columns [start, stop) that one seed works on. Raises IndexError."""
        return self._seed(seed).span

    def last_error(self, seed: int) -> BaseException | None:
        """What went wrong last with a seed: why its kernel was not loaded, or what its launch raised. Raises
        IndexError."""
        return self._seed(seed).last_error

    def seed_parameters(self, state: SeedLifecycleState | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (`<seed>.<parameter>`) and parameters of the seeds that have a kernel, or of those in one state."""
        for seed in self._kasmina.seeds:
            if state is None or seed.state is state:
                for name, parameter in seed.parameters.items():
                    yield f"{seed.index}.{name}", parameter

    async def load_kernel(
        self, seed: int, artifact_id: str, *, force: bool = False, deadline_s: float | None = None
    ) -> bool:
        """Loads an artifact into a seed, off this thread; the host path runs meanwhile.

        Goes DORMANT (or CULLED after its embargo, or CANCELLED: the slot is opened first), GERMINATED, LOADING, and
        then TRAINING, or GRAFTING with alpha 0 for a kernel without parameters. From ERROR_RECOVERY it retries, keeping
        learned parameters where the artifact is the same; a kernel that has failed in this process is refused there
        without `force`, and the seed stays. False when the artifact is missing, corrupt, late, or may not
        run here (law 4): the seed is CULLED, one line is logged, and `last_error` tells why.

        Args:
            force: load a kernel that has failed while it ran in this process all the same.
            deadline_s: seconds that the load may take once it has begun; the policy's by default.

        Raises IndexError for the seed, InvalidTransition for one that is in use, SlotEmbargoed, ValueError without an
        Urza.
        """
        load = self._begin_load(seed, artifact_id, force, deadline_s)
        if load is None:
            return False
        # By the class from here on: the layer may be unwrapped meanwhile, and be no KasminaLayer any more.
        future = load.start()
        try:
            await asyncio.wait([asyncio.wrap_future(future)])
        except BaseException as error:  # the task was cancelled: the seed must not stay in LOADING
            load.fail(error)
            KasminaLayer._settle(self)
            raise
        KasminaLayer._settle(self)
        return load.succeeded

    def load_kernel_sync(self, seed: int, artifact_id: str, *, force: bool = False) -> bool:
        """As `load_kernel`, on this thread and with no deadline, for code with no event loop."""
        load = self._begin_load(seed, artifact_id, force, None)
        if load is None:
            return False
        try:
            load.run()
        finally:
            self._settle()
        return load.succeeded

    def unload_kernel(self, seed: int) -> bool:
        """Takes a seed back to DORMANT, frees its parameters, lets the cache evict its kernel and opens the slot. False
        when it was dormant already. Raises IndexError, and InvalidTransition for a FOSSILIZED or ROLLED_BACK seed."""
        self._seed(seed)
        return self._request(Unload(seed=seed)).state is not _S.DORMANT

    def graft(self, seed: int, schedule: Schedule | None = None) -> None:
        """TRAINING to GRAFTING with alpha 0: from now on the seed contributes. With a schedule alpha rises at each step
        boundary as it says; without one, by `set_alpha`. Raises InvalidTransition, IndexError."""
        self._seed(seed)
        self._request(Move(seed=seed, target=_S.GRAFTING, schedule=schedule))

    def request_transition(self, seed: int, state: SeedLifecycleState) -> None:
        """Moves a seed along the lifecycle table. Raises InvalidTransition for any other move, SlotEmbargoed for a slot
        that is not open yet, ValueError for a state that `load_kernel` alone enters, IndexError."""
        self._seed(seed)
        self._request(Move(seed=seed, target=SeedLifecycleState(state)))

    def rollback(self, seed: int) -> None:
        """Emergency: the seed, in GRAFTING to FINE_TUNING, contributes nothing any more, and its slot is locked until
        `reset_seed(seed, force=True)`. Raises InvalidTransition, IndexError."""
        self.request_transition(seed, _S.ROLLED_BACK)

    def reset_seed(self, seed: int, *, force: bool = False) -> bool:
        """Opens the slot of a seed that is gone: CULLED, after its embargo, or CANCELLED, to DORMANT; with `force`
        during the embargo too, and from ROLLED_BACK. False when it was dormant already. Raises InvalidTransition,
        SlotEmbargoed, IndexError."""
        self._seed(seed)
        return self._request(Reset(seed=seed, force=force)).state is not _S.DORMANT

    def set_alpha(self, seed: int, value: float) -> None:
        """Sets the blending coefficient, in [0, 1], of a seed that contributes, and ends its schedule. Writes device
        memory and nothing else, so a ramp costs no new plan. Raises ValueError for the value or the seed's state,
        IndexError."""
        own = self._seed(seed)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{self._who(own)}: alpha must be from 0 to 1, found {value}")
        self._request(SetAlpha(seed=seed, value=float(value)))

    def set_seed_loss(self, seed: int, loss: SeedLoss | None) -> None:
        """What a seed of this slot learns in TRAINING: `loss(k, h)`, 0-d, of its own output and the host's on its span,
        both [..., span]. None is the default: the relative squared error of k against h. Raises IndexError."""
        self._seed(seed).loss = loss

    def seed_loss(self) -> Tensor | None:
        """The sum of the losses of the seeds in TRAINING over the layer's last training call (train mode, gradients
        enabled), 0-d; None where there is none. Its graph reaches their parameters alone. Uses the call up."""
        return seed_loss(self._kasmina)

    def is_ready_for_transition(self, seed: int) -> bool:
        """Whether the seed's stage was done as of the last step boundary, so that its next move can be ordered. Raises
        IndexError."""
        return self._seed(seed).is_ready

    def commit(self) -> None:
        """Applies what forward and backward have noted, and what waits: a seed whose kernel failed goes to
        ERROR_RECOVERY and contributes nothing from now on."""
        commit(self)

    def step_boundary(self, *, auto_advance: bool = False) -> None:
        """Call it between training steps, for a layer without a model (`model.step_boundary()` does it for all). As
        `commit`, and a step has passed: ramps advance, stages are found to be done. With
        `auto_advance` seeds that are ready make their next move."""
        end_step(self, auto_advance=auto_advance)

    def get_layer_stats(self) -> dict[str, Any]:
        """Everything measured so far; None where nothing was. Counts faults that wait for the next commit too."""
        record = self._kasmina
        return {
            "layer": record.name,
            "num_seeds": len(record.seeds),
            "active_seeds": sum(seed.state.is_active for seed in record.seeds),
            "chunking": record.chunking,
            "guard": record.guard,
            "telemetry_enabled": record.telemetry_enabled,
            "forward_calls_active": record.forward_calls_active,
            "cache": KernelCache.process().stats()._asdict(),
            "seeds": [
                {
                    "seed": seed.index,
                    "state": seed.state.name,
                    "artifact_id": seed.artifact_id,
                    "alpha": seed.alpha,
                    "span": seed.span,
                    "parameters": sum(p.numel() for p in seed.parameters.values()),
                    "error_count": seed.error_count + seed.pending_faults,
                    "exec_latency_us": seed.exec_latency_us,
                    "kernel_load_latency_us": seed.load_latency_us,
                    "activation_variance": None if seed.activations is None else seed.activations.variance,
                    "dead_neuron_ratio": None if seed.activations is None else seed.activations.dead_ratio,
                    "avg_correlation": None if seed.activations is None else seed.activations.correlation,
                    "specialisation_misses": seed.specialisation_misses,
                    "health": seed.health,
                    "is_ready_for_transition": seed.is_ready,
                    "reconstruction_error": seed.reconstruction_error,
                }
                for seed in record.seeds
            ],
        }

    def extra_repr(self) -> str:
        """The host's own line, and the state of each seed."""
        record: LayerRecord | None = self.__dict__.get(_OWN_ATTRIBUTE)
        if record is None:  # torchao keeps this method, bound, and calls it after `unwrap` too
            return host_class(self).extra_repr(self)
        states = f"seeds=[{', '.join(seed.state.name for seed in record.seeds)}]"
        host = super().extra_repr()
        return f"{host}, {states}" if host else states

    # What follows is the layer's own.

    def _seed(self, seed: int) -> Seed:
        seeds = self._kasmina.seeds
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < len(seeds):
            raise IndexError(f"layer {self._kasmina.name!r} has seeds 0 to {len(seeds) - 1}, found {seed!r}")
        return seeds[seed]

    def _who(self, seed: Seed) -> str:
        return f"seed {seed.index} of layer {self._kasmina.name!r}"

    def _begin_load(self, seed: int, artifact_id: str, force: bool, deadline_s: float | None) -> PendingLoad | None:
        own, record = self._seed(seed), self._kasmina
        if record.urza is None:
            raise ValueError(f"{self._who(own)}: no Urza to load {artifact_id!r} from; give one to wrap or adopt")
        if commits_at_once(record):
            commit(self)
        if not force and record.queue.outlook(own).state is _S.ERROR_RECOVERY:
            # Refused here and not by the load, which would cull the seed with all that it has learned.
            try:
                KernelCache.process().check_not_failed(artifact_id)
            except ArtifactRefused as error:
                own.last_error = error
                warn("load_kernel_failed", record.name, seed, artifact_id, error)
                return None
        load = PendingLoad.of(self, seed, artifact_id, force=force, seconds=deadline_s)
        self._request(Assign(seed=seed, artifact_id=artifact_id, ticket=load.ticket))
        return load

    def _request(self, request: Request) -> Outlook:
        """Queues a request; on the training thread, outside of a step, this is a boundary itself."""
        at_once = commits_at_once(self._kasmina)
        if at_once:
            commit(self)
        before = put(self._kasmina, request)
        if at_once:
            commit(self)
        return before

    def _settle(self) -> None:
        """What is there of a load takes effect, where this thread may decide that. The layer may be unwrapped by
        now."""
        record = self.__dict__.get(_OWN_ATTRIBUTE)
        if record is not None and commits_at_once(record):
            commit(self)

    def on_transition(self, observer: Observer) -> Callable[[], None]:
        """Calls `observer` after every transition of this layer's seeds, on the thread that commits it, and returns
        what ends that. A copy of the layer has no observers."""
        observers = self._kasmina.observers
        observers.append(observer)
        return lambda: observers.remove(observer) if observer in observers else None

    def on_specialisation_miss(self, observer: MissObserver) -> Callable[[], None]:
        """Calls `observer` at step boundaries, once for each artifact of this layer that calls have wanted for another
        dtype or device than its kernel is for (the host has served them), and returns what ends that."""
        observers = self._kasmina.miss_observers
        observers.append(observer)
        return lambda: observers.remove(observer) if observer in observers else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaLayer:
        before = state_storage(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        if not before.is_meta:
            state_storage(self).copy_(before)  # to_empty() leaves it undefined
        for seed in self._kasmina.seeds:
            # Another dictionary: the plan that is still there keeps its own.
            seed.parameters = {name: converted(parameter, fn) for name, parameter in seed.parameters.items()}
        if before.is_meta:
            write_state(self)
        install_dispatch(self)  # the state has new storage: the plan's views of alpha must follow it
        return self

    def _esper_state_to_keep(self, state: dict[str, Any]) -> dict[str, Any]:
        kept = dict(state)
        if isinstance(kept.get("forward"), Dispatch):
            del kept["forward"]
            if self._kasmina.prior_forward is not None:
                kept["forward"] = self._kasmina.prior_forward
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch does not annotate it
        restore_kernels(self)
        refresh(self)


def release_layer(layer: KasminaLayer) -> None:
    """Takes everything away again: the module is what it was before `adopt`. Its seeds are gone."""
    release_class(layer)  # first: it is the one step that can refuse
    drop_dispatch(layer)
    set_hook(layer, None)
    gone: list[Made] = []
    for seed in layer._kasmina.seeds:
        source, artifact_id = seed.state, seed.artifact_id
        release(seed)
        if source is not _S.DORMANT:
            seed.state = _S.DORMANT
            gone.append((seed.index, source, _S.DORMANT, artifact_id))
    tell(layer._kasmina, gone)
    del layer._buffers[_STATE_BUFFER]
    layer._non_persistent_buffers_set.discard(_STATE_BUFFER)
    del layer.__dict__[_OWN_ATTRIBUTE]
