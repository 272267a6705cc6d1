"""KasminaLayer: a host layer that holds seeds."""

from __future__ import annotations

import asyncio
import json
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_triton.kasmina import loading
from esper_triton.kasmina.adoption import Adopted, adopt_class, host_class, release_class
from esper_triton.kasmina.cache import KernelCache
from esper_triton.kasmina.dispatch import Dispatch
from esper_triton.kasmina.events import Observer, Transition
from esper_triton.kasmina.kinds import Chunking, kind_of, seed_spans
from esper_triton.kasmina.lifecycle import SeedLifecycleState, check_transition
from esper_triton.kasmina.plan import make_plan
from esper_triton.kasmina.seed import LayerRecord, LoadedKernel, LoadTicket, Seed
from esper_triton.kasmina.state import KasminaStateLayout
from esper_triton.urza import Urza

__all__ = ["HostTransform", "KasminaLayer", "release_layer"]

_S = SeedLifecycleState
_STATE_BUFFER = "_kasmina_state"
_OWN_ATTRIBUTE = "_kasmina"
_BEFORE_GERMINATION = (_S.CULLED, _S.CANCELLED)
_WITHOUT_KERNEL = (_S.DORMANT, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK)
_ENTERED_BY_LOADING = (_S.GERMINATED, _S.LOADING, _S.TRAINING)
_log = logging.getLogger("esper_triton.kasmina")


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


def _keep_fast_path_closed(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing. `nn.TransformerEncoderLayer` computes its children's results without calling
    them in eval mode, unless one of them has a hook; an active seed must not be passed over."""


class KasminaLayer(Adopted):
    """A module from a tensor to a tensor, features last, that holds seeds. Made by `adopt` or `esper_triton.wrap`.

    The module is the same object as before, of a class of its own. While every seed is dormant the host class's
    `forward` runs, with nothing in front of it. While a seed is active, the instance attribute `forward` holds the
    dispatch.

    Moves of a seed take effect at the call that asks for them; call them between training steps. Only a fault seen in
    forward waits, for `commit` (which every move does too). Names that do not exist and moves that the lifecycle does
    not have raise at once and change nothing; a kernel that cannot be loaded does not raise (law 1).
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
    ) -> KasminaLayer:
        """Turns `module` itself into a KasminaLayer and returns it.

        Args:
            num_seeds: seeds of the layer.
            urza: where `load_kernel` looks.
            name: qualified name, for messages and for drawing parameters.
            chunking: `features` divides the output's columns among the seeds; `whole` gives each seed all of them.
            features: the size of the output's last dimension, for a kind of module that is not known here.
            guard: select away non-finite outputs of a seed in every call, on the device.
            telemetry_enabled: measure the time of active calls.

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
        )
        device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
        # A buffer, so that it follows .to(); not persistent, so that the host's state_dict keeps its keys (law 8).
        layer.register_buffer(_STATE_BUFFER, KasminaStateLayout(num_seeds, device=device).storage, persistent=False)
        return layer

    _kasmina: LayerRecord

    @property
    def state(self) -> KasminaStateLayout:
        """The seeds' state on the layer's device."""
        return KasminaStateLayout(len(self._kasmina.seeds), storage=self._buffers[_STATE_BUFFER])

    @property
    def default_transform(self) -> HostTransform:
        """The host's own forward, as a callable that shows the host's attributes."""
        return HostTransform(self, self._host_forward())

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

    async def load_kernel(self, seed: int, artifact_id: str) -> bool:
        """Loads an artifact into a seed, off this thread; the host path runs meanwhile.

        Goes DORMANT (or CULLED, CANCELLED: the slot is opened first), GERMINATED, LOADING, and then TRAINING, or
        GRAFTING with alpha 0 for a kernel without parameters. From ERROR_RECOVERY it retries, keeping learned
        parameters where the artifact is the same. False when the artifact is missing, corrupt, or may not run here (law
        4): the seed is CULLED, one line is logged, and `last_error` tells why.

        Raises IndexError for the seed, InvalidTransition for one that is in use, ValueError without an Urza.
        """
        request, urza = self._begin_load(seed, artifact_id)
        try:
            loaded = await asyncio.to_thread(loading.load, request, urza)
        except Exception as error:
            return KasminaLayer._load_failed(self, request, error)
        except BaseException as error:  # the task was cancelled: the seed must not stay in LOADING
            KasminaLayer._load_failed(self, request, error)
            raise
        # By the class: the layer may have been unwrapped meanwhile, and be no KasminaLayer any more.
        return KasminaLayer._finish_load(self, request, loaded)

    def load_kernel_sync(self, seed: int, artifact_id: str) -> bool:
        """As `load_kernel`, on this thread, for code with no event loop."""
        request, urza = self._begin_load(seed, artifact_id)
        try:
            loaded = loading.load(request, urza)
        except Exception as error:
            return self._load_failed(request, error)
        except BaseException as error:
            self._load_failed(request, error)
            raise
        return self._finish_load(request, loaded)

    def unload_kernel(self, seed: int) -> bool:
        """Takes a seed back to DORMANT, frees its parameters and lets the cache evict its kernel. False when it was
        dormant already. Raises IndexError, and InvalidTransition for a FOSSILIZED or ROLLED_BACK seed."""
        own = self._seed(seed)
        self.commit()
        if own.state is _S.DORMANT:
            return False
        if own.state not in _BEFORE_GERMINATION:
            way_out = _S.CANCELLED if own.state in (_S.GERMINATED, _S.TRAINING) else _S.CULLED
            self._move(own, way_out)
        self._move(own, _S.DORMANT)
        self._rebuild()
        return True

    def graft(self, seed: int) -> None:
        """TRAINING to GRAFTING with alpha 0: from now on the seed contributes. Raises InvalidTransition, IndexError."""
        self.request_transition(seed, _S.GRAFTING)

    def request_transition(self, seed: int, state: SeedLifecycleState) -> None:
        """Moves a seed along the lifecycle table. Raises InvalidTransition for any other move, ValueError for a state
        that `load_kernel` alone enters, IndexError."""
        own, state = self._seed(seed), SeedLifecycleState(state)
        self.commit()
        check_transition(self._kasmina.name, seed, own.state, state)
        if state in _ENTERED_BY_LOADING or own.state is _S.LOADING:
            raise ValueError(
                f"{self._who(own)}: {own.state.name} to {state.name} is made by load_kernel, not by request"
            )
        self._move(own, state)
        self._rebuild()

    def set_alpha(self, seed: int, value: float) -> None:
        """Sets the blending coefficient, in [0, 1], of a seed that contributes. Writes device memory and nothing else,
        so a ramp costs no new plan. Raises ValueError for the value or the seed's state, IndexError."""
        own = self._seed(seed)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{self._who(own)}: alpha must be from 0 to 1, found {value}")
        if not own.state.is_active or own.state is _S.FOSSILIZED:
            raise ValueError(f"{self._who(own)} is {own.state.name}: alpha is set from GRAFTING to FINE_TUNING")
        own.alpha = float(value)
        with torch.no_grad():
            self.state.alpha(seed).fill_(own.alpha)

    def commit(self) -> None:
        """Applies what forward and backward have noted: a seed whose kernel failed goes to ERROR_RECOVERY and
        contributes nothing from now on. Call it at step boundaries (`model.step_boundary()` does)."""
        failed = [seed for seed in self._kasmina.seeds if seed.pending_faults]
        for seed in failed:
            seed.count_faults()
            if seed.state.is_active and seed.kernel is not None:
                _warn("kernel_failed", self._kasmina.name, seed.index, seed.artifact_id, seed.last_error)
                cache = KernelCache.process()
                cache.record_failure(seed.kernel.manifest.id, id(self._kasmina))
                cache.discard(seed.kernel.key)
                source, artifact_id = seed.state, seed.artifact_id
                seed.kernel, seed.alpha, seed.state = None, 0.0, _S.ERROR_RECOVERY
                self._tell(seed, source, artifact_id)
        if failed:
            self._rebuild()

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
                    "specialisation_misses": seed.specialisation_misses,
                }
                for seed in record.seeds
            ],
        }

    def extra_repr(self) -> str:
        """The host's own line, and the state of each seed."""
        states = f"seeds=[{', '.join(seed.state.name for seed in self._kasmina.seeds)}]"
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

    def _host_forward(self) -> Callable[..., Any]:
        prior = self.__dict__.get("forward")
        if isinstance(prior, Dispatch):
            return prior.host_forward
        return prior if prior is not None else types.MethodType(host_class(self).forward, self)

    def _host_dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def _begin_load(self, seed: int, artifact_id: str) -> tuple[loading.LoadRequest, Urza]:
        own, record = self._seed(seed), self._kasmina
        if record.urza is None:
            raise ValueError(f"{self._who(own)}: no Urza to load {artifact_id!r} from; give one to wrap or adopt")
        self.commit()
        if own.state is not _S.ERROR_RECOVERY:
            if own.state in _BEFORE_GERMINATION:
                self._move(own, _S.DORMANT)
            self._move(own, _S.GERMINATED)
        self._move(own, _S.LOADING)
        if own.artifact_id != artifact_id:
            own.parameters = {}
        own.artifact_id, own.last_error, own.ticket = artifact_id, None, LoadTicket()
        self._rebuild()
        request = self._load_request(own, artifact_id, holder=own.ticket)
        return request, record.urza

    def _load_request(self, seed: Seed, artifact_id: str, holder: object) -> loading.LoadRequest:
        record = self._kasmina
        return loading.LoadRequest(
            artifact_id=artifact_id,
            layer_name=record.name,
            layer_key=id(record),
            seed=seed.index,
            span=seed.span,
            kind=record.kind,
            device=self._state_storage().device,
            dtype=self._host_dtype(),
            holder=holder,
        )

    def _finish_load(self, request: loading.LoadRequest, loaded: LoadedKernel) -> bool:
        own = KasminaLayer._awaited(self, request)
        if own is None:
            return False
        try:
            # The layer may have been moved or cast while the artifact was on its way.
            loading.check_dtype(request.who, loaded.manifest, self._host_dtype())
            if not own.parameters:
                own.parameters = loading.make_parameters(request, loaded.manifest)
        except Exception as error:
            return self._load_failed(request, error)
        own.kernel = loaded
        KernelCache.process().pin(loaded.key, loaded.program, own)
        own.ticket = None
        self._move(own, _S.TRAINING if own.parameters else _S.GRAFTING)
        self._rebuild()
        return True

    def _load_failed(self, request: loading.LoadRequest, error: BaseException) -> bool:
        own = KasminaLayer._awaited(self, request)
        if own is not None:
            own.last_error = error
            _warn("load_kernel_failed", request.layer_name, request.seed, request.artifact_id, error)
            self._move(own, _S.CULLED)
            self._rebuild()
        return False

    def _awaited(self, request: loading.LoadRequest) -> Seed | None:
        """The seed that still waits for this load; None where it was unloaded, or the layer unwrapped, meanwhile."""
        record = self.__dict__.get(_OWN_ATTRIBUTE)
        if record is None:
            return None
        own: Seed = record.seeds[request.seed]
        return own if own.ticket is request.holder else None

    def _move(self, seed: Seed, state: SeedLifecycleState) -> None:
        check_transition(self._kasmina.name, seed.index, seed.state, state)
        source, seed.state = seed.state, state
        artifact_id = seed.artifact_id
        if state in _WITHOUT_KERNEL:
            self._release(seed)
        if state is _S.DORMANT:
            seed.reset_counters()
        if state is _S.GRAFTING:
            seed.alpha = 0.0
        for parameter in seed.parameters.values():
            parameter.requires_grad_(not state.is_frozen)
        self._tell(seed, source, artifact_id)

    def _tell(self, seed: Seed, source: SeedLifecycleState, artifact_id: str | None) -> None:
        record = self._kasmina
        event = Transition(
            layer=record.name, seed=seed.index, source=source, target=seed.state, artifact_id=artifact_id
        )
        for observer in tuple(record.observers):
            observer(event)

    def on_transition(self, observer: Observer) -> Callable[[], None]:
        """Calls `observer` after every transition of this layer's seeds, on the thread that commits it, and returns
        what ends that. A copy of the layer has no observers."""
        observers = self._kasmina.observers
        observers.append(observer)
        return lambda: observers.remove(observer) if observer in observers else None

    @staticmethod
    def _release(seed: Seed) -> None:
        if seed.kernel is not None:
            KernelCache.process().unpin(seed.kernel.key, seed)
        seed.kernel, seed.artifact_id, seed.parameters, seed.alpha, seed.ticket = None, None, {}, 0.0, None

    def _state_storage(self) -> Tensor:
        storage = self._buffers[_STATE_BUFFER]
        assert storage is not None  # registered by adopt, and nothing sets it to None
        return storage

    def _rebuild(self) -> None:
        """Writes the device state from the host's, and the dispatch from both."""
        record, state = self._kasmina, self.state
        device = self._state_storage().device
        columns: dict[str, list[Any]] = {
            "lifecycle_states": [int(seed.state) for seed in record.seeds],
            "active_kernel_id": [seed.kernel_id for seed in record.seeds],
            "alpha_blend": [seed.alpha for seed in record.seeds],
            "exec_latency_us": [round(seed.exec_latency_us or 0) for seed in record.seeds],
            "error_count": [seed.error_count for seed in record.seeds],
            "fallback_active": [seed.state is _S.ERROR_RECOVERY for seed in record.seeds],
        }
        with torch.no_grad():
            for field, values in columns.items():
                array: Tensor = getattr(state, field)
                array.copy_(torch.tensor(values, dtype=array.dtype))
        self._drop_dispatch()
        plan = make_plan(record, state.alpha, device)
        if plan is not None:
            dispatch = Dispatch(record, self._host_forward(), plan)
            record.prior_forward, self.__dict__["forward"] = self.__dict__.get("forward"), dispatch
        self._set_fast_path_closed(plan is not None)

    def _drop_dispatch(self) -> None:
        if isinstance(self.__dict__.get("forward"), Dispatch):
            del self.__dict__["forward"]
            if self._kasmina.prior_forward is not None:
                self.__dict__["forward"] = self._kasmina.prior_forward
                self._kasmina.prior_forward = None

    def _set_fast_path_closed(self, closed: bool) -> None:
        ours = [key for key, hook in self._forward_hooks.items() if hook is _keep_fast_path_closed]
        if closed and not ours:
            self.register_forward_hook(_keep_fast_path_closed)
        elif not closed:
            for key in ours:
                del self._forward_hooks[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        for seed in self._kasmina.seeds:
            for name, parameter in seed.parameters.items():
                seed.parameters[name] = _converted(parameter, fn)
        self._rebuild()  # the state has new storage: the plan's views of alpha must follow it
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
        for seed in self._kasmina.seeds:
            self._restore_kernel(seed)
        self._rebuild()

    def _restore_kernel(self, seed: Seed) -> None:
        """After a deep copy the kernel is shared; after unpickling it is loaded again, or the seed is in recovery."""
        if seed.kernel is not None:
            KernelCache.process().pin(seed.kernel.key, seed.kernel.program, seed)
        elif seed.artifact_id is not None and seed.state not in (*_WITHOUT_KERNEL, _S.ERROR_RECOVERY):
            record = self._kasmina
            try:
                if record.urza is None:
                    raise ValueError(f"{self._who(seed)}: no Urza to load {seed.artifact_id!r} from")
                request = self._load_request(seed, seed.artifact_id, holder=seed)
                seed.kernel = loading.load(request, record.urza)
            except Exception as error:
                seed.last_error = error
                seed.state = _S.ERROR_RECOVERY
                _warn("kernel_not_restored", record.name, seed.index, seed.artifact_id, error)


def release_layer(layer: KasminaLayer) -> None:
    """Takes everything away again: the module is what it was before `adopt`. Its seeds are gone."""
    release_class(layer)  # first: it is the one step that can refuse
    KasminaLayer._drop_dispatch(layer)
    KasminaLayer._set_fast_path_closed(layer, False)
    for seed in layer._kasmina.seeds:
        source, artifact_id = seed.state, seed.artifact_id
        KasminaLayer._release(seed)
        if source is not _S.DORMANT:
            seed.state = _S.DORMANT
            KasminaLayer._tell(layer, seed, source, artifact_id)
    del layer._buffers[_STATE_BUFFER]
    layer._non_persistent_buffers_set.discard(_STATE_BUFFER)
    del layer.__dict__[_OWN_ATTRIBUTE]


def _converted(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """As `nn.Module._apply` does for the host's: the same object with new contents wherever torch allows it."""
    with torch.no_grad():
        value = fn(parameter)
        grad = None if parameter.grad is None else fn(parameter.grad)
    try:
        parameter.data = value
    except (RuntimeError, TypeError):  # to or from a kind of tensor of another make, such as meta
        parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
    parameter.grad = grad
    return parameter


def _warn(event: str, layer: str, seed: int, artifact_id: str | None, error: BaseException | None) -> None:
    """One line of JSON, for people and machines."""
    fields = {
        "event": event,
        "layer": layer,
        "seed": seed,
        "artifact_id": artifact_id,
        "error": type(error).__name__,
        "reason": str(error),
    }
    _log.warning("%s", json.dumps(fields))
