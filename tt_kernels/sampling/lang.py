"""What the kernels that sample share: settings of rows, a tile of logits folded into its rows' records, their sum.

A record says of one row and one part of the vocabulary: the largest logit m and s = sum(exp(logit - m)) for the
confidence, the best score (at a temperature above 0 with its noise), its token and that token's own logit. Records are
combined in the order of the vocabulary, so equal scores go to the lowest token and two runs are equal bit for bit.
"""

import triton
import triton.language as tl

from ..runtime.lang import gumbel_tile

LARGEST32 = tl.constexpr(3.4028234663852886e38)

LARGEST64 = tl.constexpr(1.7976931348623157e308)


@triton.jit
def is_any_hot(row, mask, L, temperature_ptr):
    """Whether one of the rows is above temperature 0; a row's settings are those of its sequence of L."""
    hot = tl.load(temperature_ptr + row // L, mask=mask, other=0.0) > 0
    return tl.max(hot.to(tl.int32), axis=0) > 0


@triton.jit
def empty_record(N: tl.constexpr, dtype: tl.constexpr):
    """m, s, best, token, raw of N rows before the first tile: merged with it they are that tile's."""
    m = tl.full((N,), float("-inf"), dtype=dtype)
    return m, tl.zeros((N,), dtype=dtype), m + float("nan"), tl.zeros((N,), dtype=tl.int32), m


@triton.jit
def order(score, WIDE: tl.constexpr):
    """Numbers in the order of torch.max, where NaN is above inf: inf for NaN, the largest finite number for inf."""
    limited = tl.minimum(score, LARGEST64 if WIDE else LARGEST32)
    return tl.where(score == score, limited, float("inf"))


@triton.jit
def split_temperature(temperature, WIDE: tl.constexpr):
    """Divisor and unit of the reference's `split_temperature`, of temperatures above 0."""
    if WIDE:
        t = tl.maximum(temperature.to(tl.float64), 2.2250738585072014e-308)
        power = (t.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        unit = tl.minimum(power, 1.0)
        divisor = tl.minimum(t / unit, LARGEST64)
    else:
        t = tl.maximum(temperature.to(tl.float32), 1.1754943508222875e-38)
        power = (t.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.minimum(power, 1.0)
        divisor = tl.minimum(tl.div_rn(t, unit), LARGEST32)
    return divisor, tl.where(power == float("inf"), 18446744073709551616.0, unit)  # 2^64


@triton.jit
def sum_pairs(x):
    """Sum over axis 0 of [BLOCK, N], neighbours first. Written out, for the order of tl.sum is the layout's, which
    changes with warps and tiles, and a sum of two has but one order."""
    for _ in tl.static_range(20):  # a tensor has at most 2^20 elements
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1)
    return tl.reshape(x, (x.shape[1],))


@triton.jit
def tile_record(
    x,  # [BLOCK_V, rows]: logits of tokens from start on, fp32 or fp64
    start,
    any_hot,
    row,  # [rows]
    mask,  # [rows]: which of them there are
    L,
    temperature_ptr,  # of row // L, as seed, position and step
    seed_ptr,
    position_ptr,
    step_ptr,
    least_ptr,  # [rows]: what may be sampled, where NARROW
    last_ptr,
    V,
    suppress,
    NARROW: tl.constexpr,
    PAIRS: tl.constexpr,  # the sum by pairs, which several tiles of rows must have in one order
    BLOCK_V: tl.constexpr,
):
    """m, s, best, token, raw of one tile."""
    local = tl.arange(0, BLOCK_V)[:, None]
    ids = start + local
    x = tl.where((ids < V) & (ids != suppress), x, float("-inf"))
    WIDE: tl.constexpr = x.dtype == tl.float64
    if any_hot:
        # Loaded here and not before: in registers they would be in the way of the products.
        b = row // L
        temperature = tl.load(temperature_ptr + b, mask=mask, other=0.0)
        seed = tl.load(seed_ptr + b, mask=mask, other=0)
        position = tl.load(position_ptr + b, mask=mask, other=0) + row % L
        step = tl.load(step_ptr + b, mask=mask, other=0)
        hot = temperature > 0  # in its own dtype: narrowed, a temperature may become 0
        divisor, unit = split_temperature(tl.where(hot, temperature, 1.0), WIDE)
        divisor = divisor[None, :] + tl.zeros_like(x)
        scaled = x / divisor if WIDE else tl.div_rn(x, divisor)
        score = scaled + unit[None, :] * gumbel_tile(seed, position, step, start, BLOCK_V, WIDE)
        if NARROW:
            least = tl.load(least_ptr, mask=mask, other=0.0)
            last = tl.load(last_ptr, mask=mask, other=0)
            out = (scaled < least[None, :]) | ((scaled == least[None, :]) & (ids > last[None, :]))
            score = tl.where(out, float("-inf"), score)
        best, at = tl.max(order(tl.where(hot[None, :], score, x), WIDE), axis=0, return_indices=True)
        raw = tl.sum(tl.where(local == at[None, :], x, 0.0), axis=0)
        m = tl.max(x, axis=0)
    else:
        best, at = tl.max(order(x, WIDE), axis=0, return_indices=True)
        raw = tl.minimum(best, LARGEST64 if WIDE else LARGEST32)
        m = raw  # below an infinite or missing number, which makes s infinite or NaN
    shift = tl.where(m == float("-inf"), 0.0, m)  # -inf - -inf is no number
    # The difference first: what is rounded then is as small as the term is.
    terms = tl.exp2((x - shift[None, :]) * 1.4426950408889634)
    s = sum_pairs(terms) if PAIRS else tl.sum(terms, axis=0)
    token = start + at
    return m, s, best, tl.where(token == suppress, token + 1, token), raw  # where all are -inf: not the suppressed one


@triton.jit
def merge(m, s, best, token, raw, next_m, next_s, next_best, next_token, next_raw):
    """A record with the next one in the order of the vocabulary."""
    upper, lower = tl.maximum(m, next_m), tl.minimum(m, next_m)
    shift = tl.where(upper == float("-inf"), 0.0, upper)
    first = m >= next_m
    # One of the two is not rescaled, and the product is fused with the sum wherever this is compiled.
    s = tl.where(first, s, next_s) + tl.where(first, next_s, s) * tl.exp2((lower - shift) * 1.4426950408889634)
    kept = next_best <= best  # of equals the first; never where best is the NaN of no record
    best, token = tl.where(kept, best, next_best), tl.where(kept, token, next_token)
    return upper, s, best, token, tl.where(kept, raw, next_raw)


@triton.jit
def write_record(stats_ptr, token_ptr, row, mask, slot, slots, plane, m, s, best, token, raw):
    """stats [4, N, slots]: m, s, best, raw; token [N, slots]; plane = N * slots."""
    at = row.to(tl.int64) * slots + slot
    stats = stats_ptr + at
    tl.store(stats, m, mask=mask)
    stats += plane  # one by one: 32 bits may hold one plane and not three
    tl.store(stats, s, mask=mask)
    stats += plane
    tl.store(stats, best, mask=mask)
    stats += plane
    tl.store(stats, raw, mask=mask)
    tl.store(token_ptr + at, token, mask=mask)


@triton.jit
def read_record(stats_ptr, token_ptr, at, mask, plane):
    stats = stats_ptr + at
    m = tl.load(stats, mask=mask, other=float("-inf"))
    stats += plane
    s = tl.load(stats, mask=mask, other=0.0)
    stats += plane
    best = tl.load(stats, mask=mask, other=float("-inf"))
    stats += plane
    raw = tl.load(stats, mask=mask, other=0.0)
    return m, s, best, tl.load(token_ptr + at, mask=mask, other=0), raw


@triton.jit
def combine(stats_ptr, token_ptr, row, mask, tiles, depth, parts, plane, BLOCK_S: tl.constexpr):
    """Token and confidence of rows [n] from all their records: a part's first, as a program that walks it does."""
    offs_s = tl.arange(0, BLOCK_S)[None, :]
    at = row.to(tl.int64)[:, None] * (depth * parts) + offs_s  # [n, BLOCK_S]
    mask = mask[:, None] & (offs_s < parts)
    m, s, best, token, raw = read_record(stats_ptr, token_ptr, at, mask, plane)
    for tile in range(1, depth):
        there = mask & (offs_s * depth + tile < tiles)  # the last part may have fewer
        next_m, next_s, next_best, next_token, next_raw = read_record(
            stats_ptr + tile * parts, token_ptr + tile * parts, at, there, plane
        )
        m, s, best, token, raw = merge(m, s, best, token, raw, next_m, next_s, next_best, next_token, next_raw)
    top = tl.max(m, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    # Chosen again, so that no product is fused into a sum: which one is would be the layout's matter.
    terms = tl.where(mask, s * tl.exp2((m - shift[:, None]) * 1.4426950408889634), 0.0)
    total = sum_pairs(tl.trans(terms))
    _, winner = tl.max(best, axis=1, return_indices=True)
    won = offs_s == winner[:, None]
    token = tl.sum(tl.where(won, token, 0), axis=1)
    raw = tl.sum(tl.where(won, raw, 0.0), axis=1)
    confidence = tl.exp2((raw - top) * 1.4426950408889634) / total
    return token, tl.where(total < float("inf"), confidence, float("nan"))
