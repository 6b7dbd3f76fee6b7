"""Forward of the experts: its launches in their order."""

from collections.abc import Sequence

import triton
from torch import Tensor

from ..runtime.checks import refuse
from ..runtime.launch import Launch, run
from .experts_kernels import _experts_combine_kernel
from .experts_launch import Pairs, by_owner, rows_down, rows_up
from .operands import operands


def rows_of_pairs(
    x: Tensor,
    topk_ids: Tensor,
    sorted_pairs: Tensor,
    offsets: Tensor,
    matrices: Sequence[Tensor | None],
    activation: str,
) -> tuple[Tensor, Tensor | None]:
    """What their experts make of all pairs, [T * K, D] in the order of topk_ids, and the shared one of all tokens."""
    weights, shared = by_owner(matrices)
    if len(sorted_pairs) != topk_ids.numel():  # callers that skip checks, and graphs, have not been checked
        refuse("experts", "sorted_pairs", list(sorted_pairs.shape), f"T*K={topk_ids.numel()} pairs")
    if len(offsets) != len(weights.up):
        refuse("experts", "offsets", list(offsets.shape), f"E={len(weights.up)} of them")
    x, pairs = x.contiguous(), Pairs(sorted_pairs.contiguous(), offsets.contiguous())
    h, shared_h = rows_up(x, pairs, weights, shared, activation)
    alone = None if shared is None or shared_h is None else operands(shared_h, shared.down, None)
    return rows_down(operands(h, weights.down, None), alone, pairs, x.shape[1])


def combine(
    pairs: Tensor,
    topk_ids: Tensor,
    y: Tensor,
    E: int,
    *,
    topk_weights: Tensor | None = None,
    shared: Tensor | None,
    shared_weight: Tensor | None = None,
) -> Tensor:
    """Writes the sum over a token's pairs to y: (K + 1) T D itemsize bytes read, T D written: at 16 tokens 0.7 MB."""
    T, D = y.shape
    # Eight elements a thread: 16-byte loads; several programs a token while tokens are few.
    block = min(triton.next_power_of_2(D), 1024)
    run(
        _experts_combine_kernel,
        (T, triton.cdiv(D, block)),
        *(pairs, topk_ids, topk_weights, shared, shared_weight, y, E, D),
        K=topk_ids.shape[1],
        launch=Launch(BLOCK_D=block, num_warps=max(block // 256, 1)),
    )
    return y


def _experts_fwd(
    x: Tensor,
    topk_weights: Tensor,
    shared_weight: Tensor | None,
    topk_ids: Tensor,
    sorted_pairs: Tensor,
    offsets: Tensor,
    matrices: Sequence[Tensor | None],
    activation: str,
) -> Tensor:
    rows, shared = rows_of_pairs(x, topk_ids, sorted_pairs, offsets, matrices, activation)
    y, factor = x.new_empty(x.shape), None if shared_weight is None else shared_weight.contiguous()
    weighted = dict(topk_weights=topk_weights.contiguous(), shared=shared, shared_weight=factor)
    return combine(rows, topk_ids.contiguous(), y, len(offsets), **weighted)
