"""Rows that are sampled and the records of them that kernels leave to each other; what becomes of a row's records."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Sampling
from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, run
from ..runtime.structs import odd
from .lang import Listed, Look, Settings, Store, combine


@triton.jit(do_not_specialize=["N"])
def _combine_kernel(
    store,  # Store of the records
    listed,  # Listed, or None: record n is of row n
    token_ptr,  # [rows]
    confidence_ptr,  # [rows]
    N,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    programmatic_launch()
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    to = row
    mask = row < N
    if listed is not None:
        mask = row < tl.load(listed.count)
        to = tl.load(listed.index + row, mask=mask, other=0)
    token, confidence = combine(store, row, mask, False, BLOCK_S)
    tl.store(token_ptr + to, token.to(token_ptr.dtype.element_ty), mask=mask)
    tl.store(confidence_ptr + to, confidence.to(confidence_ptr.dtype.element_ty), mask=mask)


def combine_launch(parts: int, depth: int = 1) -> Launch:
    """Some 1024 records a program, eight a thread, or fewer: rows by powers of two."""
    block = triton.next_power_of_2(max(parts, 1))
    return Launch(BLOCK_R=max(1, 1024 // (block * triton.next_power_of_2(depth))), BLOCK_S=block)


@dataclass(frozen=True)
class Rows:
    """N rows to sample, or those of them that are listed: how many only the device knows."""

    sampling: Sampling  # [N / L], side by side in memory
    N: int
    L: int = 1
    listed: Listed | None = None
    look: Look | None = None  # what strategies look at
    by_row: bool = False  # whether logits in memory are those of all rows, not of the records
    shift: bool = False  # whether each row's logits are those of the row before it in its sequence

    @classmethod
    def of(
        cls,
        settings: Sequence[Tensor | None],
        L: int = 1,
        listed: Listed | None = None,
        look: Look | None = None,
        by_row: bool = False,
        shift: bool = False,
    ) -> "Rows":
        vectors = Sampling(*(None if t is None else t.reshape(-1).contiguous() for t in settings))  # type: ignore[arg-type]
        return cls(vectors, vectors.seed.numel() * L, L, listed, look, by_row, shift and L > 1)

    @property
    def settings(self) -> Settings:
        """What kernels read of them."""
        s = self.sampling
        return Settings(s.temperature, s.seed, s.position, s.step, None if self.L == 1 else odd(self.L))


PLANES = 4  # of Store.stats: m, s, best, raw


def new_records(rows: Rows, pieces: int, like: Tensor, dtype: torch.dtype, depth: int = 1) -> Store:
    """Memory for one record of each row and each piece of the vocabulary."""
    N = rows.N
    parts = triton.cdiv(pieces, depth)
    stats = like.new_empty(PLANES, N, depth, parts, dtype=dtype)
    tokens = like.new_empty(N, depth, parts, dtype=torch.int32)
    more = stats if rows.look is None else like.new_empty(2, N, depth, parts, dtype=dtype)
    return Store(stats, tokens, pieces, depth, parts, tokens.numel(), more)


def combine_records(records: Store, rows: Rows, token: Tensor, confidence: Tensor) -> None:
    """Write tokens and confidences [N]; of listed rows only theirs."""
    launch = combine_launch(records.parts, records.depth)
    run(
        _combine_kernel,
        (triton.cdiv(rows.N, launch.BLOCK_R),),
        *(records, rows.listed, token, confidence, rows.N),
        launch=launch,
    )
