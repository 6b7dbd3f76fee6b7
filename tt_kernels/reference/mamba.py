"""Mamba-2 from the raw projection on: convolution and scan, from states of both that lie in slots."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .common import cast, check_counts, compute_dtype, full_precision, without_gradients
from .conv1d import causal_conv1d, columns_after, conv_advance, convolved
from .slots import check_slots, read_slots, write_slots
from .ssd import ssd_advance, ssd_block, ssd_chunk, step

SHORT = 64  # tokens from which on the chunked scan takes less work than the quadratic form of a block


class MambaWeights(NamedTuple):
    """The parameters of a Mamba-2 mixer between its projections: C channels, K taps, H heads."""

    conv_weight: Tensor  # [C, K]; the last tap belongs to the token itself
    conv_bias: Tensor | None  # [C]
    A: Tensor  # [H], 0 or below, -inf too
    D: Tensor | None  # [H]; `mamba_advance` does without
    dt_bias: Tensor  # [H]


class MambaState(NamedTuple):
    """Two buffers of states, and for each of the B rows the slots that it reads and writes.

    Indices are [B] int32 or int64, as in vLLM and mamba_ssm. Read: None is slot b for row b. Written: None is the slot
    that is read. Rows may read one slot together (a fork); all write to different ones, and no row writes to a slot
    that another row reads. A conv slot that is written must not be read by the same call, unless conv_out_indices is
    None: other programs of the launch may still read it. None makes the op write beside and copy, which is slower.
    """

    conv: Tensor  # [slots, C, K]: the last K raw columns, oldest first
    ssm: Tensor  # [slots, H, P, N], fp32 in 16-bit models
    conv_indices: Tensor | None = None
    ssm_indices: Tensor | None = None
    conv_out_indices: Tensor | None = None
    ssm_out_indices: Tensor | None = None


def _check_places(op: str, s: MambaState) -> None:
    """Refuse all that is no slot before a state is written."""
    check_slots(op, s.conv, conv_indices=s.conv_indices, conv_out_indices=s.conv_out_indices)
    check_slots(op, s.ssm, ssm_indices=s.ssm_indices, ssm_out_indices=s.ssm_out_indices)


def split_columns(columns: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., H, P], B and C [..., G, N] of H P + 2 G N channels."""
    H, P, N = ssm.shape[1:]
    lead, GN = columns.shape[:-1], (columns.shape[-1] - H * P) // 2
    x, B, C = columns.split_with_sizes([H * P, GN, GN], -1)
    # unflatten is Python: five times as long
    return x.view(*lead, H, P), B.view(*lead, GN // N, N), C.view(*lead, GN // N, N)


@full_precision
def mamba_block(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    w, s = weights, state
    _check_places("mamba_block", s)
    columns = causal_conv1d(xBC, w.conv_weight, w.conv_bias, s.conv, state_indices=s.conv_indices)
    x, B, C = split_columns(columns, s.ssm)
    assert w.D is not None
    return ssd_block(x, dt, w.A, B, C, w.D, w.dt_bias, s.ssm, state_indices=s.ssm_indices, dt_limit=dt_limit)


@without_gradients
@full_precision
def mamba_advance(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    counts: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> None:
    (b, L), (H, P, N), (w, s) = xBC.shape[:2], state.ssm.shape[1:], (weights, state)
    check_counts("mamba_advance", counts, L)
    _check_places("mamba_advance", s)
    G = (xBC.shape[-1] - H * P) // (2 * N)
    own = H * P + G * N  # C does not enter the state
    bias = None if w.conv_bias is None else w.conv_bias[:own]
    xB = causal_conv1d(xBC[..., :own], w.conv_weight[:own], bias, s.conv[:, :own], state_indices=s.conv_indices)
    x, B = xB.split_with_sizes([H * P, G * N], -1)
    places = dict(state_indices=s.ssm_indices, out_indices=s.ssm_out_indices)
    x, B = x.view(b, L, H, P), B.view(b, L, G, N)
    ssd_advance(x, dt, w.A, B, w.dt_bias, s.ssm, counts, **places, dt_limit=dt_limit)
    conv_advance(xBC, s.conv, counts, state_indices=s.conv_indices, out_indices=s.conv_out_indices)


@without_gradients
@full_precision
def mamba_step(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    w, s = weights, state
    _check_places("mamba_step", s)
    acc = compute_dtype(xBC.dtype, w.conv_weight.dtype)
    # What the convolution sees is the state after the token.
    window = columns_after(xBC, cast(read_slots(s.conv, s.conv_indices, xBC.shape[0]), xBC.dtype))
    columns = F.silu(convolved(window, w.conv_weight, w.conv_bias, acc), inplace=True)
    x, B, C = split_columns(cast(columns, xBC.dtype), s.ssm)
    assert w.D is not None
    written = s.ssm_indices if s.ssm_out_indices is None else s.ssm_out_indices
    y = step(x, dt, w.A, B, C, w.D, w.dt_bias, s.ssm, s.ssm_indices, written, dt_limit)
    write_slots(s.conv, window, s.conv_indices if s.conv_out_indices is None else s.conv_out_indices)
    return y


@without_gradients
@full_precision
def mamba_extend(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    counts: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    w, s = weights, state
    if xBC.shape[1] == 1 and counts is None:
        return mamba_step(xBC[:, 0], dt[:, 0], w, s, dt_limit=dt_limit).unsqueeze(1)
    check_counts("mamba_extend", counts, xBC.shape[1])
    _check_places("mamba_extend", s)
    if xBC.shape[1] <= SHORT:
        y = mamba_block(xBC, dt, w, s, dt_limit=dt_limit)
        mamba_advance(xBC, dt, w, s, counts, dt_limit=dt_limit)
        return y
    columns = causal_conv1d(xBC, w.conv_weight, w.conv_bias, s.conv, state_indices=s.conv_indices)
    x, B, C = split_columns(columns, s.ssm)
    places = dict(state_indices=s.ssm_indices, out_indices=s.ssm_out_indices)
    assert w.D is not None
    y, *_ = ssd_chunk(
        x, dt, w.A, B, C, w.D, w.dt_bias, s.ssm, counts=counts, chunk_size=None, dt_limit=dt_limit, **places
    )
    conv_advance(xBC, s.conv, counts, state_indices=s.conv_indices, out_indices=s.conv_out_indices)
    return y
