"""Packed sequences, as kernels read them: for any cu_seqlens, and on the device, so that no length is waited for."""

import torch
from torch import Tensor

from ..reference.common import sequence_starts


def resets(cu_seqlens: Tensor | None, b: int, L: int) -> Tensor | None:
    """[b * L + 1] int8: 1 where a sequence starts. None for None."""
    return None if cu_seqlens is None else sequence_starts(cu_seqlens, b * L)


def begins(cu_seqlens: Tensor, B: int, N: int) -> Tensor:
    """[B, N] int32: where the sequence of each token begins in its row, at the token or before it."""
    tokens = torch.arange(N, device=cu_seqlens.device)
    starts = sequence_starts(cu_seqlens, B * N)[:-1].view(B, N)
    return (starts * tokens).cummax(1).values.int()
