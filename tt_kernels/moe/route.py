"""The router: which experts each token goes to, and with what weight."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.moe import SCORES, Routing
from ..runtime.checks import check, is_real, is_whole, refuse
from ..runtime.registry import define, takes_kernel, unasked
from .route_backward import _route_bwd, _route_bwd_fake
from .route_launch import _route_fwd, _route_fwd_fake

_fwd = define(_route_fwd, _route_fwd_fake)

_bwd = define(_route_bwd, _route_bwd_fake)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, K, scores, groups, kept, norm, scale):
        ids, weights, sorted_pairs, offsets, chosen = _fwd(x, weight, bias, K, scores, groups, kept, norm, scale)
        ctx.save_for_backward(x, weight, ids, chosen)
        ctx.options = scores, norm, scale
        ctx.mark_non_differentiable(ids, sorted_pairs, offsets)
        return ids, weights, sorted_pairs, offsets

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _ids, dweights, _pairs, _offsets):
        for_x, for_weight = ctx.needs_input_grad[:2]
        dx, dweight = _bwd(dweights, *ctx.saved_tensors, *ctx.options, for_x, for_weight)
        return dx if for_x else None, dweight if for_weight else None, *(None,) * 7


@unasked(reference.route)
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
    """Choose each token's experts by s + bias, s = sigmoid(x weight^T), and weigh them by s: what `experts` takes.

    With scores="softmax" s is the softmax of a token's E logits, and there is no bias. With norm_topk_prob its weights
    are at once what routers make that take the softmax over the chosen logits alone.

    With more than one group, of sigmoids: a group's score is the sum of its two best biased scores; outside the
    topk_group best groups the biased scores count as 0, but for an expert's that is switched off: whose bias is -inf is
    chosen last. Of equal scores the lower index wins, and NaN is above all.

    Args:
        x:              [T, D] float.
        weight:         [E, D] float, fp32 in a 16-bit model.
        bias:           [E] float: shifts the choice and nothing else; None for a softmax.
        top_k:          K, experts of a token, 1 to E.
        scores:         "sigmoid" (DeepSeek-V3, Nemotron 3) or "softmax" (Mixtral, Qwen3-MoE, OLMoE, GraniteMoE).
        n_group:        divides E, each group of at least 2 experts; 1: no groups.
        topk_group:     groups that stay, 1 to n_group.
        norm_topk_prob: divide the weights by their sum, of sigmoids + 1e-20.
        scale:          multiplies the weights.
    Returns:
        A Routing:
        topk_ids:     [T, K] int64, best first.
        topk_weights: [T, K] fp32 (fp64 where x is fp64).
        sorted_pairs: [T * K] int64: pairs t * K + k sorted by expert, in each expert by token: what `experts` walks.
        offsets:      [E] int32: where each expert's pairs end in sorted_pairs; the differences are its tokens.

    Numerics: chooses as fp64 would, so that no rounding decides: by scores in fp32 whose error has a proven bound, and
        again in fp64 where they are closer than that; of a softmax by logits, in whose order it is. Weights come from
        logits in fp64, of bf16 tokens on sm_100, and of more than 512 elsewhere, in fp32: sums of exact products, like
        other sums of tensor cores. Deterministic.
    Gradients: for x and weight through topk_weights, none for bias. Of a softmax without norm_topk_prob for every
        logit, in fp32 as of those computed again.
    Raises: ValueError for sizes that disagree and options out of their range.
    Cost: 2 T E D flops, T D itemsize + 4 E D + 20 T K bytes: bound by reading x and weight.
    Source: DeepSeek-V3 (2412.19437), section 2.1.2; softmax: Mixtral (2401.04088), section 2.1.

    Example:
        >>> routing = route(torch.randn(16, 64), torch.randn(8, 64), torch.zeros(8), top_k=2, scale=2.5)
        >>> ids, weights = routing.topk_ids, routing.topk_weights  # [16, 2]
    """
    if scores not in SCORES:
        refuse("route", "scores", scores, " or ".join(map(repr, SCORES)))
    softmax = scores == "softmax"
    check("route", 2, x=(x, "T D"), weight=(weight, "E D"), bias=(bias, "E"))
    if softmax != (bias is None):
        refuse("route", "bias", bias, "None beside scores='softmax'" if softmax else "a tensor")
    E = weight.shape[0]
    if not (is_whole(top_k) and 1 <= top_k <= E):
        refuse("route", "top_k", top_k, f"1 to E={E}")
    if not is_whole(n_group) or n_group < 1 or E % n_group or (n_group > 1 and 2 * n_group > E):
        refuse("route", "n_group", n_group, f"a divisor of E={E} that leaves groups of at least 2")
    if softmax and n_group > 1:
        refuse("route", "n_group", n_group, "1 beside scores='softmax'")
    if not (is_whole(topk_group) and 1 <= topk_group <= n_group):
        refuse("route", "topk_group", topk_group, f"1 to n_group={n_group}")
    if not isinstance(norm_topk_prob, bool):
        refuse("route", "norm_topk_prob", norm_topk_prob, "True or False")
    if not is_real(scale):
        refuse("route", "scale", scale, "a finite number")
    if not torch.compiler.is_compiling() and x.shape[0] * top_k >= 2**31:
        refuse("route", "x", list(x.shape), "fewer than 2^31 pairs of a token and an expert")
    if not takes_kernel("route", x, weight, bias):
        given: dict[str, Any] = dict(top_k=top_k, scores=scores, n_group=n_group, topk_group=topk_group)
        return reference.route(x, weight, bias, **given, norm_topk_prob=norm_topk_prob, scale=scale)
    options = int(top_k), scores, int(n_group), int(topk_group), norm_topk_prob, float(scale)
    return Routing(*_Route.apply(x, weight, bias, *options))
