"""Random commands and faults drive the seeds of a small model; after each of them the table, the pairing of host and
device, and the laws hold."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from seeding import break_every_launch, copy_artifact, flip_one_byte, law_2, memory_folder, own_parameters
from torch import nn

import esper_triton as esper
from esper_triton.contracts.errors import InvalidTransition, SlotEmbargoed
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.kasmina.events import Transition
from esper_triton.kasmina.gates import Policy
from esper_triton.kasmina.schedules import Schedule, cosine, linear
from esper_triton.model import MorphableModel
from esper_triton.urza import Urza

D, R, IN, ROWS = 8, 2, 6, 3
S = SeedLifecycleState
MISSING = "000000000000-cpu-standard-000000000000"

# The moves of the lifecycle, as what is observed: the table, the way into ERROR_RECOVERY, which is never asked for, and
# the forced way out of ROLLED_BACK.
GROWING = [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]
MOVES = {
    (S.DORMANT, S.GERMINATED),
    (S.GERMINATED, S.LOADING),
    *((S.LOADING, target) for target in (S.TRAINING, S.CULLED)),
    *((S.TRAINING, target) for target in (S.GRAFTING, S.CULLED, S.CANCELLED)),
    *((S.GRAFTING, target) for target in (S.STABILIZATION, S.CULLED, S.ROLLED_BACK, S.ERROR_RECOVERY)),
    *((S.STABILIZATION, target) for target in (S.EVALUATING, S.CULLED, S.ROLLED_BACK, S.ERROR_RECOVERY)),
    *((S.EVALUATING, target) for target in (S.FINE_TUNING, S.FOSSILIZED, S.CULLED, S.ROLLED_BACK, S.ERROR_RECOVERY)),
    *((S.FINE_TUNING, target) for target in (S.FOSSILIZED, S.CULLED, S.ROLLED_BACK, S.ERROR_RECOVERY)),
    (S.FOSSILIZED, S.ERROR_RECOVERY),
    (S.CULLED, S.DORMANT),
    (S.CANCELLED, S.DORMANT),
    (S.ROLLED_BACK, S.DORMANT),
    *((S.ERROR_RECOVERY, target) for target in (S.LOADING, S.CULLED)),
}

layers = st.sampled_from(["0", "2"])
seeds = st.integers(0, 1)


def raise_at_launch(*_: object, **__: object) -> None:
    raise RuntimeError("the launch failed")


class Lifecycle(RuleBasedStateMachine):
    """Two layers of two seeds; the second layer's seeds overlap."""

    source: ClassVar[Urza]
    artifact_id: ClassVar[str]

    @initialize(starts=st.tuples(*[st.sampled_from([S.DORMANT, S.TRAINING, *GROWING])] * 4))
    def wrap(self, starts: tuple[S, ...]) -> None:
        KernelCache.process().reset()
        self.folder = Path(tempfile.mkdtemp(prefix="esper-machine-", dir=memory_folder()))
        self.patch = pytest.MonkeyPatch()
        self.store = Urza(self.folder / "urza")
        copy_artifact(self.source, self.store, self.artifact_id)
        torch.manual_seed(0)
        self.model: MorphableModel = esper.wrap(
            nn.Sequential(nn.Linear(IN, 2 * D), nn.Tanh(), nn.Linear(2 * D, D)),
            ["0"],
            seeds_per_layer=2,
            urza=self.store,
            policy=Policy(embargo_epochs=2, sample_every=2, stabilization_steps=1, fine_tuning_steps=1),
        )
        last = self.model[2]  # type: ignore[index]
        KasminaLayer.adopt(
            last, num_seeds=2, urza=self.store, name="2", chunking="whole", policy=Policy(embargo_epochs=1)
        )
        self.store_is_whole = True
        self.epoch = 0
        self.draw = 0
        self.poisoned: set[tuple[str, int]] = set()
        self.moves: list[Transition] = []
        self.states = {(name, seed): S.DORMANT for name in ("0", "2") for seed in range(2)}
        for layer in self.model.kasmina_layers.values():
            layer.on_transition(self.moves.append)
        for (name, seed), start in zip(self.states, starts, strict=True):
            if start is not S.DORMANT:
                self.load(name, seed, force=False, missing=1)
                for to in GROWING[: GROWING.index(start) + 1] if start in GROWING else []:
                    self.model.request_transition(name, seed, to)
                    if to is S.GRAFTING:
                        self.model.set_alpha(name, seed, 0.5)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.patch.undo()
            esper.unwrap(self.model)
            shutil.rmtree(self.folder)
        KernelCache.process().reset()

    # ---- commands

    @rule(name=layers, seed=seeds, force=st.booleans(), missing=st.integers(0, 5))
    def load(self, name: str, seed: int, force: bool, missing: int) -> None:
        self.draw += 1
        state = self.model.kasmina_layers[name].seed_state(seed)
        try:
            loaded = self.model.load_kernel_sync(name, seed, MISSING if missing == 0 else self.artifact_id, force=force)
        except (InvalidTransition, SlotEmbargoed):
            return
        layer = self.model.kasmina_layers[name]
        assert loaded == (layer.seed_state(seed) is S.TRAINING)
        if loaded and state is not S.ERROR_RECOVERY:
            self.poisoned.discard((name, seed))
            generator = torch.Generator().manual_seed(self.draw)
            for parameter in own_parameters(layer, seed).values():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    @rule(name=layers, seed=seeds, nth=st.integers(0, 3))
    def move_on(self, name: str, seed: int, nth: int) -> None:
        layer = self.model.kasmina_layers[name]
        possible = sorted(to for source, to in MOVES if source is layer.seed_state(seed))
        if possible:
            self.move(name, seed, possible[nth % len(possible)])

    @rule(name=layers, seed=seeds, to=st.sampled_from(list(S)))
    def move(self, name: str, seed: int, to: S) -> None:
        before = self.model.kasmina_layers[name].seed_state(seed)
        try:
            self.model.request_transition(name, seed, to)
        except (InvalidTransition, SlotEmbargoed, ValueError):
            assert self.model.kasmina_layers[name].seed_state(seed) is before
        else:
            assert self.model.kasmina_layers[name].seed_state(seed) is to

    @rule(
        name=layers,
        seed=seeds,
        schedule=st.none() | st.builds(linear, st.integers(1, 3)) | st.builds(cosine, st.just(2)),
    )
    def graft(self, name: str, seed: int, schedule: Schedule | None) -> None:
        try:
            self.model.graft(name, seed, schedule)
        except InvalidTransition:
            assert self.states[name, seed] is not S.TRAINING

    @rule(name=layers, seed=seeds, value=st.floats(0, 1, width=32))
    def set_alpha(self, name: str, seed: int, value: float) -> None:
        try:
            self.model.set_alpha(name, seed, value)
        except ValueError:
            state = self.states[name, seed]
            assert not state.is_active or state is S.FOSSILIZED

    @rule(name=layers, seed=seeds)
    def unload(self, name: str, seed: int) -> None:
        try:
            self.model.unload_kernel(name, seed)
        except InvalidTransition:
            assert self.states[name, seed] in (S.FOSSILIZED, S.ROLLED_BACK)

    @rule(name=layers, seed=seeds, force=st.booleans())
    def reset(self, name: str, seed: int, force: bool) -> None:
        try:
            self.model.reset_seed(name, seed, force=force)
        except (InvalidTransition, SlotEmbargoed):
            return
        assert self.model.kasmina_layers[name].seed_state(seed) is S.DORMANT

    @rule(auto_advance=st.booleans())
    def train(self, auto_advance: bool) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.draw)
            out = self.model(torch.randn(ROWS, IN))  # type: ignore[operator]
        loss = out.square().mean()
        seeds_loss = self.model.seed_loss()
        (loss if seeds_loss is None else loss + seeds_loss).backward()
        self.model.zero_grad()
        self.model.step_boundary(auto_advance=auto_advance)

    @rule(name=layers, seed=seeds)
    def evaluate(self, name: str, seed: int) -> None:
        x = torch.ones(ROWS, IN)
        try:
            self.model.evaluate_seed(name, seed, lambda m: m(x).square().mean().item(), repeats=2)
        except ValueError:
            assert self.states[name, seed] not in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING)

    @rule()
    def next_epoch(self) -> None:
        self.epoch += 1
        self.model.epoch_boundary(self.epoch)

    @rule(name=layers, seed=seeds, to=st.sampled_from(list(S)), other=st.sampled_from(list(S)))
    def ask_inside_of_a_step(self, name: str, seed: int, to: S, other: S) -> None:
        before = self.model.kasmina_layers[name].seed_state(seed)
        with self.model.within_step():
            for state in (to, other):
                try:
                    self.model.request_transition(name, seed, state)
                except (InvalidTransition, SlotEmbargoed, ValueError):
                    continue
            assert self.model.kasmina_layers[name].seed_state(seed) is before

    # ---- faults

    @rule(seed=seeds, name=layers)
    def poison(self, name: str, seed: int) -> None:
        own = own_parameters(self.model.kasmina_layers[name], seed)
        for parameter in own.values():
            parameter.data.fill_(float("nan"))
        if own:
            self.poisoned.add((name, seed))

    @rule(backward=st.booleans())
    def raise_in_one_step(self, backward: bool) -> None:
        with pytest.MonkeyPatch.context() as patch:
            break_every_launch(patch, raise_at_launch, forward=not backward)
            x = torch.ones(ROWS, IN)
            out = self.model(x)  # type: ignore[operator]
            if not backward:
                assert torch.equal(out, self.host(x))
            out.sum().backward()
        self.model.zero_grad()
        self.model.step_boundary()

    @rule()
    def evict_what_is_in_use(self) -> None:
        KernelCache.process().reset()

    @precondition(lambda self: self.store_is_whole)
    @rule(how=st.sampled_from([flip_one_byte, lambda store, _: shutil.rmtree(store.root)]))
    def damage_the_store(self, how: Callable[[Urza, str], None]) -> None:
        how(self.store, self.artifact_id)
        self.store_is_whole = False

    @rule()
    def repair_the_store(self) -> None:
        shutil.rmtree(self.store.root, ignore_errors=True)
        copy_artifact(self.source, self.store, self.artifact_id)
        self.store_is_whole = True

    # ---- what always holds

    def host(self, x: torch.Tensor) -> torch.Tensor:
        first, tanh, last = self.model  # type: ignore[misc]
        return last.default_transform(tanh(first.default_transform(x)))  # type: ignore[no-any-return]

    @invariant()
    def every_move_was_one_of_the_table(self) -> None:
        for event in self.moves:
            key = (event.layer, event.seed)
            assert self.states[key] is event.source
            assert (event.source, event.target) in MOVES
            self.states[key] = event.target
        self.moves.clear()
        for name, layer in self.model.kasmina_layers.items():
            assert [layer.seed_state(seed) for seed in range(2)] == [self.states[name, seed] for seed in range(2)]

    @invariant()
    def host_and_device_agree(self) -> None:
        for layer in self.model.kasmina_layers.values():
            record, state = layer._kasmina, layer.state
            stats = layer.get_layer_stats()["seeds"]
            assert state.lifecycle_states.tolist() == [layer.seed_state(seed) for seed in range(2)]
            assert torch.equal(state.alpha_blend, torch.tensor([s["alpha"] for s in stats]))
            assert state.error_count.tolist() == [seed.error_count for seed in record.seeds]
            assert state.active_kernel_id.tolist() == [seed.kernel_id for seed in record.seeds]
            assert state.crc32() == record.crc32
            assert len(record.queue) == 0
            contributes = [seed.index for seed in record.seeds if seed.state.is_active]
            dispatch = vars(layer).get("forward")
            assert ([] if dispatch is None else [a.seed.index for a in dispatch.plan.seeds]) == contributes
            for seed in record.seeds:
                has_kernel = seed.state is S.TRAINING or seed.state.is_active
                assert (seed.kernel is not None) == has_kernel
                assert bool(seed.parameters) == (has_kernel or seed.state is S.ERROR_RECOVERY)
                assert all(p.requires_grad != seed.state.is_frozen for p in seed.parameters.values())

    @invariant()
    def each_layer_computes_what_law_1_and_law_2_say(self) -> None:
        for name, width in (("0", IN), ("2", 2 * D)):
            layer = self.model.kasmina_layers[name]
            x = torch.linspace(-1, 1, ROWS * width).reshape(ROWS, width)
            before = layer._kasmina.forward_calls_active
            with torch.no_grad():
                out, host = layer(x), layer.default_transform(x)
            layer._kasmina.forward_calls_active = before  # as if nobody had looked
            active = [seed for seed in range(2) if layer.seed_state(seed).is_active]
            if not any(layer.state.alpha(seed) > 0 for seed in active):
                assert torch.equal(out, host)
            elif not any((name, seed) in self.poisoned for seed in active):
                parts = [
                    (
                        layer.seed_span(seed),
                        float(layer.state.alpha(seed)),
                        {n: p.double() for n, p in own_parameters(layer, seed).items()},
                    )
                    for seed in active
                ]
                wanted = law_2(host.double(), parts)
                torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="esper_triton.kasmina")


def test_the_lifecycle_holds_under_random_commands_and_faults(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    class Machine(Lifecycle):
        source = adapter_store
        artifact_id = adapter_for(D, R)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
