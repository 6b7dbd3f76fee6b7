"""What the kernels that sample share: settings of rows, a tile of logits folded into its rows' records, their sum.

A record says of one row and one part of the vocabulary: the largest logit m and s = sum(exp(logit - m)) for the
confidence, the best score (at a temperature above 0 with its noise), its token and that token's own logit. Records are
combined in the order of the vocabulary, so equal scores go to the lowest token and two runs are equal bit for bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import Launch, run
from .lang import combine

# ---- kernels ----


@triton.jit
def _combine_kernel(
    stats_ptr,  # [4, N, depth, parts]
    token_ptr,  # [N, depth, parts]
    rows_ptr,  # [N]: which row of the results each record is of
    count_ptr,  # [1]: how many records there are
    out_token_ptr,  # [N]
    confidence_ptr,  # [N]
    N,
    tiles,  # records a row: a last part may have fewer than depth
    depth,
    parts,
    plane,  # N * depth * parts
    COMPACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    to = row
    mask = row < N
    if COMPACT:
        mask = row < tl.load(count_ptr)
        to = tl.load(rows_ptr + row, mask=mask, other=0)
    token, confidence = combine(stats_ptr, token_ptr, row, mask, tiles, depth, parts, plane, BLOCK_S)
    tl.store(out_token_ptr + to, token.to(out_token_ptr.dtype.element_ty), mask=mask)
    tl.store(confidence_ptr + to, confidence.to(confidence_ptr.dtype.element_ty), mask=mask)


# ---- launches ----


def combine_launch(parts: int, depth: int = 1) -> Launch:
    """Some 1024 records a program, eight a thread, or fewer: rows by powers of two."""
    block = triton.next_power_of_2(max(parts, 1))
    rows = max(1, 1024 // (block * triton.next_power_of_2(depth)))
    return Launch(BLOCK_R=rows, BLOCK_S=block, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class Rows:
    """What is sampled: N rows by N / L settings of each kind; of them only `count` that `index` lists, where given."""

    settings: tuple[Tensor, ...]  # temperature, seed, position, step
    N: int
    L: int = 1
    index: Tensor | None = None  # [N]
    count: Tensor | None = None  # [1]: on the device, never read by the host

    @classmethod
    def of(cls, *settings: Tensor) -> "Rows":
        vectors = row_vectors(*settings)
        return cls(vectors, vectors[0].numel())


@dataclass(frozen=True)
class Records:
    """One record for each of `tiles` pieces of the vocabulary, piece t in slot [t % depth, t // depth]."""

    stats: Tensor  # [4, N, depth, parts]: m, s, best, raw
    tokens: Tensor  # [N, depth, parts]
    tiles: int

    @classmethod
    def new(cls, N: int, tiles: int, like: Tensor, dtype: torch.dtype, depth: int = 1) -> "Records":
        shape = (N, depth, triton.cdiv(tiles, depth))
        return cls(like.new_empty(4, *shape, dtype=dtype), like.new_empty(shape, dtype=torch.int32), tiles)

    @property
    def parts(self) -> int:
        return self.tokens.shape[2]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What `combine` is told: tiles, depth, parts, plane."""
        return self.tiles, self.tokens.shape[1], self.parts, self.tokens.numel()


def row_vectors(*settings: Tensor) -> tuple[Tensor, ...]:
    """One setting a row, side by side in memory."""
    return tuple(t.reshape(-1).contiguous() for t in settings)


def combine_records(records: Records, rows: Rows, token: Tensor, confidence: Tensor) -> None:
    """Write tokens and confidences [N]; of listed rows only theirs."""
    _, depth, parts, _ = records.sizes
    launch = combine_launch(parts, depth)
    run(
        _combine_kernel,
        (triton.cdiv(rows.N, launch.BLOCK_R),),
        *(records.stats, records.tokens, rows.index, rows.count, token, confidence, rows.N),
        *records.sizes,
        COMPACT=rows.index is not None,
        launch=launch,
    )
