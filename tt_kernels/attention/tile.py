"""One tile of keys and values, as every attention kernel takes it: online softmax in powers of two."""

import triton
import triton.language as tl


@triton.jit
def attend(q, k, v, m, l, o, seen, scale, MASKED: tl.constexpr):
    """One tile of keys: the running maximum m, sum l and output o of rows q [BLOCK_M, BLOCK_P], in the dtype of m.

    MASKED: keys that are not `seen`, [BLOCK_M, BLOCK_N] or [1, BLOCK_N], get a weight of 0, which a NaN among their
    values outlives."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=m.dtype) * scale  # [BLOCK_M, BLOCK_N], log2
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        # A row that has seen nothing yet keeps -inf: nothing to rescale, and no -inf minus -inf.
        shift = tl.where(new == -float("inf"), 0.0, new)
    else:
        new = tl.maximum(m, tl.max(s, axis=1))
        shift = new
    p = tl.exp2(s - shift[:, None])
    kept = tl.exp2(m - shift)
    l = l * kept + tl.sum(p, axis=1)
    o = tl.dot(p.to(v.dtype), v, o * kept[:, None], input_precision="ieee", out_dtype=m.dtype)
    return new, l, o
