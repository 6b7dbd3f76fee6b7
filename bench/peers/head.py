"""Peers of the head: whole logits from cuBLAS with the rest compiled, and the fused losses of PyTorch, Apple and Liger.

Nobody publishes a fused head with confidence; what has to be beaten is the product and one compiled pass behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_kernels import Sampling, gumbel_noise

from .base import Peer, kernels_run, needs, only, prepared

Call = Callable[[], Any]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits of a product in the inputs' dtype."""
    if hidden.is_cuda and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden @ weight.T


def _choose(logits: Tensor, noise: Tensor | None, temperature: Tensor, suppress: int | None) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if suppress is not None:
        column = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(column == suppress, -math.inf)
    scores = logits
    if noise is not None:
        hot = (temperature > 0).unsqueeze(-1)
        scores = torch.where(hot, logits / torch.where(hot, temperature.unsqueeze(-1), 1) + noise, logits)
    token = scores.argmax(-1)
    chosen = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return token, (chosen - logits.logsumexp(-1)).exp()


def _noise(sampling: Sampling, V: int) -> Tensor | None:
    """Ours, as tokens must be ours, made before the clock: that favours the peer. None where all rows are greedy."""
    only(sampling.top_k is None and sampling.top_p is None, "without top_k and top_p only")
    hot = bool((sampling.temperature > 0).any())
    return gumbel_noise(sampling.seed, sampling.position, sampling.step, vocab_size=V).float() if hot else None


def whole_logits(hidden: Tensor, weight: Tensor, sampling: Sampling, *, suppress: int | None = None) -> Call:
    choose, noise = prepared(_choose, hidden), _noise(sampling, len(weight))
    return lambda: choose(_logits(hidden, weight), noise, sampling.temperature, suppress)


def logits_compiled(logits: Tensor, sampling: Sampling, *, suppress: int | None = None) -> Call:
    choose, noise = prepared(_choose, logits), _noise(sampling, logits.shape[-1])
    return lambda: choose(logits, noise, sampling.temperature, suppress)


# ---- the loss ----


def _ignored(targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Targets with -100 where the loss does not look, and how many are left."""
    if mask is None:
        return targets.flatten().long(), max(targets.numel(), 1)
    return targets.masked_fill(~mask, -100).flatten().long(), mask.sum().clamp(min=1)


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Call:
    fn = getattr(F, "linear_cross_entropy", None)
    only(fn is not None, f"torch {torch.__version__} has no F.linear_cross_entropy")
    assert fn is not None
    wanted, count = _ignored(targets, mask)
    return lambda: fn(hidden.flatten(0, -2), weight, wanted, reduction="sum") / count


def cut_loss(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Call:
    """Without its gradient filter, which drops small softmax entries: equal results are asked for."""
    kernels_run(hidden, "cut-cross-entropy")
    only(hidden.dtype.itemsize == 2, "cut-cross-entropy: 16-bit inputs only")
    fn = needs("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    wanted, count = _ignored(targets, mask)
    return lambda: fn(hidden.flatten(0, -2), weight, wanted, reduction="sum", filter_eps=None) / count


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Call:
    """It computes the gradients in its forward: compare the sum of both passes."""
    kernels_run(hidden, "liger-kernel")
    ops = needs("liger_kernel.transformers.functional", "liger-kernel")
    wanted, count = _ignored(targets, mask)
    fn = ops.liger_fused_linear_cross_entropy
    return lambda: fn(hidden.flatten(0, -2), weight, wanted, reduction="sum") / count


PEERS = {
    "head_sample": (Peer("logits", whole_logits),),
    "sample": (Peer("logits", logits_compiled),),
    "linear_cross_entropy": (
        Peer("F.linear_cross_entropy", torch_loss, backward=True),
        Peer("cut_cross_entropy", cut_loss, backward=True),
        Peer("liger", liger_loss, backward=True),
    ),
}
