"""The kernels of `mamba_block`, `mamba_advance` and `mamba_extend`: convolution and scan in one launch, for few rows.
`mamba_extend` has the first one write the states too.

One program for each row, head and slice of its state. It convolves its own columns of x and its group's of B and C in
registers, as the other heads of the group do again.
"""

import triton
import triton.language as tl

from ..conv1d.conv_states import move_on
from ..runtime.lang import at_slot, programmatic_launch, row_count
from .conv_lang import conv_parameters, convolved
from .lang import block_outputs, entered, extended, grow, log_decays, placed, replayed


@triton.jit(do_not_specialize=["L"])
def _mamba_block_kernel(
    xBC_ptr,  # [b, L, C]: H P channels of x, G N of B, G N of C
    dt_ptr,  # [b, L, H]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    A_ptr,  # [H], as D and dt_bias
    D_ptr,
    dt_bias_ptr,
    columns,  # Slots of [C, K]: the conv state that each row reads, and the one that it writes, which none reads
    after_columns,
    before,  # Slots of [H, P, N]: the state that each row reads, and the one that it writes; none: y is all
    after,
    counts_ptr,  # [b]: tokens that enter the states that are written; None: all L
    y_ptr,  # [b, L, H, P], contiguous
    stride_xb,
    stride_xl,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_cc: tl.constexpr,  # constants: whether columns or channels lie side by side decides how wide loads are
    stride_ck: tl.constexpr,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    G,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    programmatic_launch()
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    mask_t, mask_p, mask_n = t < L, offs_p < P, offs_n < N
    row = t.to(tl.int64)
    c_x, c_B = head.to(tl.int32) * P + offs_p, H * P + group.to(tl.int32) * N + offs_n
    c_C = c_B + G * N
    xBC_ptr += b * stride_xb
    conv_ptr = at_slot(columns, b)

    # All that comes from afar, before anything waits for it; the state last: it goes on to shared memory at once.
    at = xBC_ptr + row[:, None] * stride_xl
    mask_x, mask_B = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]
    x = tl.load(at + c_x[None, :], mask=mask_x, other=0.0)  # [BLOCK_T, BLOCK_P]
    B = tl.load(at + c_B[None, :], mask=mask_B, other=0.0)  # [BLOCK_T, BLOCK_N]
    C = tl.load(at + c_C[None, :], mask=mask_B, other=0.0)
    conv_x = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_x, mask_p, K, BLOCK_K)
    conv_B = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_B, mask_n, K, BLOCK_K)
    conv_C = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_C, mask_n, K, BLOCK_K)
    A, D = tl.load(A_ptr + head).to(ACC), tl.load(D_ptr + head).to(ACC)
    dt_bias = tl.load(dt_bias_ptr + head).to(ACC)
    at_dt = dt_ptr + b * stride_dtb + row * stride_dtl + head * stride_dth
    dt, a = log_decays(at_dt, mask_t, dt_bias, A, None, mask_t, LOW, HIGH)
    if after.ptr is not None:
        count, after_ptr = row_count(counts_ptr, b, L), at_slot(after, b) + head * stride_sh
        after_conv_ptr = at_slot(after_columns, b)
        at_dt = dt_ptr + b * stride_dtb + head * stride_dth
        left, weight = entered(dt, a, at_dt, stride_dtl, L, count, dt_bias, A, LOW, HIGH, BLOCK_T)
    at_s = at_slot(before, b) + head * stride_sh + offs_p[:, None] * stride_sp + offs_n[None, :]
    state = tl.trans(tl.load(at_s, mask=mask_p[:, None] & mask_n[None, :], other=0.0).to(ACC))  # [BLOCK_N, BLOCK_P]

    C = convolved(C, conv_C, xBC_ptr, stride_xl, t, L, c_C, mask_n, K, ACC)
    B = convolved(B, conv_B, xBC_ptr, stride_xl, t, L, c_B, mask_n, K, ACC)
    x = convolved(x, conv_x, xBC_ptr, stride_xl, t, L, c_x, mask_p, K, ACC)
    y = block_outputs(x, B, C, D, dt, a, state, SPLIT, PRECISION)
    out = y_ptr + ((b * L + row) * H + head)[:, None] * P + offs_p[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_x)

    if after.ptr is not None:
        state = extended(state, x, B, left, weight, count, counts_ptr, SPLIT, PRECISION)
        at_s = after_ptr + offs_p[None, :] * stride_sp + offs_n[:, None]
        tl.store(at_s, state, mask=mask_p[None, :] & mask_n[:, None])
        move_on(xBC_ptr, conv_ptr, after_conv_ptr, stride_xl, 1, stride_cc, stride_ck, count, c_x, mask_p, K, BLOCK_K)
        if (head % R == 0) & (tl.program_id(1) == 0):  # once for a group
            move_on(
                xBC_ptr, conv_ptr, after_conv_ptr, stride_xl, 1, stride_cc, stride_ck, count, c_B, mask_n, K, BLOCK_K
            )
            move_on(
                xBC_ptr, conv_ptr, after_conv_ptr, stride_xl, 1, stride_cc, stride_ck, count, c_C, mask_n, K, BLOCK_K
            )


@triton.jit(do_not_specialize=["L"])
def _mamba_advance_kernel(
    xBC_ptr,  # [b, L, C]: H P channels of x, G N of B, G N of C
    dt_ptr,  # [b, L, H]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    A_ptr,  # [H], as dt_bias
    dt_bias_ptr,
    columns,  # Slots of [C, K]: the conv state that each row reads, and the one that it writes, which none reads
    after_columns,
    before,  # Slots of [H, P, N]: the state that each row reads, and the one that it writes
    after,
    counts_ptr,  # [b]; None: all L
    stride_xb,
    stride_xl,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_cc: tl.constexpr,  # constants: whether columns or channels lie side by side decides how wide loads are
    stride_ck: tl.constexpr,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    G,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    programmatic_launch()
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[None, :] & mask_n[:, None]
    c_x, c_B = head.to(tl.int32) * P + offs_p, H * P + group.to(tl.int32) * N + offs_n
    c_C = c_B + G * N
    xBC_ptr += b * stride_xb
    conv_ptr = at_slot(columns, b)
    at_dt = dt_ptr + b * stride_dtb + head * stride_dth
    count = row_count(counts_ptr, b, L)
    A = tl.load(A_ptr + head).to(ACC)
    dt_bias = tl.load(dt_bias_ptr + head).to(ACC)
    conv_x = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_x, mask_p, K, BLOCK_K)
    conv_B = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_B, mask_n, K, BLOCK_K)
    before_ptr, after_ptr = at_slot(before, b) + head * stride_sh, at_slot(after, b) + head * stride_sh
    after_conv_ptr = at_slot(after_columns, b)
    offs_s = offs_p[None, :] * stride_sp + offs_n[:, None]
    state = tl.load(before_ptr + offs_s, mask=mask_s, other=0.0).to(ACC)  # [BLOCK_N, BLOCK_P]
    for start in tl.range(0, count, BLOCK_T, disable_licm=True):
        t = start + tl.arange(0, BLOCK_T)
        at, mask_t = xBC_ptr + t.to(tl.int64)[:, None] * stride_xl, t < count  # tokens that do not enter are not read
        x = tl.load(at + c_x[None, :], mask=mask_t[:, None] & mask_p[None, :], other=0.0)  # [BLOCK_T, BLOCK_P]
        B = tl.load(at + c_B[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_T, BLOCK_N]
        left, weight = replayed(at_dt, stride_dtl, start, count, dt_bias, A, LOW, HIGH, BLOCK_T)
        B = convolved(B, conv_B, xBC_ptr, stride_xl, t, count, c_B, mask_n, K, ACC)
        x = convolved(x, conv_x, xBC_ptr, stride_xl, t, count, c_x, mask_p, K, ACC)
        state = grow(state * left, B, x, weight, SPLIT, PRECISION)
    tl.store(after_ptr + offs_s, state, mask=mask_s)
    move_on(xBC_ptr, conv_ptr, after_conv_ptr, stride_xl, 1, stride_cc, stride_ck, count, c_x, mask_p, K, BLOCK_K)
    if (head % R == 0) & (tl.program_id(1) == 0):  # once for a group
        move_on(xBC_ptr, conv_ptr, after_conv_ptr, stride_xl, 1, stride_cc, stride_ck, count, c_B, mask_n, K, BLOCK_K)
        move_on(xBC_ptr, conv_ptr, after_conv_ptr, stride_xl, 1, stride_cc, stride_ck, count, c_C, mask_n, K, BLOCK_K)
