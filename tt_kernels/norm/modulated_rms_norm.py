"""The RMS norm that opens a residual layer: gate and add the last branch, modulate and norm, in one pass."""

import torch
from torch import Tensor

from .. import reference
from ..reference import Modulated
from ..runtime.checks import check, eps_of, refuse
from ..runtime.registry import define, takes_kernel, unasked
from .modulated_rms_norm_launch import (
    _modulated_rms_norm_bwd,
    _modulated_rms_norm_bwd_fake,
    _modulated_rms_norm_fwd,
    _modulated_rms_norm_fwd_fake,
)

_fwd = define(_modulated_rms_norm_fwd, _modulated_rms_norm_fwd_fake)

_bwd = define(_modulated_rms_norm_bwd, _modulated_rms_norm_bwd_fake)


class ModulatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype, norm_first=False, shift=None, scale=None, branch=None, gate=None):
        y, residual, rstd = _fwd(x, weight, eps, dtype, norm_first, shift, scale, branch, gate)
        kept = x if branch is None else residual
        ctx.save_for_backward(kept, weight, rstd, shift, scale, branch if gate is not None else None, gate)
        ctx.norm_first, ctx.has_branch = norm_first, branch is not None
        ctx.set_materialize_grads(False)
        return y, residual

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dresidual):
        residual, weight, rstd, shift, scale, branch, gate = ctx.saved_tensors
        if dy is None:  # only the residual is used further on
            dy = residual.new_zeros(residual.shape, dtype=weight.dtype)
        if not ctx.has_branch:
            dresidual = None  # the residual is x itself: its gradient does not come through here
        found = _bwd(dy, dresidual, residual, weight, rstd, ctx.norm_first, shift, scale, branch, gate)
        dx, dweight, dshift, dscale, dbranch, dgate = found
        if shift is None:
            dshift = dscale = None
        if gate is None:  # a branch without one is added as it is, and not saved
            dbranch, dgate = dx if ctx.has_branch else None, None
        return dx, dweight, None, None, None, dshift, dscale, dbranch, dgate


def check_options(op: str, shift: Tensor | None, scale: Tensor | None, order: str, eps: float) -> float:
    """eps as a float; refuses an order that there is not, a shift without a scale."""
    if order not in ("modulate_norm", "norm_modulate"):
        refuse(op, "order", order, "'modulate_norm' or 'norm_modulate'")
    if (shift is None) != (scale is None):
        refuse(op, "shift" if shift is None else "scale", None, "shift and scale, or neither")
    return eps_of(op, eps)


@unasked(reference.modulated_rms_norm)
def modulated_rms_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    order: str = "modulate_norm",
    eps: float = 1e-5,
) -> Modulated:
    """Finish a residual layer and open the next: add the gated branch to the stream, then norm and modulate it.

    residual = x + gate * branch. With modulate(v) = v * (1 + scale) + shift, y = norm(modulate(residual)) in order
    "modulate_norm" (Mamba and attention layers), modulate(norm(residual)) in order "norm_modulate" (experts and MLP).
    For a norm alone there is `rms_norm`.

    Args:
        x:            [*, L, D] float, any strides: the residual stream.
        weight:       [D] float.
        shift, scale: [*, D] float, the same for L tokens; both or neither.
        branch:       [*, L, D] float: the previous layer's output, or None.
        gate:         [*, D] float, or None for 1; only with a branch.
        order:        "modulate_norm" or "norm_modulate".
        eps:          added to the mean square.
    Returns:
        y:        [*, L, D] dtype of weight.
        residual: [*, L, D] dtype of x; without a branch it is x itself.

    Numerics: computes in fp32 (fp64 where x or weight is fp64); the norm reads the residual as it was rounded to the
    dtype of x. Deterministic.
    Gradients: for all tensors.
    Raises: ValueError for sizes that disagree, an unknown order, a shift without a scale, a gate without a branch, an
    eps below 0.
    Cost: for T tokens 9 T D flops and 4 T D itemsize bytes: bound by memory.
    Source: TwoTower (2606.26493) and its published implementation; adaLN-single of PixArt-alpha.

    Example:
        >>> (x, branch), (shift, scale, gate) = torch.randn(2, 2, 16, 256), torch.randn(3, 2, 256)
        >>> h, x = modulated_rms_norm(x, torch.ones(256), shift, scale, branch=branch, gate=gate)
    """
    rows = dict(shift=(shift, "* D"), scale=(scale, "* D"), gate=(gate, "* D"))
    check("modulated_rms_norm", 2, x=(x, "* L D"), weight=(weight, "D"), branch=(branch, "* L D"), **rows)
    if gate is not None and branch is None:
        refuse("modulated_rms_norm", "branch", None, "a branch beside the gate")
    eps = check_options("modulated_rms_norm", shift, scale, order, eps)
    if not takes_kernel("modulated_rms_norm", x, weight, shift, scale, branch, gate):
        return reference.modulated_rms_norm(x, weight, shift, scale, branch=branch, gate=gate, order=order, eps=eps)
    optional = shift, scale, branch, gate
    y, residual = ModulatedRMSNorm.apply(x, weight, eps, weight.dtype, order == "norm_modulate", *optional)
    return Modulated(y, x if branch is None else residual)
