"""The vector functions against libm in double precision, over every kind of float32."""

import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _apply(x_ptr, out_ptr, n, F: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    if F == "exp":
        y = tl.exp(x)
    elif F == "exp2":
        y = tl.exp2(x)
    elif F == "log":
        y = tl.log(x)
    elif F == "log2":
        y = tl.log2(x)
    elif F == "tanh":
        y = libdevice.tanh(x)
    elif F == "erf":
        y = tl.erf(x)
    elif F == "rsqrt":
        y = tl.rsqrt(x)
    tl.store(out_ptr + offsets, y, mask=mask)


REFERENCE = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "tanh": np.tanh,
    "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy(),
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_functions_are_within_2_ulp_everywhere(name):
    draw = np.random.default_rng(7)
    every_exponent = draw.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    usual = draw.normal(0, 3, 200_000).astype(np.float32)
    near_one = (1 + draw.normal(0, 0.05, 100_000)).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, 88.72283, 88.73, -103.97, -104.0])
    x = np.concatenate([every_exponent, usual, near_one, special.astype(np.float32)])
    out = torch.full((x.size,), 7.0)
    _apply[(triton.cdiv(x.size, 1024),)](torch.from_numpy(x), out, x.size, F=name, BLOCK=1024)
    found = out.numpy()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        exact = REFERENCE[name](x.astype(np.float64))
        nearest = exact.astype(np.float32)
    finite = np.isfinite(nearest)
    np.testing.assert_array_equal(found[~finite], nearest[~finite])
    ulp = np.spacing(np.abs(nearest[finite])).astype(np.float64)
    error = np.abs(found[finite].astype(np.float64) - exact[finite]) / ulp
    worst = int(error.argmax())
    assert error[worst] <= 2, f"{error[worst]:.2f} ulp at {x[finite][worst]!r}"
