"""Cards of the RMS norms."""

import torch

from tt_kernels.norm.gated_group_norm import gated_group_norm
from tt_kernels.norm.modulated_rms_norm import modulated_rms_norm
from tt_kernels.norm.rms_norm import rms_norm

from .op import Op


def _gated(dtype, T, D, groups):
    x, z = torch.randn(2, T, D, dtype=dtype)
    return dict(x=x, z=z, weight=torch.randn(D, dtype=dtype), groups=groups)


def modulated_inputs(dtype, B, L, D, plain=0, norm_first=0):
    x, branch = torch.randn(2, B, L, D, dtype=dtype)
    weight = torch.randn(D, dtype=dtype)
    if plain:
        return dict(x=x, weight=weight, branch=branch)
    shift, scale, gate = torch.randn(3, B, D, dtype=dtype)
    order = "norm_modulate" if norm_first else "modulate_norm"
    return dict(x=x, weight=weight, shift=shift, scale=scale, branch=branch, gate=gate, order=order)


OPS = (
    Op(
        fn=gated_group_norm,
        when="After a Mamba-2 scan: its gate, and the norm of each group of heads, in one pass.",
        inputs=_gated,
        cases=(
            dict(T=3, D=24, groups=4),
            dict(T=5, D=21, groups=3),
            dict(T=2, D=64, groups=1),
            dict(T=19, D=10, groups=2),
            dict(T=0, D=8, groups=2),
        ),
        shapes=(dict(T=16, D=4096, groups=8), dict(T=4096, D=4096, groups=8)),
        outputs=("y",),
        grads=("x", "z", "weight"),
        kernels=("_gated_group_norm_fwd_kernel", "_gated_group_norm_bwd_kernel"),
        cost=lambda itemsize, T, D, groups: (9 * T * D, 3 * T * D * itemsize),
    ),
    Op(
        fn=modulated_rms_norm,
        when="Between two residual layers: one pass adds, norms and modulates (adaLN). Without modulation too.",
        inputs=modulated_inputs,
        cases=(
            dict(B=2, L=3, D=29),
            dict(B=2, L=3, D=29, norm_first=1),
            dict(B=2, L=1, D=64, plain=1),
            dict(B=3, L=13, D=6),
            dict(B=1, L=0, D=8),
        ),
        shapes=(
            *(dict(B=1, L=16, D=2688, **order) for order in ({}, dict(norm_first=1), dict(plain=1))),
            dict(B=256, L=16, D=2688),
        ),
        outputs=("y", "residual"),
        grads=("x", "weight", "shift", "scale", "branch", "gate"),
        kernels=("_modulated_rms_norm_fwd_kernel", "_modulated_rms_norm_bwd_kernel"),
        cost=lambda itemsize, B, L, D, **_: (9 * B * L * D, 4 * B * L * D * itemsize),
    ),
    Op(
        fn=rms_norm,
        when="A norm by itself. Where a residual is added before, `modulated_rms_norm` saves a pass.",
        inputs=lambda dtype, T, D: dict(x=torch.randn(T, D, dtype=dtype), weight=torch.randn(D, dtype=dtype)),
        cases=(dict(T=5, D=37), dict(T=19, D=5), dict(T=3, D=64), dict(T=1, D=1), dict(T=0, D=8)),
        shapes=(dict(T=16, D=2688), dict(T=4096, D=2688)),
        outputs=("y",),
        grads=("x", "weight"),
        kernels=("_modulated_rms_norm_fwd_kernel", "_modulated_rms_norm_bwd_kernel"),
        cost=lambda itemsize, T, D: (4 * T * D, (2 * T * D + D) * itemsize),
    ),
)
