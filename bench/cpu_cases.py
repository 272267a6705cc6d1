"""What `cpu_backend.py` times: kernels with inputs of their own, what torch does instead, the answers in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cpu_kernels as kernels
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

Tensors = tuple[Tensor, ...]


class Launch(NamedTuple):
    """One launch of a kernel; calling it is the stock `kernel[grid](...)`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    blocks: dict[str, Any] = {}  # noqa: RUF012  # never changed

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.blocks)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel on one set of inputs, and its rivals.

    Attributes:
        outputs: makes the outputs, not initialised.
        launches: what Triton runs to fill them.
        expression: the same in torch, as `torch.compile` gets it: new tensors from the inputs.
        eager: the same in torch as one writes it by hand, into the outputs that are given first where `preallocated`.
        reference: the outputs in float64 from inputs in float64; integers stay what they are.
        preallocated: whether all contenders write into outputs that were made before. Where torch has no `out=` for
            the operation (or Inductor would copy a library's result there) all of them make new outputs each time.
        tolerance: largest error, relative to the larger of the expected value and its tensor's mean magnitude.
        bytes_moved: least traffic of a kernel that is no product, else 0.
        functions: whether it computes exponentials, other functions or random numbers for each element.
        flops: multiplications and additions of products, else 0.
        library: whether `eager` is one call of MKL.
        random: the expected value stands for half of the elements, drawn at random; the others are 0.
    """

    name: str
    inputs: Tensors
    outputs: Callable[[], Tensors]
    launches: Callable[[Tensors], tuple[Launch, ...]]
    expression: Callable[..., Tensors]
    eager: Callable[..., Tensors]
    reference: Callable[..., Tensors]
    preallocated: bool = True
    tolerance: float = 1e-5
    bytes_moved: int = 0
    functions: bool = False
    flops: int = 0
    library: bool = False
    random: bool = False

    def error(self, results: Tensors) -> str:
        """What is wrong with these results, or nothing."""
        wide = tuple(x.double() if x.is_floating_point() else x for x in self.inputs)
        expected = self.reference(*wide)
        for index, (result, value) in enumerate(zip(results, expected, strict=True)):
            if result.shape != value.shape or result.is_floating_point() != value.is_floating_point():
                return (
                    f"output {index}: {result.dtype} {list(result.shape)}, expected {value.dtype} {list(value.shape)}"
                )
            if self.random:  # of each element the expected value or 0, as often as the other within 6 sigma
                kept = result != 0
                value = torch.where(kept, value, 0.0)
                if abs(kept.double().mean() - 0.5) > 6 * 0.5 / math.sqrt(result.numel()):
                    return f"output {index}: {kept.double().mean():.4f} of the elements were kept, expected 0.5"
            if not value.is_floating_point():
                if not torch.equal(result, value):
                    return f"output {index}: {int((result != value).sum())} elements differ"
                continue
            bound = self.tolerance * torch.maximum(value.abs(), value.abs().mean())
            worst = ((result.double() - value).abs() / bound).max().item()  # NaN where poison is left
            if not worst <= 1:
                return f"output {index}: an error of {worst:.3g} times the bound of {self.tolerance:g}"
        return ""


def _flat(count: int, block: int) -> tuple[tuple[int], dict[str, int]]:
    return (triton.cdiv(count, block),), {"BLOCK": block}


def _rows(n: int) -> dict[str, int]:
    return {"BLOCK": triton.next_power_of_2(n)}


_COLUMNS = 1024
_EPS = 1e-5


def make_add(count: int, randn) -> Case:
    x, y = randn(count), randn(count)
    grid, blocks = _flat(count, 4096)
    return Case(
        name=f"add {count}",
        inputs=(x, y),
        outputs=lambda: (torch.empty(count),),
        launches=lambda out: (Launch(kernels.add, grid, (x, y, *out, count), blocks),),
        expression=lambda x, y: (x + y,),
        eager=lambda out, x, y: (torch.add(x, y, out=out[0]),),
        reference=lambda x, y: (x + y,),
        bytes_moved=12 * count,
    )


def make_gelu(count: int, randn) -> Case:
    x, y = randn(count), randn(count)
    grid, blocks = _flat(count, 4096)

    def expression(x, y):
        return (F.gelu(x * 1.7 + y) + y,)

    def eager(out, x, y):
        torch.add(y, x, alpha=1.7, out=out[0])
        torch.ops.aten.gelu.out(out[0], out=out[0])
        return (out[0].add_(y),)

    return Case(
        name=f"gelu chain {count}",
        inputs=(x, y),
        outputs=lambda: (torch.empty(count),),
        launches=lambda out: (Launch(kernels.gelu_chain, grid, (x, y, *out, count, 1.7), blocks),),
        expression=expression,
        eager=eager,
        reference=expression,
        bytes_moved=12 * count,
        functions=True,
    )


def make_swiglu(count: int, randn) -> Case:
    gate, up = randn(count), randn(count)
    grid, blocks = _flat(count, 4096)

    def eager(out, gate, up):
        torch.ops.aten.silu.out(gate, out=out[0])
        return (out[0].mul_(up),)

    return Case(
        name=f"swiglu {count}",
        inputs=(gate, up),
        outputs=lambda: (torch.empty(count),),
        launches=lambda out: (Launch(kernels.swiglu, grid, (gate, up, *out, count), blocks),),
        expression=lambda gate, up: (F.silu(gate) * up,),
        eager=eager,
        reference=lambda gate, up: (F.silu(gate) * up,),
        bytes_moved=12 * count,
        functions=True,
    )


def make_dropout(count: int, randn) -> Case:
    x = randn(count)
    grid, blocks = _flat(count, 4096)

    def eager(out, x):
        return (out[0].bernoulli_(0.5).mul_(2.0).mul_(x),)

    return Case(
        name=f"dropout {count}",
        inputs=(x,),
        outputs=lambda: (torch.empty(count),),
        launches=lambda out: (Launch(kernels.dropout, grid, (x, *out, count, 0.5, 20260131), blocks),),
        expression=lambda x: (F.dropout(x, 0.5, training=True),),
        eager=eager,
        reference=lambda x: (2 * x,),
        bytes_moved=8 * count,
        functions=True,
        random=True,
    )


def make_softmax(count: int, randn) -> Case:
    rows, n = count // _COLUMNS, _COLUMNS
    x = randn(rows, n)
    return Case(
        name=f"softmax {rows}x{n}",
        inputs=(x,),
        outputs=lambda: (torch.empty(rows, n),),
        launches=lambda out: (Launch(kernels.softmax, (rows,), (x, *out, n, n), _rows(n)),),
        expression=lambda x: (torch.softmax(x, 1),),
        eager=lambda out, x: (torch.softmax(x, 1, out=out[0]),),
        reference=lambda x: (torch.softmax(x, 1),),
        bytes_moved=8 * count,
        functions=True,
    )


def make_layernorm(count: int, randn) -> Case:
    rows, n = count // _COLUMNS, _COLUMNS
    x, weight, bias = randn(rows, n), randn(n), randn(n)

    def expression(x, weight, bias):
        return (F.layer_norm(x, (n,), weight, bias, _EPS),)

    return Case(
        name=f"layernorm {rows}x{n}",
        inputs=(x, weight, bias),
        outputs=lambda: (torch.empty(rows, n),),
        launches=lambda out: (Launch(kernels.layernorm, (rows,), (x, weight, bias, *out, n, _EPS), _rows(n)),),
        expression=expression,
        eager=lambda out, *inputs: expression(*inputs),
        reference=expression,
        preallocated=False,
        bytes_moved=8 * count,
    )


def make_layernorm_backward(count: int, randn) -> Case:
    rows, n = count // _COLUMNS, _COLUMNS
    grad, x, weight = randn(rows, n), randn(rows, n), randn(n)
    mean = x.double().mean(1, keepdim=True).float()
    rstd = (x.double().var(1, correction=0, keepdim=True) + _EPS).rsqrt().float()
    programs = min(rows, 32)
    per_program = triton.cdiv(rows, programs)

    def launches(out):
        dx, d_both = out
        partial = torch.empty(programs, 2, n)
        first = (grad, x, mean, rstd, weight, dx, partial, rows, per_program, n)
        return (
            Launch(kernels.layernorm_backward, (programs,), first, _rows(n)),
            Launch(
                kernels.sum_partials, (triton.cdiv(2 * n, 256),), (partial, d_both, programs, 2 * n), {"BLOCK": 256}
            ),
        )

    def expression(grad, x, mean, rstd, weight):
        x_hat = (x - mean) * rstd
        weighted = grad * weight
        dx = rstd * (weighted - weighted.mean(1, keepdim=True) - x_hat * (weighted * x_hat).mean(1, keepdim=True))
        return dx, torch.stack([(grad * x_hat).sum(0), grad.sum(0)])

    def eager(out, grad, x, mean, rstd, weight):
        dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, (n,), mean, rstd, weight, weight, [True, True, True]
        )
        return dx, torch.stack([d_weight, d_bias])

    return Case(
        name=f"layernorm backward {rows}x{n}",
        inputs=(grad, x, mean, rstd, weight),
        outputs=lambda: (torch.empty(rows, n), torch.empty(2, n)),
        launches=launches,
        expression=lambda *inputs: eager(None, *inputs),
        eager=eager,
        reference=expression,
        preallocated=False,
        tolerance=1e-4,  # sums of up to 16384 rows, of both signs
        bytes_moved=12 * count,
    )


def make_rmsnorm(count: int, randn) -> Case:
    rows, n = count // _COLUMNS, _COLUMNS
    x, weight = randn(rows, n), randn(n)

    def expression(x, weight):
        return (F.rms_norm(x, (n,), weight, _EPS),)

    return Case(
        name=f"rmsnorm {rows}x{n}",
        inputs=(x, weight),
        outputs=lambda: (torch.empty(rows, n),),
        launches=lambda out: (Launch(kernels.rmsnorm, (rows,), (x, weight, *out, n, _EPS), _rows(n)),),
        expression=expression,
        eager=lambda out, *inputs: expression(*inputs),
        reference=expression,
        preallocated=False,
        bytes_moved=8 * count,
    )


def make_cross_entropy(count: int, randn) -> Case:
    n = min(8192, count // 8)
    rows = count // n
    logits = randn(rows, n)
    labels = torch.randint(0, n, (rows,), generator=torch.Generator().manual_seed(7))

    def expression(logits, labels):
        return (F.cross_entropy(logits, labels, reduction="none"),)

    return Case(
        name=f"cross-entropy {rows}x{n}",
        inputs=(logits, labels),
        outputs=lambda: (torch.empty(rows),),
        launches=lambda out: (Launch(kernels.cross_entropy, (rows,), (logits, labels, *out, n), _rows(n)),),
        expression=expression,
        eager=lambda out, *inputs: expression(*inputs),
        reference=expression,
        preallocated=False,
        bytes_moved=4 * count,
        functions=True,
    )


def make_rope(count: int, randn) -> Case:
    heads, half = 8, 64
    tokens = count // (2 * heads * half)
    x, angle = randn(tokens, heads, 2 * half), randn(tokens, 1, half)
    cos, sin = angle.cos(), angle.sin()

    def expression(x, cos, sin):
        first, second = x.chunk(2, 2)
        return (torch.cat((first * cos - second * sin, second * cos + first * sin), 2),)

    def eager(out, x, cos, sin):
        (first, second), (to_first, to_second) = x.chunk(2, 2), out[0].chunk(2, 2)
        torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=to_second).addcmul_(first, sin)
        return out

    return Case(
        name=f"rope {tokens}x{heads}x{2 * half}",
        inputs=(x, cos, sin),
        outputs=lambda: (torch.empty(tokens, heads, 2 * half),),
        launches=lambda out: (Launch(kernels.rope, (tokens,), (x, cos, sin, *out), {"HEADS": heads, "HALF": half}),),
        expression=expression,
        eager=eager,
        reference=expression,
        bytes_moved=8 * count + 8 * tokens * half,
    )


def make_cumsum(count: int, randn) -> Case:
    rows, n = count // _COLUMNS, _COLUMNS
    x = randn(rows, n)
    return Case(
        name=f"cumsum {rows}x{n}",
        inputs=(x,),
        outputs=lambda: (torch.empty(rows, n),),
        launches=lambda out: (Launch(kernels.cumsum, (rows,), (x, *out, n), _rows(n)),),
        expression=lambda x: (torch.cumsum(x, 1),),
        eager=lambda out, x: (torch.cumsum(x, 1, out=out[0]),),
        reference=lambda x: (torch.cumsum(x, 1),),
        tolerance=1e-4,  # a thousand roundings of sums that grow
        bytes_moved=8 * count,
    )


def make_argmax(count: int, randn) -> Case:
    rows, n = count // _COLUMNS, _COLUMNS
    x = randn(rows, n)
    return Case(
        name=f"argmax {rows}x{n}",
        inputs=(x,),
        outputs=lambda: (torch.empty(rows, dtype=torch.int64),),
        launches=lambda out: (Launch(kernels.argmax, (rows,), (x, *out, n), _rows(n)),),
        expression=lambda x: (torch.argmax(x, 1),),
        eager=lambda out, x: (torch.argmax(x, 1, out=out[0]),),
        reference=lambda x: (torch.argmax(x, 1),),
        bytes_moved=4 * count,
    )


def make_transpose(count: int, randn) -> Case:
    rows = 2 ** (count.bit_length() // 2)
    cols = count // rows
    x = randn(rows, cols)
    # Long rows, which memory is read faster in; a tile fits the second-level cache.
    blocks = {"BLOCK_R": 64, "BLOCK_C": 512}
    grid = (triton.cdiv(rows, 64), triton.cdiv(cols, 512))
    return Case(
        name=f"transpose {rows}x{cols}",
        inputs=(x,),
        outputs=lambda: (torch.empty(cols, rows),),
        launches=lambda out: (Launch(kernels.transpose_copy, grid, (x, *out, rows, cols), blocks),),
        expression=lambda x: (x.t().contiguous(),),
        eager=lambda out, x: (out[0].copy_(x.t()),),
        reference=lambda x: (x.t(),),
        bytes_moved=8 * count,
    )


def make_matmul(m: int, n: int, k: int, randn) -> Case:
    a, b = randn(m, k), randn(k, n)
    # As large as the second-level cache allows, so that operands are fetched and put in order as rarely as possible.
    blocks = {"BM": 128, "BN": 128, "BK": 64}
    blocks["EVEN"] = m % 128 == 0 and n % 128 == 0 and k % 64 == 0
    grid = (triton.cdiv(m, 128), triton.cdiv(n, 128))
    return Case(
        name=f"matmul {m}x{n}x{k}",
        inputs=(a, b),
        outputs=lambda: (torch.empty(m, n),),
        launches=lambda out: (Launch(kernels.matmul, grid, (a, b, *out, m, n, k), blocks),),
        expression=lambda a, b: (a @ b,),
        eager=lambda out, a, b: (torch.mm(a, b),),
        reference=lambda a, b: (a @ b,),
        preallocated=False,
        flops=2 * m * n * k,
        library=True,
    )


def make_batched_matmul(batch: int, extent: int, randn) -> Case:
    a, b = randn(batch, extent, extent), randn(batch, extent, extent)
    blocks = {"M": extent, "N": extent, "K": extent}
    return Case(
        name=f"batched matmul {batch}x{extent}^3",
        inputs=(a, b),
        outputs=lambda: (torch.empty(batch, extent, extent),),
        launches=lambda out: (Launch(kernels.batched_matmul, (batch,), (a, b, *out), blocks),),
        expression=lambda a, b: (torch.bmm(a, b),),
        eager=lambda out, a, b: (torch.bmm(a, b),),
        reference=lambda a, b: (torch.bmm(a, b),),
        preallocated=False,
        flops=2 * batch * extent**3,
        library=True,
    )


def make_attention(heads: int, length: int, randn) -> Case:
    d = 64
    q, k, v = (randn(1, heads, length, d) for _ in range(3))
    grid = (triton.cdiv(length, 128), heads)
    blocks = {"D": d, "BM": 128, "BN": 128}

    def expression(q, k, v):
        return (F.scaled_dot_product_attention(q, k, v),)

    def reference(q, k, v):
        return (torch.softmax(q @ k.transpose(2, 3) / math.sqrt(d), 3) @ v,)

    return Case(
        name=f"attention {heads}x{length}x{d}",
        inputs=(q, k, v),
        outputs=lambda: (torch.empty(1, heads, length, d),),
        launches=lambda out: (Launch(kernels.attention, grid, (q, k, v, *out, length, 1 / math.sqrt(d)), blocks),),
        expression=expression,
        eager=lambda out, *inputs: expression(*inputs),
        reference=reference,
        preallocated=False,
        flops=4 * heads * length * length * d,
    )


def make_int8_matmul(m: int, n: int, k: int, randn) -> Case:
    a, scale = randn(m, k), randn(n)
    b = torch.randint(-128, 128, (k, n), dtype=torch.int8, generator=torch.Generator().manual_seed(9))
    grid, blocks = (triton.cdiv(n, 64), triton.cdiv(m, 64)), {"BM": 64, "BN": 64, "BK": 64}

    def expression(a, b, scale):
        return ((a @ b.to(a.dtype)) * scale,)

    return Case(
        name=f"int8 matmul {m}x{n}x{k}",
        inputs=(a, b, scale),
        outputs=lambda: (torch.empty(m, n),),
        launches=lambda out: (Launch(kernels.int8_matmul, grid, (a, b, scale, *out, m, n, k), blocks),),
        expression=expression,
        eager=lambda out, a, b, scale: (torch.mm(a, b.float()).mul_(scale),),
        reference=expression,
        preallocated=False,
        flops=2 * m * n * k,
    )


MEMORY_BOUND: dict[str, Callable[[int, Any], Case]] = {
    "add": make_add,
    "gelu": make_gelu,
    "swiglu": make_swiglu,
    "dropout": make_dropout,
    "softmax": make_softmax,
    "layernorm": make_layernorm,
    "layernorm-backward": make_layernorm_backward,
    "rmsnorm": make_rmsnorm,
    "cross-entropy": make_cross_entropy,
    "rope": make_rope,
    "cumsum": make_cumsum,
    "argmax": make_argmax,
    "transpose": make_transpose,
}
# Of each, extents for timing and extents for a quick look at correctness.
PRODUCTS: dict[str, tuple[Callable[..., Case], tuple[int, ...], tuple[int, ...]]] = {
    "matmul-512": (make_matmul, (512, 512, 512), (128, 256, 64)),
    "matmul-1024": (make_matmul, (1024, 1024, 1024), (128, 64, 192)),
    "matmul-ragged": (make_matmul, (1000, 333, 777), (70, 37, 90)),
    "batched-matmul": (make_batched_matmul, (512, 32), (3, 32)),
    "attention": (make_attention, (8, 1024), (2, 100)),
    "int8-matmul": (make_int8_matmul, (64, 1024, 1024), (33, 70, 90)),
}
NAMES = (*MEMORY_BOUND, *PRODUCTS)


def cases(name: str, sizes: tuple[int, ...] | None) -> list[Case]:
    """The cases of one kernel, with fresh random inputs: of these numbers of elements, or (None) small ones.

    Products have one size of their own, whatever `sizes` are.
    """
    generator = torch.Generator().manual_seed(20260131)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name in PRODUCTS:
        make, large, small = PRODUCTS[name]
        return [make(*(small if sizes is None else large), randn)]
    # Not a multiple of the block, where there is no row to be cut.
    quick = 5000 if name in ("add", "gelu", "swiglu", "dropout") else 4096
    return [MEMORY_BOUND[name](count, randn) for count in sizes or (quick,)]
