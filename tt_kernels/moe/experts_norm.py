"""The experts and the norm that follows them: their sum over a token's experts is made where the norm reads it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..norm.modulated_rms_norm import check_options, modulated_rms_norm
from ..norm.modulated_rms_norm_launch import launch_fwd
from ..reference import Modulated
from ..reference.common import compute_dtype
from ..reference.moe import ExpertWeights, Routing
from ..runtime.checks import check, refuse
from ..runtime.registry import define, takes_kernel, unasked, wants_gradients
from ..runtime.structs import Parts
from .experts import checked, experts, sorted_by_expert
from .experts_forward import rows_of_pairs


def _experts_norm(
    x: Tensor,
    topk_weights: Tensor,
    shared_weight: Tensor | None,
    topk_ids: Tensor,
    sorted_pairs: Tensor,
    offsets: Tensor,
    matrices: Sequence[Tensor | None],
    activation: str,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    norm_first: bool,
    shift: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, shared = rows_of_pairs(x, topk_ids, sorted_pairs, offsets, matrices, activation)
    parts = Parts(rows, topk_ids.contiguous(), topk_weights.contiguous(), len(offsets))
    y, summed = residual.new_empty(residual.shape, dtype=norm_weight.dtype), residual.new_empty(residual.shape)
    rstd = residual.new_empty(len(x), dtype=compute_dtype(residual.dtype, norm_weight.dtype))
    factor = None if shared_weight is None else shared_weight.contiguous()
    launch_fwd(residual, norm_weight, eps, norm_first, shift, scale, shared, gate, (y, summed, rstd), parts, factor)
    return y, summed


def _experts_norm_fake(*args):
    residual, norm_weight = args[8:10]
    return residual.new_empty(residual.shape, dtype=norm_weight.dtype), residual.new_empty(residual.shape)


_op = define(_experts_norm, _experts_norm_fake)


@unasked(reference.experts_norm)
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
    """Finish a layer of experts and open the next: `experts`, and `modulated_rms_norm` with what they return as branch.

    The same numbers bit for bit in a launch less: the sum over a token's experts is made where the norm reads it.

    Args:
        x, routing, weights, shared, shared_weight, activation: of `experts`, for T tokens of size D.
        residual:     [*, L, D] float, any strides: the residual stream of the same T tokens, in their order.
        norm_weight:  [D] float.
        shift, scale: [*, D] float, the same for L tokens; both or neither.
        gate:         [*, D] float, or None for 1: of what the experts return.
        order:        "modulate_norm" or "norm_modulate", as `modulated_rms_norm` has them.
        eps:          added to the mean square.
    Returns:
        y:        [*, L, D] dtype of norm_weight.
        residual: [*, L, D] dtype of residual: the stream with what the experts return.

    Numerics: those of the two ops; what the experts return is rounded to the dtype of x before it is added.
    Gradients: for all tensors of floats; where they are wanted the two ops run.
    Raises: what the two ops raise, and ValueError where residual does not have T tokens.
    Cost: that of `experts`, 9 T D flops and 2 T D itemsize bytes: bound by reading weights until a few hundred tokens.
    Source: those of the two ops; TensorRT-LLM too finishes a mixture of experts in the norm that follows.

    Example:
        >>> x, up, down = torch.randn(16, 64), torch.randn(8, 32, 64), torch.randn(8, 64, 32)
        >>> routing = route(x, torch.randn(8, 64), torch.zeros(8), top_k=2)
        >>> h, x = experts_norm(x, routing, ExpertWeights(up, down), x, torch.ones(64))
    """
    kernel, data = checked("experts_norm", x, routing, weights, shared, shared_weight, activation)
    rows = dict(shift=(shift, "* D"), scale=(scale, "* D"), gate=(gate, "* D"))
    check("experts_norm", 2, residual=(residual, "* L D"), norm_weight=(norm_weight, "D"), **rows)
    if not torch.compiler.is_compiling() and (residual.numel() != x.numel() or residual.shape[-1] != x.shape[-1]):
        refuse("experts_norm", "residual", list(residual.shape), f"T={x.shape[0]} tokens of D={x.shape[1]}")
    eps = check_options("experts_norm", shift, scale, order, eps)
    of_norm = residual, norm_weight, shift, scale, gate
    moe: dict[str, Any] = dict(shared=shared, shared_weight=shared_weight, activation=activation)
    if not takes_kernel("experts_norm", x, *of_norm) or not kernel:
        norm: dict[str, Any] = dict(gate=gate, order=order, eps=eps)
        return reference.experts_norm(x, routing, weights, residual, norm_weight, shift, scale, **moe, **norm)
    if wants_gradients(x, routing.topk_weights, shared_weight, *data, *of_norm):
        branch = experts(x, routing, weights, **moe).view(residual.shape)
        return modulated_rms_norm(residual, norm_weight, shift, scale, branch=branch, gate=gate, order=order, eps=eps)
    topk_weights, *listed = sorted_by_expert(routing, weights)
    last = order == "norm_modulate", shift, scale, gate
    return Modulated(*_op(x, topk_weights, shared_weight, *listed, data, activation, residual, norm_weight, eps, *last))
