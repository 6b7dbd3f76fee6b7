"""What the kernels that sample share: settings of rows, a tile of logits folded into its rows' records, their sum.

A record says of one row and one piece of the vocabulary: the largest logit m and s = sum(exp(logit - m)) for the
confidence, the best score (at a temperature above 0 with its noise), its token and that token's own logit. Records are
combined in the order of the vocabulary, so equal scores go to the lowest token and two runs are equal bit for bit.
Where a strategy looks at more, a record also has the second best logit and sum((logit - m) exp(logit - m)).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..runtime.lang import gumbel_tile, tanh


class Settings(NamedTuple):
    """Pointers to the settings of sequences of L rows: row r has those of sequence r // L."""

    temperature: Any  # [rows / L], as the next three
    seed: Any
    position: Any  # of a sequence's first row
    step: Any
    odd_L: Any  # `odd`; None: 1, as a token a step has it


class Listed(NamedTuple):
    """Which rows are sampled, where not all are: record n is of row index[n], and there are count[0] records."""

    index: Any
    count: Any


class Limits(NamedTuple):
    """What of each row's logits may be drawn: the least of them, and the last token of those that equal it."""

    least: Any
    last: Any


class Look(NamedTuple):
    """Says that records are to have what strategies look at."""

    tempered: Any  # [rows / L]: whether of the distribution that is drawn from


class Store(NamedTuple):
    """Where records lie. Piece p of the vocabulary is in slot [p % depth, p // depth] of its row."""

    stats: Any  # [4, N, depth, parts]: m, s, best, raw
    tokens: Any  # [N, depth, parts]
    pieces: Any  # records a row: the last part may have fewer than depth
    depth: Any
    parts: Any
    plane: Any  # N * depth * parts
    more: Any  # [2, N, depth, parts]: second and moment, where LOOKED


class Record(NamedTuple):
    """What is known of rows after a piece of the vocabulary."""

    m: Any
    s: Any
    best: Any
    token: Any
    raw: Any


class Looked(NamedTuple):
    """A record where somebody looks at more: in Triton 3.6 no tuple that is returned or compared may hold None."""

    m: Any
    s: Any
    best: Any
    token: Any
    raw: Any
    second: Any
    moment: Any


LARGEST32 = tl.constexpr(3.4028234663852886e38)

LARGEST64 = tl.constexpr(1.7976931348623157e308)

LARGEST_NOISE = tl.constexpr(22.9)  # that of word 0 is 22.87; approximate logarithms are off by less


@triton.jit
def sequence_of(row, settings):
    """The sequence of each row, and which of its rows it is."""
    b, place = row, 0
    if settings.odd_L is not None:
        b, place = row // (settings.odd_L >> 1), row % (settings.odd_L >> 1)
    return b, place


@triton.jit
def source_of(row, settings, SHIFT: tl.constexpr):
    """The row whose logits predict each row: with SHIFT the one before in its sequence, of the first itself."""
    if SHIFT:
        _, place = sequence_of(row, settings)
        row -= (place > 0).to(row.dtype)
    return row


@triton.jit
def is_any_hot(row, mask, settings):
    """Whether one of the rows is above temperature 0."""
    b, _ = sequence_of(row, settings)
    hot = tl.load(settings.temperature + b, mask=mask, other=0.0) > 0
    return tl.max(hot.to(tl.int32), axis=0) > 0


@triton.jit
def empty_record(N: tl.constexpr, dtype: tl.constexpr, look):
    """A record of N rows before the first tile: merged with that tile's it is that tile's."""
    m = tl.full((N,), float("-inf"), dtype=dtype)
    zeros, nothing = tl.zeros((N,), dtype=dtype), m + float("nan")
    if look is not None:
        return Looked(m, zeros, nothing, tl.zeros((N,), dtype=tl.int32), m, m, zeros)
    else:
        return Record(m, zeros, nothing, tl.zeros((N,), dtype=tl.int32), m)


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
def sum_of_exp(x, m, PAIRS: tl.constexpr):
    """sum(exp(x - m)) over axis 0."""
    shift = tl.where(m == float("-inf"), 0.0, m)  # -inf - -inf is no number
    # The difference first: what is rounded then is as small as the term is.
    terms = tl.exp2((x - shift[None, :]) * 1.4426950408889634)
    return sum_pairs(terms) if PAIRS else tl.sum(terms, axis=0)


@triton.jit
def finish(x, ids, V, bias_ptr, softcap: tl.constexpr):
    """Logits [BLOCK_V, rows] of tokens ids [BLOCK_V] from a head's products: the reference's `finish`."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + ids, mask=ids < V, other=0.0).to(x.dtype)[:, None]
        x += bias
    if softcap is not None:
        # A constant, which fp64 takes as it is; as an argument it would be of fp32. And a large cap leaves logits as
        # they are: this tanh does not cancel where they are small beside it.
        x = softcap * tanh(x / softcap)
        if bias_ptr is not None:
            x = tl.where(bias == float("-inf"), float("-inf"), x)
    return x


@triton.jit
def flip(number, dtype: tl.constexpr):
    """Bits of a float as an int of its order, and back: the sign says whether the others are reversed."""
    if number.dtype.is_floating():
        number = number.to(tl.int64 if number.dtype == tl.float64 else tl.int32, bitcast=True)
    WIDE: tl.constexpr = number.dtype == tl.int64
    flipped = number ^ ((number >> (63 if WIDE else 31)) & (0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF))
    return flipped.to(dtype, bitcast=True)


@triton.jit
def look_at(
    x,  # [BLOCK_V, rows]: logits, -inf for what is none
    ids,  # [BLOCK_V, 1]
    raw,  # [rows]: the chosen token's logit
    row,
    mask,
    settings,
    limits,
    offs,
    look,
    PAIRS: tl.constexpr,
):
    """What strategies know of a tile: m, s, raw, second and moment."""
    b, _ = sequence_of(row, settings)
    temperature = tl.load(settings.temperature + b, mask=mask, other=0.0)
    tempered = (tl.load(look.tempered + b, mask=mask, other=0) != 0) & (temperature > 0)
    t = tl.where(tempered, tl.minimum(tl.maximum(temperature.to(x.dtype), 1e-30), 1e30), 1.0)
    if limits is not None:
        least = tl.load(limits.least + offs, mask=mask, other=0.0)
        last = tl.load(limits.last + offs, mask=mask, other=0)
        out = (x < least[None, :]) | ((x == least[None, :]) & (ids > last[None, :]))
        x = tl.where(tempered[None, :] & out, float("-inf"), x)
    ts = t[None, :] + tl.zeros_like(x)
    x = x / ts if x.dtype == tl.float64 else tl.div_rn(x, ts)
    raw = raw / t if x.dtype == tl.float64 else tl.div_rn(raw, t)
    m = tl.max(x, axis=0)
    equal = tl.sum((x == m[None, :]).to(tl.int32), axis=0)
    second = tl.max(tl.where(x == m[None, :], float("-inf"), x), axis=0)
    second = tl.where(equal > 1, m, second)
    shift = tl.where(m == float("-inf"), 0.0, m)
    below = x - shift[None, :]
    terms = tl.exp2(below * 1.4426950408889634)
    moments = tl.where(terms == 0, 0.0, below * terms)
    s = sum_pairs(terms) if PAIRS else tl.sum(terms, axis=0)
    moment = sum_pairs(moments) if PAIRS else tl.sum(moments, axis=0)
    return m, s, raw, second, moment


@triton.jit
def tile_record(
    x,  # [BLOCK_V, rows]: logits of tokens from start on, fp32 or fp64
    start,
    any_hot,
    row,  # [rows]
    mask,  # [rows]: which of them there are
    settings,
    limits,  # Limits, or None
    offs,  # [rows]: which limits are theirs
    V,
    suppress,
    known,  # [rows]: a score that a token of each row has reached; NaN: none is known; None: nothing is left out
    look,  # Look, or None
    PAIRS: tl.constexpr,  # the sum by pairs, which several tiles of rows must have in one order
    BLOCK_V: tl.constexpr,
):
    """The record of one tile. Where no token can win any more, or may be drawn, there is no noise: all score -inf."""
    local = tl.arange(0, BLOCK_V)[:, None]
    ids = start + local
    x = tl.where((ids < V) & (ids != suppress), x, float("-inf"))
    WIDE: tl.constexpr = x.dtype == tl.float64
    if any_hot:
        # Loaded here and not before: in registers they would be in the way of the products.
        b, place = sequence_of(row, settings)
        temperature = tl.load(settings.temperature + b, mask=mask, other=0.0)
        seed = tl.load(settings.seed + b, mask=mask, other=0)
        position = tl.load(settings.position + b, mask=mask, other=0) + place
        step = tl.load(settings.step + b, mask=mask, other=0)
        hot = temperature > 0  # in its own dtype: narrowed, a temperature may become 0
        divisor, unit = split_temperature(tl.where(hot, temperature, 1.0), WIDE)
        m = tl.max(x, axis=0)
        s = sum_of_exp(x, m, PAIRS)
        best = tl.full(m.shape, float("-inf"), dtype=m.dtype)
        at = tl.zeros(m.shape, dtype=tl.int32)
        raw = best
        lost = 0  # whether all rows are
        if limits is not None:
            least = tl.load(limits.least + offs, mask=mask, other=0.0)
        if known is not None:
            # Division and sum are monotone and a product with the unit is exact, so no score of the tile is above this,
            # unless a logit is NaN: the maximum may miss it, s does not. What equals a known score may still be first.
            most = (m / divisor if WIDE else tl.div_rn(m, divisor)) + unit * LARGEST_NOISE
            loses = most < known
            if limits is not None:
                loses = loses | (m < least)
            loses = ~mask | (hot & loses & (s == s))
            lost = tl.min(loses.to(tl.int32), axis=0)
        if lost == 0:
            divisors = divisor[None, :] + tl.zeros_like(x)
            scaled = x / divisors if WIDE else tl.div_rn(x, divisors)
            score = scaled + unit[None, :] * gumbel_tile(seed, position, step, start, BLOCK_V, WIDE)
            if limits is not None:
                last = tl.load(limits.last + offs, mask=mask, other=0)
                out = (x < least[None, :]) | ((x == least[None, :]) & (ids > last[None, :]))
                score = tl.where(out, float("-inf"), score)
            best, at = tl.max(order(tl.where(hot[None, :], score, x), WIDE), axis=0, return_indices=True)
            raw = tl.sum(tl.where(local == at[None, :], x, 0.0), axis=0)
    else:
        best, at = tl.max(order(x, WIDE), axis=0, return_indices=True)
        raw = tl.minimum(best, LARGEST64 if WIDE else LARGEST32)
        m = raw  # below an infinite or missing number, which makes s infinite or NaN
        s = sum_of_exp(x, m, PAIRS)
    token = start + at
    token = tl.where(token == suppress, token + 1, token)  # where all are -inf: not the suppressed one
    if look is not None:
        m, s, raw, second, moment = look_at(x, ids, raw, row, mask, settings, limits, offs, look, PAIRS)
        return Looked(m, s, best, token, raw, second, moment)
    else:
        return Record(m, s, best, token, raw)


@triton.jit
def rescaled(moment, s, by):
    """A sum((x - m) exp(x - m)), with s = sum(exp(x - m)), once m is larger by -by."""
    scale = tl.exp2(by * 1.4426950408889634)
    return tl.where(scale == 0, 0.0, (moment + by * s) * scale)


@triton.jit
def merge(a, b, LOOKED: tl.constexpr):
    """Record a with the next one in the order of the vocabulary; where LOOKED both are `Looked`."""
    upper, lower = tl.maximum(a.m, b.m), tl.minimum(a.m, b.m)
    shift = tl.where(upper == float("-inf"), 0.0, upper)
    first = a.m >= b.m
    # Only the smaller of the two is rescaled, and the product is fused with the sum wherever this is compiled.
    s = tl.where(first, a.s, b.s) + tl.where(first, b.s, a.s) * tl.exp2((lower - shift) * 1.4426950408889634)
    kept = b.best <= a.best  # of equals the first; never where a.best is the NaN of no record
    best, token = tl.where(kept, a.best, b.best), tl.where(kept, a.token, b.token)
    raw = tl.where(kept, a.raw, b.raw)
    if LOOKED:
        second = tl.maximum(lower, tl.maximum(a.second, b.second))
        other = rescaled(tl.where(first, b.moment, a.moment), tl.where(first, b.s, a.s), lower - shift)
        moment = tl.where(first, a.moment, b.moment) + other
        return Looked(upper, s, best, token, raw, second, moment)
    else:
        return Record(upper, s, best, token, raw)


@triton.jit
def write_record(store, row, mask, slot, record, LOOKED: tl.constexpr):
    at = row.to(tl.int64) * (store.depth * store.parts) + slot
    stats = store.stats + at
    tl.store(stats, record.m, mask=mask)
    stats += store.plane  # one by one: 32 bits may hold one plane and not three
    tl.store(stats, record.s, mask=mask)
    stats += store.plane
    tl.store(stats, record.best, mask=mask)
    stats += store.plane
    tl.store(stats, record.raw, mask=mask)
    tl.store(store.tokens + at, record.token, mask=mask)
    if LOOKED:
        more = store.more + at
        tl.store(more, record.second, mask=mask)
        tl.store(more + store.plane, record.moment, mask=mask)


@triton.jit
def read_record(store, at, mask, LOOKED: tl.constexpr):
    stats = store.stats + at
    m = tl.load(stats, mask=mask, other=float("-inf"))
    stats += store.plane
    s = tl.load(stats, mask=mask, other=0.0)
    stats += store.plane
    best = tl.load(stats, mask=mask, other=float("-inf"))
    stats += store.plane
    raw = tl.load(stats, mask=mask, other=0.0)
    token = tl.load(store.tokens + at, mask=mask, other=0)
    if LOOKED:
        more = store.more + at
        second = tl.load(more, mask=mask, other=float("-inf"))
        return Looked(m, s, best, token, raw, second, tl.load(more + store.plane, mask=mask, other=0.0))
    else:
        return Record(m, s, best, token, raw)


@triton.jit
def combine(store, row, mask, LOOKED: tl.constexpr, BLOCK_S: tl.constexpr):
    """Token and confidence of rows [n] from all their records: a part's first, as a program that walks it does. Where
    LOOKED, also the margin of the two best tokens and the entropy."""
    offs_s = tl.arange(0, BLOCK_S)[None, :]
    at = row.to(tl.int64)[:, None] * (store.depth * store.parts) + offs_s  # [n, BLOCK_S]
    mask = mask[:, None] & (offs_s < store.parts)
    record = read_record(store, at, mask, LOOKED)
    for tile in range(1, store.depth):
        there = mask & (offs_s * store.depth + tile < store.pieces)  # the last part may have fewer
        record = merge(record, read_record(store, at + tile * store.parts, there, LOOKED), LOOKED)
    top = tl.max(record.m, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    # The second `where` keeps the product from being fused into a sum: which sum would depend on the layout.
    terms = tl.where(mask, record.s * tl.exp2((record.m - shift[:, None]) * 1.4426950408889634), 0.0)
    total = sum_pairs(tl.trans(terms))
    _, winner = tl.max(record.best, axis=1, return_indices=True)
    won = offs_s == winner[:, None]
    token = tl.sum(tl.where(won, record.token, 0), axis=1)
    raw = tl.sum(tl.where(won, record.raw, 0.0), axis=1)
    confidence = tl.exp2((raw - top) * 1.4426950408889634) / total
    confidence = tl.where(total < float("inf"), confidence, float("nan"))
    if LOOKED:
        bests = tl.sum((record.m == top[:, None]).to(tl.int32), axis=1)
        second = tl.max(tl.where(record.m == top[:, None], record.second, record.m), axis=1)
        second = tl.where(bests > 1, top, second)
        margin = (1 - tl.exp2((second - top) * 1.4426950408889634)) / total
        moments = tl.where(mask, rescaled(record.moment, record.s, record.m - shift[:, None]), 0.0)
        entropy = tl.log(total) - sum_pairs(tl.trans(moments)) / total
        margin = tl.where(total < float("inf"), margin, float("nan"))
        return token, confidence, margin, tl.where(total < float("inf"), entropy, float("nan"))
    else:
        return token, confidence
