"""The loss over masked positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import full_precision, head_logits

_NONE = -(2**63)  # no token is ignored


@full_precision
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return _in_a_graph(hidden, weight, targets, mask)
    if mask is not None:
        hidden, targets = hidden[mask], targets[mask]
    targets = targets.flatten()
    if targets.device.type == "cpu":  # a GPU is not waited for
        check_targets(targets, len(weight))
    logits = head_logits(hidden, weight).reshape(-1, len(weight))
    loss = F.cross_entropy(logits, targets.long(), reduction="sum", ignore_index=_NONE)
    return loss / max(len(targets), 1)


def _in_a_graph(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of all tokens, for the number of masked ones is no size there."""
    if mask is None:
        mask = torch.ones_like(targets, dtype=torch.bool)
    # Zeros for what is not to be read: NaN times a gradient of 0 is NaN.
    hidden, targets = torch.where(mask.unsqueeze(-1), hidden, 0), torch.where(mask, targets.long(), 0)
    logits = head_logits(hidden, weight)
    logits = logits.reshape(-1, weight.shape[0])
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=_NONE)
    return torch.where(mask.flatten(), losses, 0).sum() / mask.sum().clamp(min=1)


def check_targets(targets: Tensor, V: int) -> None:
    if not targets.numel():
        return
    low, high = (int(t) for t in targets.aminmax())
    if low < 0 or high >= V:
        wrong = low if low < 0 else high
        raise ValueError(f"linear_cross_entropy: targets has {wrong}, expected token ids below V={V}")
