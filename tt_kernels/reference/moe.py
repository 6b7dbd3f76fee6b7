"""Mixture of experts: the router and the experts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, compute_dtype, full_precision


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of all experts of a layer: up [E, N, D], down [E, D, N], gate [E, N, D] or None; of a shared one:
    the same without E."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None


@full_precision
def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = (x.double() @ weight.double().T).sigmoid()  # [T, E]
    biased = scores.detach() + bias  # fp64
    if n_group > 1:
        grouped = biased.unflatten(1, (n_group, -1))
        rank = grouped.topk(2, dim=-1).values.sum(-1)  # [T, n_group]
        kept = torch.zeros_like(rank, dtype=torch.bool)
        kept.scatter_(1, rank.sort(dim=1, descending=True, stable=True).indices[:, :topk_group], True)
        biased = (grouped * kept.unsqueeze(-1)).flatten(1)
    ids = biased.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()  # ties: the lower expert
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = cast(weights if scale == 1 else weights * scale, compute_dtype(x.dtype))
    return ids, weights, *index_lists(ids, len(weight))


def index_lists(ids: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Token-expert pairs t * K + k sorted by expert, and where each expert's end."""
    pairs, order = ids.flatten().sort(stable=True)
    return order, torch.bincount(pairs, minlength=E).cumsum(0, dtype=torch.int32)


def activate(h: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return F.relu(h).square()
    return F.silu(h)


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times their own expert's weight: [R, D], [E, N, D], [E] -> [R, N]."""
    accepted = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    strides = (x.stride(0), weight.stride(1), weight.shape[1])  # the last is the result's, and so its gradient's
    aligned = all(stride * x.element_size() % 16 == 0 for stride in strides)
    if x.dtype in accepted and x.dtype == weight.dtype and aligned and len(x) >= len(weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # Few rows hit few experts, and grouped_mm costs a product for every one of them.
    segments = x.tensor_split(ends[:-1].tolist())
    parts = [rows @ w.T for rows, w in zip(segments, weight, strict=True) if len(rows)]
    return torch.cat(parts or [x @ weight[0].T])  # without rows: connected to what it would come from


@full_precision
def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    expert_weights: ExpertWeights,
    *,
    order: Tensor | None = None,
    ends: Tensor | None = None,
    shared: ExpertWeights | None = None,
    activation: str = "relu2",
) -> Tensor:
    y = _routed(x, ids, weights, expert_weights, order, ends, activation)
    return y if shared is None else y + _mlp(x, shared, activation)


def _one(weights: ExpertWeights, e: int) -> ExpertWeights:
    return ExpertWeights(weights.up[e], weights.down[e], None if weights.gate is None else weights.gate[e])


def _mlp(x: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
    h = F.linear(x, weights.up)
    h = activate(h, activation) if weights.gate is None else activate(F.linear(x, weights.gate), activation) * h
    return F.linear(h, weights.down)


def _routed(x, ids, weights, expert_weights, order, ends, activation) -> Tensor:
    (T, D), K = x.shape, ids.shape[1]
    if T == 1 and not x.is_cuda:  # a decoding step: nothing to sort
        rows = [_mlp(x, _one(expert_weights, e), activation) for e in ids[0].tolist()]
        return cast(weights @ cast(torch.cat(rows), weights.dtype), x.dtype)
    if order is None or ends is None:
        order, ends = index_lists(ids, len(expert_weights.up))
    rows = x.index_select(0, order // K)
    h = _grouped_linear(rows, expert_weights.up, ends)
    if expert_weights.gate is None:
        h = activate(h, activation)
    else:
        h = activate(_grouped_linear(rows, expert_weights.gate, ends), activation) * h
    y = _grouped_linear(h, expert_weights.down, ends)
    y = torch.empty_like(y).index_copy_(0, order, y)  # back to the tokens' order
    return cast((weights.unsqueeze(1) @ cast(y.view(T, K, D), weights.dtype)).squeeze(1), x.dtype)
