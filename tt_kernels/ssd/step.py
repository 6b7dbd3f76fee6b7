"""The scan of one token: its output and the new state together, as autoregressive decoding needs them."""

import math

import torch
from torch import Tensor

from .. import reference
from ..core import Op, check, refuse
from .block import check_limit, scan_inputs


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
        A:        [H] float, 0 or below.
        B, C:     [b, G, N] float; head h belongs to group h // (H / G).
        D:        [H] float.
        dt_bias:  [H] float.
        state:    [b, H, P, N] float, fp32 in 16-bit models; it is not changed.
        dt_limit: (low, high), what the time step is clamped to.
    Returns:
        y:     [b, H, P] dtype of x.
        state: [b, H, P, N] fp32 (fp64 where x or A is fp64), in new memory.

    Computes in the dtype of the new state; decays below e^-64 count as 0. Gradients for all tensors. Deterministic.
    Raises ValueError for sizes that disagree, G that does not divide H, a crossed dt_limit. Cost: 6 b H P N flops,
    8 b H P N + (2 H P + 2 G N + H) b itemsize bytes: bound by reading and writing the state.
    Source: `selective_state_update` of mamba_ssm; Dao and Gu, Transformers are SSMs (Mamba-2, 2024).
    """
    check(
        "ssd_step",
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
    return reference.ssd_step(x, dt, A, B, C, D, dt_bias, state, dt_limit=dt_limit)


def _inputs(dtype: torch.dtype, b: int, H: int, P: int, G: int, N: int) -> dict[str, Tensor | None]:
    inputs = scan_inputs(dtype, b=b, L=1, H=H, P=P, G=G, N=N)
    return inputs | {name: inputs[name].squeeze(1) for name in ("x", "dt", "B", "C")}


def _cost(itemsize: int, b: int, H: int, P: int, G: int, N: int) -> tuple[int, int]:
    return 6 * b * H * P * N, 8 * b * H * P * N + b * (2 * H * P + 2 * G * N + H) * itemsize


OPS = (
    Op(
        fn=ssd_step,
        reference=reference.ssd_step,
        inputs=_inputs,
        cases=(dict(b=2, H=4, P=3, G=2, N=5), dict(b=1, H=3, P=8, G=1, N=4), dict(b=0, H=2, P=3, G=1, N=4)),
        shapes=(dict(b=1, H=64, P=64, G=8, N=128), dict(b=64, H=64, P=64, G=8, N=128)),
        outputs=("y", "state"),
        grads=("x", "dt", "A", "B", "C", "D", "dt_bias", "state"),
        cost=_cost,
    ),
)
