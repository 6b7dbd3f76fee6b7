"""The kernels of `mamba_block`, `mamba_advance` and `mamba_step`: convolution and scan in one launch.

One program for each row, head and slice of its state. It convolves its own columns of x and its group's of B and C in
registers: the heads of a group repeat the latter, 2 K (N + N) flops a token and head beside the scan's 2 P N and more.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..conv1d.causal import _causal_conv1d
from ..core import define
from ..launch import Launch, architecture, run, tuned
from ..reference.common import compute_dtype
from .block_kernels import longest_block, ssd_block_launch
from .conv import conv_parameters, convolved
from .scan import scan
from .tile import arithmetic, block_outputs, lined_up, log_decays, placed

# ---- kernels ----


@triton.jit
def _mamba_block_kernel(
    xBC_ptr,  # [b, L, C]: H P channels of x, G N of B, G N of C
    dt_ptr,  # [b, L, H]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    A_ptr,  # [H], as D and dt_bias
    D_ptr,
    dt_bias_ptr,
    conv_ptr,  # [b, C, K]
    state_ptr,  # [b, H, P, N]
    y_ptr,  # [b, L, H, P], contiguous
    stride_xb,
    stride_xl,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_cb,
    stride_cc,
    stride_ck,
    stride_sb,
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
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    mask_t, mask_p, mask_n = t < L, offs_p < P, offs_n < N
    row = t.to(tl.int64)
    c_x, c_B = head * P + offs_p, H * P + group * N + offs_n
    c_C = c_B + G * N
    mask_x, mask_B = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]

    # All that comes from afar, before anything waits for it.
    at_s = state_ptr + b * stride_sb + head * stride_sh + offs_p[:, None] * stride_sp + offs_n[None, :]
    state = tl.load(at_s, mask=mask_p[:, None] & mask_n[None, :], other=0.0).to(ACC)  # [BLOCK_P, BLOCK_N]
    xBC_ptr += b * stride_xb
    conv_ptr += b * stride_cb
    x = tl.load(xBC_ptr + row[:, None] * stride_xl + c_x[None, :], mask=mask_x, other=0.0)  # [BLOCK_T, BLOCK_P]
    B = tl.load(xBC_ptr + row[:, None] * stride_xl + c_B[None, :], mask=mask_B, other=0.0)  # [BLOCK_T, BLOCK_N]
    C = tl.load(xBC_ptr + row[:, None] * stride_xl + c_C[None, :], mask=mask_B, other=0.0)
    taps_x, past_x, bias_x = conv_parameters(
        weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_x, mask_p, K, BLOCK_K
    )
    taps_B, past_B, bias_B = conv_parameters(
        weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_B, mask_n, K, BLOCK_K
    )
    taps_C, past_C, bias_C = conv_parameters(
        weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_C, mask_n, K, BLOCK_K
    )
    A, D = tl.load(A_ptr + head).to(ACC), tl.load(D_ptr + head).to(ACC)
    dt_bias = tl.load(dt_bias_ptr + head).to(ACC)
    at_dt = dt_ptr + b * stride_dtb + row * stride_dtl + head * stride_dth
    dt, a = log_decays(at_dt, mask_t, dt_bias, A, None, mask_t, LOW, HIGH)

    x = convolved(x, taps_x, past_x, bias_x, xBC_ptr, stride_xl, t, L, c_x, mask_p, K, ACC)
    B = convolved(B, taps_B, past_B, bias_B, xBC_ptr, stride_xl, t, L, c_B, mask_n, K, ACC)
    C = convolved(C, taps_C, past_C, bias_C, xBC_ptr, stride_xl, t, L, c_C, mask_n, K, ACC)
    y = block_outputs(x, B, C, D, dt, a, state, SPLIT, PRECISION, ACC, BLOCK_T, BLOCK_P)
    out = y_ptr + ((b * L + row) * H + head)[:, None] * P + offs_p[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_x)


# ---- launches ----


def mamba_block_launch(rows: int, L: int, P: int, N: int, itemsize: int) -> Launch:
    """As `ssd_block_launch`."""
    return ssd_block_launch(rows, L, P, N, itemsize)


def _mamba_block(
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    low: float,
    high: float,
) -> Tensor:
    (b, L, C), K, (H, P, N) = xBC.shape, weight.shape[1], state.shape[1:]
    G = (C - H * P) // (2 * N)
    if longest_block(architecture(xBC)) < L:
        convolved = _causal_conv1d(xBC, weight, bias, conv_state, True, None)
        x, B, C = convolved.split_with_sizes([H * P, G * N, G * N], -1)
        x, B, C = x.view(b, L, H, P), B.view(b, L, G, N), C.view(b, L, G, N)
        return scan(x, dt, A, B, C, D, dt_bias, state, None, None, L, low, high, before=False)[0]
    y = xBC.new_empty(b, L, H, P)
    xBC, state = lined_up(xBC), lined_up(state)
    launch = tuned(
        "_mamba_block_kernel",
        mamba_block_launch(b * H, L, P, N, xBC.element_size()),
        architecture(xBC),
        rows=triton.next_power_of_2(b * H),
        L=triton.next_power_of_2(L),
    )
    run(
        _mamba_block_kernel,
        (b * H if L else 0, triton.cdiv(P, launch.BLOCK_P)),
        *(xBC, dt, weight.contiguous(), None if bias is None else bias.contiguous()),
        *(A.contiguous(), D.contiguous(), dt_bias.contiguous(), conv_state, state, y),
        *(*xBC.stride()[:2], *dt.stride(), *conv_state.stride(), *state.stride()[:3]),
        *(L, H, H // G, G),
        P=P,
        N=N,
        K=K,
        **arithmetic(xBC, A, dt_limit=(low, high)),
        BLOCK_K=triton.next_power_of_2(K),
        launch=launch,
    )
    return y


# ---- op ----


def _mamba_block_fake(xBC, dt, weight, bias, A, D, dt_bias, conv_state, state, *_):
    return xBC.new_empty((*xBC.shape[:2], *state.shape[1:3]))


mamba_block_forward = define(
    "mamba_block(Tensor xBC, Tensor dt, Tensor weight, Tensor? bias, Tensor A, Tensor D, Tensor dt_bias, "
    "Tensor conv_state, Tensor state, float low, float high) -> Tensor",
    _mamba_block,
    _mamba_block_fake,
)
