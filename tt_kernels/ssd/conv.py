"""The convolution inside scan kernels: a tile of tokens of some channels, from the raw projection into registers.

Channels c [BLOCK_C] of x [L, C] and of a conv state [C, K] (the K columns before x), weight [C, K], bias [C].
"""

import triton
import triton.language as tl

from ..lang import silu


@triton.jit
def conv_parameters(
    weight_ptr, bias_ptr, state_ptr, stride_sc, stride_sk, c, mask_c, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Taps and past columns [BLOCK_C, BLOCK_K], as they lie side by side in memory, and the bias [BLOCK_C]."""
    k = tl.arange(0, BLOCK_K)
    mask = mask_c[:, None] & (k < K)[None, :]
    taps = tl.load(weight_ptr + c[:, None] * K + k[None, :], mask=mask, other=0.0)
    past = tl.load(state_ptr + c[:, None] * stride_sc + k[None, :] * stride_sk, mask=mask, other=0.0)
    bias = tl.zeros_like(c).to(weight_ptr.dtype.element_ty)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=mask_c, other=0.0)
    return taps, past, bias


@triton.jit
def column(tile, k: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, tile.shape[1]) == k)[None, :], tile, 0.0), axis=1)


@triton.jit
def convolved(own, taps, past, bias, x_ptr, stride_xl, t, length, c, mask_c, K: tl.constexpr, ACC: tl.constexpr):
    """Activated columns of tokens t < length [BLOCK_T, BLOCK_C], rounded to the dtype of x as the op by itself does.

    `own`: these tokens' columns of x, read before; those to the left of them, K - 1 times the same lines, come from L1.
    """
    taps = taps.to(ACC)
    past = past.to(own.dtype).to(ACC)  # as a column of x would be: in its dtype
    y = bias.to(ACC)[None, :] + own.to(ACC) * column(taps, K - 1)[None, :]
    for back in tl.static_range(1, K):
        source = t - back
        mask = ((source >= 0) & (t < length))[:, None] & mask_c[None, :]
        left = tl.load(x_ptr + source.to(tl.int64)[:, None] * stride_xl + c[None, :], mask=mask, other=0.0)
        y += left.to(ACC) * column(taps, K - 1 - back)[None, :]
    for early in tl.static_range(K - 1):  # the tokens that reach into the past
        seen = column(past, early + 1) * column(taps, 0)
        for k in tl.static_range(1, K - 1 - early):
            seen += column(past, early + 1 + k) * column(taps, k)
        y += tl.where((t == early)[:, None], seen[None, :], 0.0)
    return silu(y).to(own.dtype)
