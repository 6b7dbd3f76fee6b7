"""The scan of long sequences, chunk by chunk, with the states at chunk boundaries: prefill and training."""

import math

import torch
from torch import Tensor

from .. import reference
from ..core import Op, check, is_whole, refuse, takes_kernel, wants_gradients
from ..launch import Launch
from .block import check_groups, check_limit, scan_inputs
from .scan import ssd_chunk_forward


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
    With a chunk_size the number of chunks is a size of the result: an export with a dynamic L holds for one chunk or
    for several, as its example had.
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


def _inputs(dtype: torch.dtype, Q: int, packed: int = 0, ragged: int = 0, **dims: int) -> dict[str, object]:
    b, L = dims["b"], dims["L"]
    cu_seqlens = torch.tensor([0, L // 3, L // 2, b * L]) if packed else None
    lengths = torch.randint(0, L + 1, (b,)) if ragged else None
    return dict(**scan_inputs(dtype, **dims), lengths=lengths, chunk_size=Q or None, cu_seqlens=cu_seqlens)


def _cost(
    itemsize: int,
    b: int,
    L: int,
    H: int,
    P: int,
    G: int,
    N: int,
    Q: int,
    seeded: int = 1,
    packed: int = 0,
    ragged: int = 0,
) -> tuple[int, int]:
    flops = 2 * b * L * ((Q or 64) * (G * N + H * P) + 2 * H * P * N)
    states = 2 + -(-L // Q) if Q else 2
    return flops, b * L * (2 * H * P + 2 * G * N + H) * itemsize + 4 * b * states * H * P * N


OPS = (
    Op(
        fn=ssd_chunk,
        reference=reference.ssd_chunk,
        inputs=_inputs,
        cases=(
            dict(b=2, L=7, H=4, P=3, G=2, N=5, Q=4),
            dict(b=1, L=33, H=2, P=4, G=1, N=8, Q=8, seeded=0, packed=1),
            dict(b=2, L=7, H=2, P=4, G=2, N=8, Q=64, seeded=0),
            dict(b=1, L=0, H=2, P=3, G=1, N=4, Q=4),
            dict(b=0, L=5, H=2, P=3, G=1, N=4, Q=4),
            dict(b=2, L=100, H=2, P=17, G=1, N=8, Q=64, ragged=1),
            dict(b=1, L=90, H=2, P=4, G=1, N=8, Q=20, seeded=0, packed=1),
            dict(b=2, L=100, H=2, P=4, G=1, N=8, Q=0, ragged=1),
            dict(b=1, L=150, H=1, P=4, G=1, N=8, Q=70),
        ),
        shapes=(
            *(dict(b=1, L=L, H=64, P=64, G=8, N=128, Q=Q) for L in (4096, 8192) for Q in (64, 0)),
            dict(b=1, L=2048, H=64, P=64, G=8, N=128, Q=0),
            dict(b=1, L=8192, H=64, P=64, G=8, N=128, Q=16, seeded=0),
            dict(b=1, L=8192, H=64, P=64, G=8, N=128, Q=16, seeded=0, packed=1),
            dict(b=1, L=100, H=64, P=64, G=8, N=128, Q=0),
            dict(b=64, L=128, H=64, P=64, G=8, N=128, Q=0, ragged=1),
        ),
        grows=dict(b=64, L=1024),
        outputs=("y", "state", "before"),
        grads=("x", "dt", "A", "B", "C", "D", "dt_bias", "state"),
        cost=_cost,
        kernels=("_chunk_steps_kernel", "_chunk_states_kernel", "_chunk_scan_kernel"),
        forward_only=True,
        candidates=dict(
            _chunk_scan_kernel=tuple(
                Launch(BLOCK_T=t, BLOCK_U=u, BLOCK_P=p, BLOCK_N=128, STAGES=stages, num_warps=4, num_stages=1)
                for t, u, p, stages in (
                    (64, 32, 64, 1),
                    (64, 16, 64, 2),
                    (64, 32, 32, 1),
                    (16, 16, 32, 1),
                    (16, 16, 32, 2),
                )
            )
        ),
        tensor_cores={"_chunk_states_kernel": "BLOCK_N", "_chunk_scan_kernel": "BLOCK_T"},
    ),
)
