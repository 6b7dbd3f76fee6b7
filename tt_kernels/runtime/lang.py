"""Functions inside kernels that two or more of them share."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from .launch import ON_CPU

_ON_CPU = tl.constexpr(ON_CPU)


@triton.jit
def programmatic_launch():
    """The first line of every kernel: wait until the launches before are done and their writes visible, then let the
    next launch's programs start, whose first line waits for this launch. So its start overlaps with this one's end."""
    if not _ON_CPU and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-1.4426950408889634 * x))  # one ex2.approx; tl.exp adds range checks


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def load_row(rows, i, cols, mask, ACC: tl.constexpr):
    """Columns of row i of an operand `Rows`, in the dtype of sums."""
    return tl.load(rows.ptr + i * rows.stride + cols, mask=mask, other=0.0).to(ACC)


@triton.jit
def sum_of_pairs(pairs_ptr, ids_ptr, weights_ptr, t, cols, E, D, K: tl.constexpr, ACC: tl.constexpr):
    """Columns of sum_k weights[t, k] pairs[t * K + k], in the order of k. Pairs [T * K, D] of ids [T, K] that are not 0
    to E - 1 have not been written: they count as 0. weights None: 1."""
    y = tl.zeros(cols.shape, dtype=ACC)
    for k in tl.static_range(K):  # unrolled: all K rows are on their way at once
        expert = tl.load(ids_ptr + t * K + k)
        columns = tl.where(tl.where(expert < 0, E, expert) < E, D, 0)  # that this pair has
        pair = tl.load(pairs_ptr + (t * K + k) * D + cols, mask=cols < columns, other=0.0).to(ACC)
        if weights_ptr is not None:
            pair *= tl.load(weights_ptr + t * K + k, mask=columns > 0, other=0.0).to(ACC)
        y += pair
    return y


@triton.jit
def row_count(counts_ptr, b, L):
    """How many of row b's L tokens enter: what counts [rows] say, cut to 0 .. L; None: all."""
    count = L
    if counts_ptr is not None:
        count = tl.minimum(tl.maximum(tl.load(counts_ptr + b), 0), L).to(tl.int32)
    return count


@triton.jit
def at_slot(slots, row):
    """Where the state of a row (64-bit) begins: in the slot that its index names, cut to those that exist."""
    if slots.indices is not None:
        row = tl.minimum(tl.maximum(tl.load(slots.indices + row), 0), (slots.odd_slots >> 1) - 1).to(tl.int64)
    return slots.ptr + row * slots.stride


@triton.jit
def philox(seed, c0, c1, c2):
    """Four words of Philox4x32-10 at counter (c0, c1, c2, 0) and key (seed mod 2^32, seed >> 32)."""
    c0 = c0.to(tl.uint32)
    return tl.philox(seed.to(tl.int64), c0, c1.to(tl.uint32), c2.to(tl.uint32), tl.zeros_like(c0), n_rounds=10)


@triton.jit
def _gumbel32(word):
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((0xFFFFFFFF - word).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u, rounded
    e = -tl.log(rest)
    # That rounding is as large as a small u itself; -log(rest) / (1 - rest) hardly feels it.
    e = tl.where(word < 0x80000000, tl.where(rest < 1, e / (1 - rest), 1.0) * u, e)
    return -tl.log(e)


@triton.jit
def gumbel(word, WIDE: tl.constexpr):
    """-log(-log(1 - u)) with u = (word + 1/2) / 2^32: WIDE in fp64, where 1 - u is exact, else in fp32, off by at most
    1.1e-6, where rounding the exact noise to fp32 is off by 1e-6."""
    return -tl.log(-tl.log((4294967295.5 - word.to(tl.float64)) * 2.3283064365386963e-10)) if WIDE else _gumbel32(word)


@triton.jit
def noise_counter(ids):
    """The counter whose four words four tokens share: their ids differ in bits 3 and 6, the others are its bits."""
    return (ids >> 7 << 5) | (ids >> 1 & 24) | (ids & 7)


@triton.jit
def gumbel_tile(seed, position, step, start, BLOCK_V: tl.constexpr, WIDE: tl.constexpr):
    """Noise of BLOCK_V tokens from start on, a multiple of BLOCK_V, for each of the rows: [BLOCK_V, rows].

    A thread of four warps holds tokens of a tile of products that differ in bits 3 and 6, one of eight warps in bit 3.
    Their counters are the same expression of the thread's place, for start enters by itself, so the compiler computes
    the words once.
    """
    local = tl.arange(0, BLOCK_V)[:, None] + tl.zeros_like(seed).to(tl.int32)[None, :]
    counter = noise_counter(start) + noise_counter(local)
    w0, w1, w2, w3 = philox(seed[None, :], counter, position[None, :], step[None, :])
    bits = local if BLOCK_V >= 128 else start + local
    odd = (bits & 8) != 0
    word = tl.where((bits & 64) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    return gumbel(word, WIDE=WIDE)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to a rounding also where exp(x) is small; x itself above 20."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    u = 1 + e
    # u has rounded e, and log(u) / (u - 1) hardly feels it. Where u is 1 nothing is left of e, which is the logarithm.
    log = tl.where(u > 1, tl.log(u) * (e / tl.where(u > 1, u - 1, u)), e)
    return tl.where(x > 20, x, tl.maximum(x, 0.0) + log)


@triton.jit
def decay(log):
    """exp, and 0 at e^-64 and below; also at -inf. NaN stays NaN."""
    return tl.where(log <= -64, 0.0, tl.exp2(1.4426950408889634 * log))


@triton.jit
def tanh(z):
    """By one exp2 and one division, to 4 eps of itself: below 1/8, where 1 - exp2 would cancel, it is the continued
    fraction z / (1 + z^2 / (3 + z^2 / (5 + ...))) up to 9, whose error is 1e-16 there."""
    size = tl.abs(z)
    e = tl.exp2(size * -2.8853900817779268)  # tanh z = (1 - e^-2z) / (1 + e^-2z), which cannot overflow
    square, small = size * size, size < 0.125
    above = tl.where(small, size * ((square + 105.0) * square + 945.0), 1.0 - e)
    t = above / tl.where(small, (15.0 * square + 420.0) * square + 945.0, 1.0 + e)
    return tl.where(z < 0, -t, t)
