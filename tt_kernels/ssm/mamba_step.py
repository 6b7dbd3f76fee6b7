"""One token from the raw projection on: its output and both new states in one launch, for autoregressive decoding."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, run, tuned
from ..runtime.registry import define, takes_kernel, wants_gradients
from .conv_lang import conv_parameters, convolved_token
from .lang import placed, stepped, time_steps
from .launch import arithmetic, dense, lined_up
from .mamba_block import check_inputs

# ---- kernels ----


@triton.jit
def _mamba_step_kernel(
    xBC_ptr,  # [b, C]: H P channels of x, G N of B, G N of C
    dt_ptr,  # [b, H]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    A_ptr,  # [H], as D and dt_bias
    D_ptr,
    dt_bias_ptr,
    conv_ptr,  # [b, C, K]
    state_ptr,  # [b, H, P, N]
    y_ptr,  # [b, H, P], contiguous
    new_conv_ptr,  # [b, C, K], contiguous
    new_ptr,  # [b, H, P, N], contiguous
    stride_xb,
    stride_dtb,
    stride_dth,
    stride_cb,
    stride_cc,
    stride_ck,
    stride_sb,
    stride_sh,
    stride_sp,
    H,
    R,  # heads of a group
    G,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[:, None] & mask_n[None, :]
    c_x, c_B = head.to(tl.int32) * P + offs_p, H * P + group.to(tl.int32) * N + offs_n
    c_C = c_B + G * N
    xBC_ptr += b * stride_xb
    conv_ptr += b * stride_cb
    new_conv_ptr += b * (H * P + 2 * G * N) * K

    # All is asked for before anything is waited for: one round trip to memory.
    at_s = state_ptr + b * stride_sb + head * stride_sh + offs_p[:, None] * stride_sp + offs_n[None, :]
    state = tl.load(at_s, mask=mask_s, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_N]
    x = tl.load(xBC_ptr + c_x, mask=mask_p, other=0.0)
    B = tl.load(xBC_ptr + c_B, mask=mask_n, other=0.0)
    C = tl.load(xBC_ptr + c_C, mask=mask_n, other=0.0)
    conv_x = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_x, mask_p, K, BLOCK_K, 1)
    conv_B = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_B, mask_n, K, BLOCK_K, 1)
    conv_C = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_C, mask_n, K, BLOCK_K, 1)
    A, D = tl.load(A_ptr + head).to(ACC), tl.load(D_ptr + head).to(ACC)
    dt_bias = tl.load(dt_bias_ptr + head).to(ACC)
    dt = time_steps(tl.load(dt_ptr + b * stride_dtb + head * stride_dth).to(ACC), dt_bias, LOW, HIGH)

    x, after_x = convolved_token(x, conv_x, K, ACC)
    B, after_B = convolved_token(B, conv_B, K, ACC)
    C, after_C = convolved_token(C, conv_C, K, ACC)
    y, state = stepped(state, x, B, C, D, dt, A)
    out = (b * H + head) * P + offs_p
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask_p)
    tl.store(new_ptr + out[:, None] * N + offs_n[None, :], state, mask=mask_s)
    k = tl.arange(0, BLOCK_K)[None, :]
    tl.store(new_conv_ptr + c_x[:, None] * K + k, after_x, mask=mask_p[:, None] & (k < K))
    if (head % R == 0) & (tl.program_id(1) == 0):  # once for a group
        mask = mask_n[:, None] & (k < K)
        tl.store(new_conv_ptr + c_B[:, None] * K + k, after_B, mask=mask)
        tl.store(new_conv_ptr + c_C[:, None] * K + k, after_C, mask=mask)


# ---- launches ----


def mamba_step_launch(rows: int, P: int, N: int) -> Launch:
    """`rows`: rows times heads. Reading and writing the state bounds it: 32 numbers a thread in flight, and
    the convolution of B and C repeated for two slices of 64; at few rows latency does (one round trip to memory): 16,
    where that gives an H200's 132 multiprocessors two programs each."""
    block_n = triton.next_power_of_2(N)
    block_p = min(triton.next_power_of_2(P), max(1, 4096 // block_n))
    while block_p > 1 and rows * triton.cdiv(P, block_p) < 256:
        block_p //= 2
    return Launch(BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4, num_stages=1)


def _mamba_step(
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
) -> tuple[Tensor, Tensor, Tensor]:
    (b, C), (H, P, N), K = xBC.shape, state.shape[1:], weight.shape[1]
    G = (C - H * P) // (2 * N)
    y, new_conv, new = _mamba_step_fake(xBC, dt, weight, bias, A, D, dt_bias, conv_state, state)
    xBC, state = lined_up(xBC), lined_up(state, 2)
    launch = tuned(
        "_mamba_step_kernel",
        mamba_step_launch(b * H, P, N),
        architecture(xBC),
        rows=triton.next_power_of_2(b * H),
        P=P,
        N=N,
    )
    constants = arithmetic(xBC, A, dt_limit=(low, high))
    run(
        _mamba_step_kernel,
        (b * H, triton.cdiv(P, launch.BLOCK_P)),
        *(xBC, dt, *dense(weight, bias, A, D, dt_bias), conv_state, state, y, new_conv, new),
        *(xBC.stride(0), *dt.stride(), *conv_state.stride(), *state.stride()[:3], H, H // G, G),
        P=P,
        N=N,
        K=K,
        **{name: constants[name] for name in ("ACC", "LOW", "HIGH")},
        BLOCK_K=triton.next_power_of_2(K),
        launch=launch,
    )
    return y, new_conv, new


# ---- op ----


def _mamba_step_fake(xBC, dt, weight, bias, A, D, dt_bias, conv_state, state, *_):
    new = state.new_empty(state.shape, dtype=compute_dtype(xBC.dtype, A.dtype))
    return xBC.new_empty(state.shape[:3]), xBC.new_empty(conv_state.shape), new


_step = define(
    "mamba_step(Tensor xBC, Tensor dt, Tensor weight, Tensor? bias, Tensor A, Tensor D, Tensor dt_bias, "
    "Tensor conv_state, Tensor state, float low, float high) -> (Tensor, Tensor, Tensor)",
    _mamba_step,
    _mamba_step_fake,
)


def mamba_step(
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one token, as `mamba_block` and `mamba_advance` take several: its output and both states after it.

    Args:
        xBC:        [b, C] float, any strides: C = H P + 2 G N channels, of x, of B, of C.
        dt:         [b, H] float, before bias and softplus.
        weight:     [C, K] float; the last tap belongs to the token itself.
        bias:       [C] float or None.
        A:          [H] float, 0 or below, -inf too.
        D:          [H] float.
        dt_bias:    [H] float.
        conv_state: [b, C, K] float: the columns of xBC before the token, oldest first. It is not changed.
        state:      [b, H, P, N] float, fp32 in 16-bit models. It is not changed.
        dt_limit:   (low, high), what the time step is clamped to; low is finite.
    Returns:
        y:          [b, H, P] dtype of xBC.
        conv_state: [b, C, K] dtype of xBC, contiguous, in new memory.
        state:      [b, H, P, N] fp32 (fp64 where xBC or A is fp64), contiguous, in new memory.

    Computes in the dtype of the new state; decays below e^-64 count as 0. Gradients for all tensors: where they are
    wanted the reference runs. Deterministic. Raises ValueError as `mamba_block` does. Cost: b (6 H P N + 2 K C) flops,
    8 b H P N + (b (C + H P + H) + (2 b + 1) K C) itemsize bytes: bound by reading and writing the state.
    Source: `causal_conv1d_update` of causal-conv1d and `selective_state_update` of mamba_ssm.
    """
    tensors = (xBC, dt, weight, bias, A, D, dt_bias, conv_state, state)
    check_inputs("mamba_step", dt_limit, *tensors, tokens="b")
    if not takes_kernel("mamba_step", *tensors) or wants_gradients(*tensors):
        return reference.mamba_step(*tensors, dt_limit=dt_limit)
    return _step(*tensors, *dt_limit)
