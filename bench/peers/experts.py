"""Peers of the experts: F.grouped_mm, vLLM's fused_moe, triton_kernels. The shared expert is two cuBLAS products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_kernels.reference.moe import ACTIVATIONS

from .base import Peer, Unavailable, needs, on_gpu, only

Call = Callable[[], Any]


def _activate(h: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    fn = ACTIVATIONS[activation]
    return fn(h) if gate is None else fn(gate) * h


def _with_shared(routed: Callable[[], Tensor], x: Tensor, shared: Any, activation: str) -> Call:
    if shared is None:
        return routed

    def call() -> Tensor:
        h = F.linear(x, shared.up)
        h = _activate(h, None if shared.gate is None else F.linear(x, shared.gate), activation)
        return routed() + F.linear(h, shared.down)

    return call


def grouped_mm(
    x: Tensor,
    routing: Any,
    weights: Any,
    *,
    shared: Any = None,
    activation: str = "relu2",
) -> Call:
    """Rows gathered by expert, F.grouped_mm twice, and a weighted sum: what one writes with PyTorch alone."""
    ids, topk_weights, order, ends = routing
    w, (T, K), E = weights, ids.shape, len(weights.up)
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
        h = _activate(product(rows, w.up), None if w.gate is None else product(rows, w.gate), activation)
        y = product(h, w.down)
        y = torch.empty_like(y).index_copy_(0, order, y).view(T, K, w.down.shape[1])
        return (topk_weights.unsqueeze(1) @ y.to(topk_weights.dtype)).squeeze(1).to(x.dtype)

    return _with_shared(routed, x, shared, activation)


def vllm_fused_moe(
    x: Tensor,
    routing: Any,
    weights: Any,
    *,
    shared: Any = None,
    activation: str = "relu2",
) -> Call:
    """It sorts by itself."""
    on_gpu(x, "vLLM's fused_moe")
    fused = needs("vllm.model_executor.layers.fused_moe.fused_moe", "vllm")
    names = needs("vllm.model_executor.layers.fused_moe.activation", "vllm")
    gated = weights.gate is not None
    only(gated == (activation == "silu"), "vLLM's fused_moe: relu2 without a gate, silu with one")
    kind = names.MoEActivation.SILU if gated else names.MoEActivation.RELU2_NO_MUL
    up = torch.cat([weights.gate, weights.up], 1) if gated else weights.up
    few, topk_weights = routing.topk_ids.int(), routing.topk_weights.float()

    def routed() -> Tensor:
        return fused.fused_experts(x, up, weights.down, topk_weights, few, activation=kind)

    return _with_shared(routed, x, shared, activation)


def triton_kernels(
    x: Tensor,
    routing: Any,
    weights: Any,
    *,
    shared: Any = None,
    activation: str = "relu2",
) -> Call:
    """matmul_ogs twice, of vLLM's copy; its index lists are made from our ids before the clock, as ours are."""
    on_gpu(x, "triton_kernels")
    only(weights.gate is None, "triton_kernels: without a gate only")
    vllm = "vllm.model_executor.layers.fused_moe."
    makers = None
    for place in ("experts.gpt_oss_triton_kernels_moe", "gpt_oss_triton_kernels_moe"):
        try:
            makers = needs(vllm + place, "vllm")
            ogs = needs("triton_kernels.matmul_ogs", "triton_kernels")  # vllm registers its copy under this name
            break
        except Unavailable as error:
            why = error
    if makers is None:
        raise why
    data, gather, scatter = makers.make_routing_data(
        routing.topk_ids.int(), routing.topk_weights.float(), len(weights.up)
    )
    up, down = weights.up.mT, weights.down.mT

    def routed() -> Tensor:
        h = ogs.matmul_ogs(x, up, None, data, gather_indx=gather)
        h = _activate(h, None, activation)
        return ogs.matmul_ogs(h, down, None, data, scatter_indx=scatter, gammas=data.gate_scal)

    return _with_shared(routed, x, shared, activation)


PEERS = {
    "experts": (
        Peer("grouped_mm", grouped_mm, backward=True),
        Peer("vllm", vllm_fused_moe),
        Peer("triton_kernels", triton_kernels),
    )
}
