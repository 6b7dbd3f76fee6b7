"""The scan of a short block from a seeded state, and the state after the first tokens of it.

For every head h of size P, its group g sharing B and C, and time step dt' = clamp(softplus(dt + dt_bias), dt_limit):

    state_t = exp(dt'_t A_h) state_{t-1} + dt'_t x_t B_t^T        [P, N]
    y_t     = state_t C_t + D_h x_t                               [P]
"""

import math

from torch import Tensor

from .. import reference
from ..runtime.checks import check, is_real, refuse
from ..runtime.registry import define, takes_kernel, wants_gradients
from .ssd_block_launch import _ssd_advance, _ssd_advance_fake, _ssd_block


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


ssd_block_forward = define(
    "ssd_block(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, Tensor? state, float low, "
    "float high) -> Tensor",
    _ssd_block,
    lambda x, *_: x.new_empty(x.shape),
)

ssd_advance_forward = define(
    "ssd_advance(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor dt_bias, Tensor? state, Tensor? lengths, float low, "
    "float high) -> Tensor",
    _ssd_advance,
    _ssd_advance_fake,
)
