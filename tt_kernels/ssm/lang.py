"""One tile of tokens of one head, as every scan kernel takes it: time steps, decays, products of fp32 with 16 bits."""

import triton
import triton.language as tl

from ..runtime.lang import decay, softplus


@triton.jit
def placed(H, R, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row, head, group (64-bit: their strides may be anything), offsets into P and N of a program of a grid (rows times
    heads, slices of P); R: heads of a group, which lie side by side and find its B and C in L2."""
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    return row, head.to(tl.int64), (head // R).to(tl.int64), offs_p, tl.arange(0, BLOCK_N)


@triton.jit
def within(offs, size: tl.constexpr, BLOCK: tl.constexpr):
    """offs < size, which the compiler does not see to be true where slices of BLOCK divide it."""
    if size % BLOCK == 0:
        return tl.full((BLOCK,), True, dtype=tl.int1)
    else:
        return offs < size


@triton.jit
def time_steps(dt, bias, LOW: tl.constexpr, HIGH: tl.constexpr):
    dt = softplus(dt + bias)
    if LOW > 0:  # not tl.maximum, which takes the number beside a NaN
        dt = tl.where(dt < LOW, LOW, dt)
    if HIGH < 3e38:
        dt = tl.where(dt > HIGH, HIGH, dt)
    return dt


@triton.jit
def log_decay(dt, A):
    """dt A, and 0 where dt is 0 even if A is -inf."""
    return dt * tl.maximum(A, -3e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log_decays(dt_ptr, known, bias, A, resets_ptr, inside, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Time steps dt and log-decays dt A of tokens: 0 but for `known` ones, which neither decay a state nor add to it.

    At least -128, which is as good as any number below -64: so that sums of them keep their precision. That also where
    a packed sequence starts: nothing from before it reaches the token, whatever is added.
    """
    dt = tl.where(known, time_steps(tl.load(dt_ptr, mask=known, other=0.0).to(A.dtype), bias, LOW, HIGH), 0.0)
    a = tl.maximum(log_decay(dt, A), -128.0, propagate_nan=tl.PropagateNan.ALL)
    if resets_ptr is not None:
        a = tl.where(tl.load(resets_ptr, mask=inside, other=0) != 0, -128.0, a)
    return dt, a


@triton.jit
def decays_to_end(after):
    """exp(a[j + 1] + ... + a[last]) of each j, where after[j] is a[j + 1] and 0 at last: no sum less its first term."""
    return decay(tl.cumsum(after, axis=0, reverse=True))


@triton.jit
def replayed(dt_ptr, stride_dtl, start, count, bias, A, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of the tile of tokens from `start` on: how much it leaves of the state before it, and the weight with which each
    token enters the state after it; 0 from `count` on, where nothing is read."""
    t = start + tl.arange(0, BLOCK_T)
    at, known = dt_ptr + t.to(tl.int64) * stride_dtl, t < count
    dt, a = log_decays(at, known, bias, A, None, known, LOW, HIGH)
    following = (t + 1 < count) & (t + 1 < start + BLOCK_T)
    _, after = log_decays(at + stride_dtl, following, bias, A, None, following, LOW, HIGH)
    return decay(tl.sum(a, axis=0)), decays_to_end(after) * dt


@triton.jit
def stepped(state, x, B, C, D, dt, A):
    """y of one token and the state after it: state [BLOCK_P, BLOCK_N], x [BLOCK_P], B and C [BLOCK_N], all as state."""
    state = state * decay(log_decay(dt, A)) + (x * dt)[:, None] * B[None, :]
    return tl.sum(state * C[None, :], axis=1) + x * D, state


# A product of an fp32 and a bf16 matrix, SPLIT: the fp32 numbers as sums of bf16 ones, whose products with bf16 numbers
# are exact in fp32. A part takes the next 8 bits; three hold all 24, two leave 2^-15, which is 64 times finer than the
# rounding of a bf16 result. Otherwise both are widened: fp32 multiplied at PRECISION, or fp64.


@triton.jit
def leading_bits(a, dtype: tl.constexpr):
    """a, cut (not rounded: that would take one conversion instruction each) to what `dtype` holds."""
    KEPT: tl.constexpr = 0xFFFF0000 if dtype == tl.bfloat16 else 0xFFFFE000
    return (a.to(tl.uint32, bitcast=True) & KEPT).to(tl.float32, bitcast=True)


@triton.jit
def leading_part(a, dtype: tl.constexpr):
    """The same in `dtype`: of bf16 the upper half of the bits, from a itself, so that nothing else is kept for it."""
    if dtype == tl.bfloat16:
        return (a.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return leading_bits(a, dtype).to(dtype)


@triton.jit
def wide_times_narrow(a, b, acc, PARTS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a b + acc: a [M, K] in the dtype of acc [M, N], b [K, N] as it lies in memory."""
    if SPLIT:
        rest = a - leading_bits(a, b.dtype)
        if PARTS == 3:
            acc = tl.dot((rest - leading_bits(rest, b.dtype)).to(b.dtype), b, acc)
            acc = tl.dot(leading_part(rest, b.dtype), b, acc)
        else:
            acc = tl.dot(rest.to(b.dtype), b, acc)
        return tl.dot(leading_part(a, b.dtype), b, acc)
    else:
        return tl.dot(a, b.to(acc.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def narrow_times_wide(a, b, acc, PARTS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a b + acc: a [M, K] as it lies in memory, b [K, N] in the dtype of acc [M, N]."""
    if SPLIT:
        rest = b - leading_bits(b, a.dtype)
        if PARTS == 3:
            acc = tl.dot(a, (rest - leading_bits(rest, a.dtype)).to(a.dtype), acc)
            acc = tl.dot(a, leading_part(rest, a.dtype), acc)
        else:
            acc = tl.dot(a, rest.to(a.dtype), acc)
        return tl.dot(a, leading_part(b, a.dtype), acc)
    else:
        return tl.dot(a.to(acc.dtype), b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def grow(state, B, x, weight, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """state + sum over tokens of B weight x^T: B [BLOCK_T, BLOCK_N], x [BLOCK_T, BLOCK_P].

    A state lies here as [BLOCK_N, BLOCK_P]: N is what wgmma takes as its rows, so that heads can be cut in slices.
    """
    return narrow_times_wide(tl.trans(B), x.to(state.dtype) * weight[:, None], state, 3, SPLIT, PRECISION)


@triton.jit
def entered(dt, a, dt_ptr, stride_dtl, L, count, bias, A, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_T: tl.constexpr):
    """As `replayed`, of a tile that holds all L tokens and whose time steps dt and log-decays a are known: what is read
    does not wait for `count`."""
    t = tl.arange(0, BLOCK_T)
    at, there = dt_ptr + t.to(tl.int64) * stride_dtl, t + 1 < L
    _, after = log_decays(at + stride_dtl, there, bias, A, None, there, LOW, HIGH)
    left = decay(tl.sum(tl.where(t < count, a, 0.0), axis=0))
    return left, decays_to_end(tl.where(t + 1 < count, after, 0.0)) * tl.where(t < count, dt, 0.0)


@triton.jit
def extended(state, x, B, left, weight, count, counts_ptr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """The state after the first `count` of a tile's tokens, which enter with what `entered` returns. Registers hold the
    others too: they are cut out, not just weighted with 0, which a NaN outlives."""
    if count > 0:  # not only to save work: products in one region are cut into warps alike, which sm_80 spills over
        if counts_ptr is not None:
            enters = (tl.arange(0, x.shape[0]) < count)[:, None]
            x, B = tl.where(enters, x, 0.0), tl.where(enters, B, 0.0)
        state = grow(state * left, B, x, weight, SPLIT, PRECISION)
    return state


@triton.jit
def pair_weights(C, B, dt, log, D, start, part: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """What token i takes of x of token j: (C_i B_j) exp(log) dt_j for i >= j, log = a[j + 1] + ... + a[i], and D of its
    own. B is of tokens from `part` on. `start` is any number of the tile: masks are then made where they are used, not
    kept around a loop."""
    ACC: tl.constexpr = dt.dtype
    i = (start + tl.arange(0, C.shape[0]))[:, None]
    j = (start + part + tl.arange(0, B.shape[0]))[None, :]
    if SPLIT:  # products of bf16 numbers are exact in fp32
        pairs = tl.dot(C, tl.trans(B))
    else:
        pairs = tl.dot(C.to(ACC), tl.trans(B.to(ACC)), input_precision=PRECISION, out_dtype=ACC)
    weights = pairs * decay(tl.where(i >= j, log, -float("inf"))) * dt  # masked before exp could overflow
    return weights + tl.where(i == j, D, 0.0)


@triton.jit
def block_outputs(x, B, C, D, dt, a, state, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """y [BLOCK_T, BLOCK_P] of a tile of tokens: x [BLOCK_T, BLOCK_P], B and C [BLOCK_T, BLOCK_N] as they lie in memory,
    time steps dt and log-decays a [BLOCK_T], the state before them [BLOCK_N, BLOCK_P] or None."""
    t = tl.arange(0, x.shape[0])
    y = tl.zeros(x.shape, dtype=dt.dtype)
    if state is not None:
        y = narrow_times_wide(C, state, y, 3, SPLIT, PRECISION) * decay(tl.cumsum(a, axis=0))[:, None]
    # Summed directly for each pair: a difference of sums would cancel.
    log = tl.cumsum(tl.where(t[:, None] > t[None, :], a[:, None], 0.0), axis=0)  # [BLOCK_T, BLOCK_T]
    weights = pair_weights(C, B, dt[None, :], log, 0.0, 0, 0, SPLIT, PRECISION)
    return wide_times_narrow(weights, x, y, 3, SPLIT, PRECISION) + x.to(y.dtype) * D
