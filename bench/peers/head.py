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

from .base import Arguments, Call, Peer, kernels_run, needs, only, prepared


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
    below = logits - logits.amax(-1, keepdim=True)
    return token, below.gather(-1, token.unsqueeze(-1)).squeeze(-1).exp() / below.exp().sum(-1)


def _noise(sampling: Sampling, V: int) -> Tensor | None:
    """Ours, as tokens must be ours, made before the clock: that favours the peer. None where all rows are greedy."""
    only(sampling.top_k is None and sampling.top_p is None, "without top_k and top_p only")
    hot = bool((sampling.temperature > 0).any())
    return gumbel_noise(sampling.seed, sampling.position, sampling.step, vocab_size=V).float() if hot else None


def whole_logits(a: Arguments) -> Call:
    choose, noise = prepared(_choose, a.hidden), _noise(a.sampling, len(a.weight))
    return lambda: choose(_logits(a.hidden, a.weight), noise, a.sampling.temperature, a.suppress)


def logits_compiled(a: Arguments) -> Call:
    choose, noise = prepared(_choose, a.logits), _noise(a.sampling, a.logits.shape[-1])
    return lambda: choose(a.logits, noise, a.sampling.temperature, a.suppress)


# ---- the loss ----


def _summed(a: Arguments, fn: Callable[..., Tensor], **options: Any) -> Call:
    """The sum by theirs over the number of targets: -100 is where the loss does not look."""
    if a.mask is None:
        targets, count = a.targets.flatten().long(), max(a.targets.numel(), 1)
    else:
        targets, count = a.targets.masked_fill(~a.mask, -100).flatten().long(), a.mask.sum().clamp(min=1)
    return lambda: fn(a.hidden.flatten(0, -2), a.weight, targets, reduction="sum", **options) / count


def torch_loss(a: Arguments) -> Call:
    only(hasattr(F, "linear_cross_entropy"), f"torch {torch.__version__} has no F.linear_cross_entropy")
    return _summed(a, F.linear_cross_entropy)


def cut_loss(a: Arguments) -> Call:
    """Without its gradient filter, which drops small softmax entries: equal results are asked for."""
    kernels_run(a.hidden, "cut-cross-entropy")
    only(a.hidden.dtype.itemsize == 2, "cut-cross-entropy: 16-bit inputs only")
    return _summed(a, needs("cut_cross_entropy").linear_cross_entropy, filter_eps=None)


def liger_loss(a: Arguments) -> Call:
    """It computes the gradients in its forward: compare the sum of both passes."""
    kernels_run(a.hidden, "liger-kernel")
    return _summed(a, needs("liger_kernel.transformers.functional", "liger-kernel").liger_fused_linear_cross_entropy)


PEERS = {
    "head_sample": (Peer("logits", whole_logits),),
    "sample": (Peer("logits", logits_compiled),),
    "linear_cross_entropy": (
        Peer("F.linear_cross_entropy", torch_loss, backward=True),
        Peer("cut_cross_entropy", cut_loss, backward=True),
        Peer("liger", liger_loss, backward=True),
    ),
}
