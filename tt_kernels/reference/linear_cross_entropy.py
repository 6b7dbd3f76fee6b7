"""The loss over masked positions."""

import torch.nn.functional as F
from torch import Tensor

from .common import full_precision, head_logits


@full_precision
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        hidden, targets = hidden[mask], targets[mask]
    targets = targets.flatten()
    loss = F.cross_entropy(head_logits(hidden, weight).flatten(0, -2), targets.long(), reduction="sum")
    return loss / max(len(targets), 1)
