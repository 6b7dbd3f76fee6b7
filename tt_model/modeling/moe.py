"""Mixture of experts and the dense MLP. B batch, L tokens, D hidden, N expert width, E experts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tt_kernels import ExpertWeights, Modulated, experts, experts_norm, route

from ..config import TwoTowerConfig
from .linear import Linear
from .wide import Wide

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": lambda h: F.relu(h).square(), "silu": F.silu}


class MLP(nn.Module):
    """down(act(up(h))), act being relu^2 or SiLU."""

    def __init__(self, D: int, N: int, activation: str, *, bias: bool = False):
        super().__init__()
        self.activation = activation
        self.up_proj = Linear(D, N, bias=bias)
        self.down_proj = Linear(N, D, bias=bias)

    def forward(self, h_BLD: Tensor) -> Tensor:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(h_BLD)))


class Router(Wide):
    """Router weights, fp32 in a 16-bit model."""

    def __init__(self, E: int, D: int):
        super().__init__()
        self.weight = self.parameter(E, D)
        self.e_score_correction_bias = self.parameter(E)
        nn.init.zeros_(self.e_score_correction_bias)


class Experts(nn.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, E: int, N: int, D: int):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(E, N, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, N))


class MoE(nn.Module):
    """sum of w_k * expert_k(h) over the chosen experts, plus the shared expert."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = config
        D, E = config.hidden_size, config.n_routed_experts
        self.gate = Router(E, D)
        self.experts = Experts(E, config.moe_intermediate_size, D)
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = MLP(D, shared, config.mlp_hidden_act) if shared else None
        self.load: Tensor | None = None  # [E] tokens each expert got, counted while training balances them

    def forward(self, h_BLD: Tensor, x_BLD: Tensor | None = None, **opening: Any) -> Tensor | Modulated:
        """The branch. With the stream x that it is added to, and what opens the next layer: what `modulated_rms_norm`
        makes of all three, in one op that sums the branch where the norm reads it."""
        c = self.config
        h = h_BLD.flatten(0, 1)  # [T, D]
        routing = route(
            h,
            self.gate.weight,
            self.gate.e_score_correction_bias,
            top_k=c.num_experts_per_tok,
            n_group=c.n_group,
            topk_group=c.topk_group,
            norm_topk_prob=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )
        if self.load is not None:
            self.load += torch.bincount(routing.topk_ids.flatten(), minlength=len(self.load))
        stacked = ExpertWeights(self.experts.up_proj, self.experts.down_proj)
        shared = self.shared_experts  # without a bias: `TwoTowerConfig` refuses one beside experts
        folded = None if shared is None else ExpertWeights(shared.up_proj.weight, shared.down_proj.weight)
        given: dict[str, Any] = dict(shared=folded, activation=c.mlp_hidden_act)
        if x_BLD is None:
            return experts(h, routing, stacked, **given).view_as(h_BLD)
        return experts_norm(h, routing, stacked, x_BLD, opening.pop("weight"), **given, **opening)
