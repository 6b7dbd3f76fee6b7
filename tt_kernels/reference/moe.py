"""Mixture of experts: the router and the experts."""

from dataclasses import dataclass
from typing import Any

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
        biased = torch.where(kept.unsqueeze(-1) | (grouped == -torch.inf), grouped, 0).flatten(1)
    ids = biased.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()  # ties: the lower expert
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = cast(weights if scale == 1 else weights * scale, compute_dtype(x.dtype))
    return ids, weights, *index_lists(ids, len(weight))


def index_lists(ids: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Token-expert pairs t * K + k sorted by expert, those of no expert 0 to E - 1 last, and where each expert's end;
    without a look at them from the host."""
    pairs, order = torch.where(ids < 0, E, ids).flatten().sort(stable=True)
    experts = torch.arange(E, device=ids.device, dtype=ids.dtype)
    return order, torch.searchsorted(pairs, experts, right=True, out_int32=True)


def activate(h: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return F.relu(h).square()
    return F.silu(h)


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times their own expert's weight: [R, D], [E, N, D], [E] -> [R, N]. Rows behind the
    last end are nobody's: 0, as is their gradient."""
    tracing = torch.compiler.is_compiling()
    if x.is_cuda and _fits_grouped_mm(x, weight, torch.bfloat16) and (tracing or len(x) >= len(weight)):
        # It leaves nobody's rows as they come, in the result and in the gradient of x.
        real = (torch.arange(len(x), device=x.device) < ends[-1]).unsqueeze(1)
        return torch.where(real, F.grouped_mm(torch.where(real, x, 0), weight.transpose(1, 2), offs=ends), 0)
    return _whole_grouped_linear(x, weight, ends) if tracing else _segments_linear(x, weight, ends)


def _fits_grouped_mm(x: Tensor, weight: Tensor, *dtypes: torch.dtype) -> bool:
    strides = (x.stride(0), weight.stride(1), weight.shape[1])  # the last is the result's, and so its gradient's
    fits = all(stride * x.element_size() % 16 == 0 for stride in strides) and 0 not in weight.shape
    return fits and x.dtype in dtypes and x.dtype == weight.dtype


def _segments_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`_grouped_linear` by segments whose sizes the host knows."""
    bounds = ends.tolist()
    accepted = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if bounds[-1] >= len(weight) and _fits_grouped_mm(x, weight, *accepted):
        y = F.grouped_mm(x[: bounds[-1]], weight.transpose(1, 2), offs=ends)
        return y if len(y) == len(x) else F.pad(y, (0, 0, 0, len(x) - len(y)))
    # Few rows hit few experts, and grouped_mm costs a product for every one of them.
    *segments, rest = x.tensor_split(bounds)
    parts = [rows @ w.T for rows, w in zip(segments, weight, strict=True) if len(rows)]
    parts = parts or [x[:0] @ weight[0].T]  # without rows: connected to what they would come from
    return torch.cat([*parts, rest.new_zeros(len(rest), weight.shape[1])] if len(rest) else parts)


# For torch.compile and export, as one operation: its segments' sizes are values of tensors, and grouped_mm can be
# traced in bf16 alone.


@torch.library.custom_op("tt_reference::grouped_linear", mutates_args=())
def _whole_grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _segments_linear(x, weight, ends)


@torch.library.custom_op("tt_reference::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    rows = zip(*(t.tensor_split(ends.tolist())[:-1] for t in (dy, x)), strict=True)
    return _segments_linear(dy, weight.transpose(1, 2), ends), torch.stack([d.T @ r for d, r in rows])


@_whole_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_grouped_linear_backward(dy, *ctx.saved_tensors), None


_whole_grouped_linear.register_autograd(_differentiate, setup_context=_keep)


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
    (T, D), K, E = x.shape, ids.shape[1], len(expert_weights.up)
    if not (torch.compiler.is_compiling() or x.is_cuda) and T == 1:  # a decoding step: nothing to sort
        chosen = ids[0].tolist()
        if all(0 <= e < E for e in chosen):
            rows = [_mlp(x, _one(expert_weights, e), activation) for e in chosen]
            return cast(weights @ cast(torch.cat(rows), weights.dtype), x.dtype)
    if order is None or ends is None:
        order, ends = index_lists(ids, E)
    ends = ends.int()
    rows = x.index_select(0, order // K)
    h = _grouped_linear(rows, expert_weights.up, ends)
    if expert_weights.gate is None:
        h = activate(h, activation)
    else:
        h = activate(_grouped_linear(rows, expert_weights.gate, ends), activation) * h
    y = _grouped_linear(h, expert_weights.down, ends)
    y = torch.empty_like(y).index_copy_(0, order.long(), y)  # back to the tokens' order
    weights = torch.where((ids >= 0) & (ids < E), weights, 0)
    return cast((weights.unsqueeze(1) @ cast(y.view(T, K, D), weights.dtype)).squeeze(1), x.dtype)
