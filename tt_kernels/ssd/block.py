"""The scan of a short block from a seeded state, and the state after the first tokens of it.

For every head h of size P, its group g sharing B and C, and time step dt' = clamp(softplus(dt + dt_bias), dt_limit):

    state_t = exp(dt'_t A_h) state_{t-1} + dt'_t x_t B_t^T        [P, N]
    y_t     = state_t C_t + D_h x_t                               [P]
"""

import math

import torch
from torch import Tensor

from .. import reference
from ..core import Op, check, is_real, refuse, takes_kernel, wants_gradients
from ..launch import Launch
from .block_kernels import ssd_advance_forward, ssd_block_forward


def check_groups(op: str, x: Tensor, B: Tensor) -> None:
    H, G = x.shape[2], B.shape[2]
    if G < 1 or H % G:
        raise ValueError(f"{op}: B has G={G} groups, expected a divisor of H={H}, the heads of x")


def check_limit(op: str, dt_limit: tuple[float, float]) -> None:
    pair = isinstance(dt_limit, tuple | list) and len(dt_limit) == 2
    low, high = dt_limit if pair else (None, None)
    if not (is_real(low) and (high == math.inf or is_real(high)) and 0 <= low <= high):
        refuse(op, "dt_limit", dt_limit, "(low, high) with 0 <= low <= high, low finite")


def ssd_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Run a short block of tokens from a state, in matrix form; the state is only read.

    Args:
        x:        [b, L, H, P] float, any strides.
        dt:       [b, L, H] float, before bias and softplus.
        A:        [H] float, 0 or below, -inf too.
        B, C:     [b, L, G, N] float; head h belongs to group h // (H / G).
        D:        [H] float.
        dt_bias:  [H] float.
        state:    [b, H, P, N] float, fp32 in 16-bit models: the state before the block; None: zeros.
        dt_limit: (low, high), what the time step is clamped to; low is finite.
    Returns:
        y: [b, L, H, P] dtype of x.

    Computes in fp32 (fp64 where x or A is fp64) and rounds once; decays below e^-64 count as 0. Gradients for all
    tensors: where they are wanted the reference runs. Deterministic. A NaN stays in its row and heads, but reaches
    earlier tokens of the block too: a product takes 0 times NaN for NaN. Raises ValueError for sizes that disagree, G
    that does not divide H, a crossed dt_limit.
    Cost: 2 b L (L (G N + H P) + H P N) flops, (2 b L H P + 2 b L G N + b L H) itemsize + 4 b H P N bytes: bound by
    reading the state at L = 16. Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), sections 3 and 6.
    """
    check(
        "ssd_block",
        7,
        x=(x, "b L H P"),
        dt=(dt, "b L H"),
        A=(A, "H"),
        B=(B, "b L G N"),
        C=(C, "b L G N"),
        D=(D, "H"),
        dt_bias=(dt_bias, "H"),
        state=(state, "b H P N"),
    )
    check_groups("ssd_block", x, B)
    check_limit("ssd_block", dt_limit)
    tensors = (x, dt, A, B, C, D, dt_bias, state)
    if not takes_kernel("ssd_block", *tensors) or wants_gradients(*tensors):
        return reference.ssd_block(*tensors, dt_limit=dt_limit)
    return ssd_block_forward(*tensors, *dt_limit)


def ssd_advance(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The state after the first lengths[b] tokens of each row, in matrix form.

    Args:
        x:        [b, L, H, P] float, any strides.
        dt:       [b, L, H] float, before bias and softplus.
        A:        [H] float, 0 or below, -inf too.
        B:        [b, L, G, N] float.
        dt_bias:  [H] float.
        state:    [b, H, P, N] float: the state before the tokens; None: zeros. It is not changed.
        lengths:  [b] int, 0 to L, or None for all L; what lies past a row's length may be anything, NaN included.
                  Kernels cut other lengths to 0 or L, the reference refuses them where they are on a CPU.
        dt_limit: (low, high), what the time step is clamped to; low is finite.
    Returns:
        state: [b, H, P, N] fp32 (fp64 where x or A is fp64), contiguous, in new memory.

    Computes in the dtype of the result; decays below e^-64 count as 0. Gradients for all float tensors: where they are
    wanted the reference runs. Deterministic. Raises ValueError as `ssd_block` does. Cost: 2 b L H P N flops, b L (H P +
    G N + H) itemsize + 8 b H P N bytes: bound by reading and writing the state. Source: as `ssd_block`.
    """
    check(
        "ssd_advance",
        5,
        x=(x, "b L H P"),
        dt=(dt, "b L H"),
        A=(A, "H"),
        B=(B, "b L G N"),
        dt_bias=(dt_bias, "H"),
        state=(state, "b H P N"),
        lengths=(lengths, "b", int),
    )
    check_groups("ssd_advance", x, B)
    check_limit("ssd_advance", dt_limit)
    tensors = (x, dt, A, B, dt_bias, state)
    if not takes_kernel("ssd_advance", *tensors) or wants_gradients(*tensors):
        return reference.ssd_advance(*tensors, lengths, dt_limit=dt_limit)
    return ssd_advance_forward(*tensors, lengths, *dt_limit)


def scan_inputs(
    dtype: torch.dtype, b: int, L: int, H: int, P: int, G: int, N: int, seeded: int = 1
) -> dict[str, Tensor | None]:
    """Time steps from 1e-3 to 0.1 and A from -1 to -16, as Mamba-2 is initialised; a state far above the tokens."""
    wide = torch.promote_types(dtype, torch.float32)  # what a 16-bit model keeps in fp32
    step = torch.logspace(-3, -1, H, dtype=wide)
    return dict(
        x=torch.randn(b, L, H, P, dtype=dtype),
        dt=torch.randn(b, L, H, dtype=dtype),
        A=-torch.linspace(1, 16, H, dtype=wide),
        B=torch.randn(b, L, G, N, dtype=dtype),
        C=torch.randn(b, L, G, N, dtype=dtype),
        D=torch.randn(H, dtype=wide),
        dt_bias=step.expm1().log(),
        state=10 * torch.randn(b, H, P, N, dtype=wide) if seeded else None,
    )


def _advance_inputs(dtype: torch.dtype, ragged: int = 1, **dims: int) -> dict[str, Tensor | None]:
    inputs = scan_inputs(dtype, **dims)
    lengths = torch.randint(0, dims["L"] + 1, (dims["b"],)) if ragged else None
    return {k: v for k, v in inputs.items() if k not in ("C", "D")} | dict(lengths=lengths)


def _block_cost(itemsize: int, b: int, L: int, H: int, P: int, G: int, N: int, seeded: int = 1) -> tuple[int, int]:
    flops = 2 * b * L * (L * (G * N + H * P) + seeded * H * P * N)
    return flops, b * L * (2 * H * P + 2 * G * N + H) * itemsize + 4 * seeded * b * H * P * N


def _advance_cost(
    itemsize: int, b: int, L: int, H: int, P: int, G: int, N: int, seeded: int = 1, ragged: int = 1
) -> tuple[int, int]:
    return 2 * b * L * H * P * N, b * L * (H * P + G * N + H) * itemsize + 4 * (1 + seeded) * b * H * P * N


_CASES = (
    dict(b=2, L=5, H=4, P=3, G=2, N=5),
    dict(b=1, L=1, H=4, P=8, G=1, N=4),
    dict(b=1, L=16, H=3, P=4, G=3, N=8, seeded=0),
    dict(b=1, L=0, H=2, P=3, G=1, N=4),
    dict(b=0, L=3, H=2, P=3, G=1, N=4),
    dict(b=1, L=37, H=2, P=19, G=1, N=17),
    dict(b=1, L=70, H=1, P=4, G=1, N=8),
)

OPS = (
    Op(
        fn=ssd_block,
        reference=reference.ssd_block,
        inputs=scan_inputs,
        cases=_CASES,
        shapes=tuple(
            dict(b=b, L=L, H=64, P=64, G=8, N=128) for b, L in ((1, 16), (1, 1), (1, 64), (64, 16), (1, 32), (64, 64))
        ),
        grows=dict(b=64, L=64),
        outputs=("y",),
        grads=("x", "dt", "A", "B", "C", "D", "dt_bias", "state"),
        cost=_block_cost,
        kernels=("_ssd_block_kernel",),
        forward_only=True,
        candidates=dict(  # those with fewer tokens than the block give wrong results and drop out
            _ssd_block_kernel=tuple(
                Launch(BLOCK_T=t, BLOCK_P=p, BLOCK_N=128, num_warps=4, num_stages=1)
                for t in (16, 32)
                for p in (16, 32, 64)
            )
        ),
    ),
    Op(
        fn=ssd_advance,
        reference=reference.ssd_advance,
        inputs=_advance_inputs,
        cases=(*_CASES, dict(b=2, L=5, H=4, P=3, G=2, N=5, ragged=0)),
        shapes=tuple(
            dict(b=b, L=L, H=64, P=64, G=8, N=128, ragged=ragged)
            for b, L, ragged in ((1, 16, 0), (1, 1, 0), (1, 64, 1), (64, 16, 1), (1, 32, 1), (64, 64, 1))
        ),
        grows=dict(b=64, L=64),
        outputs=("state",),
        grads=("x", "dt", "A", "B", "dt_bias", "state"),
        cost=_advance_cost,
        kernels=("_ssd_advance_kernel",),
        forward_only=True,
        candidates=dict(
            _ssd_advance_kernel=tuple(
                Launch(BLOCK_T=t, BLOCK_P=p, BLOCK_N=128, num_warps=4, num_stages=1)
                for t in (16, 32)
                for p in (16, 32, 64)
            )
        ),
    ),
)
