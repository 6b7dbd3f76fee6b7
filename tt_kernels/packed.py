"""Packed sequences, as kernels read them."""

import torch
from torch import Tensor


def resets(cu_seqlens: Tensor | None, b: int, L: int) -> Tensor | None:
    """[b * L + 1] int8: 1 where a sequence starts. None for None."""
    if cu_seqlens is None:
        return None
    starts = torch.zeros(b * L + 1, dtype=torch.int8, device=cu_seqlens.device)
    return starts.index_fill_(0, cu_seqlens.long().clamp(0, b * L), 1)
