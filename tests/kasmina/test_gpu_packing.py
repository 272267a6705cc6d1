"""What can be known of launches on a GPU without one: what is handed to Triton's driver, when, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from gpu_recorder import RecordingDriver, pretend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeding import copy_artifact, grow, linear_with_seeds

import esper_triton as esper
from esper_triton.contracts.errors import ArtifactRefused, CompileError
from esper_triton.contracts.expressions import evaluate
from esper_triton.contracts.manifest import KernelStatus, Manifest, TargetSpec
from esper_triton.cpu.driver import CPUDriver
from esper_triton.kasmina import KasminaLayer, gpu
from esper_triton.kasmina.boundary import refresh
from esper_triton.kasmina.launcher import Bound, KernelProgram, check_runs_here
from esper_triton.kasmina.views import Extents
from esper_triton.urza import Urza

D, R = 48, 4
TARGETS = {"cuda": "90", "hip": "gfx942"}
both = pytest.mark.parametrize("backend", TARGETS)


@pytest.fixture(scope="module")
def gpu_store(tmp_path_factory: pytest.TempPathFactory, adapter_path: Path) -> Urza:
    """Real cubins and hsacos of the shipped adapter."""
    store = Urza(tmp_path_factory.mktemp("gpu") / "urza")
    targets = [f"{backend}:{arch}" for backend, arch in TARGETS.items()]
    esper.compile(adapter_path, dims={"d": D, "r": R}, targets=targets, urza=store)
    return store


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    gpu.reset()
    yield
    gpu.reset()


def stored(store: Urza, backend: str) -> tuple[Manifest, dict[str, bytes]]:
    (artifact_id,) = (i for i in store.ids() if f"-{backend}{TARGETS[backend]}-" in i)
    artifact, blobs = store.load(artifact_id)
    return artifact.manifest, dict(blobs)


def loaded(store: Urza, backend: str, device: str = "cuda:0") -> KernelProgram:
    return KernelProgram.load(*stored(store, backend), torch.device(device))


def run(bound: Bound, addresses: dict[str, int]) -> None:
    values = (*bound.constants, *(addresses[name] for name in bound.order))
    for launch, grid, pick in bound.launches:
        launch(*grid, *pick(values))


# ---- Arguments and grids


@both
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 2**31 - 1), gap=st.integers(0, 2**31), base=st.integers(0, 2**55), backward=st.booleans())
def test_every_launch_gets_its_grid_and_its_arguments_in_the_order_of_the_signature(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch, backend: str, rows: int, gap: int, base: int, backward: bool
) -> None:
    with monkeypatch.context() as patch:
        gpu.reset()
        driver = pretend(patch, backend, [TARGETS[backend]])
        program = loaded(gpu_store, backend)
        manifest = program.manifest
        strides = {"h": D + gap, "out": D + 2 * gap, "grad_out": D + 3 * gap}
        bound = (program.bind_backward if backward else program.bind_forward)(Extents.of_rows(rows), strides)
        addresses = {name: base + 256 * place for place, name in enumerate(bound.order)}
        run(bound, addresses)
        functions = {load.symbol: load.function for load in driver.loads}

    steps = manifest.backward if backward else manifest.forward
    assert len(driver.launches) == len(steps)
    strides |= {"z": R, "activated": R, "z_grad": R, "grad_h": D}
    for launch, step in zip(driver.launches, steps, strict=True):
        record = manifest.kernels[step.kernel]
        wanted = [
            rows
            if argument == "rows"
            else strides[argument.removesuffix(".row_stride")]
            if argument.endswith(".row_stride")
            else addresses[argument]
            for argument in step.arguments
        ]
        grid = [evaluate(text, {"rows": rows}) for text in step.grid]
        stream, packed = 0, (record.num_warps, 1, record.shared_bytes)
        assert list(launch.values) == [*grid, stream, functions[record.symbol], packed, None, None, None, *wanted]
        assert launch.signature == record.signature


@both
def test_launchers_are_made_for_kernels_of_one_cta_without_scratch_memory(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    driver = pretend(monkeypatch, backend, [TARGETS[backend]])
    manifest = loaded(gpu_store, backend).manifest
    assert [(m.num_warps, m.shared, m.warp_size) for m in driver.metadata] == [
        (k.num_warps, k.shared_bytes, 64 if backend == "hip" else 32) for k in manifest.kernels.values()
    ]
    for metadata in driver.metadata:
        assert metadata.num_ctas == 1
        assert not metadata.global_scratch_size + metadata.profile_scratch_size
        assert not metadata.launch_cooperative_grid
        assert not metadata.launch_pdl


@pytest.mark.parametrize("kind", ["global", "profile"])
def test_a_kernel_that_needs_scratch_memory_is_not_stored(
    adapter_path: Path, store: Urza, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    compile_kernel = triton.compile

    def needing_scratch(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_kernel(*args, **kwargs)
        compiled.metadata = compiled.metadata._replace(**{f"{kind}_scratch_size": 16})
        return compiled

    monkeypatch.setattr(triton, "compile", needing_scratch)
    with pytest.raises(CompileError, match=f"for cuda90 needs {kind} scratch memory, which a launch plan cannot give"):
        esper.compile(adapter_path, dims={"d": D, "r": R}, targets="cuda:90", urza=store)
    assert not store.ids()


def _attributes_read(function: Any, name: str) -> set[str]:
    """Attributes of the parameter `name` that a function or a class reads."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == name}
    asked = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr"]
    return read | {n.args[1].value for n in asked if getattr(n.args[0], "id", "") == name}  # type: ignore[attr-defined]


@both
def test_everything_that_this_tritons_launcher_reads_of_a_kernel_is_there(backend: str) -> None:
    vendor = {"cuda": "nvidia", "hip": "amd"}[backend]
    driver = importlib.import_module(f"triton.backends.{vendor}.driver")
    launcher = {"cuda": "CudaLauncher", "hip": "HIPLauncher"}[backend]
    compiler = triton.backends.backends[vendor].compiler
    read = _attributes_read(getattr(driver, launcher), "metadata") | _attributes_read(
        compiler.pack_metadata, "metadata"
    )
    assert "profile_scratch_size" in read
    assert read <= {f.name for f in dataclasses.fields(gpu._LaunchMetadata)}
    # `src.fn` is asked for the names of constants, of which there are none.
    assert _attributes_read(getattr(driver, launcher), "src") <= {"signature", "constants", "fn"}


# ---- Loading


@both
def test_binaries_are_loaded_onto_the_layers_device_while_that_is_current(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    arch = TARGETS[backend]
    driver = pretend(monkeypatch, backend, ["80" if backend == "cuda" else "gfx90a", arch])
    manifest, blobs = stored(gpu_store, backend)
    program = KernelProgram.load(manifest, blobs, torch.device("cuda:1"))
    assert program.device == torch.device("cuda:1")
    assert program.code_bytes == sum(len(blobs[k.binary]) for k in manifest.kernels.values())
    assert [(load.symbol, load.binary, load.shared, load.index, load.current) for load in driver.loads] == [
        (k.symbol, blobs[k.binary], k.shared_bytes, 1, 1) for k in manifest.kernels.values()
    ]
    assert driver.current == 0


def test_a_device_without_an_index_is_the_current_one(gpu_store: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch, "cuda", ["80", "90"])
    driver.current = 1
    assert loaded(gpu_store, "cuda", "cuda").device == torch.device("cuda:1")


def test_the_same_kernels_are_loaded_once_for_each_device_of_a_process(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = pretend(monkeypatch, "cuda", ["90", "90"])
    for _ in range(3):
        loaded(gpu_store, "cuda", "cuda:0")
        loaded(gpu_store, "cuda", "cuda:1")
    assert sorted(load.index for load in driver.loads) == [0, 0, 0, 1, 1, 1]


# ---- Streams and devices


def _one_launch(program: KernelProgram) -> Callable[[], None]:
    bound = program.bind_forward(Extents.of_rows(5), {"h": D, "out": D})
    return lambda: run(bound, dict.fromkeys(bound.order, 4096))


def test_a_launch_goes_to_the_stream_that_is_current_on_its_device_then(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = pretend(monkeypatch, "cuda", ["90", "90"])
    launch = _one_launch(loaded(gpu_store, "cuda", "cuda:1"))
    for streams in ({0: 11, 1: 22}, {0: 11, 1: 33}, {}):
        driver.streams = streams
        launch()
    assert [one.values[3] for one in driver.launches] == [22, 33, 0]


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_is_made_under_its_device_whichever_is_current_and_leaves_that_as_it_was(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch, current: int
) -> None:
    driver = pretend(monkeypatch, "cuda", ["90", "90"])
    launch = _one_launch(loaded(gpu_store, "cuda", "cuda:1"))
    driver.guards.clear()
    driver.current = current
    launch()
    assert [one.current for one in driver.launches] == [1]
    assert driver.current == current
    assert driver.guards == ([] if current == 1 else [1])  # entering a guard costs more than asking


# ---- What is refused


def test_code_for_another_architecture_names_both_and_the_device_that_would_do(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = pretend(monkeypatch, "cuda", ["89", "90", "100"])
    message = (
        r"artifact \S+-cuda90-\S+ is for cuda90, cuda:2 \(GPU number 2\) is cuda100; "
        r"compile blueprint 'bottleneck_adapter' for cuda:100, or move the layer to cuda:1"
    )
    with pytest.raises(ArtifactRefused, match=message):
        loaded(gpu_store, "cuda", "cuda:2")
    assert not driver.loads


def test_code_for_another_gfx_architecture_is_refused_and_features_behind_the_name_do_not_matter(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "hip", ["gfx90a"])
    with pytest.raises(ArtifactRefused, match=r"is for hipgfx942, cuda:0 .* is hipgfx90a; compile .* for hip:gfx90a$"):
        loaded(gpu_store, "hip")


def test_code_of_another_vendor_is_for_no_device_of_this_process(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    with pytest.raises(ArtifactRefused, match="is for hipgfx942 and this process has no such device"):
        loaded(gpu_store, "hip")


def test_code_for_a_gpu_is_not_loaded_for_the_cpu_nor_that_of_a_cpu_for_a_gpu(
    gpu_store: Urza, adapter_store: Urza, adapter_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    with pytest.raises(ArtifactRefused, match=r"is for cuda90 and cannot run on cpu; .* or move the layer to the GPU"):
        loaded(gpu_store, "cuda", "cpu")
    artifact, blobs = adapter_store.load(adapter_id)
    with pytest.raises(ArtifactRefused, match="is for cpu and cannot run on cuda:0"):
        KernelProgram.load(artifact.manifest, blobs, torch.device("cuda:0"))


def test_a_binary_of_another_kind_than_the_targets_is_refused(gpu_store: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    manifest, blobs = stored(gpu_store, "cuda")
    name, record = next(iter(manifest.kernels.items()))
    kernels = {**manifest.kernels, name: record.model_copy(update={"binary_kind": "hsaco"})}
    with pytest.raises(
        ArtifactRefused, match=f"kernel '{name}' is a hsaco and its target is cuda90, which takes cubin"
    ):
        KernelProgram.load(manifest.model_copy(update={"kernels": kernels}), blobs, torch.device("cuda:0"))


def test_only_proven_code_runs_on_a_gpu_either(gpu_store: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    manifest, _ = stored(gpu_store, "cuda")
    with pytest.raises(ArtifactRefused, match="is PENDING_HARDWARE and only VALIDATED ones run"):
        check_runs_here(manifest, torch.device("cuda:0"))
    check_runs_here(manifest.model_copy(update={"status": KernelStatus.VALIDATED}), torch.device("cuda:0"))


def test_a_kernel_for_a_gpu_is_refused_while_the_cpu_is_tritons_active_device(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    monkeypatch.setattr(triton.runtime.driver, "_active", CPUDriver())
    message = r"for cuda90 cannot be loaded while Triton's active driver is that of 'cpu'; call .*cpu\.disable\(\)"
    with pytest.raises(ArtifactRefused, match=message):
        loaded(gpu_store, "cuda")


def test_a_kernel_for_a_gpu_is_refused_while_another_vendors_driver_is_active(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    monkeypatch.setattr(triton.runtime.driver, "_active", RecordingDriver("hip", 64))
    with pytest.raises(ArtifactRefused, match="while Triton's active driver is that of 'hip'; load it in a process"):
        loaded(gpu_store, "cuda")


def test_a_kernel_for_a_gpu_is_refused_where_triton_finds_no_driver(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    for backend in triton.backends.backends.values():
        monkeypatch.setattr(backend.driver, "is_active", staticmethod(lambda: False))
    with pytest.raises(ArtifactRefused, match="Triton has no driver: 0 active drivers"):
        loaded(gpu_store, "cuda")


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("max_threads", 127, r"4 warps of 32 are 128 threads, the device takes 127 of this kernel; .* fewer warps"),
        ("max_shared", 1024, r"needs \d+ bytes of shared memory, one program can have 1024 there; .* smaller blocks"),
    ],
)
def test_a_kernel_that_the_device_cannot_take_is_refused(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    driver = pretend(monkeypatch, "cuda", ["90"])
    setattr(driver, limit, value)
    with pytest.raises(ArtifactRefused, match=rf"kernel 'adapter_\w+' for cuda90 .* onto cuda:0: .*{message}"):
        loaded(gpu_store, "cuda")
    assert driver.current == 0


@pytest.mark.parametrize("step", ["load_binary", "launcher_cls"])
def test_what_the_driver_or_the_compiler_of_a_launcher_raises_is_the_reason_of_the_refusal(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    driver = pretend(monkeypatch, "cuda", ["90"])

    def fails(*_: object) -> None:
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    setattr(driver, step, fails)
    with pytest.raises(
        ArtifactRefused, match=r"cannot be loaded onto cuda:0: RuntimeError: .*image is invalid"
    ) as caught:
        loaded(gpu_store, "cuda")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_grid_that_a_launcher_would_silently_launch_nothing_of_is_an_error(
    gpu_store: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = pretend(monkeypatch, "cuda", ["90"])
    manifest, blobs = stored(gpu_store, "cuda")
    record = next(iter(manifest.kernels.values()))
    launch = gpu.GPUKernel.load(blobs[record.binary], record, manifest.target, torch.device("cuda:0")).launcher()
    launch(2**15, 2**15, 1)
    launch(2**31 - 1, 1, 1)
    for grid in ((2**16, 2**15, 1), (2**31, 1, 1), (2**11, 2**11, 2**10)):
        with pytest.raises(ValueError, match="is more than a GPU's launch can have"):
            launch(*grid)
    assert len(driver.launches) == 2


def test_more_rows_than_32_bits_can_tell_are_an_error(gpu_store: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", ["90"])
    with pytest.raises(ValueError, match="2147483648 rows are more than a kernel can be told of"):
        loaded(gpu_store, "cuda").bind_forward(Extents.of_rows(2**31), {"h": D, "out": D})


def test_tensors_elsewhere_are_an_error_before_any_launch(gpu_store: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch, "cuda", ["90"])
    program = loaded(gpu_store, "cuda")
    with pytest.raises(ValueError, match=r"on cpu, artifact \S+ takes \[rows, 48\] torch.float32 on cuda:0"):
        program.forward({"h": torch.zeros(3, D)}, {}, torch.tensor(0.5), torch.zeros(3, D))
    assert not driver.launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU gets another refusal")
def test_a_layer_on_the_cpu_refuses_an_artifact_for_a_gpu_and_says_who_and_what_would_do(
    gpu_store: Urza, store: Urza
) -> None:
    manifest, _ = stored(gpu_store, "cuda")
    proven = copy_artifact(gpu_store, store, manifest.id, status=KernelStatus.VALIDATED)
    layer = linear_with_seeds(store, 6, D, 1)
    assert not layer.load_kernel_sync(0, proven)
    assert isinstance(layer, KasminaLayer)
    assert "is for cuda90, seed 0 of layer 'fc' is on cpu; move the layer" in str(layer.last_error(0))


def test_a_layer_that_has_moved_away_from_its_kernel_takes_the_hosts_path(
    adapter_store: Urza, adapter_for: Callable[..., str]
) -> None:
    layer = linear_with_seeds(adapter_store, 6, D, 1)
    grow(layer, 0, adapter_for(D, R), alpha=1.0)
    kernel = layer._kasmina.seeds[0].kernel
    assert kernel is not None
    x = torch.randn(3, 6)
    host, grown = layer.default_transform(x), layer(x)
    assert not torch.equal(grown, host)
    kernel.program.device = torch.device("cuda:0")  # as if the layer had been there and were here now
    refresh(layer)
    assert torch.equal(layer(x), host)
    assert torch.equal(layer(x), host)
    stats = layer.get_layer_stats()["seeds"][0]
    assert (stats["specialisation_misses"], stats["error_count"]) == (2, 0)


# ---- Proving what is here


def test_a_gpu_for_an_artifact_is_the_first_of_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = TargetSpec(backend="cuda", arch="90")
    with monkeypatch.context() as patch:
        pretend(patch, "cuda", ["80", "90", "90"])
        assert gpu.find_gpu(h100) == torch.device("cuda:1")
        assert gpu.find_gpu(TargetSpec(backend="cuda", arch="86")) is None
        assert gpu.find_gpu(TargetSpec(backend="hip", arch="gfx942")) is None
        patch.setattr(triton.runtime.driver, "_active", CPUDriver())
        assert gpu.find_gpu(h100) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.find_gpu(h100) is None


def test_a_compile_proves_a_stored_artifact_on_the_gpu_that_it_is_for(
    gpu_store: Urza, adapter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.device]] = []

    def validate(
        artifact_id: str, store: Urza, level: str, *, device: torch.device, **_: object
    ) -> tuple[object, None]:
        asked.append((artifact_id, device))
        return store.get(artifact_id), None

    monkeypatch.setattr("esper_triton.urabrask.verdict.validate", validate)
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled again"))
    pretend(monkeypatch, "cuda", ["80", "90"])
    compiled = esper.compile(adapter_path, dims={"d": D, "r": R}, targets=["cuda:90", "hip:gfx942"], urza=gpu_store)
    assert asked == [(compiled["cuda90"].id, torch.device("cuda:1"))]


# ---- Triton's own launcher


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler, which Triton needs for a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU has a vendor's library of its own")
@both
def test_tritons_own_launcher_passes_grid_block_stream_and_every_argument_to_the_driver(
    gpu_store: Urza, tmp_path: Path, backend: str
) -> None:
    here = Path(__file__).parent
    vendor, name = {"cuda": ("nvidia", "libcuda.so.1"), "hip": ("amd", "libamdhip64.so")}[backend]
    include, library = Path(triton.__file__).parent / "backends" / vendor / "include", tmp_path / name
    source = here / f"recording_{name.partition('.')[0]}.c"
    options = ["-shared", "-fPIC", "-w", "-D__HIP_PLATFORM_AMD__", f"-Wl,-soname,{name}", f"-I{include}"]
    subprocess.run(["gcc", *options, "-o", str(library), str(source)], check=True, capture_output=True)

    manifest, _ = stored(gpu_store, backend)
    rows, stream = 70, 2**63 + 5
    strides = {"h": D + 1, "out": D + 2, "grad_out": D + 3}
    named = {a for step in (*manifest.forward, *manifest.backward) for a in step.arguments if "." not in a} - {"rows"}
    addresses = {name: 2**63 + 4096 * place for place, name in enumerate(sorted(named))}  # above all signed integers
    request = {"rows": rows, "stream": stream, "strides": strides, "addresses": addresses}
    environment = os.environ | {
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_LIBHIP_PATH": str(library),
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(esper.__file__).parents[1]), str(here), str(here.parent)]),
    }
    done = subprocess.run(
        [sys.executable, str(here / "recorded_launches.py"), str(gpu_store.root), manifest.id, str(library)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    recorded = [json.loads(line) for line in done.stdout.splitlines()]

    strides |= {"grad_h": D}
    wanted = []
    for step in (*manifest.forward, *manifest.backward):
        record = manifest.kernels[step.kernel]
        params = []
        for argument, kind in zip(step.arguments, record.signature, strict=True):
            tensor, _, is_stride = argument.partition(".")
            value = rows if argument == "rows" else strides[tensor] if is_stride else addresses[tensor]
            params.append(value.to_bytes(4 if kind == "i32" else 8, "little").hex())
        wanted.append(
            {
                "function": record.symbol,
                "grid": [evaluate(text, {"rows": rows}) for text in step.grid],
                "block": [(64 if backend == "hip" else 32) * record.num_warps, 1, 1],
                "shared": record.shared_bytes,
                "stream": stream,
                "attributes": 0,
                "params": [*params, *["00" * 8] * 2],  # two kinds of scratch memory, of which there is none
            }
        )
    assert recorded == wanted
