"""Laws 4, 5 and 6: what may run, what is one unit, and what has a key of its own."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from seeding import copy_artifact, flip_one_byte, grow, linear_with_seeds

import esper_triton as esper
from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    EsperError,
    UntrustedArtifact,
)
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina import KasminaLayer, KernelCache, SeedLifecycleState
from esper_triton.tezzeret import plan as planning
from esper_triton.tezzeret.plan import plan_build
from esper_triton.tezzeret.targets import parse_target
from esper_triton.urza import Urza

D, R, IN = 16, 4, 6
PACKAGE = Path(esper.__file__).parent


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    KernelCache.process().reset()
    yield
    KernelCache.process().reset()


# ---- Law 4: only proven code runs


def _refused(layer: KasminaLayer, artifact_id: str) -> BaseException:
    x = torch.randn(3, IN)
    host = layer(x)
    assert layer.load_kernel_sync(0, artifact_id) is False
    assert layer.seed_state(0) is SeedLifecycleState.CULLED
    assert torch.equal(layer(x), host)
    error = layer.last_error(0)
    assert error is not None
    return error


def test_law_4_a_flipped_byte_is_refused(store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]) -> None:
    artifact_id = copy_artifact(adapter_store, store, adapter_for(D, R))
    flip_one_byte(store, artifact_id)
    error = _refused(linear_with_seeds(store, IN, D, 1), artifact_id)
    assert isinstance(error, CorruptObject)


def test_law_4_a_byte_flipped_after_a_good_load_is_refused_although_the_kernel_is_cached(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    artifact_id = copy_artifact(adapter_store, store, adapter_for(D, R))
    first = linear_with_seeds(store, IN, D, 1)
    grow(first, 0, artifact_id, alpha=1.0)
    flip_one_byte(store, artifact_id)
    assert isinstance(_refused(linear_with_seeds(store, IN, D, 1), artifact_id), CorruptObject)
    assert first.seed_state(0) is SeedLifecycleState.GRAFTING


def test_law_4_code_for_features_that_this_machine_lacks_is_refused_by_name(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    original = adapter_store.get(adapter_for(D, R)).manifest
    target = original.target.model_copy(update={"features": (*original.target.features, "avx9000")})
    artifact_id = copy_artifact(adapter_store, store, original.id, target=target)
    error = _refused(linear_with_seeds(store, IN, D, 1), artifact_id)
    assert isinstance(error, ArtifactRefused)
    assert "avx9000" in str(error)


@pytest.mark.parametrize("status", [s for s in KernelStatus if s is not KernelStatus.VALIDATED])
def test_law_4_what_is_not_validated_is_refused(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str], status: KernelStatus
) -> None:
    artifact_id = copy_artifact(adapter_store, store, adapter_for(D, R), status=status)
    error = _refused(linear_with_seeds(store, IN, D, 1), artifact_id)
    assert isinstance(error, ArtifactRefused)
    assert status.value in str(error)


def test_law_4_what_nobody_that_is_trusted_has_signed_is_refused(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    artifact_id = copy_artifact(adapter_store, store, adapter_for(D, R))
    digest = store.get(artifact_id).digest
    error = _refused(linear_with_seeds(Urza(store.root, trust=f"keys:prover={'0' * 64}"), IN, D, 1), artifact_id)
    assert isinstance(error, UntrustedArtifact)
    assert "which the trust policy does not name" in str(error)
    (store.root / "refs" / artifact_id).write_text(f"{digest}\n")  # as it was stored before there were signatures
    error = _refused(linear_with_seeds(store, IN, D, 1), artifact_id)
    assert isinstance(error, UntrustedArtifact)
    assert "is not signed" in str(error)


def test_law_4_an_unknown_launch_format_is_refused(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    artifact_id = copy_artifact(adapter_store, store, adapter_for(D, R), launch_format=99)
    error = _refused(linear_with_seeds(store, IN, D, 1), artifact_id)
    assert isinstance(error, ArtifactRefused)
    assert "launch format 99" in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU gets another refusal")
@pytest.mark.parametrize(("backend", "arch"), [("cuda", "90"), ("hip", "gfx942")])
def test_law_4_code_for_a_device_that_is_not_here_is_refused(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str], backend: str, arch: str
) -> None:
    original = adapter_store.get(adapter_for(D, R)).manifest
    target = original.target.model_copy(update={"backend": backend, "arch": arch, "features": ()})
    artifact_id = copy_artifact(adapter_store, store, original.id, target=target)
    error = _refused(linear_with_seeds(store, IN, D, 1), artifact_id)
    assert isinstance(error, ArtifactRefused)
    assert f"{backend}{arch}" in str(error)


def test_law_4_an_artifact_that_does_not_exist_is_refused(store: Urza) -> None:
    error = _refused(linear_with_seeds(store, IN, D, 1), "000000000000-cpu-standard-000000000000")
    assert isinstance(error, ArtifactNotFound)


@pytest.mark.parametrize(
    "path", sorted(p for room in ("kasmina", "urza") for p in (PACKAGE / room).rglob("*.py")), ids=str
)
def test_law_4_no_room_on_the_load_path_unpickles_evaluates_or_imports_what_is_stored(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    imports = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imports |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not names & {"eval", "exec", "compile", "__import__"}
    assert not imports & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "importlib", "runpy", "joblib"}
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "load"]
    assert not [n for n in loads if isinstance(n.value, ast.Name) and n.value.id == "torch"]


# ---- Law 5: one artifact is one unit


def test_law_5_a_reader_sees_one_writers_manifest_with_its_own_binaries_or_nothing(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    artifacts = [adapter_store.load(adapter_for(D, r)) for r in (R, 5, 8)]
    errors: list[BaseException] = []
    whole = 0

    def write(draw: int) -> None:
        try:
            for turn in range(30):
                artifact, blobs = artifacts[(turn + draw) % len(artifacts)]
                store.commit(artifact.manifest, blobs)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(draw,)) for draw in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for artifact, blobs in artifacts:
            try:
                found, contents = store.load(artifact.id)
            except ArtifactNotFound:
                continue
            assert found.manifest.kernels == artifact.manifest.kernels
            assert contents == blobs
            whole += 1
    for writer in writers:
        writer.join()
    assert not errors
    assert whole > 0


def test_law_5_a_commit_with_a_binary_missing_or_of_another_leaves_nothing(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    artifact, blobs = adapter_store.load(adapter_for(D, R))
    _, others = adapter_store.load(adapter_for(D, 5))
    binary = next(iter(artifact.manifest.kernels.values())).binary
    foreign = next(content for digest, content in others.items() if digest not in blobs)
    for broken in ({k: v for k, v in blobs.items() if k != binary}, blobs | {binary: foreign}):
        with pytest.raises(EsperError):
            store.commit(artifact.manifest, broken)
        assert artifact.id not in store
        with pytest.raises(ArtifactNotFound):
            store.load(artifact.id)


# ---- Law 6: keys are complete


def test_law_6_whatever_changes_the_code_changes_the_artifacts_id(
    adapter_path: Path, adapter_variant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(
        path: Path = adapter_path, dims: dict[str, int] | None = None, dtype: str = "float32", target: str = "cpu"
    ) -> str:
        blueprint = esper.Blueprint.load(path)
        return plan_build(blueprint, dims or {"d": D, "r": R}, dtype, parse_target(target), "standard").artifact_id

    monkeypatch.delenv("TRITON_ENABLE_LLVM_DEBUG", raising=False)
    keys = {
        "as it is": key(),
        "source": key(adapter_variant(source={"No atomics": "no atomics"})),
        "constexpr": key(adapter_variant(toml={'BLOCK_ROWS = "32"': 'BLOCK_ROWS = "64"'})),
        "d": key(dims={"d": D + 1, "r": R}),
        "r": key(dims={"d": D, "r": R + 1}),
        "dtype": key(dtype="bfloat16"),
        "target": key(target="cuda:90"),
        "architecture": key(target="cuda:80"),
    }
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_ENABLE_LLVM_DEBUG", "1")  # one of the variables that Triton obeys
        keys["options"] = key()
    from esper_triton.cpu.host import cpu_features  # here: it loads LLVM

    with monkeypatch.context() as patch:
        patch.setattr("esper_triton.cpu.host.cpu_features", lambda: cpu_features()[1:])
        keys["features"] = key()
    known = planning.toolchain_of
    for part in ("triton", "llvm", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr(planning, "toolchain_of", lambda t, part=part: known(t).model_copy(update={part: "0.0.1"}))
            keys[part] = key()
    assert key() == keys["as it is"]
    assert len(set(keys.values())) == len(keys), keys


def test_law_6_a_kernel_is_cached_by_its_manifest_the_specialisation_and_the_device(
    store: Urza, adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    kernels = KernelCache.process()
    layer = linear_with_seeds(adapter_store, IN, 2 * D, 2)
    assert layer.load_kernel_sync(0, adapter_for(D, R))
    assert layer.load_kernel_sync(1, adapter_for(D, R))
    assert kernels.stats().entries == 1
    # The same binaries under another manifest, if only by the time they were made, are another kernel.
    other = copy_artifact(adapter_store, store, adapter_for(D, R), created_at="2025-01-01T00:00:00+00:00")
    assert linear_with_seeds(store, IN, D, 1).load_kernel_sync(0, other)
    assert kernels.stats().entries == 2
