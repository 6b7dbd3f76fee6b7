"""The scan of a short block from carried states, and the states after the first tokens of it.

For every head h of size P, its group g sharing B and C, and time step dt' = clamp(softplus(dt + dt_bias), dt_limit):

    state_t = exp(dt'_t A_h) state_{t-1} + dt'_t x_t B_t^T        [P, N]
    y_t     = state_t C_t + D_h x_t                               [P]
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..runtime.checks import check, is_real, refuse
from ..runtime.registry import define, takes_kernel, wants_gradients
from ..runtime.slots import check_room
from .ssd_block_launch import _ssd_advance, _ssd_block


def check_limit(op: str, dt_limit: tuple[float, float]) -> None:
    pair = isinstance(dt_limit, tuple | list) and len(dt_limit) == 2
    low, high = dt_limit if pair else (math.nan, math.nan)
    if not (is_real(low) and (high == math.inf or is_real(high)) and 0 <= low <= high):
        refuse(op, "dt_limit", dt_limit, "(low, high) with 0 <= low <= high, low finite")


def check_scan(
    op: str, x: Tensor, B: Tensor, state: Tensor | None, indices: Tensor | None, dt_limit: tuple[float, float]
) -> None:
    """What `check` does not see."""
    check_room(op, "ssm_state", state, x.shape[0], indices)
    H, G = x.shape[-2], B.shape[-2]
    if G < 1 or H % G:
        raise ValueError(f"{op}: B has G={G} groups, expected a divisor of H={H}, the heads of x")
    check_limit(op, dt_limit)


def ssd_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Run a short block of tokens from a state, in matrix form; the state is only read. `ssd_advance` moves it on.

    Args:
        x:             [b, L, H, P] float, any strides.
        dt:            [b, L, H] float, before bias and softplus.
        A:             [H] float, 0 or below, -inf too.
        B, C:          [b, L, G, N] float; head h belongs to group h // (H / G).
        D:             [H] float.
        dt_bias:       [H] float.
        ssm_state:     [slots, H, P, N] float, fp32 in 16-bit models: states before the block; None: zeros.
        state_indices: [b] int: the slot that each row reads; None: row b has slot b.
        dt_limit:      (low, high), what the time step is clamped to; low is finite.
    Returns:
        y: [b, L, H, P] dtype of x.

    Numerics: computes in fp32 (fp64 where x or A is fp64) and rounds once; decays below e^-64 count as 0;
        deterministic. A NaN stays in its row and heads, but reaches earlier tokens of the block too: a product takes 0
        times NaN for NaN.
    Gradients: for all float tensors, the states among them; where they are wanted the reference runs.
    Raises: ValueError for sizes that disagree, G that does not divide H, fewer slots than rows without indices, a
        crossed dt_limit.
    Cost: 2 b L (L (G N + H P) + H P N) flops, (2 b L H P + 2 b L G N + b L H) itemsize + 4 b H P N bytes: bound by
        reading the state at L = 16.
    Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), sections 3 and 6.

    Example:
        >>> x, B, C = torch.randn(1, 16, 4, 8), torch.randn(1, 16, 2, 5), torch.randn(1, 16, 2, 5)
        >>> y = ssd_block(x, torch.randn(1, 16, 4), -torch.ones(4), B, C, torch.ones(4), torch.zeros(4))
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
        ssm_state=(ssm_state, "slots H P N"),
        state_indices=(state_indices, "b", int),
    )
    check_scan("ssd_block", x, B, ssm_state, state_indices, dt_limit)
    tensors = (x, dt, A, B, C, D, dt_bias, ssm_state)
    if not takes_kernel("ssd_block", *tensors) or wants_gradients(*tensors):
        return reference.ssd_block(*tensors, state_indices=state_indices, dt_limit=dt_limit)
    return _block(*tensors, state_indices, *dt_limit)


@torch.no_grad()
def ssd_advance(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    counts: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> None:
    """Move states on by the first counts[b] tokens of each row, in place and in matrix form.

    Args:
        x:             [b, L, H, P] float, any strides.
        dt:            [b, L, H] float, before bias and softplus.
        A:             [H] float, 0 or below, -inf too.
        B:             [b, L, G, N] float; head h belongs to group h // (H / G).
        dt_bias:       [H] float.
        ssm_state:     [slots, H, P, N] float, fp32 in 16-bit models, written.
        counts:        [b] int, 0 to L, or None for all L. Tokens that do not enter may be anything, NaN included.
        state_indices: [b] int: the slot that each row reads; None: row b has slot b. Rows may read one together.
        out_indices:   [b] int: the slot that each row writes, all different, none of them read by another row; None:
                       the slot that it reads.
        dt_limit:      (low, high), what the time step is clamped to; low is finite.
    Returns:
        None.

    Numerics: computes in fp32 (fp64 where x or A is fp64) and rounds to the dtype of ssm_state; decays below e^-64
        count as 0; deterministic. Kernels cut counts to 0 and L and indices to the slots that exist; the reference
        refuses them where they are on a CPU.
    Gradients: none; what is written carries none.
    Raises: ValueError as `ssd_block` does.
    Cost: 2 b L H P N flops, b L (H P + G N + H) itemsize + 8 b H P N bytes: bound by reading and writing the state.
    Source: as `ssd_block`.

    Example:
        >>> x, B, (A, dt_bias) = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 1, 16), -torch.rand(2, 4)
        >>> pool = torch.zeros(3, 4, 8, 16)  # three slots
        >>> ssd_advance(x, torch.rand(1, 5, 4), A, B, dt_bias, pool, state_indices=torch.tensor([2]))
    """
    check(
        "ssd_advance",
        6,
        x=(x, "b L H P"),
        dt=(dt, "b L H"),
        A=(A, "H"),
        B=(B, "b L G N"),
        dt_bias=(dt_bias, "H"),
        ssm_state=(ssm_state, "slots H P N"),
        counts=(counts, "b", int),
        state_indices=(state_indices, "b", int),
        out_indices=(out_indices, "b", int),
    )
    check_scan("ssd_advance", x, B, ssm_state, state_indices, dt_limit)
    tensors = (x, dt, A, B, dt_bias, ssm_state)
    if takes_kernel("ssd_advance", *tensors):
        _advance(*tensors, counts, state_indices, out_indices, *dt_limit)
    else:
        places: dict[str, Any] = dict(state_indices=state_indices, out_indices=out_indices)
        reference.ssd_advance(*tensors, counts, **places, dt_limit=dt_limit)


_block = define(_ssd_block, lambda x, *_: x.new_empty(x.shape))

_advance = define(_ssd_advance, lambda *_: None, writes=("ssm_state",))
