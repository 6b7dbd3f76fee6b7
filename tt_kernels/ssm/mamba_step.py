"""One token from the raw projection on, both its states moved on in one launch, for autoregressive decoding."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..conv1d.conv_states import conv_slots
from ..reference.mamba import MambaState, MambaWeights
from ..runtime.lang import at_slot, programmatic_launch
from ..runtime.launch import run
from ..runtime.registry import define, takes_kernel
from .conv_lang import conv_parameters, convolved_token
from .lang import placed, stepped, time_steps
from .launch import arithmetic, dense, lined_up, measured_step, ssm_slots, step_launch
from .mamba_block import check_inputs
from .mamba_block_launch import groups


@triton.jit
def _mamba_step_kernel(
    xBC_ptr,  # [b, C]: H P channels of x, G N of B, G N of C
    dt_ptr,  # [b, H]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    A_ptr,  # [H], as D and dt_bias
    D_ptr,
    dt_bias_ptr,
    columns,  # Slots of [C, K]: the conv state that each row reads, and the one that it writes, which none reads
    after_columns,
    before,  # Slots of [H, P, N]: the state that each row reads, and the one that it writes
    after,
    y_ptr,  # [b, H, P], contiguous
    stride_xb,
    stride_dtb,
    stride_dth,
    stride_cc: tl.constexpr,  # constants, as in `_mamba_block_kernel`
    stride_ck: tl.constexpr,
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
    programmatic_launch()
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[:, None] & mask_n[None, :]
    c_x, c_B = head.to(tl.int32) * P + offs_p, H * P + group.to(tl.int32) * N + offs_n
    c_C = c_B + G * N
    xBC_ptr += b * stride_xb
    conv_ptr, after_conv_ptr = at_slot(columns, b), at_slot(after_columns, b)
    before_ptr, after_ptr = at_slot(before, b) + head * stride_sh, at_slot(after, b) + head * stride_sh
    offs_s = offs_p[:, None] * stride_sp + offs_n[None, :]

    # All is asked for before anything is waited for: one round trip to memory.
    state = tl.load(before_ptr + offs_s, mask=mask_s, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_N]
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
    tl.store(after_ptr + offs_s, state, mask=mask_s)
    k = tl.arange(0, BLOCK_K)[None, :]
    after_conv_ptr += k * stride_ck
    tl.store(after_conv_ptr + c_x[:, None] * stride_cc, after_x, mask=mask_p[:, None] & (k < K))
    if (head % R == 0) & (tl.program_id(1) == 0):  # once for a group
        mask = mask_n[:, None] & (k < K)
        tl.store(after_conv_ptr + c_B[:, None] * stride_cc, after_B, mask=mask)
        tl.store(after_conv_ptr + c_C[:, None] * stride_cc, after_C, mask=mask)


def _mamba_step(
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv: Tensor,
    ssm: Tensor,
    conv_indices: Tensor | None,
    ssm_indices: Tensor | None,
    conv_out_indices: Tensor | None,
    ssm_out_indices: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    b, (H, P, N), G, K = xBC.shape[0], ssm.shape[1:], groups(xBC, ssm), conv_weight.shape[1]
    y, xBC = xBC.new_empty(b, H, P), lined_up(xBC)
    # 32 numbers a thread: the convolution of B and C is repeated for two slices of 64.
    launch = measured_step("_mamba_step_kernel", step_launch(b * H, P, N, numbers=32), xBC, b * H, P, N)
    constants = arithmetic(xBC, A, dt_limit=(low, high))
    with (
        conv_slots(conv, b, conv_indices, conv_out_indices) as (columns, after_columns),
        ssm_slots(ssm, ssm_indices, ssm_out_indices) as (before, after),
    ):
        run(
            _mamba_step_kernel,
            (b * H, triton.cdiv(P, launch.BLOCK_P)),
            *(xBC, dt, *dense(conv_weight, conv_bias, A, D, dt_bias)),
            *(columns, after_columns, before, after, y),
            *(xBC.stride(0), *dt.stride(), *columns.ptr.stride()[1:], *before.ptr.stride()[1:3], H, H // G, G),
            P=P,
            N=N,
            K=K,
            **{name: constants[name] for name in ("ACC", "LOW", "HIGH")},
            BLOCK_K=triton.next_power_of_2(K),
            launch=launch,
        )
    return y


_step = define(
    _mamba_step,
    lambda xBC, dt, weight, bias, A, D, dt_bias, conv, ssm, *_: xBC.new_empty((*dt.shape, ssm.shape[2])),
    writes=("conv", "ssm"),
)


@torch.no_grad()
def mamba_step(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Take one token, as `mamba_block` and `mamba_advance` take several: its output, and both states moved on in place.

    Args:
        xBC:      [b, C] float, any strides: C = H P + 2 G N channels, of x, of B, of C.
        dt:       [b, H] float, before bias and softplus.
        weights:  MambaWeights, as `mamba_block` takes them.
        state:    MambaState, written, as `mamba_advance` takes it.
        dt_limit: (low, high), what the time step is clamped to; low is finite.
    Returns:
        y: [b, H, P] dtype of xBC.

    Numerics: computes in fp32 (fp64 where xBC or A is fp64), rounds y once and the states to their dtypes; decays below
        e^-64 count as 0; deterministic. Kernels cut indices to the slots that exist; the reference refuses others where
        they are on a CPU.
    Gradients: none, neither of y nor of what is written: a decoding step. `mamba_block` has them.
    Raises: ValueError as `mamba_block` does.
    Cost: b (6 H P N + 2 K C) flops, 8 b H P N + (b (C + H P + H) + (2 b + 1) K C) itemsize bytes: bound by reading and
        writing the state.
    Source: `causal_conv1d_update` of causal-conv1d and `selective_state_update` of mamba_ssm.

    Example:
        >>> weights = MambaWeights(torch.randn(64, 4), None, *-torch.rand(3, 4))
        >>> planes = dict(conv_indices=torch.tensor([0, 1]), conv_out_indices=torch.tensor([2, 3]))
        >>> state = MambaState(torch.zeros(4, 64, 4), torch.zeros(2, 4, 8, 16), **planes)
        >>> y = mamba_step(torch.randn(2, 64), torch.rand(2, 4), weights, state)
    """
    w, s = weights, state
    check_inputs("mamba_step", xBC, dt, w, s, dt_limit, tokens="b")
    tensors = (xBC, dt, *w, s.conv, s.ssm)
    if not takes_kernel("mamba_step", *tensors):
        return reference.mamba_step(xBC, dt, w, s, dt_limit=dt_limit)
    return _step(*tensors, *s[2:], *dt_limit)
