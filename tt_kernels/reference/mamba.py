"""Mamba-2 from the raw projection on: convolution and scan, from seeded states of both."""

import math

from torch import Tensor

from .common import check_lengths, full_precision
from .conv1d import causal_conv1d
from .conv1d import conv_state as _conv_state
from .ssd import ssd_advance, ssd_block, ssd_step


def _sizes(xBC: Tensor, state: Tensor) -> tuple[int, int, int, int]:
    """H, P, G, N: the channels are H P of x, G N of B, G N of C."""
    H, P, N = state.shape[1:]
    return H, P, (xBC.shape[-1] - H * P) // (2 * N), N


@full_precision
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
    (b, L), (H, P, G, N) = xBC.shape[:2], _sizes(xBC, state)
    x, B, C = causal_conv1d(xBC, weight, bias, conv_state).split_with_sizes([H * P, G * N, G * N], -1)
    x, B, C = x.view(b, L, H, P), B.view(b, L, G, N), C.view(b, L, G, N)  # unflatten is Python: five times as long
    return ssd_block(x, dt, A, B, C, D, dt_bias, state, dt_limit=dt_limit)


@full_precision
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
    (b, L), (H, P, G, N) = xBC.shape[:2], _sizes(xBC, state)
    check_lengths("mamba_advance", lengths, L)
    own = H * P + G * N  # C does not enter the state
    xB = causal_conv1d(xBC[..., :own], weight[:own], None if bias is None else bias[:own], conv_state[:, :own])
    x, B = xB.split_with_sizes([H * P, G * N], -1)
    new = ssd_advance(x.view(b, L, H, P), dt, A, B.view(b, L, G, N), dt_bias, state, lengths, dt_limit=dt_limit)
    return _conv_state(xBC, lengths, conv_state, kernel_size=weight.shape[1]), new


@full_precision
def mamba_step(
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
) -> tuple[Tensor, Tensor, Tensor]:
    b, (H, P, G, N) = xBC.shape[0], _sizes(xBC, state)
    xBC = xBC.unsqueeze(1)
    convolved = causal_conv1d(xBC, weight, bias, conv_state).squeeze(1)
    x, B, C = convolved.split_with_sizes([H * P, G * N, G * N], -1)
    x, B, C = x.view(b, H, P), B.view(b, G, N), C.view(b, G, N)
    y, new = ssd_step(x, dt, A, B, C, D, dt_bias, state, dt_limit=dt_limit)
    return y, _conv_state(xBC, None, conv_state, kernel_size=weight.shape[1]), new
