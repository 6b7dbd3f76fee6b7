"""Mixture of experts: the router and the experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, compute_dtype, full_precision, product
from .norm import Modulated, modulated_rms_norm


class Routing(NamedTuple):
    """Which experts each token goes to: what `route` returns and `experts` takes. `experts` makes the last two where
    they are None."""

    topk_ids: Tensor  # [T, K] int, best first; below 0, or E and above: the expert is elsewhere
    topk_weights: Tensor  # [T, K] fp32 or wider
    sorted_pairs: Tensor | None = None  # [T * K] int: pairs t * K + k by expert, in each expert by token
    offsets: Tensor | None = None  # [E] int: where each expert's pairs end in sorted_pairs


class Matrix(NamedTuple):
    """Weights and how they are stored; a plain Tensor stands for Matrix(tensor)."""

    data: Tensor  # the shape of the matrices that it holds
    scale: Tensor | None = None
    format: str | None = None  # a key of FORMATS; None: numbers of the dtype of x


class ExpertWeights(NamedTuple):
    """The weights of all experts of a layer; of the shared expert the same without E."""

    up: Tensor | Matrix  # [E, N, D]
    down: Tensor | Matrix  # [E, D, N]
    gate: Tensor | Matrix | None = None  # [E, N, D]


class PlainWeights(NamedTuple):
    """`ExpertWeights` in the dtype of x."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None


class Format(NamedTuple):
    """How a Matrix stores its weights."""

    dequantized: Callable[[Matrix, torch.dtype], Tensor]  # the matrices in the dtype of x
    dtype: torch.dtype | None = None  # of data; None: that of x
    scale_shape: Callable[[torch.Size], tuple[int, ...]] | None = None  # from the shape of data; None: no scale


FORMATS: dict[str | None, Format] = {None: Format(lambda matrix, dtype: matrix.data)}

# down(act(up(x))), or down(act(gate(x)) * up(x)).
# Append only: cards count by position. Kernels: `activate` in moe/lang.py; models: tt_model/config.py names its own.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda h: F.gelu(h, approximate="tanh"),
}

SCORES = ("sigmoid", "softmax")  # of a router


@full_precision
def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    scores: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> Routing:
    logits = F.linear(x.double(), weight.double())  # [T, E]
    if scores == "softmax":
        ids = _best(logits.detach(), top_k)
        chosen = logits.gather(1, ids).softmax(-1) if norm_topk_prob else logits.softmax(-1).gather(1, ids)
        weights = cast(chosen if scale == 1 else chosen * scale, compute_dtype(x.dtype))
        return Routing(ids, weights, *_sorted_pairs(ids, len(weight)))
    assert bias is not None, "sigmoids have a bias"
    every = logits.sigmoid()
    biased = every.detach() + bias  # fp64
    if n_group > 1:
        grouped = biased.unflatten(1, (n_group, -1))
        rank = grouped.topk(2, dim=-1).values.sum(-1)  # [T, n_group]
        kept = torch.zeros_like(rank, dtype=torch.bool)
        kept.scatter_(1, rank.sort(dim=1, descending=True, stable=True).indices[:, :topk_group], True)
        biased = torch.where(kept.unsqueeze(-1) | (grouped == -torch.inf), grouped, 0).flatten(1)
    ids = _best(biased, top_k)
    weights = every.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = cast(weights if scale == 1 else weights * scale, compute_dtype(x.dtype))
    return Routing(ids, weights, *_sorted_pairs(ids, len(weight)))


def _best(scores: Tensor, top_k: int) -> Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()  # ties: the lower expert


def sort_pairs(topk_ids: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """(sorted_pairs, offsets) of `Routing`; pairs of no expert 0 to E - 1 come last. The host reads no value."""
    return _sorted_pairs(torch.where(topk_ids < 0, E, topk_ids), E)


def _sorted_pairs(topk_ids: Tensor, E: int) -> tuple[Tensor, Tensor]:
    experts, sorted_pairs = topk_ids.flatten().sort(stable=True)
    every = torch.arange(E, device=topk_ids.device, dtype=topk_ids.dtype)
    return sorted_pairs, torch.searchsorted(experts, every, right=True, out_int32=True)


def plain(weights: ExpertWeights, dtype: torch.dtype) -> PlainWeights:
    """The weights of any format in this dtype."""
    if Matrix not in map(type, weights):
        return PlainWeights(*weights)  # type: ignore[arg-type]

    def one(weight: Tensor | Matrix) -> Tensor:
        return FORMATS[weight.format].dequantized(weight, dtype) if isinstance(weight, Matrix) else weight

    return PlainWeights(one(weights.up), one(weights.down), None if weights.gate is None else one(weights.gate))


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times their own expert's weight: [R, D], [E, N, D], [E] -> [R, N]. Rows behind the
    last offset belong to no expert: they are 0, as is their gradient."""
    tracing = torch.compiler.is_compiling()
    if x.is_cuda and _fits_grouped_mm(x, weight, torch.bfloat16) and (tracing or len(x) >= len(weight)):
        # It leaves rows of no expert as they come, in the result and in the gradient of x.
        real = (torch.arange(len(x), device=x.device) < offsets[-1]).unsqueeze(1)
        return torch.where(real, F.grouped_mm(torch.where(real, x, 0), weight.transpose(1, 2), offs=offsets), 0)
    return _whole_grouped_linear(x, weight, offsets) if tracing else _segments_linear(x, weight, offsets)


def _fits_grouped_mm(x: Tensor, weight: Tensor, *dtypes: torch.dtype) -> bool:
    strides = (x.stride(0), weight.stride(1), weight.shape[1])  # the last is the result's, and so its gradient's
    fits = all(stride * x.element_size() % 16 == 0 for stride in strides) and 0 not in weight.shape
    return fits and x.dtype in dtypes and x.dtype == weight.dtype


def _segments_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`_grouped_linear` by segments whose sizes the host knows."""
    bounds = offsets.tolist()
    accepted = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if bounds[-1] >= len(weight) and _fits_grouped_mm(x, weight, *accepted):
        y = F.grouped_mm(x[: bounds[-1]], weight.transpose(1, 2), offs=offsets)
        return y if len(y) == len(x) else F.pad(y, (0, 0, 0, len(x) - len(y)))
    # Few rows hit few experts, and grouped_mm costs a product for every one of them.
    *segments, rest = x.tensor_split(bounds)
    parts = [rows @ w.T for rows, w in zip(segments, weight, strict=True) if len(rows)]
    parts = parts or [x[:0] @ weight[0].T]  # without rows: connected to what they would come from
    return torch.cat([*parts, rest.new_zeros(len(rest), weight.shape[1])] if len(rest) else parts)


# For torch.compile and export, as one operation: its segments' sizes are values of tensors, and grouped_mm can be
# traced in bf16 alone.


@torch.library.custom_op("tt_reference::grouped_linear", mutates_args=())
def _whole_grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _segments_linear(x, weight, offsets)


@torch.library.custom_op("tt_reference::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows = zip(*(t.tensor_split(offsets.tolist())[:-1] for t in (dy, x)), strict=True)
    return _segments_linear(dy, weight.transpose(1, 2), offsets), torch.stack([d.T @ r for d, r in rows])


@_whole_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_grouped_linear_backward(dy, *ctx.saved_tensors), None


_whole_grouped_linear.register_autograd(_differentiate, setup_context=_keep)


@full_precision
def experts(
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    *,
    shared: ExpertWeights | None = None,
    shared_weight: Tensor | None = None,
    activation: str = "relu2",
) -> Tensor:
    y = _routed(x, routing, plain(weights, x.dtype), activation)
    if shared is None:
        return y
    alone = _mlp(x, plain(shared, x.dtype), activation)
    if shared_weight is None:
        return y + alone
    wide = compute_dtype(x.dtype, shared_weight.dtype)
    return cast(cast(y, wide) + cast(shared_weight, wide).unsqueeze(1) * cast(alone, wide), x.dtype)


def experts_norm(
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    residual: Tensor,
    norm_weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    shared: ExpertWeights | None = None,
    shared_weight: Tensor | None = None,
    activation: str = "relu2",
    gate: Tensor | None = None,
    order: str = "modulate_norm",
    eps: float = 1e-5,
) -> Modulated:
    moe: dict[str, Any] = dict(shared=shared, shared_weight=shared_weight, activation=activation)
    branch = experts(x, routing, weights, **moe).view(residual.shape)
    return modulated_rms_norm(residual, norm_weight, shift, scale, branch=branch, gate=gate, order=order, eps=eps)


def _mlp(x: Tensor, weights: PlainWeights, activation: str) -> Tensor:
    h, act = product(x, weights.up), ACTIVATIONS[activation]
    h = act(h) if weights.gate is None else act(product(x, weights.gate)) * h
    return product(h, weights.down)


def _of_expert(weights: PlainWeights, e: int | Tensor) -> PlainWeights:
    return PlainWeights(weights.up[e], weights.down[e], None if weights.gate is None else weights.gate[e])


def _routed(x: Tensor, routing: Routing, weights: PlainWeights, activation: str) -> Tensor:
    ids, topk_weights, sorted_pairs, offsets = routing
    (T, D), K, E = x.shape, ids.shape[1], len(weights.up)
    if T == 1 and x.is_cpu and torch.compiler.is_compiling():  # the compiler reads a chosen expert's weights in place
        own, act = _of_expert(weights, ids[0].clamp(0, E - 1)), ACTIVATIONS[activation]
        rows = x.expand(K, 1, D)
        h = torch.bmm(rows, own.up.mT)
        h = act(h) if own.gate is None else act(torch.bmm(rows, own.gate.mT)) * h
        each = torch.bmm(h, own.down.mT).squeeze(1)
        topk_weights = torch.where((ids >= 0) & (ids < E), topk_weights, 0)
        return cast(topk_weights @ cast(each, topk_weights.dtype), x.dtype)
    if T == 1 and not (torch.compiler.is_compiling() or x.is_cuda):  # a decoding step: nothing to sort
        listed = ids[0].tolist()
        if all(0 <= e < E for e in listed):
            each = torch.cat([_mlp(x, _of_expert(weights, e), activation) for e in listed])
            return cast(topk_weights @ cast(each, topk_weights.dtype), x.dtype)
    if sorted_pairs is None or offsets is None:
        sorted_pairs, offsets = sort_pairs(ids, E)
    offsets, act = offsets.int(), ACTIVATIONS[activation]
    rows = x.index_select(0, sorted_pairs // K)
    h = _grouped_linear(rows, weights.up, offsets)
    h = act(h) if weights.gate is None else act(_grouped_linear(rows, weights.gate, offsets)) * h
    y = _grouped_linear(h, weights.down, offsets)
    y = torch.empty_like(y).index_copy_(0, sorted_pairs.long(), y)  # back to the tokens' order
    topk_weights = torch.where((ids >= 0) & (ids < E), topk_weights, 0)
    return cast((topk_weights.unsqueeze(1) @ cast(y.view(T, K, D), topk_weights.dtype)).squeeze(1), x.dtype)
