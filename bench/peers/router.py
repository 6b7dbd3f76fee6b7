"""Peer of the router: SGLang's moe_fused_gate, with the product before it. Its file is imported without the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import Peer, bare_package, kernels_run, needs, only, stand_in


def _module() -> Any:
    for name in ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.moe"):
        bare_package(name)
    stand_in("sglang.srt.utils.common", is_cuda=torch.cuda.is_available)  # the server's, with all that it imports
    return needs("sglang.kernels.ops.moe.moe_fused_gate", "sglang")


def sglang_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> Callable[[], Any]:
    """Logits by cuBLAS in fp32, then their kernel. No sorted index lists, which ours makes too."""
    kernels_run(x, "SGLang's moe_fused_gate")
    only(norm_topk_prob, "SGLang's moe_fused_gate: with normalised weights here")
    gate = _module()

    def call() -> tuple[Tensor, Tensor]:
        logits = x.float() @ weight.float().T
        weights, ids = gate.moe_fused_gate(
            logits,
            bias.float(),
            top_k,
            scoring_func="sigmoid",
            renormalize=True,
            routed_scaling_factor=scale,
            apply_routed_scaling_factor_on_output=True,
            num_expert_group=n_group,
            topk_group=topk_group,
        )
        return ids, weights

    return call


PEERS = {"route": (Peer("sglang", sglang_gate, outputs=("topk_ids", "topk_weights")),)}
