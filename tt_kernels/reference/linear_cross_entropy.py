"""The loss over masked positions."""

import torch.nn.functional as F
from torch import Tensor

from .common import compute_dtype


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        hidden, targets = hidden[mask], targets[mask]
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits.to(compute_dtype(logits.dtype)), targets, reduction="sum")
    return loss / max(len(targets), 1)
