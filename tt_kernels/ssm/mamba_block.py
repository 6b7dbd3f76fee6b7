"""Mamba-2 from the raw projection on, convolution and scan together: a block, and the states after it."""

import math

import torch
from torch import Tensor

from .. import reference
from ..reference.mamba import MambaState, MambaWeights
from ..runtime.checks import check, refuse
from ..runtime.registry import define, takes_kernel, unasked, wants_gradients
from ..runtime.slots import check_room
from .mamba_block_launch import _mamba_advance, _mamba_block
from .ssd_block import check_limit


def check_inputs(
    op: str,
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    dt_limit: tuple[float, float],
    *,
    tokens: str = "b L",
    counts: Tensor | None = None,
) -> None:
    w, s = weights, state
    check(
        op,
        7 if op == "mamba_advance" else 8,
        xBC=(xBC, f"{tokens} C"),
        dt=(dt, f"{tokens} H"),
        conv_weight=(w.conv_weight, "C K"),
        A=(w.A, "H"),
        dt_bias=(w.dt_bias, "H"),
        conv=(s.conv, "conv_slots C K"),
        ssm=(s.ssm, "ssm_slots H P N"),
        D=(w.D, "H"),
        conv_bias=(w.conv_bias, "C"),
        counts=(counts, "b", int),
        **{name: (getattr(s, name), "b", int) for name in MambaState._fields[2:]},
    )
    C, (H, P, N) = xBC.shape[-1], s.ssm.shape[1:]
    G, rest = divmod(C - H * P, max(1, 2 * N))
    if N < 1 or rest or G < 1 or H % G:
        refuse(op, "C", C, f"H*P + 2*G*N with H={H}, P={P}, N={N} of the state and a divisor G of H")
    check_room(op, "conv", s.conv, xBC.shape[0], s.conv_indices)
    check_room(op, "ssm", s.ssm, xBC.shape[0], s.ssm_indices)
    check_limit(op, dt_limit)


@unasked(reference.mamba_block)
def mamba_block(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Run a short block of tokens from both its states, which are only read: `causal_conv1d` with SiLU, then
    `ssd_block` on the x, B and C that come out, rounded in between as those ops by themselves do.

    Args:
        xBC:      [b, L, C] float, any strides, as in_proj leaves it: C = H P + 2 G N channels, of x, of B, of C; head h
                  belongs to group h // (H / G).
        dt:       [b, L, H] float, before bias and softplus.
        weights:  MambaWeights: conv_weight [C, K], conv_bias [C] or None, A, D and dt_bias [H], floats.
        state:    MambaState: conv [slots, C, K] float, the columns of xBC before the block (the last K - 1 count), ssm
                  [slots, H, P, N] float, fp32 in 16-bit models, and the slots of both that each row reads.
        dt_limit: (low, high), what the time step is clamped to; low is finite.
    Returns:
        y: [b, L, H, P] dtype of xBC.

    Numerics: computes in fp32 (fp64 where xBC or A is fp64); decays below e^-64 count as 0; deterministic. Kernels cut
        indices to the slots that exist; the reference refuses others where they are on a CPU.
    Gradients: for all float tensors, the states among them; where they are wanted the reference runs.
    Raises: ValueError for sizes that disagree, channels that are no H P + 2 G N with G a divisor of H, fewer slots than
        rows without indices, a crossed dt_limit.
    Cost: 2 b L (L (G N + H P) + H P N + K C) flops, (b L (C + H P + H) + (b + 1) K C) itemsize + 4 b H P N bytes: bound
        by reading the state at L = 16.
    Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), sections 3, 6 and 8.

    Example:
        >>> weights = MambaWeights(torch.randn(64, 4), None, *-torch.rand(3, 4))
        >>> state = MambaState(torch.zeros(2, 64, 4), torch.zeros(2, 4, 8, 16))
        >>> y = mamba_block(torch.randn(2, 16, 64), torch.rand(2, 16, 4), weights, state)
    """
    w, s = weights, state
    check_inputs("mamba_block", xBC, dt, w, s, dt_limit)
    tensors = (xBC, dt, *w, s.conv, s.ssm)
    if not takes_kernel("mamba_block", *tensors) or wants_gradients(*tensors):
        return reference.mamba_block(xBC, dt, w, s, dt_limit=dt_limit)
    return _block(*tensors, s.conv_indices, s.ssm_indices, *dt_limit)


@torch.no_grad()
def mamba_advance(
    xBC: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    state: MambaState,
    counts: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> None:
    """Move both states on by the first counts[b] tokens of each row, in place: `conv_advance`, and `ssd_advance` on the
    x and B that the convolution makes of xBC.

    Args:
        xBC:      [b, L, C] float, any strides: as `mamba_block` takes it.
        dt:       [b, L, H] float, before bias and softplus.
        weights:  MambaWeights, as `mamba_block` takes them; D is not needed.
        state:    MambaState, written: conv [slots, C, K] and ssm [slots, H, P, N] float, and the slots of both that
                  each row reads and writes. All that are written are different. A conv slot that is written must not be
                  read by this call; without conv_out_indices they are written beside and copied, which is slower. An
                  SSM slot that is written must not be read by another row.
        counts:   [b] int, 0 to L, or None for all L. Tokens that do not enter may be anything, NaN included.
        dt_limit: (low, high), what the time step is clamped to; low is finite.
    Returns:
        None.

    Numerics: computes in fp32 (fp64 where xBC or A is fp64) and rounds to the dtypes of the states; decays below e^-64
        count as 0; deterministic. Kernels cut counts to 0 and L and indices to the slots that exist; the reference
        refuses them where they are on a CPU.
    Gradients: none; what is written carries none.
    Raises: ValueError as `mamba_block` does.
    Cost: 2 b L (H P N + K (H P + G N)) flops, (b L (H P + G N + H) + (2 b + 1) K C) itemsize + 8 b H P N bytes: bound
        by reading and writing the state.
    Source: as `mamba_block`.

    Example:
        >>> weights = MambaWeights(torch.randn(64, 4), None, *-torch.rand(3, 4))
        >>> state = MambaState(torch.zeros(2, 64, 4), torch.zeros(2, 4, 8, 16))
        >>> mamba_advance(torch.randn(2, 16, 64), torch.rand(2, 16, 4), weights, state, counts=torch.tensor([16, 3]))
    """
    w, s = weights, state
    check_inputs("mamba_advance", xBC, dt, w, s, dt_limit, counts=counts)
    tensors = (xBC, dt, w.conv_weight, w.conv_bias, w.A, w.dt_bias, s.conv, s.ssm)
    if takes_kernel("mamba_advance", *tensors):
        _advance(*tensors, *s[2:], counts, *dt_limit)
    else:
        reference.mamba_advance(xBC, dt, w, s, counts, dt_limit=dt_limit)


_block = define(
    _mamba_block, lambda xBC, dt, weight, bias, A, D, dt_bias, conv, ssm, *_: xBC.new_empty((*dt.shape, ssm.shape[2]))
)

_advance = define(_mamba_advance, lambda *_: None, writes=("conv", "ssm"))
