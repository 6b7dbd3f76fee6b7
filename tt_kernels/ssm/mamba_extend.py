"""Mamba-2 over tokens that enter: outputs and both states, by the form that serves their number.

Many rows of up to 64 tokens take a launch for the convolution, with its states, and two for the scan. One for y and the
states together was compiled: the state beside the products of y takes 255 registers and more (it spills on sm_90 and
sm_100 even for 16 tokens), and a multiprocessor holds two programs where y alone has three and the states alone four.
By the compiled code it takes longer than both.
"""

import math

import torch
from torch import Tensor

from .. import reference
from ..conv1d.causal_conv1d import convolve
from ..conv1d.conv_states import conv_slots
from ..reference.mamba import SHORT, MambaState, MambaWeights, split_columns
from ..runtime.registry import define, takes_kernel, unasked
from .launch import arithmetic, ssm_slots
from .mamba_block import check_inputs
from .mamba_block_launch import in_one_wave, joined
from .mamba_step import mamba_step
from .ssd_block_launch import _ssd_advance, _ssd_block
from .ssd_chunk_launch import _ssd_chunk


def _mamba_extend(
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
    counts: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    b, L = xBC.shape[:2]
    with conv_slots(conv, b, conv_indices, conv_out_indices) as (columns, after_columns):
        constants = arithmetic(xBC, A, dt_limit=(low, high))
        tf32 = constants["PRECISION"] == "tf32x3" and not constants["SPLIT"]
        if in_one_wave(b * ssm.shape[1], L, tf32):
            with ssm_slots(ssm, ssm_indices, ssm_out_indices) as (before, after):
                tensors, states = (xBC, dt, conv_weight, conv_bias, A, D, dt_bias), (columns, before)
                return joined(*tensors, *states, after_columns, after, counts, dt_limit=(low, high))
        x, B, C = split_columns(convolve(xBC, conv_weight, conv_bias, columns, after_columns, counts), ssm)
    places = ssm_indices, ssm_out_indices
    if L > SHORT:
        return _ssd_chunk(x, dt, A, B, C, D, dt_bias, ssm, counts, *places, None, None, low, high)[0]
    y = _ssd_block(x, dt, A, B, C, D, dt_bias, ssm, ssm_indices, low, high)
    _ssd_advance(x, dt, A, B, dt_bias, ssm, counts, *places, low, high)
    return y


_extend = define(
    _mamba_extend,
    lambda xBC, dt, weight, bias, A, D, dt_bias, conv, ssm, *_: xBC.new_empty((*dt.shape, ssm.shape[2])),
    writes=("conv", "ssm"),
)


@unasked(reference.mamba_extend)
@torch.no_grad()
def mamba_extend(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    counts: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Run tokens from both states and move these on by the first counts[b] of each row: prefill, commits, decoding.

    | tokens | form |
    |---|---|
    | 1, all of them entering | `mamba_step`: one launch |
    | up to 16, of few rows, not fp16 | `mamba_block`, with the states: one launch, the state is read and written once |
    | up to 64 | `causal_conv1d`, with its states, `ssd_block`, `ssd_advance`: quadratic in L |
    | more | `causal_conv1d`, with its states, `ssd_chunk`: linear in L |

    Args:
        xBC:      [b, L, C] float, any strides, as in_proj leaves it: C = H P + 2 G N channels, of x, of B, of C.
        dt:       [b, L, H] float, before bias and softplus.
        weights:  MambaWeights: conv_weight [C, K], conv_bias [C] or None, A, D and dt_bias [H], floats.
        state:    MambaState, written: conv [slots, C, K] and ssm [slots, H, P, N] float, and the slots of both that
                  each row reads and writes, as `mamba_advance` takes them.
        counts:   [b] int, 0 to L, or None for all L. y of the other tokens means nothing where L is above 64.
        dt_limit: (low, high), what the time step is clamped to; low is finite.
    Returns:
        y: [b, L, H, P] dtype of xBC.

    Numerics: those of the form; forms agree to rounding. Tokens that do not enter do not reach the states, even where
        they are NaN; up to 64 tokens they reach y of the row, as in `mamba_block`.
    Gradients: none; `mamba_block` and `ssd_chunk` have them.
    Raises: ValueError as `mamba_block` does.
    Cost: 2 b L (min(L, 64) (G N + H P) + 2 H P N + K C) flops, (b L (C + H P + H) + (2 b + 1) K C) itemsize + 8 b H P N
        bytes: at L = 1 and 16 bound by reading and writing the state, which more than one launch reads twice.
    Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), sections 3, 6 and 8.

    Example:
        >>> weights = MambaWeights(torch.randn(64, 4), None, *-torch.rand(3, 4))
        >>> state = MambaState(torch.zeros(2, 64, 4), torch.zeros(2, 4, 8, 16))
        >>> y = mamba_extend(torch.randn(2, 16, 64), torch.rand(2, 16, 4), weights, state)
    """
    w, s = weights, state
    check_inputs("mamba_extend", xBC, dt, w, s, dt_limit, counts=counts)
    tensors = (xBC, dt, *w, s.conv, s.ssm)
    if not takes_kernel("mamba_extend", *tensors):
        return reference.mamba_extend(xBC, dt, w, s, counts, dt_limit=dt_limit)
    if xBC.shape[1] == 1 and counts is None:
        return mamba_step(xBC[:, 0], dt[:, 0], w, s, dt_limit=dt_limit).unsqueeze(1)
    return _extend(*tensors, *s[2:], counts, *dt_limit)
