"""Peers of the norms: PyTorch's own, and Liger's and fla's fused kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Arguments, Call, Peer, kernels_run, needs, only, prepared


def torch_rms_norm(a: Arguments) -> Call:
    only(a.x.dtype == a.weight.dtype, "F.rms_norm: x and weight of one dtype")
    return lambda: F.rms_norm(a.x, a.weight.shape, a.weight, a.eps)


def _casting(x: Tensor) -> str:
    """ "gemma" widens 16 bits and multiplies by the weight in fp32, as we do; "none" leaves fp32 as it is. In place,
    which is False below, a backward would overwrite the cotangent."""
    return "gemma" if x.dtype.itemsize == 2 else "none"


def liger_rms_norm(a: Arguments) -> Call:
    kernels_run(a.x, "liger-kernel")
    norm = needs("liger_kernel.ops.rms_norm", "liger-kernel").LigerRMSNormFunction.apply
    return lambda: norm(a.x, a.weight, a.eps, 0.0, _casting(a.x), False)


def liger_modulated(a: Arguments) -> Call:
    """(1 + scale) * rms_norm(x) + shift is one kernel of theirs; the gated residual before it is PyTorch, compiled."""
    only(a.order == "norm_modulate", "Liger modulates after the norm only")
    only(a.scale is not None and a.shift is not None, "Liger: with shift and scale only")
    kernels_run(a.x, "liger-kernel")
    norm = needs("liger_kernel.ops.modulated_rms_norm", "liger-kernel").LigerModulatedRMSNormFunction.apply
    add = prepared(_residual, a.x)

    def call() -> tuple[Tensor, Tensor]:
        residual = a.x if a.branch is None else add(a.x, a.branch, a.gate)
        return norm(residual, a.weight, a.scale, a.shift, a.eps, 0.0, _casting(a.x), False), residual

    return call


def _residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    step = branch.float() if gate is None else branch.float() * gate.float().unsqueeze(-2)
    return (x.float() + step).to(x.dtype)


def fla_gated(a: Arguments) -> Call:
    kernels_run(a.x, "fla-core")
    norm = needs("fla.modules.norm.layernorm_gated", "fla-core").rmsnorm_fn
    options = dict(z=a.z, eps=a.eps, group_size=a.x.shape[-1] // a.groups, norm_before_gate=False)
    return lambda: norm(a.x, a.weight, None, **options)


PEERS = {
    "rms_norm": (
        Peer("F.rms_norm", torch_rms_norm, backward=True),
        Peer("liger", liger_rms_norm, backward=True),
    ),
    "modulated_rms_norm": (Peer("liger", liger_modulated, backward=True),),
    "gated_group_norm": (Peer("fla", fla_gated, backward=True),),
}
