"""The scan of one token: its output, and its state moved on in place, as autoregressive decoding needs them."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..runtime.checks import check
from ..runtime.lang import at_slot, programmatic_launch
from ..runtime.launch import run
from ..runtime.registry import define, takes_kernel
from .lang import placed, stepped, time_steps
from .launch import arithmetic, dense, lined_up, measured_step, ssm_slots, step_launch
from .ssd_block import check_scan


@triton.jit
def _ssd_step_kernel(
    x_ptr,  # [b, H, P]
    dt_ptr,  # [b, H]
    A_ptr,  # [H], as D and dt_bias
    B_ptr,  # [b, G, N], as C
    C_ptr,
    D_ptr,
    bias_ptr,
    before,  # Slots of [H, P, N]: the state that each row reads, and the one that it writes
    after,
    y_ptr,  # [b, H, P], contiguous
    stride_xb,
    stride_xh,
    stride_dtb,
    stride_dth,
    stride_Bb,
    stride_Bg,
    stride_Cb,
    stride_Cg,
    stride_sh,
    stride_sp,
    H,
    R,  # heads of a group
    P: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    programmatic_launch()
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[:, None] & mask_n[None, :]
    before_ptr, after_ptr = at_slot(before, b) + head * stride_sh, at_slot(after, b) + head * stride_sh
    offs_s = offs_p[:, None] * stride_sp + offs_n[None, :]
    state = tl.load(before_ptr + offs_s, mask=mask_s, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_N]
    bias = tl.load(bias_ptr + head).to(ACC)
    dt = time_steps(tl.load(dt_ptr + b * stride_dtb + head * stride_dth).to(ACC), bias, LOW, HIGH)
    A, D = tl.load(A_ptr + head).to(ACC), tl.load(D_ptr + head).to(ACC)
    x = tl.load(x_ptr + b * stride_xb + head * stride_xh + offs_p, mask=mask_p, other=0.0).to(ACC)
    B = tl.load(B_ptr + b * stride_Bb + group * stride_Bg + offs_n, mask=mask_n, other=0.0).to(ACC)
    C = tl.load(C_ptr + b * stride_Cb + group * stride_Cg + offs_n, mask=mask_n, other=0.0).to(ACC)
    y, state = stepped(state, x, B, C, D, dt, A)
    out = (b * H + head) * P + offs_p
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask_p)
    tl.store(after_ptr + offs_s, state, mask=mask_s)


def _ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    state_indices: Tensor | None,
    out_indices: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    (b, H, P), (G, N) = x.shape, B.shape[1:]
    y = x.new_empty(x.shape)
    x, B, C = (lined_up(t) for t in (x, B, C))
    # 16 numbers a thread also make, at 64 heads, 512 programs of one row.
    launch = measured_step("_ssd_step_kernel", step_launch(b * H, P, N, numbers=16), x, b * H, P, N)
    constants = arithmetic(x, A, B, C, dt_limit=(low, high))
    with ssm_slots(ssm_state, state_indices, out_indices) as (before, after):
        run(
            _ssd_step_kernel,
            (b * H, triton.cdiv(P, launch.BLOCK_P)),
            *(x, dt, *dense(A), B, C, *dense(D, dt_bias), before, after, y),
            *(*x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2], *before.ptr.stride()[1:3], H, H // G),
            P=P,
            N=N,
            **{name: constants[name] for name in ("ACC", "LOW", "HIGH")},
            launch=launch,
        )
    return y


_step = define(_ssd_step, lambda x, *_: x.new_empty(x.shape), writes=("ssm_state",))


@torch.no_grad()
def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    *,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Take one token and move the state on, in place: state' = exp(dt' A) state + dt' x B^T, y = state' C + D x, where
    dt' = clamp(softplus(dt + dt_bias)).

    Args:
        x:             [b, H, P] float, any strides.
        dt:            [b, H] float, before bias and softplus.
        A:             [H] float, 0 or below, -inf too.
        B, C:          [b, G, N] float; head h belongs to group h // (H / G).
        D:             [H] float.
        dt_bias:       [H] float.
        ssm_state:     [slots, H, P, N] float, fp32 in 16-bit models, written.
        state_indices: [b] int: the slot that each row reads; None: row b has slot b. Rows may read one together.
        out_indices:   [b] int: the slot that each row writes, all different, none of them read by another row; None:
                       the slot that it reads.
        dt_limit:      (low, high), what the time step is clamped to; low is finite.
    Returns:
        y: [b, H, P] dtype of x.

    Numerics: computes in fp32 (fp64 where x or A is fp64), rounds y once and the state to the dtype of ssm_state;
        decays below e^-64 count as 0; deterministic. Kernels cut indices to the slots that exist; the reference refuses
        others where they are on a CPU.
    Gradients: none, neither of y nor of what is written: a decoding step. `ssd_block` has them.
    Raises: ValueError for sizes that disagree, G that does not divide H, fewer slots than rows without indices, a
        crossed dt_limit.
    Cost: 6 b H P N flops, 8 b H P N + (2 H P + 2 G N + H) b itemsize bytes: bound by reading and writing the state.
    Source: `selective_state_update` of mamba_ssm; Dao and Gu, Transformers are SSMs (Mamba-2, 2024).

    Example:
        >>> x, (B, C), (A, D, dt_bias) = torch.randn(2, 4, 8), torch.randn(2, 2, 1, 16), -torch.rand(3, 4)
        >>> pool, slots = torch.zeros(9, 4, 8, 16), torch.tensor([3, 1])
        >>> y = ssd_step(x, torch.rand(2, 4), A, B, C, D, dt_bias, pool, state_indices=slots)
    """
    check(
        "ssd_step",
        8,
        x=(x, "b H P"),
        dt=(dt, "b H"),
        A=(A, "H"),
        B=(B, "b G N"),
        C=(C, "b G N"),
        D=(D, "H"),
        dt_bias=(dt_bias, "H"),
        ssm_state=(ssm_state, "slots H P N"),
        state_indices=(state_indices, "b", int),
        out_indices=(out_indices, "b", int),
    )
    check_scan("ssd_step", x, B, ssm_state, state_indices, dt_limit)
    tensors = (x, dt, A, B, C, D, dt_bias, ssm_state)
    if not takes_kernel("ssd_step", *tensors):
        places: dict[str, Any] = dict(state_indices=state_indices, out_indices=out_indices)
        return reference.ssd_step(*tensors, **places, dt_limit=dt_limit)
    return _step(*tensors, state_indices, out_indices, *dt_limit)
