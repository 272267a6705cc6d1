"""Random numbers: Philox's known answers, Triton's way from them to floats, against numpy.

Integers and uniform floats have the same bits on every device. Normal ones differ in the last bits between devices as
the logarithm and the cosine do: each is within 2 ulp here, which leaves 5 for their product.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTH = 64

# J. K. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011): multipliers, and what the key is raised by.
CONSTANTS = {
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
}

# Width, counter, key and output after ten rounds, from the vectors that come with Random123.
KNOWN_ANSWERS = [
    (32, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (32, [2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        32,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
    (64, [0] * 4, [0] * 2, [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]),
]  # fmt: skip


def philox(width: int, counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    """Philox4x32 or 4x64 of one counter, in Python's integers."""
    (m0, m1), (w0, w1) = CONSTANTS[width]
    every = 2**width - 1
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        a, b = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (b >> width) ^ c1 ^ k0, b & every, (a >> width) ^ c3 ^ k1, a & every
        k0, k1 = (k0 + w0) & every, (k1 + w1) & every
    return [c0, c1, c2, c3]


def words(seed: int, offsets: list[int], rounds: int = 10) -> np.ndarray:
    """uint32 (4, len(offsets)): what a seed and offsets give, each taken for its low 64 bits."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    counters = [[at & 0xFFFFFFFF, (at >> 32) & 0xFFFFFFFF, 0, 0] for at in offsets]
    return np.array([philox(32, counter, key, rounds) for counter in counters], dtype=np.uint32).T


def uniform(integers: np.ndarray) -> np.ndarray:
    """float32 in [0, 1): the magnitude of an integer of either sign, rounded, times just below 2^-31 or 2^-63."""
    signed = integers.view(np.int32 if integers.itemsize == 4 else np.int64)
    scale = np.float32(4.6566127342e-10 if integers.itemsize == 4 else 1.0842020432385337e-19)
    return np.where(signed < 0, ~signed, signed).astype(np.float32) * scale


def normal(u1: np.ndarray, u2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64: Box and Muller's pair of normal numbers, whose angle is a float32 as in the kernel."""
    angle = (np.float32(2 * np.pi) * u2).astype(np.float64)
    radius = np.sqrt(-2 * np.log(np.maximum(u1, np.float32(1e-7)).astype(np.float64)))
    return radius * np.cos(angle), radius * np.sin(angle)


@pytest.mark.parametrize(("width", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_this_file_s_philox_gives_the_known_answers(width, counter, key, answer):
    assert philox(width, counter, key) == answer


@given(st.lists(st.integers(0, 2**64 - 2), min_size=4, max_size=4), st.integers(0, 2**64 - 1))
@settings(max_examples=20, deadline=None)
def test_this_file_s_philox_of_64_bits_is_numpy_s(counter, key):
    counter_words, key_words = np.array(counter, dtype=np.uint64), np.array([key, 0], dtype=np.uint64)
    theirs = np.random.Philox(counter=counter_words, key=key_words).random_raw(4)  # which counts up before, not after
    assert philox(64, [counter[0] + 1, *counter[1:]], [key, 0]) == theirs.tolist()


@triton.jit(do_not_specialize=["seed"])
def _philox(seed, counter_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    c0, c1, c2, c3 = tl.philox(
        seed, tl.load(counter_ptr + at), tl.load(counter_ptr + N + at), tl.load(counter_ptr + 2 * N + at),
        tl.load(counter_ptr + 3 * N + at),
    )  # fmt: skip
    tl.store(out_ptr + at, c0)
    tl.store(out_ptr + N + at, c1)
    tl.store(out_ptr + 2 * N + at, c2)
    tl.store(out_ptr + 3 * N + at, c3)


SEEDS = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(2**31, 2**32), st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, -1, 16, 2**32, 2**63 - 1, 2**63, 2**64 - 1]),
)  # fmt: skip


@pytest.mark.parametrize("width", [32, 64])
@given(seed=SEEDS, data=st.randoms(use_true_random=False))
@settings(max_examples=12, deadline=None)
def test_every_counter_of_either_width_is_turned_into_four_numbers(width, seed, data):
    dtype = np.uint32 if width == 32 else np.uint64
    counters = np.array([[data.getrandbits(width) for _ in range(LENGTH)] for _ in range(4)], dtype=dtype)
    counters[:, 0], counters[:, 1] = 0, 2**width - 1
    out = torch.full((4, LENGTH), 7, dtype=torch.uint32 if width == 32 else torch.uint64)
    _philox[(1,)](seed, torch.from_numpy(counters), out, N=LENGTH)
    unsigned = seed % 2**64
    key = [unsigned, 0] if width == 64 else [unsigned & 0xFFFFFFFF, unsigned >> 32]
    expected = [philox(width, [int(c) for c in column], key) for column in counters.T]
    assert out.T.tolist() == expected


@triton.jit(do_not_specialize=["seed"])
def _draw(seed, offset_ptr, integer_ptr, uniform_ptr, normal_ptr, ROUNDS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    offset = tl.load(offset_ptr + at)
    i1, i2, i3, i4 = tl.randint4x(seed, offset, ROUNDS)
    tl.store(integer_ptr + at, i1)
    tl.store(integer_ptr + N + at, i2)
    tl.store(integer_ptr + 2 * N + at, i3)
    tl.store(integer_ptr + 3 * N + at, i4)
    tl.store(integer_ptr + 4 * N + at, tl.randint(seed, offset, ROUNDS))
    u1, u2, u3, u4 = tl.rand4x(seed, offset, ROUNDS)
    tl.store(uniform_ptr + at, u1)
    tl.store(uniform_ptr + N + at, u2)
    tl.store(uniform_ptr + 2 * N + at, u3)
    tl.store(uniform_ptr + 3 * N + at, u4)
    tl.store(uniform_ptr + 4 * N + at, tl.rand(seed, offset, ROUNDS))
    n1, n2, n3, n4 = tl.randn4x(seed, offset, ROUNDS)
    tl.store(normal_ptr + at, n1)
    tl.store(normal_ptr + N + at, n2)
    tl.store(normal_ptr + 2 * N + at, n3)
    tl.store(normal_ptr + 3 * N + at, n4)
    tl.store(normal_ptr + 4 * N + at, tl.randn(seed, offset, ROUNDS))


OFFSETS = {
    torch.int32: (-(2**31), 2**31 - 1), torch.int64: (-(2**63), 2**63 - 1), torch.uint32: (0, 2**32 - 1),
    torch.uint64: (0, 2**64 - 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", OFFSETS, ids=str)
@given(seed=SEEDS, first=st.data(), rounds=st.sampled_from([10, 10, 7]))
@settings(max_examples=10, deadline=None)
def test_integers_and_floats_of_a_seed_and_offsets(dtype, seed, first, rounds):
    low, high = OFFSETS[dtype]
    boundary = st.sampled_from([n for n in (0, 2**31 - LENGTH // 2, 2**32 - LENGTH // 2, low) if n <= high - LENGTH])
    start = first.draw(st.one_of(st.integers(low, high - LENGTH), boundary))
    offsets = list(range(start, start + LENGTH))
    integers = torch.full((5, LENGTH), 7, dtype=torch.uint32)
    uniforms, normals = torch.full((5, LENGTH), float("nan")), torch.full((5, LENGTH), float("nan"))
    _draw[(1,)](seed, torch.tensor(offsets, dtype=dtype), integers, uniforms, normals, ROUNDS=rounds, N=LENGTH)

    if dtype in (torch.int32, torch.uint32):  # the high word of the counter is zero, not the sign
        offsets = [at & 0xFFFFFFFF for at in offsets]
    drawn = words(seed % 2**64, offsets, rounds)
    assert np.array_equal(integers.numpy(), drawn[[0, 1, 2, 3, 0]])
    floats = uniform(drawn)
    assert np.array_equal(uniforms.numpy().view(np.uint32), floats[[0, 1, 2, 3, 0]].view(np.uint32))
    pairs = np.stack([*normal(floats[0], floats[1]), *normal(floats[2], floats[3])])[[0, 1, 2, 3, 0]]
    ulp = np.spacing(np.abs(pairs).astype(np.float32)).astype(np.float64)
    assert (np.abs(normals.numpy() - pairs) <= 5 * ulp).all()


@triton.jit
def _to_floats(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.random.uint_to_uniform_float(tl.load(x_ptr + at)))


@pytest.mark.parametrize("width", [32, 64])
def test_no_integer_gives_a_float_outside_of_0_to_1(width):
    top = 2 ** (width - 1)
    values = [0, 1, 2, top - 1, top, top + 1, 2 * top - 1, top // 2, top // 3, 3, top - 129, top - 65, top - 64]
    values += [7, 9, 255]
    x = np.array(values, dtype=np.uint32 if width == 32 else np.uint64)
    out = torch.full((16,), -1.0)
    _to_floats[(1,)](torch.from_numpy(x), out, N=16)
    assert np.array_equal(out.numpy().view(np.uint32), uniform(x).view(np.uint32))
    assert (out >= 0).all()
    assert (out < 1).all()
