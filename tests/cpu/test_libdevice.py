"""Every function of `triton.language.extra.libdevice`, in every type that it is declared for: none is refused."""

from __future__ import annotations

import importlib.util
import inspect
import math
import random
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import libdevice_reference as reference
import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language import core
from triton.language.extra.cuda import libdevice

COUNT = 64  # numbers that a function is tried on
TYPES = {
    "fp32": (torch.float32, np.float32), "fp64": (torch.float64, np.float64), "int32": (torch.int32, np.int32),
    "int64": (torch.int64, np.int64), "uint32": (torch.uint32, np.uint32), "uint64": (torch.uint64, np.uint64),
}  # fmt: skip


class _Declared(Exception):
    """Raised with the table of a function's types and symbols."""


def _declarations() -> list[tuple[str, tuple[str, ...], str]]:
    """(name, types of arguments, type of result) of everything that libdevice declares."""

    def tell(library, path, args, table, **_):
        raise _Declared(table)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "extern_elementwise", tell)
        for name, function in vars(libdevice).items():
            if not callable(function) or getattr(function, "__module__", "") != libdevice.__name__:
                continue
            count = len(inspect.signature(function).parameters) - 1
            with pytest.raises(_Declared) as declared:
                function(*[None] * count, _semantic=object())
            for types, (_, result) in declared.value.args[0].items():
                found.append((name, tuple(map(str, types)), str(result)))
    return found


DECLARATIONS = _declarations()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A module with one kernel per function: Triton reads kernels from files."""
    lines = ["import triton, triton.language as tl", "from triton.language.extra import libdevice"]
    for name, arity in {name: len(types) for name, types, _ in DECLARATIONS}.items():
        pointers = [f"p{k}" for k in range(arity)]
        loads = ", ".join(f"tl.load({pointer} + at)" for pointer in pointers)
        lines += [
            "@triton.jit",
            f"def {name}({', '.join(pointers)}, out, N: tl.constexpr):",
            "    at = tl.arange(0, N)",
            f"    tl.store(out + at, libdevice.{name}({loads}).to(out.dtype.element_ty))",
        ]
    path = tmp_path_factory.mktemp("libdevice") / "libdevice_kernels.py"
    Path(path).write_text("\n".join(lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("libdevice_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def _launch(kernels: ModuleType, name: str, columns: list[np.ndarray], result: str) -> np.ndarray:
    out = torch.zeros(len(columns[0]), dtype=TYPES[result][0])
    getattr(kernels, name)[(1,)](*map(torch.from_numpy, columns), out, N=len(columns[0]))
    return out.numpy()


# ------------------------------------------------------------------------------------------------------------ arguments

_UNIT = "asin acos atanh erfinv"
_POSITIVE = "log log2 log10 log1p sqrt rsqrt y0 y1 yn lgamma tgamma pow fast_logf fast_log2f fast_log10f fast_powf"


def _float(draw: random.Random, name: str, scalar: type[np.floating]) -> float:
    base = name.split("_r")[0] if reference.directed(name) else name
    if base in ("normcdfinv", "erfcinv"):
        value = draw.choice([draw.uniform(0, 1), 10 ** draw.uniform(-30, 0)]) * (2 if base == "erfcinv" else 1)
        value = min(value, 2 - 1e-6 if base == "erfcinv" else 1 - 1e-6)
    elif base in _UNIT.split():
        value = draw.choice([draw.uniform(-1, 1), draw.uniform(-1e-4, 1e-4)])
    elif base == "acosh":
        value = 1 + abs(draw.gauss(0, 4))
    elif base in _POSITIVE.split() or (base in ("sqrt", "rsqrt") and base != name):
        value = abs(draw.gauss(0, 4)) + 1e-3
    elif "2" in name and reference.directed(name):  # a conversion to integers
        value = draw.choice(
            [draw.gauss(0, 4), draw.gauss(0, 1) * 2.0 ** draw.randint(0, 68), draw.randint(-9, 9) + 0.5]
        )
    elif reference.directed(name):
        value = draw.gauss(0, 1) * 2.0 ** draw.randint(-20, 20)
    else:
        value = draw.choice([draw.gauss(0, 3), draw.gauss(0, 1e-3), float(draw.randint(-9, 9)) + 0.5])
    return float(scalar(value or 1.5))


def _argument(draw: random.Random, name: str, type_: str) -> float | int:
    scalar = TYPES[type_][1]
    if issubclass(scalar, np.floating):
        return _float(draw, name, scalar)
    if name in ("jn", "yn"):
        return draw.randint(0, 6)
    if name in ("ldexp", "scalbn"):
        return draw.randint(-160, 130)
    if name == "pow":
        return draw.randint(-20, 20)
    if name == "byte_perm":
        return draw.randint(-(2**31), 2**31 - 1)
    if name == "sad":
        return draw.randint(0, 2**20)
    limits = np.iinfo(scalar)
    if name in ("int_as_float", "uint_as_float", "longlong_as_double", "hiloint2double"):
        return draw.randint(0, int(limits.max) // 2)  # no NaN
    small = draw.randint(max(-99, int(limits.min)), 99)
    return draw.choice([small, draw.randint(int(limits.min), int(limits.max)), int(limits.min), int(limits.max)])


# -------------------------------------------------------------------------------------------------------------- results

# Units in the last place; 2 where nothing is said. What has zeros apart from 0 is good to so many units of 1 there.
ULPS = {
    **dict.fromkeys(["j0", "j1", "y0", "y1", "jn", "yn", "lgamma", "tgamma"], 6),
    **dict.fromkeys(["erfcx", "erfinv", "erfcinv", "normcdf", "normcdfinv", "cyl_bessel_i0", "cyl_bessel_i1"], 6),
    **dict.fromkeys(["sinh", "cosh", "tanh", "acosh", "asinh", "atanh", "log1p", "expm1", "exp10", "erfc"], 3),
    **dict.fromkeys(["norm3d", "norm4d", "rnorm3d", "rnorm4d", "rhypot", "log10"], 3),
}
_CROSS_ZERO = {"j0", "j1", "jn", "y0", "y1", "yn", "lgamma", "normcdfinv"}
_ONCE = {  # rounded correctly
    "abs", "floor", "ceil", "trunc", "rint", "nearbyint", "round", "saturatef", "logb", "fast_dividef", "copysign",
    "fmod", "remainder", "fdim", "fma", "ldexp", "scalbn", "sqrt",
}  # fmt: skip
_ODD = {"ceil", "trunc", "rint", "nearbyint", "round", "fmod", "remainder"}  # f(-x) = -f(x), or a zero as if it were


def _expected(name: str, types: tuple[str, ...], result: str, args: tuple[float | int, ...]):
    """What is to come out: an integer or a float where it is certain, an mpf where `ULPS` are allowed."""
    scalar = TYPES[result][1]
    if name in reference.OF_INTEGERS and not types[0].startswith("fp"):
        return reference.OF_INTEGERS[name](8 * TYPES[types[0]][1]().nbytes, types[0].startswith("int"), *args)
    if name == "nextafter":
        return np.nextafter(*map(scalar, args))
    if rounding := reference.directed(name):
        exact, mode = rounding
        if issubclass(scalar, np.integer):
            return reference.saturated(reference.whole(args[0], mode), np.iinfo(scalar).bits, "2u" not in name)
        value = exact(*args)
        return reference.rounded(value, mode, scalar) if value else scalar(0)
    value = reference.EXPECTED[name](*args)
    if issubclass(scalar, np.integer) or isinstance(value, float):
        return value
    if name in _ONCE:
        value = reference.exactly(value)
        return (
            reference.rounded(value, "rn", scalar)
            if value
            else scalar(math.copysign(0.0, args[0] if name in _ODD else 1))
        )
    return value


@pytest.mark.parametrize(
    ("name", "types", "result"), [pytest.param(*d, id=f"{d[0]}-{'-'.join(d[1])}") for d in DECLARATIONS]
)
def test_a_function_of_libdevice_gives_what_mathematics_says(name, types, result, kernels):
    draw = random.Random(f"{name} {types}")
    rows = [tuple(_argument(draw, name, type_) for type_ in types) for _ in range(COUNT)]
    columns = [np.array(column, TYPES[type_][1]) for column, type_ in zip(zip(*rows, strict=True), types, strict=True)]
    found = _launch(kernels, name, columns, result)
    with mpmath.workprec(reference.PRECISION):
        for row, value in zip(rows, found, strict=True):
            expected = _expected(name, types, result, row)
            if not isinstance(expected, mpmath.mpf):
                assert value == expected, f"{row}: {value!r} instead of {expected!r}"
                assert np.signbit(value) == np.signbit(np.asarray(expected, value.dtype))
                continue
            nearest = reference.rounded(reference.exactly(expected), "rn", TYPES[result][1])
            if np.isinf(nearest):
                assert value == nearest
                continue
            scale = max(abs(nearest), nearest.dtype.type(1)) if name in _CROSS_ZERO else abs(nearest)
            allowed = ULPS.get(name, 2) * Fraction(float(np.spacing(scale)))
            allowed = Fraction(abs(float(nearest))) / 2**20 if name == "rcp64h" else allowed
            error = abs(reference.exactly(expected) - Fraction(float(value)))
            assert error <= allowed, (
                f"{row}: {value!r} instead of {nearest!r}, {float(error / allowed):.2f} of the bound"
            )


# ------------------------------------------------------------------------------------------------------- special values

INF, NAN, PI = math.inf, math.nan, math.pi
LARGEST, SMALLEST = "largest", "smallest"  # finite number, number above 0: of whichever type it is
# (function, arguments, result) by Annex F of C, and by CUDA's manual for what C has not.
SPECIAL = [
    *[(name, [x], x) for name in ("floor", "ceil", "trunc", "rint", "nearbyint", "round", "asinh", "sinh", "cbrt")
      for x in (0.0, -0.0, INF, -INF, NAN)],
    *[(name, [x], x) for name in ("sin", "tan", "tanh", "asin", "atan", "atanh", "expm1", "log1p", "erf", "erfinv",
                                  "sinpi", "sqrt", "cyl_bessel_i1") for x in (0.0, -0.0, NAN)],
    *[(name, [x], NAN) for name in ("sin", "cos", "tan", "sinpi", "cospi") for x in (INF, -INF)],
    *[(name, [x], NAN) for name in ("asin", "acos", "atanh", "erfinv") for x in (2.0, -2.0, INF)],
    *[(name, [-1.0], NAN) for name in ("log", "log2", "log10", "sqrt", "rsqrt", "y0", "y1", "acosh", "erfcinv",
                                       "normcdfinv", "tgamma")],
    *[(name, [0.0], -INF) for name in ("log", "log2", "log10", "logb", "y0", "y1", "normcdfinv")],
    *[(name, [INF], INF) for name in ("log", "log2", "log10", "log1p", "exp", "exp2", "exp10", "expm1", "cosh", "acosh",
                                      "sqrt", "logb", "lgamma", "tgamma", "cyl_bessel_i0", "cyl_bessel_i1")],
    *[(name, [-INF], 0.0) for name in ("exp", "exp2", "exp10", "normcdf")],
    *[(name, [INF], 0.0) for name in ("rsqrt", "rcbrt", "erfc", "erfcx", "y0", "y1", "j0", "j1")],
    *[(name, [0.0], 1.0) for name in ("exp", "exp2", "exp10", "cos", "cosh", "cospi", "erfc", "erfcx", "j0",
                                      "cyl_bessel_i0")],
    *[(name, [INF], 1.0) for name in ("tanh", "erf", "normcdf")],
    *[(name, [-INF], -1.0) for name in ("tanh", "erf", "expm1")],
    ("abs", [-0.0], 0.0), ("abs", [-INF], INF), ("rsqrt", [0.0], INF), ("rsqrt", [-0.0], -INF),
    ("rcbrt", [-0.0], -INF), ("rcbrt", [-INF], -0.0), ("cyl_bessel_i1", [-INF], -INF), ("cyl_bessel_i0", [-INF], INF),
    ("erfc", [-INF], 2.0), ("erfcx", [-INF], INF), ("erfinv", [1.0], INF), ("erfinv", [-1.0], -INF),
    ("erfcinv", [0.0], INF), ("erfcinv", [2.0], -INF), ("erfcinv", [1.0], 0.0), ("normcdfinv", [1.0], INF),
    ("normcdfinv", [0.5], 0.0), ("normcdf", [0.0], 0.5), ("lgamma", [0.0], INF), ("lgamma", [-3.0], INF),
    ("lgamma", [1.0], 0.0), ("lgamma", [2.0], 0.0), ("tgamma", [0.0], INF), ("tgamma", [-0.0], -INF),
    ("tgamma", [5.0], 24.0), ("sinpi", [1.0], 0.0), ("sinpi", [-1.0], -0.0), ("sinpi", [0.5], 1.0),
    ("sinpi", [-1.5], 1.0), ("sinpi", [1e10], 0.0), ("cospi", [0.5], 0.0), ("cospi", [1.0], -1.0),
    ("cospi", [-1.5], 0.0), ("cospi", [1e10], 1.0), ("round", [2.5], 3.0), ("rint", [2.5], 2.0),
    ("nearbyint", [-0.5], -0.0), ("ceil", [-0.5], -0.0), ("saturatef", [NAN], 0.0), ("saturatef", [-0.0], 0.0),
    ("saturatef", [INF], 1.0), ("saturatef", [-INF], 0.0), ("acos", [1.0], 0.0), ("acosh", [1.0], 0.0),
    ("atanh", [1.0], INF), ("atanh", [-1.0], -INF), ("log1p", [-1.0], -INF), ("pow", [NAN, 0.0], 1.0),
    ("pow", [1.0, NAN], 1.0), ("pow", [-1.0, INF], 1.0), ("pow", [-0.0, -1.0], -INF), ("pow", [-2.0, 3.0], -8.0),
    ("pow", [-2.0, 0.5], NAN), ("pow", [0.5, INF], 0.0), ("pow", [0.5, -INF], INF), ("atan2", [0.0, 0.0], 0.0),
    ("atan2", [-0.0, 0.0], -0.0), ("atan2", [0.0, -0.0], PI), ("atan2", [-0.0, -1.0], -PI),
    ("atan2", [INF, INF], PI / 4), ("atan2", [1.0, INF], 0.0), ("atan2", [1.0, 0.0], PI / 2),
    ("hypot", [INF, NAN], INF), ("hypot", [NAN, -INF], INF), ("hypot", [NAN, 1.0], NAN), ("hypot", [-0.0, -0.0], 0.0),
    ("rhypot", [INF, NAN], 0.0), ("rhypot", [NAN, 1.0], NAN), ("rhypot", [0.0, 0.0], INF),
    ("norm3d", [1.0, NAN, -INF], INF), ("norm3d", [1.0, NAN, 2.0], NAN), ("norm3d", [-0.0, 0.0, 0.0], 0.0),
    ("rnorm3d", [NAN, INF, 1.0], 0.0), ("rnorm3d", [0.0, 0.0, 0.0], INF), ("norm4d", [1.0, 2.0, INF, NAN], INF),
    ("rnorm4d", [NAN, NAN, NAN, -INF], 0.0), ("rnorm4d", [NAN, 0.0, 0.0, 0.0], NAN), ("fmod", [1.0, INF], 1.0),
    ("fmod", [INF, 1.0], NAN), ("fmod", [1.0, 0.0], NAN), ("fmod", [-4.0, 2.0], -0.0),
    ("remainder", [3.0, 2.0], -1.0), ("remainder", [1.0, 0.0], NAN), ("remainder", [-4.0, 2.0], -0.0),
    ("remainder", [5.0, INF], 5.0), ("fdim", [1.0, NAN], NAN), ("fdim", [INF, INF], 0.0), ("fdim", [INF, 1.0], INF),
    ("fdim", [1.0, INF], 0.0), ("copysign", [NAN, 1.0], NAN), ("copysign", [1.0, -0.0], -1.0),
    ("nextafter", [0.0, 1.0], SMALLEST), ("nextafter", [LARGEST, INF], INF), ("nextafter", [INF, 0.0], LARGEST),
    ("nextafter", [0.0, -0.0], -0.0), ("nextafter", [1.0, NAN], NAN),
    ("logb", [SMALLEST], {"fp32": -149.0, "fp64": -1074.0}), ("fma", [INF, 0.0, 1.0], NAN),
    ("fma", [LARGEST, LARGEST, -INF], -INF), ("fma", [-1.0, 0.0, 0.0], 0.0),
    # Sums that are 0 have the sign that the rounding goes towards, unless both summands have one sign.
    ("add_rd", [1.0, -1.0], -0.0), ("add_rd", [0.0, 0.0], 0.0), ("add_rd", [-0.0, 0.0], -0.0),
    ("add_ru", [1.0, -1.0], 0.0), ("add_rz", [1.0, -1.0], 0.0), ("add_ru", [-0.0, -0.0], -0.0),
    ("sub_rd", [1.0, 1.0], -0.0), ("sub_rd", [0.0, -0.0], 0.0), ("sub_rd", [0.0, 0.0], -0.0),
    ("sub_ru", [1.0, 1.0], 0.0), ("fma_rd", [1.0, 2.0, -2.0], -0.0), ("fma_rd", [0.0, 2.0, 0.0], 0.0),
    ("fma_ru", [1.0, 2.0, -2.0], 0.0), ("fma_rz", [-1.0, 0.0, -0.0], -0.0), ("add_rz", [LARGEST, LARGEST], LARGEST),
    ("add_ru", [LARGEST, LARGEST], INF), ("add_rd", [LARGEST, LARGEST], LARGEST),
    ("add_rd", [LARGEST, SMALLEST], LARGEST), ("add_ru", [LARGEST, SMALLEST], INF), ("add_ru", [INF, -INF], NAN),
    ("add_rz", [INF, 1.0], INF), ("add_rd", [INF, LARGEST], INF), ("mul_ru", [SMALLEST, SMALLEST], SMALLEST),
    ("mul_rd", [SMALLEST, SMALLEST], 0.0), ("mul_rz", [SMALLEST, SMALLEST], 0.0),
    ("mul_rz", [LARGEST, LARGEST], LARGEST), ("mul_ru", [LARGEST, 2.0], INF), ("mul_rd", [INF, 0.0], NAN),
    ("mul_rd", [-0.0, 1.0], -0.0), ("div_rz", [1.0, 0.0], INF), ("div_ru", [1.0, INF], 0.0),
    ("div_rd", [1.0, -INF], -0.0), ("div_rd", [0.0, 0.0], NAN), ("div_ru", [SMALLEST, LARGEST], SMALLEST),
    ("div_rd", [LARGEST, SMALLEST], LARGEST), ("rcp_ru", [-0.0], -INF), ("rcp_rd", [INF], 0.0),
    ("sqrt_rd", [-0.0], -0.0), ("sqrt_ru", [INF], INF), ("sqrt_rz", [-1.0], NAN),
]  # fmt: skip


def _of(value: float | str | dict[str, float], type_: str, scalar: type[np.floating]) -> np.floating:
    if value == LARGEST:
        return np.finfo(scalar).max
    if value == SMALLEST:
        return np.finfo(scalar).smallest_subnormal
    return scalar(value[type_] if isinstance(value, dict) else value)


def _neighbours(x: np.floating) -> list[np.floating]:
    """The numbers that may stand for a multiple of pi; an integer, infinity or extreme stands for itself."""
    exact = np.isinf(x) or x == np.rint(x) or abs(x) < 1e-30
    return [x] if exact else [np.nextafter(x, x.dtype.type(y)) for y in (-9, x, 9)]


@pytest.mark.parametrize("type_", ["fp32", "fp64"])
@pytest.mark.parametrize("name", list(dict.fromkeys(name for name, *_ in SPECIAL)))
def test_zeros_infinities_and_nan_lead_where_the_standard_says(name, type_, kernels):
    arity = next(len(args) for other, args, _ in SPECIAL if other == name)
    if (name, (type_,) * arity, type_) not in DECLARATIONS:
        return
    scalar = TYPES[type_][1]
    cases = [(args, result) for other, args, result in SPECIAL if other == name]
    cases += cases[:1] * ((1 << (len(cases) - 1).bit_length()) - len(cases))  # to a power of two, as blocks are
    columns = [np.array([_of(value, type_, scalar) for value in c]) for c in zip(*(a for a, _ in cases), strict=True)]
    found = _launch(kernels, name, columns, type_)
    for (args, result), value in zip(cases, found, strict=True):
        expected = _of(result, type_, scalar)
        told = f"{name}{tuple(args)} = {value!r}, not {expected!r}"
        assert value in _neighbours(expected) or (np.isnan(value) and np.isnan(expected)), told
        assert np.signbit(value) == np.signbit(expected) or expected != 0, told


@triton.jit
def _rounded_both_ways(x_ptr, y_ptr, out_ptr):
    x, y = tl.load(x_ptr), tl.load(y_ptr)
    tl.store(out_ptr, libdevice.div_rd(x, y))
    tl.store(out_ptr + 1, x / y)
    tl.store(out_ptr + 2, libdevice.div_ru(x, y))
    tl.store(out_ptr + 3, x / y)


def test_a_rounding_mode_holds_for_one_operation_and_for_scalars_too():
    out = torch.zeros(4, dtype=torch.float64)
    for x, y in ((1.0, 3.0), (2.0, 3.0)):  # one is rounded up to the nearest, one down
        _rounded_both_ways[(1,)](torch.tensor([x]).double(), torch.tensor([y]).double(), out)
        down, nearest, up, again = out.tolist()
        assert down < Fraction(x) / Fraction(y) < up == math.nextafter(down, 2)
        assert nearest == again == x / y
        assert torch.tensor([x]).double().div(y).item() == x / y  # nor is the mode left behind


@pytest.mark.parametrize("type_", ["fp32", "fp64"])
def test_cube_roots_are_good_over_all_exponents(type_, kernels):
    scalar = TYPES[type_][1]
    info, draw = np.finfo(scalar), random.Random(type_)
    ends = [float(info.max), float(info.smallest_subnormal), float(info.tiny), 1e-290, 1e300, -1e-289, -1e299, 1.0]
    rows = [2.0 ** draw.uniform(info.minexp, info.maxexp) * draw.choice([-1, 1]) for _ in range(512 - len(ends))]
    within = [v for v in ends + rows if abs(v) <= float(info.max)]
    x = np.resize(np.array(within, scalar), 512)
    x[x == 0] = 1
    for name, root in (("cbrt", mpmath.cbrt), ("rcbrt", lambda v: 1 / mpmath.cbrt(v))):
        found = _launch(kernels, name, [x], type_)
        with mpmath.workprec(reference.PRECISION):
            for argument, value in zip(x, found, strict=True):
                exact = Fraction(math.copysign(1, argument)) * reference.exactly(root(mpmath.mpf(float(abs(argument)))))
                bound = Fraction(float(np.spacing(abs(value)))) * (
                    4 if abs(argument) < 1e-289 else 2
                )  # libm's own root there
                assert abs(Fraction(float(value)) - exact) <= bound, f"{name}({argument!r}) = {value!r}"
