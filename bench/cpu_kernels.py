"""The kernels of `cpu_backend.py`: ordinary Triton.

Block sizes are chosen for a processor: a tile fits its inner caches, and there are enough programs for its cores.
"""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask) + tl.load(y_ptr + i, mask=mask), mask=mask)


@triton.jit
def gelu_chain(x_ptr, y_ptr, out_ptr, n, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    y = tl.load(y_ptr + i, mask=mask)
    h = tl.load(x_ptr + i, mask=mask) * scale + y
    tl.store(out_ptr + i, 0.5 * h * (1 + tl.erf(h * 0.7071067811865476)) + y, mask=mask)


@triton.jit
def swiglu(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    gate = tl.load(gate_ptr + i, mask=mask)
    tl.store(out_ptr + i, gate * tl.sigmoid(gate) * tl.load(up_ptr + i, mask=mask), mask=mask)


@triton.jit
def dropout(x_ptr, out_ptr, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    tl.store(out_ptr + i, tl.where(tl.rand(seed, i) > p, x / (1 - p), 0.0), mask=mask)


@triton.jit
def softmax(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    start = tl.program_id(0) * stride
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + i, mask=i < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + start + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def layernorm(x_ptr, weight_ptr, bias_ptr, out_ptr, n, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0) * n
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + start + i, mask=mask, other=0.0)
    mean = tl.sum(x, 0) / n
    centred = tl.where(mask, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / n + eps)
    weight, bias = tl.load(weight_ptr + i, mask=mask), tl.load(bias_ptr + i, mask=mask)
    tl.store(out_ptr + start + i, centred * scale * weight + bias, mask=mask)


@triton.jit
def layernorm_backward(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, partial_ptr, rows, rows_per_program, n, BLOCK: tl.constexpr
):
    """The gradient of x, and for each program the sums of its rows' gradients of weight and bias."""
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < n
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    d_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, rows)):
        grad = tl.load(grad_ptr + row * n + i, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row)
        x_hat = tl.where(
            mask, (tl.load(x_ptr + row * n + i, mask=mask, other=0.0) - tl.load(mean_ptr + row)) * rstd, 0.0
        )
        weighted = weight * grad
        along = tl.sum(x_hat * weighted, 0) / n
        mean = tl.sum(weighted, 0) / n
        tl.store(dx_ptr + row * n + i, (weighted - (x_hat * along + mean)) * rstd, mask=mask)
        d_weight += grad * x_hat
        d_bias += grad
    tl.store(partial_ptr + program * 2 * n + i, d_weight, mask=mask)
    tl.store(partial_ptr + (program * 2 + 1) * n + i, d_bias, mask=mask)


@triton.jit
def sum_partials(partial_ptr, out_ptr, programs, n, BLOCK: tl.constexpr):
    """out[j] = sum of partial[p, j] over p."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for program in range(programs):
        total += tl.load(partial_ptr + program * n + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, total, mask=i < n)


@triton.jit
def rmsnorm(x_ptr, weight_ptr, out_ptr, n, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0) * n
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + start + i, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / n + eps)
    tl.store(out_ptr + start + i, x * scale * tl.load(weight_ptr + i, mask=mask), mask=mask)


@triton.jit
def cross_entropy(logits_ptr, labels_ptr, loss_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * n + i, mask=i < n, other=-float("inf"))
    most = tl.max(x, 0)
    normaliser = tl.log(tl.sum(tl.exp(x - most), 0)) + most
    tl.store(loss_ptr + row, normaliser - tl.load(logits_ptr + row * n + tl.load(labels_ptr + row)))


@triton.jit
def rope(x_ptr, cos_ptr, sin_ptr, out_ptr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotates the halves of each head's vector; one program for each token."""
    token = tl.program_id(0)
    i = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * HALF + i)[None, :]
    sin = tl.load(sin_ptr + token * HALF + i)[None, :]
    at = token * HEADS * 2 * HALF + tl.arange(0, HEADS)[:, None] * 2 * HALF + i[None, :]
    first, second = tl.load(x_ptr + at), tl.load(x_ptr + at + HALF)
    tl.store(out_ptr + at, first * cos - second * sin)
    tl.store(out_ptr + at + HALF, second * cos + first * sin)


@triton.jit
def cumsum(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0) * n
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + i, mask=i < n, other=0.0)
    tl.store(out_ptr + start + i, tl.cumsum(x, 0), mask=i < n)


@triton.jit
def argmax(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, mask=i < n, other=-float("inf"))
    tl.store(out_ptr + row, tl.argmax(x, 0).to(tl.int64))


@triton.jit
def transpose_copy(x_ptr, out_ptr, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.load(x_ptr + r[:, None] * cols + c[None, :], mask=(r[:, None] < rows) & (c[None, :] < cols))
    mask = (c[:, None] < cols) & (r[None, :] < rows)
    tl.store(out_ptr + c[:, None] * rows + r[None, :], tl.trans(x), mask=mask)


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """C = A B of row-major matrices. EVEN: all extents are multiples of the block's, so that nothing needs a mask."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_at = a_ptr + m[:, None] * K + k[None, :]
    b_at = b_ptr + k[:, None] * N + n[None, :]
    c = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            a = tl.load(a_at, mask=(m[:, None] < M) & (k[None, :] < K - start), other=0.0)
            b = tl.load(b_at, mask=(k[:, None] < K - start) & (n[None, :] < N), other=0.0)
        c = tl.dot(a, b, c)
        a_at += BK
        b_at += BK * N
    c_at = c_ptr + m[:, None] * N + n[None, :]
    if EVEN:
        tl.store(c_at, c)
    else:
        tl.store(c_at, c, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def batched_matmul(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """One program for each small product."""
    batch = tl.program_id(0)
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + batch * M * K + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + batch * K * N + k[:, None] * N + n[None, :])
    tl.store(c_ptr + batch * M * N + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, out_ptr, length, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """softmax(Q K^T scale) V of one head and BM queries, with the running maximum and sum of flash attention."""
    head = tl.program_id(1) * length * D
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    q = tl.load(q_ptr + head + m[:, None] * D + d[None, :], mask=m[:, None] < length, other=0.0)
    q = q * (scale * 1.4426950408889634)
    most = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, D), tl.float32)
    for start in range(0, length, BN):
        n = start + tl.arange(0, BN)
        k = tl.load(k_ptr + head + n[:, None] * D + d[None, :], mask=n[:, None] < length, other=0.0)
        v = tl.load(v_ptr + head + n[:, None] * D + d[None, :], mask=n[:, None] < length, other=0.0)
        scores = tl.where(n[None, :] < length, tl.dot(q, tl.trans(k)), -float("inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights, v, out * shrink[:, None])
        most = new_most
    tl.store(out_ptr + head + m[:, None] * D + d[None, :], out / total[:, None], mask=m[:, None] < length)


@triton.jit
def int8_matmul(
    a_ptr, b_ptr, scale_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """C = A (B * scale), with B int8 and one scale for each of its columns."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    c = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        left = k < K - start
        a_at, b_at = a_ptr + m[:, None] * K + start + k[None, :], b_ptr + (start + k[:, None]) * N + n[None, :]
        a = tl.load(a_at, mask=(m[:, None] < M) & left[None, :], other=0.0)
        b = tl.load(b_at, mask=left[:, None] & (n[None, :] < N), other=0)
        c = tl.dot(a, b.to(tl.float32), c)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c * scale[None, :], mask=(m[:, None] < M) & (n[None, :] < N))
