"""What comes out of a compile: real binaries, the same ones every time, or one error and nothing."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import triton

import esper_triton as esper
from esper_triton.contracts.errors import CompileError
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.tezzeret import forge

DIMS = {"d": 64, "r": 16}
EM_CUDA, EM_X86_64, EM_AARCH64 = 190, 62, 183


def elf_header(binary: bytes) -> tuple[bytes, int, int]:
    """Magic, type (1 relocatable, 2 executable) and machine of a little-endian ELF file."""
    kind, machine = struct.unpack_from("<HH", binary, 16)
    return binary[:4], kind, machine


def test_compiling_for_a_gpu_that_is_not_here_puts_a_valid_cubin_into_the_store(
    adapter_path: Path, store: esper.Urza
) -> None:
    compiled = esper.compile(adapter_path, dims=DIMS, targets=["cuda:90"], urza=store)
    artifact, blobs = store.load(compiled.id)
    assert artifact.status is KernelStatus.PENDING_HARDWARE
    assert artifact.id.split("-")[1:3] == ["cuda90", "standard"]
    assert artifact.manifest.toolchain.triton == triton.__version__
    assert set(artifact.manifest.kernels) == {"adapter_forward", "adapter_backward_rows", "adapter_backward_weights"}
    for record in artifact.manifest.kernels.values():
        binary = blobs[record.binary]
        assert record.binary_kind == "cubin"
        assert elf_header(binary) == (b"\x7fELF", 2, EM_CUDA)
        assert f".text.{record.symbol}".encode() in binary  # the section that cuModuleGetFunction looks for
        assert b"tt.func public @" + record.symbol.encode() in blobs[record.ttir]
        assert blobs[record.source] == adapter_path.with_suffix(".py").read_bytes()
        assert 0 < record.shared_bytes <= 227 * 1024


def test_an_artifact_is_built_again_from_what_it_keeps(adapter_path: Path, adapter_store: esper.Urza, adapter_id: str):
    kept = adapter_store.blueprint(adapter_id)
    assert kept == esper.Blueprint.load(adapter_path).model_copy(update={"path": None})
    again = esper.compile(kept, dims={"d": 64, "r": 16}, targets=["cpu"], urza=adapter_store)
    assert again.id == adapter_id


def test_the_code_of_a_cpu_artifact_is_an_object_file_for_this_machine(
    adapter_store: esper.Urza, adapter_id: str
) -> None:
    artifact, blobs = adapter_store.load(adapter_id)
    assert artifact.status is KernelStatus.VALIDATED
    for record in artifact.manifest.kernels.values():
        magic, kind, machine = elf_header(blobs[record.binary])
        assert (record.binary_kind, magic, kind) == ("o", b"\x7fELF", 1)
        assert machine in (EM_X86_64, EM_AARCH64)
        assert record.symbol.encode() in blobs[record.binary]


@pytest.mark.parametrize("dims", [{"d": 1024, "r": 256}, {"d": 3, "r": 1}])
def test_the_adapter_fits_the_shared_memory_of_small_gpus_at_the_ends_of_its_range(
    adapter_path: Path, store: esper.Urza, dims: dict[str, int]
) -> None:
    artifact = esper.compile(adapter_path, dims=dims, dtype="float16", targets=["cuda:86"], urza=store)
    assert all(kernel.shared_bytes <= 99 * 1024 for kernel in artifact.manifest.kernels.values())


def test_the_same_request_twice_is_a_hit_and_compiles_nothing(
    adapter_path: Path, store: esper.Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = esper.compile(adapter_path, dims=DIMS, targets=["cuda:90"], urza=store)
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled again"))
    second = esper.compile(adapter_path, dims=DIMS, targets=["cuda:90"], urza=store)
    assert (second.id, second.digest) == (first.id, first.digest)
    assert len(store.ids()) == 1


def test_a_damaged_artifact_is_built_again(adapter_path: Path, store: esper.Urza) -> None:
    first = esper.compile(adapter_path, dims=DIMS, targets=["cuda:90"], urza=store)
    path = store.object_path(first.manifest.kernels["adapter_forward"].binary)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    again = esper.compile(adapter_path, dims=DIMS, targets=["cuda:90"], urza=store)
    assert again.id == first.id
    _, blobs = store.load(again.id)
    assert set(blobs) == set(first.manifest.blobs)


def test_two_processes_with_caches_of_their_own_make_the_same_artifact(adapter_path: Path, tmp_path: Path) -> None:
    script = (
        "import sys, json, esper_triton as e\n"
        "made = e.compile(sys.argv[1], dims={'d': 32, 'r': 4}, targets=['cpu', 'cuda:90'], urza=sys.argv[2])\n"
        "print(json.dumps([[a.id, sorted({k.binary for k in a.manifest.kernels.values()})] for a in made]))\n"
    )
    results = []
    for name in ("one", "two"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(adapter_path), str(tmp_path / name / "urza")],
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / name / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    assert [len(binaries) for _, binaries in results[0]] == [3, 3]


def test_a_kernel_that_does_not_compile_is_named_with_its_target_and_nothing_is_stored(
    adapter_variant: Callable[..., Path], store: esper.Urza
) -> None:
    path = adapter_variant(source={"tl.dot(h, tl.trans(down), acc=z": "tl.dot(h, down, acc=z"})
    with pytest.raises(CompileError, match="kernel 'adapter_forward' for cuda90 does not compile") as caught:
        esper.compile(path, dims=DIMS, targets=["cuda:90"], urza=store)
    assert isinstance(caught.value.__cause__, triton.CompilationError)
    assert store.ids() == []


def test_nothing_is_stored_for_any_target_where_one_of_them_fails(
    adapter_path: Path, store: esper.Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forge, "shared_memory_limit", lambda spec: 1024 if spec.arch == "80" else 227 * 1024)
    with pytest.raises(CompileError, match=r"for cuda80 needs \d+ bytes of shared memory, one program can have 1024"):
        esper.compile(adapter_path, dims=DIMS, targets=["cuda:90", "cuda:80"], urza=store)
    assert store.ids() == []
