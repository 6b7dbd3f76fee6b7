"""The scan of one token: its output and the new state together, as autoregressive decoding needs them."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.common import compute_dtype
from ..runtime.checks import check, refuse
from ..runtime.launch import Launch, architecture, run, tuned
from ..runtime.registry import define, takes_kernel, wants_gradients
from .lang import placed, stepped, time_steps
from .launch import arithmetic, dense, lined_up
from .ssd_block import check_limit

# ---- kernels ----


@triton.jit
def _ssd_step_kernel(
    x_ptr,  # [b, H, P]
    dt_ptr,  # [b, H]
    A_ptr,  # [H], as D and dt_bias
    B_ptr,  # [b, G, N], as C
    C_ptr,
    D_ptr,
    bias_ptr,
    state_ptr,  # [b, H, P, N]
    y_ptr,  # [b, H, P], contiguous
    new_ptr,  # [b, H, P, N], contiguous
    stride_xb,
    stride_xh,
    stride_dtb,
    stride_dth,
    stride_Bb,
    stride_Bg,
    stride_Cb,
    stride_Cg,
    stride_sb,
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
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[:, None] & mask_n[None, :]
    at_s = state_ptr + b * stride_sb + head * stride_sh + offs_p[:, None] * stride_sp + offs_n[None, :]
    state = tl.load(at_s, mask=mask_s, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_N]
    bias = tl.load(bias_ptr + head).to(ACC)
    dt = time_steps(tl.load(dt_ptr + b * stride_dtb + head * stride_dth).to(ACC), bias, LOW, HIGH)
    A, D = tl.load(A_ptr + head).to(ACC), tl.load(D_ptr + head).to(ACC)
    x = tl.load(x_ptr + b * stride_xb + head * stride_xh + offs_p, mask=mask_p, other=0.0).to(ACC)
    B = tl.load(B_ptr + b * stride_Bb + group * stride_Bg + offs_n, mask=mask_n, other=0.0).to(ACC)
    C = tl.load(C_ptr + b * stride_Cb + group * stride_Cg + offs_n, mask=mask_n, other=0.0).to(ACC)
    y, state = stepped(state, x, B, C, D, dt, A)
    out = (b * H + head) * P + offs_p
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask_p)
    tl.store(new_ptr + out[:, None] * N + offs_n[None, :], state, mask=mask_s)


# ---- launches ----


def ssd_step_launch(rows: int, P: int, N: int) -> Launch:
    """`rows`: rows times heads. Reading and writing the state bounds it: 16 numbers a thread in flight, which at 64
    heads also makes 512 programs of one row."""
    block_n = triton.next_power_of_2(N)
    block_p = min(triton.next_power_of_2(P), max(1, 2048 // block_n))
    while block_p > 1 and rows * triton.cdiv(P, block_p) < 256:
        block_p //= 2
    return Launch(BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4, num_stages=1)


def _ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    (b, H, P), (G, N) = x.shape, B.shape[1:]
    y, new = _ssd_step_fake(x, dt, A, B)
    x, B, C, state = *(lined_up(t) for t in (x, B, C)), lined_up(state, 2)
    launch = tuned(
        "_ssd_step_kernel", ssd_step_launch(b * H, P, N), architecture(x), rows=triton.next_power_of_2(b * H), P=P, N=N
    )
    constants = arithmetic(x, A, B, C, dt_limit=(low, high))
    run(
        _ssd_step_kernel,
        (b * H, triton.cdiv(P, launch.BLOCK_P)),
        *(x, dt, *dense(A), B, C, *dense(D, dt_bias), state, y, new),
        *(*x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2], *state.stride()[:3], H, H // G),
        P=P,
        N=N,
        **{name: constants[name] for name in ("ACC", "LOW", "HIGH")},
        launch=launch,
    )
    return y, new


# ---- op ----


def _ssd_step_fake(x, dt, A, B, *_):
    return x.new_empty(x.shape), x.new_empty((*x.shape, B.shape[2]), dtype=compute_dtype(x.dtype, A.dtype))


_step = define(
    "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, Tensor state, float low, "
    "float high) -> (Tensor, Tensor)",
    _ssd_step,
    _ssd_step_fake,
)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Take one token: state' = exp(dt' A) state + dt' x B^T, y = state' C + D x, dt' = clamp(softplus(dt + dt_bias)).

    Args:
        x:        [b, H, P] float, any strides.
        dt:       [b, H] float, before bias and softplus.
        A:        [H] float, 0 or below, -inf too.
        B, C:     [b, G, N] float; head h belongs to group h // (H / G).
        D:        [H] float.
        dt_bias:  [H] float.
        state:    [b, H, P, N] float, fp32 in 16-bit models; it is not changed.
        dt_limit: (low, high), what the time step is clamped to; low is finite.
    Returns:
        y:     [b, H, P] dtype of x.
        state: [b, H, P, N] fp32 (fp64 where x or A is fp64), in new memory.

    Computes in the dtype of the new state; decays below e^-64 count as 0. Gradients for all tensors: where they are
    wanted the reference runs. Deterministic. Raises ValueError for sizes that disagree, G that does not divide H, a
    crossed dt_limit. Cost: 6 b H P N flops, 8 b H P N + (2 H P + 2 G N + H) b itemsize bytes: bound by reading and
    writing the state.
    Source: `selective_state_update` of mamba_ssm; Dao and Gu, Transformers are SSMs (Mamba-2, 2024).
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
        state=(state, "b H P N"),
    )
    H, G = x.shape[1], B.shape[1]
    if G < 1 or H % G:
        refuse("ssd_step", "G", G, f"groups of B that divide the H={H} heads of x")
    check_limit("ssd_step", dt_limit)
    tensors = (x, dt, A, B, C, D, dt_bias, state)
    if not takes_kernel("ssd_step", *tensors) or wants_gradients(*tensors):
        return reference.ssd_step(*tensors, dt_limit=dt_limit)
    return _step(*tensors, *dt_limit)
