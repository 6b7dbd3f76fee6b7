"""Inside the router's kernels: products in fp64, the choice of a tile of tokens, places in the sorted lists.

Scores of a tile lie in BLOCK_P columns, BLOCK_N (a power of two) for each group of experts: column g * BLOCK_N + n is
expert g * (E / GROUPS) + n, so that columns ascend as experts do. A tile of R tokens has the shape [R, H, C], C at most
64 and H * C = BLOCK_P: a warp loads 64 scores at a time, 16 bytes a lane, and Triton then gives it the token's next 64
(of [R, BLOCK_P] another warp has them, and the two meet at a barrier in every round of the choice).
"""

import triton
import triton.language as tl

from ...launch import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)
_TAKEN = tl.constexpr(-(2**63))  # below the key of any number
_NAN = tl.constexpr(2**63 - 1)  # above it
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def widen(x):
    """x in fp64. From 16 bits in assembly: Triton 3.6 lays the fp64 operands of a dot out by the width that they were
    loaded with, which it cannot do at 16 bits, and looks through any conversion that it understands."""
    if _INTERPRET or x.dtype.primitive_bitwidth > 16:
        return x.to(tl.float64)
    return tl.inline_asm_elementwise(
        "cvt.f64.f32 $0, $1;", "=d,f", [x.to(tl.float32)], dtype=tl.float64, is_pure=False, pack=1
    )


@triton.jit
def sigmoid64(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def columns(E, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """The experts of the columns, and which columns have one: [H, C] each."""
    C: tl.constexpr = min(BLOCK_P, 64)
    p = tl.arange(0, BLOCK_P // C)[:, None] * C + tl.arange(0, C)[None, :]
    size = E // GROUPS
    return p // BLOCK_N * size + p % BLOCK_N, (p // BLOCK_N < GROUPS) & (p % BLOCK_N < size)


@triton.jit
def ordered(x):
    """fp64 as int64 of the same order, NaN above all: what is taken can then be told from every number."""
    bits = x.to(tl.int64, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return tl.where(x != x, _NAN, bits)


@triton.jit
def best(keys, NUMBER: tl.constexpr):
    """For each of keys [R, H, C] the round that takes it when each token's largest is taken NUMBER times, or -1; of
    equal ones the first is taken. By halves: a warp finds the largest 32-bit number in one instruction."""
    H: tl.constexpr = keys.shape[1]
    C: tl.constexpr = keys.shape[2]
    p = tl.arange(0, H)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    high = (keys >> 32).to(tl.int32)
    low = ((keys & 0xFFFFFFFF) - 0x80000000).to(tl.int32)  # in the order of unsigned numbers
    taken = tl.full(keys.shape, -1, dtype=tl.int32)
    for k in range(NUMBER):
        top = high == tl.max(tl.max(high, axis=1), axis=1)[:, None, None]
        below = tl.where(top, low, -0x80000000)
        top = top & (low == tl.max(tl.max(below, axis=1), axis=1)[:, None, None])
        first = tl.min(tl.min(tl.where(top, p, _NONE), axis=1), axis=1)
        now = p == first[:, None, None]
        taken = tl.where(now, k, taken)
        high = tl.where(now, -0x80000000, high)
        low = tl.where(now, -0x80000000, low)
    return taken


@triton.jit
def within_groups(biased, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Biased scores [R, H, C], -inf where there is no expert, with 0 outside the groups whose two best sum highest, but
    for what is -inf."""
    R: tl.constexpr = biased.shape[0]
    H: tl.constexpr = biased.shape[1]
    C: tl.constexpr = biased.shape[2]
    BLOCK_G: tl.constexpr = H * C // BLOCK_N
    grouped = tl.reshape(biased, (R, BLOCK_G, BLOCK_N))
    n = tl.arange(0, BLOCK_N)[None, None, :]
    broken = grouped != grouped  # a maximum would lose it
    numbers = tl.where(broken, -float("inf"), grouped)
    first, at = tl.max(numbers, axis=2, return_indices=True, return_indices_tie_break_left=True)  # [R, BLOCK_G]
    second = tl.max(tl.where(n == at[:, :, None], -float("inf"), numbers), axis=2)
    keys = tl.where(tl.max(broken.to(tl.int32), axis=2) > 0, _NAN, ordered(first + second))
    keys = tl.where(tl.arange(0, BLOCK_G)[None, :] < GROUPS, keys, _TAKEN)
    kept = best(keys[:, None, :], TOPK_GROUP) >= 0
    stays = tl.reshape(kept, (R, BLOCK_G, 1)) | (grouped == -float("inf"))
    return tl.reshape(tl.where(stays, grouped, 0.0), (R, H, C))


@triton.jit
def choose(
    scores,  # [R, H, C] fp64
    bias_ptr,
    rows,  # [R]: the tokens
    ids_ptr,  # [T, K]
    weights_ptr,
    chosen_ptr,
    T,
    E,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Choose a tile's experts and write them, their weights and their scores.

    Returns, [R, H, C] each: the pair t * K + k of a token and an expert, whether there is one, and how many of the
    tile's earlier tokens chose the same expert; [H, C]: how many did in all."""
    expert, real = columns(E, GROUPS, BLOCK_N, scores.shape[1] * scores.shape[2])
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float64)
    biased = scores + bias[None, :, :]
    if GROUPS > 1:
        biased = within_groups(tl.where(real[None, :, :], biased, -float("inf")), GROUPS, TOPK_GROUP, BLOCK_N)
    k = best(tl.where(real[None, :, :], ordered(biased), _TAKEN), TOP_K)
    paired = (k >= 0) & (rows < T)[:, None, None]
    pair = rows[:, None, None] * TOP_K + k
    weights = scores * SCALE
    if NORM:
        total = tl.sum(tl.sum(tl.where(k >= 0, scores, 0.0), axis=1), axis=1)
        weights *= (1 / (total + 1e-20))[:, None, None]
    tl.store(ids_ptr + pair, tl.broadcast_to(expert[None, :, :], pair.shape).to(tl.int64), mask=paired)
    tl.store(weights_ptr + pair, weights.to(weights_ptr.dtype.element_ty), mask=paired)
    tl.store(chosen_ptr + pair, scores, mask=paired)
    ones = paired.to(tl.int32)
    return pair, paired, tl.cumsum(ones, axis=0) - ones, tl.sum(ones, axis=0)
