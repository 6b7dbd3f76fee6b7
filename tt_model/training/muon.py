"""Muon: momentum whose direction is made orthogonal, for the matrices inside a tower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Five steps of x <- a x + b (x x^T) x + c (x x^T)^2 x bring every singular value near 1 (Jordan 2024, Muon).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1 (0.7 to 1.2): [..., M, N], fp32; 30 min(M, N)^2 max(M, N) or so
    operations each. A matrix of zeros stays."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum 0.95, made `orthogonal`, times 0.2 sqrt(max(M, N)): an update as large as AdamW's, so that
    both take the same learning rate and weight decay (Moonlight, arXiv 2502.16982). Stacked matrices [E, M, N] are made
    orthogonal one by one, which torch.optim.Muon refuses."""

    def __init__(self, parameters: Iterable[nn.Parameter | Tensor], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = cast(dict[str, Any], self.state[p])
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape[-2:]) ** 0.5 * group["lr"])
