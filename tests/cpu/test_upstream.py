"""What Triton's own runtime does around a kernel, on this backend: tuning, benchmarks, caches, hooks."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime._async_compile import AsyncCompileMode

from esper_triton.cpu.driver import CPUDriver


@pytest.fixture(autouse=True, scope="module")
def cpu():
    triton.runtime.driver.set_active(CPUDriver())
    yield
    triton.runtime.driver.reset_active()


@pytest.fixture
def cache(tmp_path):
    """An empty disk cache."""
    for kernel in (scale, tuned.fn, chosen.fn):
        kernel.device_caches.clear()
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        yield tmp_path
    for kernel in (scale, tuned.fn, chosen.fn):
        kernel.device_caches.clear()


@triton.jit
def scale(x, out, n, factor=2.0, BLOCK: tl.constexpr = 64):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.load(x + i, mask=mask) * factor, mask=mask)


CONFIGS = [
    triton.Config({"BLOCK": 32}, num_warps=2),
    triton.Config({"BLOCK": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK": 128}, num_warps=8, num_stages=2),
]


@triton.autotune(configs=CONFIGS, key=["n"], restore_value=["total"])
@triton.jit
def tuned(x, total, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(total + i, tl.load(total + i, mask=mask) + tl.load(x + i, mask=mask), mask=mask)


@triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["n"]), "EVEN": lambda args: args["n"] % 2 == 0})
@triton.jit
def chosen(x, out, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    if EVEN:
        value = -value
    tl.store(out + i, value, mask=i < n)


def launch(n: int = 100, **options):
    """(kernel, result is right) of one stock launch."""
    x, out = torch.randn(n), torch.full((n,), float("nan"))
    kernel = scale[(triton.cdiv(n, 64),)](x, out, n, **options)
    return kernel, torch.equal(out, x * 2)


def test_autotuning_tries_every_configuration_and_keeps_one_for_each_key(cache):
    tuned.cache.clear()
    x, total = torch.randn(500), torch.zeros(500)
    tuned[lambda meta: (triton.cdiv(500, meta["BLOCK"]),)](x, total, 500)
    assert torch.equal(total, x)  # added once, however often it was tried
    assert tuned.best_config in CONFIGS
    assert len(tuned.configs_timings) == len(CONFIGS)
    assert all(time > 0 for timings in tuned.configs_timings.values() for time in timings)
    tuned[lambda meta: (triton.cdiv(500, meta["BLOCK"]),)](x, total, 500)
    assert torch.equal(total, x + x)
    assert len(tuned.cache) == 1
    x, total = torch.randn(70), torch.zeros(70)
    tuned[lambda meta: (triton.cdiv(70, meta["BLOCK"]),)](x, total, 70)
    assert torch.equal(total, x)
    assert len(tuned.cache) == 2


def test_heuristics_choose_constants_from_arguments():
    for n in (7, 10):
        x, out = torch.randn(n), torch.full((n,), float("nan"))
        chosen[(1,)](x, out, n)
        assert torch.equal(out, -x if n == 10 else x)


@pytest.mark.parametrize("mode", ["min", "max", "mean", "median", "all"])
def test_do_bench_gives_milliseconds_in_every_mode(mode):
    x = torch.ones(64)
    measured = triton.testing.do_bench(lambda: scale[(1,)](x, x, 64, 1.0), warmup=1, rep=2, return_mode=mode)
    assert all(0 < ms < 1000 for ms in (measured if mode == "all" else [measured]))


def test_do_bench_gives_quantiles_in_order_and_zeroes_gradients():
    x = torch.ones(64, requires_grad=True)
    x.grad = torch.ones(64)
    low, high = triton.testing.do_bench(
        lambda: x.detach().add(1), warmup=1, rep=2, quantiles=[0.2, 0.8], grad_to_none=[x]
    )
    assert 0 < low <= high
    assert x.grad is None


def test_a_grid_may_be_short_and_may_be_a_function_of_the_arguments():
    x, out = torch.randn(128), torch.empty(128)
    for grid in [(2,), (2, 1), (2, 1, 1), [2], lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)]:
        out.fill_(float("nan"))
        scale[grid](x, out, 128)
        assert torch.equal(out, x * 2)


def test_arguments_may_have_defaults_and_names():
    x, out = torch.randn(64), torch.empty(64)
    scale[(1,)](x=x, out=out, n=64, factor=0.5)
    assert torch.equal(out, x * 0.5)
    scale[(1,)](x, n=64, out=out, BLOCK=128)
    assert torch.equal(out, x * 2)
    scale.run(x, out, 64, 4.0, grid=(1,), warmup=False)
    assert torch.equal(out, x * 4)


def test_options_of_gpus_are_accepted_by_a_launch():
    for options in ({"num_warps": 8}, {"num_stages": 5}, {"num_ctas": 1}, {"maxnreg": 32}):
        assert launch(**options)[1]


def test_an_unknown_option_is_upstreams_error():
    with pytest.raises(KeyError, match="Keyword argument num_wraps was specified but unrecognised"):
        launch(num_wraps=4)


def test_a_warmup_compiles_for_types_and_runs_nothing(cache):
    kernel = scale.warmup(torch.float32, torch.float32, 100, 2.0, BLOCK=64, grid=(1,))
    assert kernel.metadata.name == "scale"
    x = torch.randn(64)
    out = torch.full((64,), -1.0)
    scale.warmup(x, out, 64, 2.0, grid=(1,))
    assert out.tolist() == [-1.0] * 64
    kernel[(1, 1, 1)](x, out, 64, 2.0, 64)
    assert torch.equal(out, x * 2)


def test_kernels_go_to_the_folder_that_the_environment_names(tmp_path):
    source = tmp_path / "kernel.py"
    source.write_text(
        "import torch, triton, triton.language as tl\n"
        "@triton.jit\n"
        "def fill(out): tl.store(out + tl.program_id(0), 7)\n"
        "out = torch.zeros(3, dtype=torch.int32)\n"
        "fill[(3,)](out)\n"
        "print(out.tolist())\n"
    )
    folder = tmp_path / "cache"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, source], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[7, 7, 7]", done.stderr
    assert len(list(folder.rglob("fill.o"))) == 1


def test_always_compile_goes_past_the_cache(cache, monkeypatch):
    hits = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: hits.append(event["cache_hit"]))
    for always in (False, False, True):
        monkeypatch.setattr(knobs.compilation, "always_compile", always)
        scale.device_caches.clear()
        assert launch()[1]
    assert hits == [False, True, False]


def test_the_cache_hook_sees_each_compilation_and_can_forbid_it(cache, monkeypatch):
    seen = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **event: seen.append(event["fn"].name) or True)
    assert launch(BLOCK=32)[0] is None
    assert seen == ["scale"]
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    after = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: after.append(event["repr"]))
    assert launch()[1]
    assert len(after) == 1
    assert "scale" in after[0]


def test_a_kernel_is_preloaded_from_what_the_cache_hook_was_told(cache, monkeypatch):
    told = []
    monkeypatch.setattr(
        knobs.runtime, "jit_cache_hook", lambda **event: told.append(event["compile"]["specialization_data"]) and None
    )
    kernel, right = launch()
    assert right
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    scale.device_caches.clear()
    loaded = scale.preload(told[0])
    assert loaded.hash == kernel.hash
    misses = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: misses.append(event["cache_hit"]))
    assert launch()[1]
    assert misses == []  # it was there already


def test_kernels_compile_in_the_background(cache):
    x, out = torch.randn(64), torch.full((64,), float("nan"))
    with (
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        AsyncCompileMode(pool),
    ):
        for block in (16, 32, 64):
            scale.warmup(x, out, 64, 2.0, BLOCK=block, grid=(1,))
        scale[(4,)](x, out, 64, 2.0, BLOCK=16)
    assert torch.equal(out, x * 2)
    assert len(list(cache.rglob("scale.o"))) == 3


def test_a_kernel_compiled_by_hand_runs_and_takes_options(cache):
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}
    for options in ({}, {"num_warps": 4, "opt_level": 3}):
        kernel = triton.compile(ASTSource(scale, signature, {(4,): 64}), GPUTarget("cpu", "native", 1), options)
        x, out = torch.randn(100), torch.full((100,), float("nan"))
        kernel[(2, 1, 1)](x, out, 100, 3.0, 64)
        torch.testing.assert_close(out, x * 3, rtol=0, atol=0)
        assert kernel.metadata.opt_level == options.get("opt_level", 1)


def test_load_hooks_surround_the_loading_of_code(cache, monkeypatch):
    seen = []
    for name in ("kernel_load_start_hook", "kernel_load_end_hook"):
        chain = getattr(knobs.runtime, name)
        if chain is None:
            monkeypatch.setattr(knobs.runtime, name, lambda *args: seen.append(args[2]))
        else:
            monkeypatch.setattr(chain, "calls", [lambda *args: seen.append(args[2])])
    assert launch()[1]
    assert launch()[1]
    assert seen == ["scale", "scale"]


def test_launch_metadata_of_a_kernel_reaches_its_hook(monkeypatch):
    @triton.jit(launch_metadata=lambda grid, metadata, args: {"name": metadata.name, "bytes": 8 * args["n"]})
    def copy(x, out, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)

    seen = []
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda data: seen.append(data.get()))
    x = torch.randn(10)
    copy[(1,)](x, torch.empty(10), 10, BLOCK=16)
    assert [(data["name"], data["bytes"]) for data in seen] == [("copy", 80)]
