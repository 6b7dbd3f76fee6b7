"""RMS norms: plain, with modulation, gate and residual, and gated by groups of channels."""

import torch
from torch import Tensor

from . import reference
from .core import Op, check, refuse


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x by its root mean square: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x:       [*, D] float, any strides.
        weight:  [D] float.
        eps:     added to the mean square.
    Returns:
        y: [*, D] dtype of x.

    Computes in fp32 (fp64 where an argument is fp64) and rounds once. Gradients for x and weight. Deterministic.
    Raises ValueError where sizes disagree. Cost for T rows: 4 T D flops, (2 T D + D) itemsize bytes: bound by memory.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    check("rms_norm", x=(x, "* D"), weight=(weight, "D"))
    return reference.rms_norm(x, weight, eps=eps)


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
) -> tuple[Tensor, Tensor]:
    """Finish a residual layer and open the next: add the gated branch to the stream, then norm and modulate it.

    residual = x + gate * branch. With modulate(v) = v * (1 + scale) + shift, y = norm(modulate(residual)) in order
    "modulate_norm" (Mamba and attention layers), modulate(norm(residual)) in order "norm_modulate" (experts and MLP).

    Args:
        x:            [*, L, D] float: the residual stream.
        weight:       [D] float.
        shift, scale: [*, D] float, the same for L tokens; both or neither.
        branch:       [*, L, D] float: the previous layer's output, or None.
        gate:         [*, D] float, or None for 1; only with a branch.
        order:        "modulate_norm" or "norm_modulate".
        eps:          added to the mean square.
    Returns:
        y:        [*, L, D] dtype of weight.
        residual: [*, L, D] dtype of x; without a branch it is x itself.

    Computes in fp32 (fp64 where x or weight is fp64); the norm reads the residual as it was rounded to the dtype of x.
    Gradients for all tensors. Deterministic. Raises ValueError for sizes that disagree, an unknown order, a shift
    without a scale, a gate without a branch. Cost for T tokens: 9 T D flops, 4 T D itemsize bytes, so bound by memory.
    Source: TwoTower (2606.26493) and its published implementation; adaLN-single of PixArt-alpha.
    """
    check(
        "modulated_rms_norm",
        x=(x, "* L D"),
        weight=(weight, "D"),
        shift=(shift, "* D"),
        scale=(scale, "* D"),
        branch=(branch, "* L D"),
        gate=(gate, "* D"),
    )
    if order not in ("modulate_norm", "norm_modulate"):
        refuse("modulated_rms_norm", "order", order, "'modulate_norm' or 'norm_modulate'")
    if (shift is None) != (scale is None):
        refuse("modulated_rms_norm", "shift" if shift is None else "scale", None, "shift and scale, or neither")
    if gate is not None and branch is None:
        refuse("modulated_rms_norm", "branch", None, "a branch beside the gate")
    return reference.modulated_rms_norm(x, weight, shift, scale, branch=branch, gate=gate, order=order, eps=eps)


def gated_group_norm(x: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    """Gate x by silu(z), then RMS-normalise within each of `groups` equal runs of channels, times weight.

    Args:
        x:      [*, D] float: the scan's output.
        z:      [*, D] float: the gate.
        weight: [D] float.
        groups: divides D.
        eps:    added to the mean square.
    Returns:
        y: [*, D] dtype of z.

    Computes in fp32 (fp64 where x or weight is fp64) and rounds once. Gradients for all tensors. Deterministic.
    Raises ValueError for sizes that disagree and groups that do not divide D. Cost for T rows: 9 T D flops,
    3 T D itemsize bytes, so bound by memory. Source: `rmsnorm_fn` of mamba_ssm with norm_before_gate=False.
    """
    check("gated_group_norm", x=(x, "* D"), z=(z, "* D"), weight=(weight, "D"))
    if groups < 1 or x.shape[-1] % groups:
        refuse("gated_group_norm", "groups", groups, f"a divisor of D={x.shape[-1]}")
    return reference.gated_group_norm(x, z, weight, groups=groups, eps=eps)


def _rows(dtype: torch.dtype, T: int, D: int) -> dict[str, Tensor]:
    return dict(x=torch.randn(T, D, dtype=dtype), weight=torch.randn(D, dtype=dtype))


def _modulated(dtype: torch.dtype, B: int, L: int, D: int, plain: int = 0, norm_first: int = 0) -> dict[str, object]:
    x, branch = torch.randn(2, B, L, D, dtype=dtype)
    weight = torch.randn(D, dtype=dtype)
    if plain:
        return dict(x=x, weight=weight, branch=branch)
    shift, scale, gate = torch.randn(3, B, D, dtype=dtype)
    order = "norm_modulate" if norm_first else "modulate_norm"
    return dict(x=x, weight=weight, shift=shift, scale=scale, branch=branch, gate=gate, order=order)


def _gated(dtype: torch.dtype, T: int, D: int, groups: int) -> dict[str, object]:
    x, z = torch.randn(2, T, D, dtype=dtype)
    return dict(x=x, z=z, weight=torch.randn(D, dtype=dtype), groups=groups)


OPS = (
    Op(
        fn=rms_norm,
        reference=reference.rms_norm,
        inputs=_rows,
        cases=(dict(T=5, D=37), dict(T=3, D=64), dict(T=1, D=1), dict(T=0, D=8)),
        shapes=(dict(T=16, D=2688), dict(T=4096, D=2688)),
        outputs=("y",),
        grads=("x", "weight"),
        cost=lambda itemsize, T, D: (4 * T * D, (2 * T * D + D) * itemsize),
    ),
    Op(
        fn=modulated_rms_norm,
        reference=reference.modulated_rms_norm,
        inputs=_modulated,
        cases=(
            dict(B=2, L=3, D=29),
            dict(B=2, L=3, D=29, norm_first=1),
            dict(B=2, L=1, D=64, plain=1),
            dict(B=1, L=0, D=8),
        ),
        shapes=(dict(B=1, L=16, D=2688), dict(B=1, L=16, D=2688, norm_first=1), dict(B=256, L=16, D=2688)),
        outputs=("y", "residual"),
        grads=("x", "weight", "shift", "scale", "branch", "gate"),
        cost=lambda itemsize, B, L, D, plain=0, norm_first=0: (9 * B * L * D, 4 * B * L * D * itemsize),
    ),
    Op(
        fn=gated_group_norm,
        reference=reference.gated_group_norm,
        inputs=_gated,
        cases=(
            dict(T=3, D=24, groups=4),
            dict(T=5, D=21, groups=3),
            dict(T=2, D=64, groups=1),
            dict(T=0, D=8, groups=2),
        ),
        shapes=(dict(T=16, D=4096, groups=8), dict(T=4096, D=4096, groups=8)),
        outputs=("y",),
        grads=("x", "z", "weight"),
        cost=lambda itemsize, T, D, groups: (9 * T * D, 3 * T * D * itemsize),
    ),
)
