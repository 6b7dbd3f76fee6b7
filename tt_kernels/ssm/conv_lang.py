"""The convolution inside scan kernels: a tile of tokens of some channels, from the raw projection into registers.

Channels c [BLOCK_C] of x [L, C] and of a row's conv state [C, K] (the K columns before x), weight [C, K], bias [C].
"""

import triton
import triton.language as tl

from ..runtime.lang import silu


@triton.jit
def conv_parameters(
    weight_ptr,
    bias_ptr,
    state_ptr,
    stride_sc,
    stride_sk,
    c,
    mask_c,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr = 0,
):
    """What channels c need beside their columns of x: taps and past columns, from AHEAD on, [BLOCK_C, BLOCK_K] as they
    lie in memory, and the bias [BLOCK_C]."""
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = mask_c[:, None] & (k < K)
    taps = tl.load(weight_ptr + c[:, None] * K + k, mask=mask, other=0.0)
    mask &= k < K - AHEAD
    at = state_ptr + c.to(tl.int64)[:, None] * stride_sc + (k + AHEAD).to(tl.int64) * stride_sk
    past = tl.load(at, mask=mask, other=0.0)
    bias = tl.zeros_like(c).to(taps.dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=mask_c, other=0.0)
    return taps, past, bias


# A column picked from such a tile goes to the threads that need it through shared memory, with two barriers: up to four
# columns of 16 bits go together, as one number, which halves the barriers of a block's kernel.


@triton.jit
def bundled(tile, PACKED: tl.constexpr):
    if PACKED:
        bits = tile.to(tl.uint16, bitcast=True).to(tl.int64)
        return tl.sum(bits << (16 * tl.arange(0, tile.shape[1]))[None, :], axis=1)[None, :]
    else:
        return tile


@triton.jit
def column(bundle, k: tl.constexpr, dtype: tl.constexpr, PACKED: tl.constexpr):
    """[1, BLOCK_C]"""
    if PACKED:
        return (bundle >> (16 * k)).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return tl.sum(tl.where((tl.arange(0, bundle.shape[1]) == k)[None, :], bundle, 0.0), axis=1)[None, :]


@triton.jit
def convolved(own, parameters, x_ptr, stride_xl, t, count, c, mask_c, K: tl.constexpr, ACC: tl.constexpr):
    """Activated columns of tokens t < count [BLOCK_T, BLOCK_C], rounded to the dtype of x as the op by itself does.

    `own`: these tokens' columns of x, read before, as `parameters` by `conv_parameters`; those to the left of them, K -
    1 times the same lines, come from L1.
    """
    taps, past, bias = parameters
    NARROW: tl.constexpr = own.dtype
    PACKED: tl.constexpr = (
        NARROW.primitive_bitwidth == 16 and taps.dtype == NARROW and bias.dtype == NARROW and taps.shape[1] <= 4
    )
    past = past.to(NARROW)  # as a column of x would be: in its dtype
    if not PACKED:
        taps, past, bias = taps.to(ACC), past.to(ACC), bias.to(ACC)
    taps, past = bundled(taps, PACKED), bundled(past, PACKED)
    y = bias.to(ACC)[None, :] + own.to(ACC) * column(taps, K - 1, NARROW, PACKED).to(ACC)
    for back in tl.static_range(1, K):
        source = t - back
        mask = ((source >= 0) & (t < count))[:, None] & mask_c[None, :]
        left = tl.load(x_ptr + source.to(tl.int64)[:, None] * stride_xl + c[None, :], mask=mask, other=0.0)
        y += left.to(ACC) * column(taps, K - 1 - back, NARROW, PACKED).to(ACC)
    for early in tl.static_range(K - 1):  # the tokens that reach into the past
        seen = column(past, early + 1, NARROW, PACKED).to(ACC) * column(taps, 0, NARROW, PACKED).to(ACC)
        for k in tl.static_range(1, K - 1 - early):
            seen += column(past, early + 1 + k, NARROW, PACKED).to(ACC) * column(taps, k, NARROW, PACKED).to(ACC)
        y += tl.where((t == early)[:, None], seen, 0.0)
    return silu(y).to(NARROW)


@triton.jit
def convolved_token(own, parameters, K: tl.constexpr, ACC: tl.constexpr):
    """The activated columns [BLOCK_C] of one token, rounded to the dtype of x, and the next conv state [BLOCK_C,
    BLOCK_K]: `parameters` have the past AHEAD by one, where the next state has it, so that the last column is free."""
    taps, past, bias = parameters
    window = tl.where((tl.arange(0, past.shape[1]) == K - 1)[None, :], own[:, None], past.to(own.dtype))
    y = tl.sum(window.to(ACC) * taps.to(ACC), axis=1) + bias.to(ACC)
    return silu(y).to(own.dtype).to(ACC), window
