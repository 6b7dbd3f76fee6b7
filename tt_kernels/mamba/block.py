"""Mamba-2 from the raw projection on, convolution and scan together: a block, the states after it."""

import math

import torch
from torch import Tensor

from .. import reference
from ..core import Op, check, refuse, takes_kernel, wants_gradients
from ..launch import Launch
from ..ssd.block import check_limit, scan_inputs
from .kernels import mamba_advance_forward, mamba_block_forward


def check_channels(op: str, xBC: Tensor, state: Tensor) -> None:
    C, (H, P, N) = xBC.shape[-1], state.shape[1:]
    G, rest = divmod(C - H * P, max(1, 2 * N))
    if N < 1 or rest or G < 1 or H % G:
        refuse(op, "C", C, f"H*P + 2*G*N with H={H}, P={P}, N={N} of the state and a divisor G of H")


def check_inputs(
    op: str,
    dt_limit: tuple[float, float],
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *,
    lengths: Tensor | None = None,
    tokens: str = "b L",
) -> None:
    check(
        op,
        7 if op == "mamba_advance" else 8,
        xBC=(xBC, f"{tokens} C"),
        dt=(dt, f"{tokens} H"),
        weight=(weight, "C K"),
        A=(A, "H"),
        dt_bias=(dt_bias, "H"),
        conv_state=(conv_state, "b C K"),
        state=(state, "b H P N"),
        D=(D, "H"),
        bias=(bias, "C"),
        lengths=(lengths, "b", int),
    )
    check_channels(op, xBC, state)
    check_limit(op, dt_limit)


def mamba_block(
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
) -> Tensor:
    """Run a short block of tokens from both its states, which are only read: `causal_conv1d` with SiLU, then
    `ssd_block` on the x, B and C that come out, rounded in between as those ops by themselves do.

    Args:
        xBC:        [b, L, C] float, any strides, as in_proj leaves it: C = H P + 2 G N channels, of x, of B, of C; head
                    h belongs to group h // (H / G).
        dt:         [b, L, H] float, before bias and softplus.
        weight:     [C, K] float; the last tap belongs to the token itself.
        bias:       [C] float or None.
        A:          [H] float, 0 or below, -inf too.
        D:          [H] float.
        dt_bias:    [H] float.
        conv_state: [b, C, K] float: the columns of xBC before the block, oldest first; the last K - 1 count.
        state:      [b, H, P, N] float, fp32 in 16-bit models: the state before the block.
        dt_limit:   (low, high), what the time step is clamped to; low is finite.
    Returns:
        y: [b, L, H, P] dtype of xBC.

    Computes in fp32 (fp64 where xBC or A is fp64); decays below e^-64 count as 0. Gradients for all tensors: where they
    are wanted the reference runs. Deterministic. Raises ValueError for sizes that disagree, channels that are no
    H P + 2 G N with G a divisor of H, a crossed dt_limit.
    Cost: 2 b L (L (G N + H P) + H P N + K C) flops, (b L (C + H P + H) + (b + 1) K C) itemsize + 4 b H P N bytes: bound
    by reading the state at L = 16. Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), sections 3, 6 and 8.
    """
    tensors = (xBC, dt, weight, bias, A, D, dt_bias, conv_state, state)
    check_inputs("mamba_block", dt_limit, *tensors)
    if not takes_kernel("mamba_block", *tensors) or wants_gradients(*tensors):
        return reference.mamba_block(*tensors, dt_limit=dt_limit)
    return mamba_block_forward(*tensors, *dt_limit)


def mamba_advance(
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    lengths: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Both states after the first lengths[b] tokens of each row: `conv_state`, and `ssd_advance` on the x and B that
    the convolution makes of xBC.

    Args:
        xBC:        [b, L, C] float, any strides: as `mamba_block` takes it.
        dt:         [b, L, H] float, before bias and softplus.
        weight:     [C, K] float; the last tap belongs to the token itself.
        bias:       [C] float or None.
        A:          [H] float, 0 or below, -inf too.
        dt_bias:    [H] float.
        conv_state: [b, C, K] float: the columns of xBC before the tokens, oldest first. It is not changed.
        state:      [b, H, P, N] float: the state before the tokens. It is not changed.
        lengths:    [b] int, 0 to L, or None for all L; what lies past a row's length may be anything, NaN included.
                    Kernels cut other lengths to 0 or L, the reference refuses them where they are on a CPU.
        dt_limit:   (low, high), what the time step is clamped to; low is finite.
    Returns:
        conv_state: [b, C, K] dtype of xBC, contiguous, in new memory.
        state:      [b, H, P, N] fp32 (fp64 where xBC or A is fp64), contiguous, in new memory.

    Computes in the dtype of the new state; decays below e^-64 count as 0. Gradients for all float tensors: where they
    are wanted the reference runs. Deterministic. Raises ValueError as `mamba_block` does.
    Cost: 2 b L (H P N + K (H P + G N)) flops, (b L (H P + G N + H) + (2 b + 1) K C) itemsize + 8 b H P N bytes: bound
    by reading and writing the state. Source: as `mamba_block`.
    """
    tensors = (xBC, dt, weight, bias, A, dt_bias, conv_state, state)
    check_inputs("mamba_advance", dt_limit, xBC, dt, weight, bias, A, None, dt_bias, conv_state, state, lengths=lengths)
    if not takes_kernel("mamba_advance", *tensors) or wants_gradients(*tensors):
        return reference.mamba_advance(*tensors, lengths, dt_limit=dt_limit)
    return mamba_advance_forward(*tensors, lengths, *dt_limit)


# ---- card ----


def mamba_inputs(
    dtype: torch.dtype, b: int, L: int, H: int, P: int, G: int, N: int, K: int, biased: int = 1
) -> dict[str, Tensor | None]:
    """Time steps, A and states as of `scan_inputs`; xBC and dt are views of one projection, behind a gate of H P."""
    scan, C = scan_inputs(dtype, b, L, H, P, G, N), H * P + 2 * G * N
    _, xBC, dt = torch.randn(b, L, H * P + C + H, dtype=dtype).split_with_sizes([H * P, C, H], -1)
    return dict(
        xBC=xBC,
        dt=dt,
        weight=torch.randn(C, K, dtype=dtype) / K**0.5,
        bias=torch.randn(C, dtype=dtype) if biased else None,
        **{name: scan[name] for name in ("A", "D", "dt_bias")},
        conv_state=torch.randn(b, C, K, dtype=dtype),
        state=scan["state"],
    )


def _block_cost(
    itemsize: int, b: int, L: int, H: int, P: int, G: int, N: int, K: int, biased: int = 1
) -> tuple[int, int]:
    C = H * P + 2 * G * N
    flops = 2 * b * L * (L * (G * N + H * P) + H * P * N + K * C)
    return flops, (b * L * (C + H * P + H) + (b + 1) * K * C) * itemsize + 4 * b * H * P * N


def _advance_inputs(dtype: torch.dtype, ragged: int = 1, **dims: int) -> dict[str, Tensor | None]:
    inputs = mamba_inputs(dtype, **dims)
    lengths = torch.randint(0, dims["L"] + 1, (dims["b"],)) if ragged else None
    return {k: v for k, v in inputs.items() if k != "D"} | dict(lengths=lengths)


def _advance_cost(
    itemsize: int, b: int, L: int, H: int, P: int, G: int, N: int, K: int, biased: int = 1, ragged: int = 1
) -> tuple[int, int]:
    C, own = H * P + 2 * G * N, H * P + G * N
    moved = (b * L * (own + H) + (2 * b + 1) * K * C) * itemsize + 8 * b * H * P * N
    return 2 * b * L * (H * P * N + K * own), moved


_CASES = (
    dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4),
    dict(b=1, L=1, H=4, P=8, G=1, N=4, K=4, biased=0),
    dict(b=1, L=16, H=3, P=4, G=3, N=8, K=3),
    dict(b=1, L=0, H=2, P=3, G=1, N=4, K=4),
    dict(b=0, L=3, H=2, P=3, G=1, N=4, K=4),
    dict(b=1, L=29, H=2, P=35, G=1, N=17, K=2),
    dict(b=1, L=37, H=2, P=4, G=1, N=8, K=4),
)

OPS = (
    Op(
        fn=mamba_block,
        reference=reference.mamba_block,
        inputs=mamba_inputs,
        cases=_CASES,
        shapes=tuple(
            dict(b=b, L=L, H=64, P=64, G=8, N=128, K=4)
            for b, L in ((1, 16), (1, 1), (1, 32), (1, 64), (64, 1), (64, 16), (64, 32), (64, 64))
        ),
        grows=dict(b=64, L=64),
        outputs=("y",),
        grads=("xBC", "dt", "weight", "bias", "A", "D", "dt_bias", "conv_state", "state"),
        cost=_block_cost,
        kernels=("_mamba_block_kernel", "_causal_conv1d_kernel", "_ssd_block_kernel"),
        forward_only=True,
        candidates=dict(  # those with fewer tokens than the block give wrong results and drop out
            _mamba_block_kernel=tuple(
                Launch(BLOCK_T=t, BLOCK_P=p, BLOCK_N=128, num_warps=warps, num_stages=1)
                for t, warps in ((16, 4), (16, 8), (32, 8))
                for p in (16, 32, 64)
            )
        ),
    ),
    Op(
        fn=mamba_advance,
        reference=reference.mamba_advance,
        inputs=_advance_inputs,
        cases=(*_CASES, dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4, ragged=0)),
        shapes=tuple(
            dict(b=b, L=L, H=64, P=64, G=8, N=128, K=4, ragged=ragged)
            for b, L, ragged in ((1, 16, 0), (1, 16, 1), (1, 1, 0), (1, 32, 1), (1, 64, 1), (64, 16, 1), (64, 64, 1))
        ),
        grows=dict(b=64, L=64),
        outputs=("conv_state", "state"),
        grads=("xBC", "dt", "weight", "bias", "A", "dt_bias", "conv_state", "state"),
        cost=_advance_cost,
        kernels=("_mamba_advance_kernel", "_causal_conv1d_kernel", "_ssd_advance_kernel", "_conv_state_kernel"),
        forward_only=True,
        candidates=dict(
            _mamba_advance_kernel=tuple(
                Launch(BLOCK_T=t, BLOCK_P=p, BLOCK_N=128, num_warps=warps, num_stages=1)
                for t, warps in ((16, 4), (16, 8), (32, 8))
                for p in (16, 32)
            )
        ),
    ),
)
