"""Causal depthwise convolution with a carried state: the convolution, and the states that it leaves behind.

A conv state is the last K raw (not yet activated) columns of x, oldest first, zeros where there were none: [B, C, K].
"""

import torch
from torch import Tensor

from . import reference
from .core import Op, check, refuse


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Convolve every channel with its own K taps over the token and the K - 1 before it, then activate.

    y[b, t, c] = act(bias[c] + sum_k weight[c, k] x[b, t - K + 1 + k, c]), the tokens before the first from the state.

    Args:
        x:          [B, L, C] float, any strides.
        weight:     [C, K] float; the last tap belongs to the token itself.
        bias:       [C] float or None.
        state:      [B, C, S] float, S >= K - 1: the columns before x, oldest first (the last K - 1 count); None: zeros.
        activation: "silu" or None.
        cu_seqlens: [sequences + 1] int, from 0, counted over the flattened B * L tokens: sequences packed in x start
                    from zeros and do not see each other; not with a state. A row starts anew in any case.
    Returns:
        y: [B, L, C] dtype of x.

    Computes in fp32 (fp64 where x or weight is fp64) and rounds once. Gradients for x, weight, bias and state.
    Deterministic. Raises ValueError for sizes that disagree, a state that is too short, a state beside cu_seqlens, an
    unknown activation. Cost: 2 K B L C flops, 2 B L C itemsize bytes, so bound by memory.
    Source: `causal_conv1d_fn` of causal-conv1d with initial_states.
    """
    check(
        "causal_conv1d",
        x=(x, "B L C"),
        weight=(weight, "C K"),
        bias=(bias, "C"),
        state=(state, "B C S"),
        cu_seqlens=(cu_seqlens, "sequences+1", int),
    )
    if activation not in ("silu", None):
        refuse("causal_conv1d", "activation", activation, "'silu' or None")
    if state is not None:
        if state.shape[-1] < weight.shape[-1] - 1:
            refuse("causal_conv1d", "state", list(state.shape), f"at least K-1={weight.shape[-1] - 1} columns")
        if cu_seqlens is not None:
            refuse("causal_conv1d", "state", list(state.shape), "None beside cu_seqlens")
    return reference.causal_conv1d(x, weight, bias, state, activation=activation, cu_seqlens=cu_seqlens)


def conv_state(x: Tensor, lengths: Tensor | None, state: Tensor | None, *, kernel_size: int) -> Tensor:
    """The conv state after the first lengths[b] tokens of each row.

    Args:
        x:           [B, L, C] float: raw columns.
        lengths:     [B] int, 0 to L, or None for all L; what lies past a row's length may be anything.
        state:       [B, C, K] float: the state before x; None: zeros.
        kernel_size: K.
    Returns:
        state: [B, C, K] dtype of x, contiguous, in new memory.

    Copies without arithmetic. Gradients for x and state. Raises ValueError for sizes that disagree.
    Cost: 2 B C K itemsize bytes (the reference also copies x). Source: `conv_state` of causal-conv1d's
    `causal_conv1d_update`, whose oldest column the next token does not read.
    """
    check("conv_state", x=(x, "B L C"), lengths=(lengths, "B", int), state=(state, "B C K"))
    if kernel_size < 1 or (state is not None and state.shape[-1] != kernel_size):
        refuse("conv_state", "kernel_size", kernel_size, "1 or more" if state is None else f"K={state.shape[-1]}")
    return reference.conv_state(x, lengths, state, kernel_size=kernel_size)


def conv_block_states(x: Tensor, *, block_size: int, kernel_size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The conv states before every block of whole sequences, as training needs them.

    Args:
        x:           [B, N, C] float: raw columns from the start of each row.
        block_size:  S, tokens of a block.
        kernel_size: K.
        cu_seqlens:  as in `causal_conv1d`.
    Returns:
        states: [B, ceil(N / S), C, K] dtype of x, laid out as [B, ceil(N / S), K, C].

    Copies without arithmetic. Gradients for x. Raises ValueError for sizes below 1.
    Cost: 2 B ceil(N / S) C K itemsize bytes.
    """
    check("conv_block_states", x=(x, "B N C"), cu_seqlens=(cu_seqlens, "sequences+1", int))
    for name, value in (("block_size", block_size), ("kernel_size", kernel_size)):
        if value < 1:
            refuse("conv_block_states", name, value, "1 or more")
    return reference.conv_block_states(x, block_size=block_size, kernel_size=kernel_size, cu_seqlens=cu_seqlens)


def _conv(
    dtype: torch.dtype, B: int, L: int, C: int, K: int, seeded: int = 1, packed: int = 0
) -> dict[str, Tensor | None]:
    return dict(
        x=torch.randn(B, L, C, dtype=dtype),
        weight=torch.randn(C, K, dtype=dtype),
        bias=torch.randn(C, dtype=dtype) if seeded else None,
        state=torch.randn(B, C, K, dtype=dtype) if seeded else None,
        cu_seqlens=torch.tensor([0, L // 3, B * L]) if packed else None,
    )


def _state(dtype: torch.dtype, B: int, L: int, C: int, K: int, ragged: int = 1) -> dict[str, object]:
    lengths = torch.randint(0, L + 1, (B,)) if ragged else None
    state = torch.randn(B, C, K, dtype=dtype) if ragged else None
    return dict(x=torch.randn(B, L, C, dtype=dtype), lengths=lengths, state=state, kernel_size=K)


def _block_states(dtype: torch.dtype, B: int, N: int, C: int, K: int, S: int, packed: int = 0) -> dict[str, object]:
    cu_seqlens = torch.tensor([0, S, B * N]) if packed else None
    return dict(x=torch.randn(B, N, C, dtype=dtype), block_size=S, kernel_size=K, cu_seqlens=cu_seqlens)


OPS = (
    Op(
        fn=causal_conv1d,
        reference=reference.causal_conv1d,
        inputs=_conv,
        cases=(
            dict(B=2, L=5, C=6, K=4),
            dict(B=1, L=1, C=29, K=4),
            dict(B=2, L=7, C=3, K=2, seeded=0),
            dict(B=1, L=12, C=3, K=4, seeded=0, packed=1),
            dict(B=2, L=0, C=3, K=4),
        ),
        shapes=(dict(B=1, L=16, C=6144, K=4), dict(B=1, L=4096, C=6144, K=4, seeded=0)),
        outputs=("y",),
        grads=("x", "weight", "bias", "state"),
        cost=lambda itemsize, B, L, C, K, seeded=1, packed=0: (2 * K * B * L * C, (2 * B * L * C + C * K) * itemsize),
    ),
    Op(
        fn=conv_state,
        reference=reference.conv_state,
        inputs=_state,
        cases=(dict(B=3, L=5, C=6, K=4), dict(B=2, L=2, C=29, K=4, ragged=0), dict(B=2, L=0, C=3, K=4)),
        shapes=(dict(B=1, L=16, C=6144, K=4),),
        outputs=("state",),
        grads=("x", "state"),
        cost=lambda itemsize, B, L, C, K, ragged=1: (0, 2 * B * C * K * itemsize),
    ),
    Op(
        fn=conv_block_states,
        reference=reference.conv_block_states,
        inputs=_block_states,
        cases=(
            dict(B=2, N=12, C=5, K=4, S=4),
            dict(B=1, N=7, C=3, K=4, S=2),
            dict(B=1, N=16, C=3, K=4, S=4, packed=1),
            dict(B=1, N=0, C=3, K=4, S=4),
        ),
        shapes=(dict(B=1, N=4096, C=6144, K=4, S=16),),
        outputs=("states",),
        grads=("x",),
        cost=lambda itemsize, B, N, C, K, S, packed=0: (0, 2 * B * -(-N // S) * C * K * itemsize),
    ),
)
