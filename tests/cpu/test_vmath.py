"""Elementary functions against double precision and mpmath, over every kind of number."""

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from esper_triton.cpu import compiler
from esper_triton.cpu.lowering import vmath


@triton.jit
def _apply(x_ptr, out_ptr, n, F: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    if F == "exp":
        y = tl.exp(x)
    elif F == "expm1":
        y = libdevice.expm1(x)
    elif F == "exp2":
        y = tl.exp2(x)
    elif F == "log":
        y = tl.log(x)
    elif F == "log1p":
        y = libdevice.log1p(x)
    elif F == "log2":
        y = tl.log2(x)
    elif F == "sin":
        y = tl.sin(x)
    elif F == "cos":
        y = tl.cos(x)
    elif F == "tanh":
        y = libdevice.tanh(x)
    elif F == "erf":
        y = tl.erf(x)
    elif F == "rsqrt":
        y = tl.rsqrt(x)
    elif F == "sqrt":
        y = tl.sqrt(x)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def _erf(x):
    return torch.erf(torch.from_numpy(x)).numpy()


REFERENCE = {
    "exp": np.exp,
    "expm1": np.expm1,
    "exp2": np.exp2,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "erf": _erf,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
}
# mpmath's functions fail at infinities and zeros, which the test of float64 leaves to numpy.
EXACT = {
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "exp2": lambda x: mpmath.mpf(2) ** x,
    "log": mpmath.log,
    "log1p": mpmath.log1p,
    "log2": lambda x: mpmath.log(x, 2),
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "tanh": mpmath.tanh,
    "erf": mpmath.erf,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "sqrt": mpmath.sqrt,
}
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, 88.72283, 88.73, -103.97, -104.0, 2.0**20, 1e6]


def _computed(name, x, out_dtype=None, block=1024):
    out = torch.full(x.shape, 7.0, dtype=out_dtype or x.dtype)
    _apply[(triton.cdiv(len(x), block),)](x, out, len(x), F=name, BLOCK=block)
    return out


def _every_kind_of_float32():
    draw = np.random.default_rng(7)
    every_exponent = draw.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    usual = draw.normal(0, 3, 200_000).astype(np.float32)
    near_one = (1 + draw.normal(0, 0.05, 100_000)).astype(np.float32)
    turns = (draw.integers(0, 2**20, 100_000) * (np.pi / 2)).astype(np.float32)
    return np.concatenate([every_exponent, usual, near_one, turns, np.array(SPECIAL, np.float32)])


def _assert_within(found, exact, ulps, x):
    """`found` against float64 `exact` in units in the last place of `found`'s type, signs of zeros and NaN included."""
    with np.errstate(all="ignore"):
        nearest = exact.astype(found.dtype)
    finite = np.isfinite(nearest)
    np.testing.assert_array_equal(found[~finite], nearest[~finite])
    np.testing.assert_array_equal(np.signbit(found[finite]), np.signbit(nearest[finite]))
    ulp = np.spacing(np.abs(nearest[finite])).astype(np.float64)
    error = np.abs(found[finite].astype(np.float64) - exact[finite]) / ulp
    worst = int(error.argmax())
    assert error[worst] <= ulps, f"{error[worst]:.2f} ulp at {x[finite][worst]!r}"


@pytest.mark.parametrize("name", REFERENCE)
def test_functions_are_within_2_ulp_everywhere(name):
    x = _every_kind_of_float32()
    with np.errstate(all="ignore"):
        exact = REFERENCE[name](x.astype(np.float64))
    # The root is rounded correctly. That is half a unit, but for what its float64 value was rounded.
    _assert_within(_computed(name, torch.from_numpy(x)).numpy(), exact, 0.5 + 1e-8 if name == "sqrt" else 2, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", REFERENCE)
def test_of_every_16_bit_float_the_result_in_float32_is_rounded_once(name, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = _computed(name, x.float())
    found = _computed(name, x, dtype)
    assert torch.equal(found.isnan(), wide.isnan())
    expected = wide.to(dtype)[~wide.isnan()]
    assert torch.equal(found[~wide.isnan()].view(torch.int16), expected.view(torch.int16))
    with np.errstate(all="ignore"):
        exact = REFERENCE[name](x.double().numpy())
    _assert_within(wide.numpy(), exact, 2, x.float().numpy())


@pytest.mark.parametrize("name", REFERENCE)
def test_functions_of_float64_are_within_2_ulp(name):
    draw = np.random.default_rng(11)
    x = np.concatenate(
        [
            draw.integers(0, 2**64, 400, dtype=np.uint64).view(np.float64),
            draw.normal(0, 3, 2000),
            1 + draw.normal(0, 0.05, 400),
            draw.uniform(-800, 800, 400),
            draw.normal(0, 1, 200) * 1e-5,
            # Where glibc's tanh is off by more than 2.
            np.array([float.fromhex("-0x1.defce1c7e2658p-3"), float.fromhex("0x1.dd6ea3cfa715p-3")]),
            np.array(SPECIAL),
        ]
    )
    found = _computed(name, torch.from_numpy(x)).numpy()
    with np.errstate(all="ignore"):
        nearly = REFERENCE[name](x)
    plain = np.isfinite(nearly) & (nearly != 0)
    np.testing.assert_array_equal(found[~plain], nearly[~plain])
    number = ~np.isnan(nearly)
    np.testing.assert_array_equal(np.signbit(found[number]), np.signbit(nearly[number]))
    with mpmath.workprec(200):
        errors = [
            float(abs(mpmath.mpf(y) - EXACT[name](mpmath.mpf(at))) / mpmath.mpf(float(np.spacing(abs(y)))))
            for at, y in zip(x[plain].tolist(), found[plain].tolist(), strict=True)
        ]
    worst = int(np.argmax(errors))
    assert errors[worst] <= 2, f"{errors[worst]:.2f} ulp at {x[plain][worst]!r}"


@pytest.mark.parametrize("name", ["exp", "exp2", "tanh", "erf"])
def test_powers_of_two_are_multiplied_alike_without_avx_512(name, monkeypatch):
    x = torch.from_numpy(_every_kind_of_float32())
    found = _computed(name, x)
    without = tuple(feature for feature in vmath.cpu_features() if not feature.startswith("avx512"))
    monkeypatch.setattr(vmath, "cpu_features", lambda: without)
    compiler._lower.cache_clear()
    out = torch.empty_like(x)
    # A block of another size is another kernel, which no cache has yet.
    kernel = _apply[(triton.cdiv(len(x), 512),)](x, out, len(x), F=name, BLOCK=512)
    compiler._lower.cache_clear()
    assert "scalef" not in kernel.asm["llir"]
    assert torch.equal(out.isnan(), found.isnan())
    assert torch.equal(out.nan_to_num(5.0).view(torch.int32), found.nan_to_num(5.0).view(torch.int32))


@pytest.mark.parametrize("block", [1, 4, 64])
def test_one_large_angle_does_not_disturb_its_neighbours(block):
    x = torch.linspace(-9, 9, 64)
    x[5], x[40], x[41] = 3e38, float("inf"), -(2.0**20 + 1)
    for name in ("sin", "cos"):
        with np.errstate(all="ignore"):
            exact = REFERENCE[name](x.double().numpy())
        _assert_within(_computed(name, x, block=block).numpy(), exact, 2, x.numpy())
