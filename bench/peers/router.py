"""Peer of the router: SGLang's moe_fused_gate, with the product before it. Its file is imported without the server."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Arguments, Call, Peer, bare_package, kernels_run, needs, only, stand_in


def sglang_gate(a: Arguments) -> Call:
    """Logits by cuBLAS in fp32, then their kernel. No sorted index lists, which ours makes too."""
    kernels_run(a.x, "SGLang's moe_fused_gate")
    only(a.scores == "sigmoid", "SGLang's moe_fused_gate: with sigmoids here")
    only(a.norm_topk_prob, "SGLang's moe_fused_gate: with normalised weights here")
    for name in ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.moe"):
        bare_package(name)
    stand_in("sglang.srt.utils.common", is_cuda=torch.cuda.is_available)  # the server's, with all that it imports
    gate = needs("sglang.kernels.ops.moe.moe_fused_gate", "sglang").moe_fused_gate
    options = dict(num_expert_group=a.n_group, topk_group=a.topk_group, scoring_func="sigmoid", renormalize=True)
    options |= dict(routed_scaling_factor=a.scale, apply_routed_scaling_factor_on_output=True)

    def call() -> tuple[Tensor, Tensor]:
        weights, ids = gate(a.x.float() @ a.weight.float().T, a.bias.float(), a.top_k, **options)
        return ids, weights

    return call


PEERS = {"route": (Peer("sglang", sglang_gate, outputs=("topk_ids", "topk_weights")),)}
