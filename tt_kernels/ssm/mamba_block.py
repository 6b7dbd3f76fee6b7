"""Mamba-2 from the raw projection on, convolution and scan together: a block, the states after it."""

import math

from torch import Tensor

from .. import reference
from ..runtime.checks import check, refuse
from ..runtime.registry import define, takes_kernel, wants_gradients
from .mamba_block_launch import _mamba_advance, _mamba_advance_fake, _mamba_block, _mamba_block_fake
from .ssd_block import check_limit


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


mamba_block_forward = define(
    "mamba_block(Tensor xBC, Tensor dt, Tensor weight, Tensor? bias, Tensor A, Tensor D, Tensor dt_bias, "
    "Tensor conv_state, Tensor state, float low, float high) -> Tensor",
    _mamba_block,
    _mamba_block_fake,
)

mamba_advance_forward = define(
    "mamba_advance(Tensor xBC, Tensor dt, Tensor weight, Tensor? bias, Tensor A, Tensor dt_bias, Tensor conv_state, "
    "Tensor state, Tensor? lengths, float low, float high) -> (Tensor, Tensor)",
    _mamba_advance,
    _mamba_advance_fake,
)
