"""Mamba-2 over tokens that enter: outputs and both states, by the form that serves their number."""

import math

import torch
from torch import Tensor

from .. import reference
from ..conv1d.causal_conv1d import causal_conv1d
from ..conv1d.conv_states import conv_advance
from ..reference.mamba import SHORT, MambaState, MambaWeights, split_columns
from ..runtime.registry import takes_kernel
from .mamba_block import check_inputs, mamba_advance, mamba_block
from .mamba_step import mamba_step
from .ssd_chunk import ssd_chunk


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
    | up to 64 | `mamba_block` and `mamba_advance`: quadratic in L, the state is read twice and written once |
    | more | `causal_conv1d`, `ssd_chunk`, `conv_advance`: linear in L |

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

    Numerics: those of the form; forms agree to rounding.
    Gradients: none; `mamba_block` and `ssd_chunk` have them.
    Raises: ValueError as `mamba_block` does.
    Cost: that of the form; at L = 1 and 16 bound by reading and writing the state.
    Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), sections 3, 6 and 8.

    Example:
        >>> weights = MambaWeights(torch.randn(64, 4), None, *-torch.rand(3, 4))
        >>> state = MambaState(torch.zeros(2, 64, 4), torch.zeros(2, 4, 8, 16))
        >>> y = mamba_extend(torch.randn(2, 16, 64), torch.rand(2, 16, 4), weights, state)
    """
    w, s = weights, state
    check_inputs("mamba_extend", xBC, dt, w, s, dt_limit, counts=counts)
    if not takes_kernel("mamba_extend", xBC, dt, *w, s.conv, s.ssm):
        return reference.mamba_extend(xBC, dt, w, s, counts, dt_limit=dt_limit)
    L = xBC.shape[1]
    if L == 1 and counts is None:
        return mamba_step(xBC[:, 0], dt[:, 0], w, s, dt_limit=dt_limit).unsqueeze(1)
    if L <= SHORT:
        y = mamba_block(xBC, dt, w, s, dt_limit=dt_limit)
        mamba_advance(xBC, dt, w, s, counts, dt_limit=dt_limit)
        return y
    columns = causal_conv1d(xBC, w.conv_weight, w.conv_bias, s.conv, state_indices=s.conv_indices)
    x, B, C = split_columns(columns, s.ssm)
    assert w.D is not None
    places = dict(state_indices=s.ssm_indices, out_indices=s.ssm_out_indices)
    y = ssd_chunk(
        x, dt, w.A, B, C, w.D, w.dt_bias, s.ssm, counts=counts, chunk_size=None, dt_limit=dt_limit, **places
    ).y
    conv_advance(xBC, s.conv, counts, state_indices=s.conv_indices, out_indices=s.conv_out_indices)
    return y
