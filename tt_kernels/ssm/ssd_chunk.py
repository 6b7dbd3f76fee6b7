"""The scan of long sequences, chunk by chunk, with the states at chunk boundaries: prefill and training."""

import math

from torch import Tensor

from .. import reference
from ..runtime.checks import check, is_whole, refuse
from ..runtime.registry import define, takes_kernel, wants_gradients
from .ssd_block import check_groups, check_limit
from .ssd_chunk_launch import _ssd_chunk, _ssd_chunk_fake


def ssd_chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    chunk_size: int | None = 64,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run long sequences: matrix form inside a chunk, a recurrence from chunk to chunk. `ssd_block` states the formula.

    Args:
        x:          [b, L, H, P] float, any strides.
        dt:         [b, L, H] float, before bias and softplus.
        A:          [H] float, 0 or below, -inf too.
        B, C:       [b, L, G, N] float; head h belongs to group h // (H / G).
        D:          [H] float.
        dt_bias:    [H] float.
        state:      [b, H, P, N] float: the state before the first token; None: zeros. It is not changed.
        lengths:    [b] int, 0 to L, or None for all L: the row's last state is the one after lengths[b] tokens. What
                    lies past it in x, dt and B may be anything, NaN included, and y there means nothing. Kernels cut
                    other lengths to 0 or L, the reference refuses them where they are on a CPU.
        chunk_size: Q, tokens between the states that are returned: any number from 1 on (a tile of tokens lies in one
                    chunk: multiples of 64 fill tiles best). None: none of those, and none in memory; on their way
                    kernels keep at most 15 states a row, however long it is.
        dt_limit:   (low, high), what the time step is clamped to; low is finite.
        cu_seqlens: [sequences + 1] int, from 0, ascending, counted over the flattened b * L tokens: sequences packed in
                    x start from zeros, what lies behind the last entry is one more; not with a state. A row starts anew
                    in any case.
    Returns:
        y:      [b, L, H, P] dtype of x.
        state:  [b, H, P, N] fp32 (fp64 where x or A is fp64): after a row's last token (packed: of its last sequence).
        before: [b, max(1, ceil(L / Q)), H, P, N] dtype of state: before each chunk; zeros where a sequence starts.
                [b, 0, H, P, N] without a Q.

    The state after any other token, a packed sequence's last for one, is `ssd_advance` of the tokens from s on, where s
    is the later of its chunk's and its sequence's start: from before of that chunk, or from zeros where the sequence
    starts later.

    Computes in the dtype of the states and rounds y once; decays below e^-64 count as 0. Gradients for all float
    tensors: where they are wanted the reference runs. Deterministic; Q and b move results by rounding only.
    A NaN stays in its row and heads, but reaches earlier tokens of its chunk too, and packed sequences in and after it.
    Raises ValueError as `ssd_block` does, and for a state beside cu_seqlens. Cost: 2 b L (Q (G N + H P) + 2 H P N)
    flops (Q at most 64 without one), b L (2 H P + 2 G N + H) itemsize + 8 b H P N bytes, + 4 b (L / Q) H P N of states.
    Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), section 6; `mamba_chunk_scan_combined` of mamba_ssm.
    """
    check(
        "ssd_chunk",
        7,
        x=(x, "b L H P"),
        dt=(dt, "b L H"),
        A=(A, "H"),
        B=(B, "b L G N"),
        C=(C, "b L G N"),
        D=(D, "H"),
        dt_bias=(dt_bias, "H"),
        state=(state, "b H P N"),
        lengths=(lengths, "b", int),
        cu_seqlens=(cu_seqlens, "sequences+1", int),
    )
    check_groups("ssd_chunk", x, B)
    check_limit("ssd_chunk", dt_limit)
    if chunk_size is not None and (not is_whole(chunk_size) or chunk_size < 1):
        refuse("ssd_chunk", "chunk_size", chunk_size, "1 or more, or None")
    if state is not None and cu_seqlens is not None:
        refuse("ssd_chunk", "state", list(state.shape), "None beside cu_seqlens")
    tensors = (x, dt, A, B, C, D, dt_bias, state)
    if not takes_kernel("ssd_chunk", *tensors) or wants_gradients(*tensors):
        return reference.ssd_chunk(*tensors, lengths, chunk_size=chunk_size, dt_limit=dt_limit, cu_seqlens=cu_seqlens)
    return ssd_chunk_forward(*tensors, lengths, cu_seqlens, chunk_size, *dt_limit)


ssd_chunk_forward = define(
    "ssd_chunk(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, Tensor? state, "
    "Tensor? lengths, Tensor? cu_seqlens, SymInt? chunk_size, float low, float high) -> (Tensor, Tensor, Tensor)",
    _ssd_chunk,
    _ssd_chunk_fake,
)
