"""Peers of the experts: F.grouped_mm, vLLM's fused_moe, triton_kernels. The shared expert is two cuBLAS products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_kernels import experts, modulated_rms_norm
from tt_kernels.reference.moe import ACTIVATIONS

from .base import Arguments, Call, Peer, Unavailable, needs, on_gpu, only


def _activate(h: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    fn = ACTIVATIONS[activation]
    return fn(h) if gate is None else fn(gate) * h


def _with_shared(a: Arguments, routed: Callable[[], Tensor]) -> Call:
    shared = a.shared
    if shared is None:
        return routed

    def call() -> Tensor:
        gate = None if shared.gate is None else F.linear(a.x, shared.gate)
        alone = F.linear(_activate(F.linear(a.x, shared.up), gate, a.activation), shared.down)
        return routed() + (alone if a.shared_weight is None else a.shared_weight[:, None] * alone)

    return call


def grouped_mm(a: Arguments) -> Call:
    """Rows gathered by expert, F.grouped_mm twice, and a weighted sum: what one writes with PyTorch alone."""
    ids, topk_weights, order, ends = a.routing
    x, w, (T, K), E = a.x, a.weights, ids.shape, len(a.weights.up)
    strides = (x.stride(0), w.up.stride(1), w.down.stride(1))
    only(all(s * x.element_size() % 16 == 0 for s in strides), "F.grouped_mm: rows of whole 16 bytes only")
    only(not x.is_cuda or x.dtype == torch.bfloat16, "F.grouped_mm: bf16 only on a GPU")
    if order is None or ends is None:  # the router's work: before the clock, as it is for us
        pairs, order = ids.flatten().sort(stable=True)
        ends = torch.bincount(pairs, minlength=E).cumsum(0, dtype=torch.int32)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    def routed() -> Tensor:
        rows = x.index_select(0, order // K)
        h = _activate(product(rows, w.up), None if w.gate is None else product(rows, w.gate), a.activation)
        y = product(h, w.down)
        y = torch.empty_like(y).index_copy_(0, order, y).view(T, K, w.down.shape[1])
        return (topk_weights.unsqueeze(1) @ y.to(topk_weights.dtype)).squeeze(1).to(x.dtype)

    return _with_shared(a, routed)


def vllm_fused_moe(a: Arguments) -> Call:
    """It sorts by itself."""
    on_gpu(a.x, "vLLM's fused_moe")
    fused = needs("vllm.model_executor.layers.fused_moe.fused_moe", "vllm")
    names = needs("vllm.model_executor.layers.fused_moe.activation", "vllm")
    w, gated = a.weights, a.weights.gate is not None
    only(gated == (a.activation == "silu"), "vLLM's fused_moe: relu2 without a gate, silu with one")
    kind = names.MoEActivation.SILU if gated else names.MoEActivation.RELU2_NO_MUL
    up = torch.cat([w.gate, w.up], 1) if gated else w.up
    ids, topk_weights = a.routing.topk_ids.int(), a.routing.topk_weights.float()
    return _with_shared(a, lambda: fused.fused_experts(a.x, up, w.down, topk_weights, ids, activation=kind))


def triton_kernels(a: Arguments) -> Call:
    """matmul_ogs twice, of vLLM's copy; its index lists are made from our ids before the clock, as ours are."""
    on_gpu(a.x, "triton_kernels")
    only(a.weights.gate is None, "triton_kernels: without a gate only")
    vllm = "vllm.model_executor.layers.fused_moe."
    try:
        makers = needs(f"{vllm}experts.gpt_oss_triton_kernels_moe", "vllm")
    except Unavailable:
        makers = needs(f"{vllm}gpt_oss_triton_kernels_moe", "vllm")
    ogs = needs("triton_kernels.matmul_ogs", "triton_kernels")  # vllm registers its copy under this name
    ids, topk_weights = a.routing.topk_ids.int(), a.routing.topk_weights.float()
    data, gather, scatter = makers.make_routing_data(ids, topk_weights, len(a.weights.up))
    up, down = a.weights.up.mT, a.weights.down.mT

    def routed() -> Tensor:
        h = _activate(ogs.matmul_ogs(a.x, up, None, data, gather_indx=gather), None, a.activation)
        return ogs.matmul_ogs(h, down, None, data, scatter_indx=scatter, gammas=data.gate_scal)

    return _with_shared(a, routed)


def apart(a: Arguments) -> Call:
    """Our own two ops, a launch more."""

    def both() -> Any:
        moe = dict(shared=a.shared, shared_weight=a.shared_weight, activation=a.activation)
        branch = experts(a.x, a.routing, a.weights, **moe).view(a.residual.shape)
        more = dict(branch=branch, gate=a.gate, order=a.order, eps=a.eps)
        return modulated_rms_norm(a.residual, a.norm_weight, a.shift, a.scale, **more)

    return both


PEERS = {
    "experts_norm": (Peer("apart", apart),),
    "experts": (
        Peer("grouped_mm", grouped_mm, backward=True),
        Peer("vllm", vllm_fused_moe),
        Peer("triton_kernels", triton_kernels),
    ),
}
