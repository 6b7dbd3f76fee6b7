"""The scan of long sequences, chunk by chunk, with the states at chunk boundaries: prefill and training."""

import math
from typing import Any

from torch import Tensor

from .. import reference
from ..reference.ssd import SSDChunk
from ..runtime.checks import check, is_whole, refuse
from ..runtime.registry import define, takes_kernel, wants_gradients
from .ssd_block import check_scan
from .ssd_chunk_launch import _ssd_chunk, _ssd_chunk_fake


def ssd_chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> SSDChunk:
    """Run long sequences: matrix form inside a chunk, a recurrence from chunk to chunk. `ssd_block` states the formula.

    The state after any other token than a row's last, a packed sequence's last for one, is `ssd_advance` of the tokens
    from s on, where s is the later of its chunk's and its sequence's start: from the state before that chunk, or from
    zeros where the sequence starts later.

    Args:
        x:             [b, L, H, P] float, any strides.
        dt:            [b, L, H] float, before bias and softplus.
        A:             [H] float, 0 or below, -inf too.
        B, C:          [b, L, G, N] float; head h belongs to group h // (H / G).
        D:             [H] float.
        dt_bias:       [H] float.
        ssm_state:     [slots, H, P, N] float: rows start from the states in it, and their last ones are written to it;
                       None: they start from zeros, and their last states are a result.
        counts:        [b] int, 0 to L, or None for all L: the row's last state is the one after counts[b] tokens. The
                       others may be anything in x, dt and B, NaN included, and y there means nothing.
        state_indices: [b] int: the slot that each row reads; None: row b has slot b. Rows may read one together.
        out_indices:   [b] int: the slot that each row writes, all different, none of them read by another row; None:
                       the slot that it reads.
        cu_seqlens:    [sequences + 1] int, from 0, ascending, counted over the flattened b * L tokens: sequences packed
                       in x start from zeros, tokens behind the last entry are one more; not with a state. A row
                       starts anew in any case.
        chunk_size:    Q, tokens between the states that are returned: any number from 1 on (a tile of tokens lies in
                       one chunk: multiples of 64 fill tiles best). None: none of those, and none in memory; on their
                       way kernels keep at most 15 states a row, however long it is.
        dt_limit:      (low, high), what the time step is clamped to; low is finite.
    Returns:
        y:            [b, L, H, P] dtype of x.
        final_state:  [b, H, P, N] fp32 (fp64 where x or A is fp64): after a row's last token (packed: of its last
                      sequence). None where it was written to ssm_state.
        chunk_states: [b, max(1, ceil(L / Q)), H, P, N] fp32 or fp64: before each chunk; zeros where a sequence starts.
                      [b, 0, H, P, N] without a Q. Their number is a size of the result: an export with a dynamic L
                      holds for one chunk or for several, as its example had.

    Numerics: computes in fp32 (fp64 where x or A is fp64) and rounds y once; decays below e^-64 count as 0;
        deterministic; Q and b move results by rounding only. A NaN stays in its row and heads, but reaches earlier
        tokens of its chunk too, and packed sequences in and after it. Kernels cut counts to 0 and L and indices to the
        slots that exist; the reference refuses them where they are on a CPU.
    Gradients: of results, for all float tensors, the states read among them; where they are wanted the reference runs.
        What is written to ssm_state carries none.
    Raises: ValueError as `ssd_block` does, for a chunk_size below 1 and for a state beside cu_seqlens.
    Cost: 2 b L (Q (G N + H P) + 2 H P N) flops (Q at most 64 without one), b L (2 H P + 2 G N + H) itemsize +
        8 b H P N bytes, + 4 b (L / Q) H P N of states. More than four tiles of tokens copy ssm_state's rows once.
    Source: Dao and Gu, Transformers are SSMs (Mamba-2, 2024), section 6; `mamba_chunk_scan_combined` of mamba_ssm.

    Example:
        >>> x, (B, C), (A, D, dt_bias) = torch.randn(1, 200, 4, 8), torch.randn(2, 1, 200, 1, 16), -torch.rand(3, 4)
        >>> y, final_state, chunk_states = ssd_chunk(x, torch.rand(1, 200, 4), A, B, C, D, dt_bias, chunk_size=64)
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
        ssm_state=(ssm_state, "slots H P N"),
        counts=(counts, "b", int),
        state_indices=(state_indices, "b", int),
        out_indices=(out_indices, "b", int),
        cu_seqlens=(cu_seqlens, "sequences+1", int),
    )
    check_scan("ssd_chunk", x, B, ssm_state, state_indices, dt_limit)
    if chunk_size is not None and (not is_whole(chunk_size) or chunk_size < 1):
        refuse("ssd_chunk", "chunk_size", chunk_size, "1 or more, or None")
    if ssm_state is not None and cu_seqlens is not None:
        refuse("ssd_chunk", "ssm_state", list(ssm_state.shape), "None beside cu_seqlens")
    tensors = (x, dt, A, B, C, D, dt_bias, ssm_state)
    if not takes_kernel("ssd_chunk", *tensors) or wants_gradients(*tensors):
        places: dict[str, Any] = dict(
            counts=counts, state_indices=state_indices, out_indices=out_indices, cu_seqlens=cu_seqlens
        )
        return reference.ssd_chunk(*tensors, **places, chunk_size=chunk_size, dt_limit=dt_limit)
    y, final, states = _chunk(*tensors, counts, state_indices, out_indices, cu_seqlens, chunk_size, *dt_limit)
    return SSDChunk(y, final if ssm_state is None else None, states)


_chunk = define(_ssd_chunk, _ssd_chunk_fake, writes=("ssm_state",))
