"""What several references share: the dtype of sums, packed sequences."""

import torch
from torch import Tensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: fp32, or fp64 where an input is fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def sequence_index(cu_seqlens: Tensor, B: int, L: int) -> Tensor:
    """Which packed sequence each token belongs to: [B, L] int64. cu_seqlens counts over the flattened B*L tokens."""
    tokens = torch.arange(B * L, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), tokens, right=True).view(B, L)
