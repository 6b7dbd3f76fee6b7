"""The kernels of `ssd_block` and `ssd_advance`: one program for each row, head and slice of its state."""

import triton
import triton.language as tl

from ..runtime.lang import at_slot, programmatic_launch, row_count
from .lang import block_outputs, grow, log_decays, placed, replayed


@triton.jit(do_not_specialize=["L"])
def _ssd_block_kernel(
    x_ptr,  # [b, L, H, P]
    dt_ptr,  # [b, L, H]
    A_ptr,  # [H], as D and dt_bias
    B_ptr,  # [b, L, G, N], as C
    C_ptr,
    D_ptr,
    bias_ptr,
    before,  # Slots of [H, P, N]; none: zeros
    y_ptr,  # [b, L, H, P], contiguous
    stride_xb,
    stride_xl,
    stride_xh,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_Cb,
    stride_Cl,
    stride_Cg,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    P: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    programmatic_launch()
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    mask_t, mask_p, mask_n = t < L, offs_p < P, offs_n < N
    row = t.to(tl.int64)

    A = tl.load(A_ptr + head).to(ACC)
    bias = tl.load(bias_ptr + head).to(ACC)
    at_dt = dt_ptr + b * stride_dtb + row * stride_dtl + head * stride_dth
    dt, a = log_decays(at_dt, mask_t, bias, A, None, mask_t, LOW, HIGH)
    at_B = B_ptr + b * stride_Bb + group * stride_Bg
    at_C = C_ptr + b * stride_Cb + group * stride_Cg
    B = tl.load(at_B + row[:, None] * stride_Bl + offs_n[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0)
    C = tl.load(at_C + row[:, None] * stride_Cl + offs_n[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0)
    at_x = x_ptr + b * stride_xb + head * stride_xh
    mask_x = mask_t[:, None] & mask_p[None, :]
    x = tl.load(at_x + row[:, None] * stride_xl + offs_p[None, :], mask=mask_x, other=0.0)  # [BLOCK_T, BLOCK_P]
    state = None
    if before.ptr is not None:
        at_s = at_slot(before, b) + head * stride_sh + offs_p[:, None] * stride_sp + offs_n[None, :]
        state = tl.trans(tl.load(at_s, mask=mask_p[:, None] & mask_n[None, :], other=0.0).to(ACC))  # [BLOCK_N, BLOCK_P]
    D = tl.load(D_ptr + head).to(ACC)
    y = block_outputs(x, B, C, D, dt, a, state, SPLIT, PRECISION)
    out = y_ptr + ((b * L + row) * H + head)[:, None] * P + offs_p[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_x)


@triton.jit(do_not_specialize=["L"])
def _ssd_advance_kernel(
    x_ptr,  # [b, L, H, P]
    dt_ptr,  # [b, L, H]
    A_ptr,  # [H], as dt_bias
    B_ptr,  # [b, L, G, N]
    bias_ptr,
    before,  # Slots of [H, P, N]: the state that each row reads, and the one that it writes
    after,
    counts_ptr,  # [b]; None: all L
    stride_xb,
    stride_xl,
    stride_xh,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    P: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    programmatic_launch()
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[None, :] & mask_n[:, None]
    A = tl.load(A_ptr + head).to(ACC)
    bias = tl.load(bias_ptr + head).to(ACC)
    count = row_count(counts_ptr, b, L)
    before_ptr, after_ptr = at_slot(before, b) + head * stride_sh, at_slot(after, b) + head * stride_sh
    offs_s = offs_p[None, :] * stride_sp + offs_n[:, None]
    state = tl.load(before_ptr + offs_s, mask=mask_s, other=0.0).to(ACC)  # [BLOCK_N, BLOCK_P]
    at_dt = dt_ptr + b * stride_dtb + head * stride_dth
    for start in tl.range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask_t = t < count  # tokens that do not enter are not read
        row = t.to(tl.int64)
        left, weight = replayed(at_dt, stride_dtl, start, count, bias, A, LOW, HIGH, BLOCK_T)
        at_x = x_ptr + b * stride_xb + row[:, None] * stride_xl + head * stride_xh + offs_p[None, :]
        x = tl.load(at_x, mask=mask_t[:, None] & mask_p[None, :], other=0.0)  # [BLOCK_T, BLOCK_P]
        at_B = B_ptr + b * stride_Bb + row[:, None] * stride_Bl + group * stride_Bg + offs_n[None, :]
        B = tl.load(at_B, mask=mask_t[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_T, BLOCK_N]
        state = grow(state * left, B, x, weight, SPLIT, PRECISION)
    tl.store(after_ptr + offs_s, state, mask=mask_s)
