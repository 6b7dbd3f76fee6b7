"""Peers of the norms: PyTorch's own, and Liger's fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .base import Peer, kernels_run, needs, only, prepared


def torch_rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Callable[[], Any]:
    only(x.dtype == weight.dtype, "F.rms_norm: x and weight of one dtype")
    return lambda: F.rms_norm(x, weight.shape, weight, eps)


def liger_rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Callable[[], Any]:
    kernels_run(x, "liger-kernel")
    ops = needs("liger_kernel.ops.rms_norm", "liger-kernel")
    return lambda: ops.LigerRMSNormFunction.apply(x, weight, eps, 0.0, _casting(x), False)


def _casting(x: Tensor) -> str:
    """ "gemma" widens 16 bits and multiplies by the weight in fp32, as we do; "none" leaves fp32 as it is. In place,
    which is False above and below, a backward would overwrite the cotangent."""
    return "gemma" if x.dtype.itemsize == 2 else "none"


def liger_modulated(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    order: str = "modulate_norm",
    eps: float = 1e-5,
) -> Callable[[], Any]:
    """(1 + scale) * rms_norm(x) + shift is one kernel of theirs; the gated residual before it is PyTorch, compiled."""
    only(order == "norm_modulate", "Liger modulates after the norm only")
    only(scale is not None and shift is not None, "Liger: with shift and scale only")
    kernels_run(x, "liger-kernel")
    ops = needs("liger_kernel.ops.modulated_rms_norm", "liger-kernel")
    assert scale is not None
    add = prepared(_residual, x)

    def call() -> tuple[Tensor, Tensor]:
        residual = x if branch is None else add(x, branch, gate)
        norm = ops.LigerModulatedRMSNormFunction.apply
        return norm(residual, weight, scale, shift, eps, 0.0, _casting(x), False), residual

    return call


def _residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    step = branch.float() if gate is None else branch.float() * gate.float().unsqueeze(-2)
    return (x.float() + step).to(x.dtype)


def fla_gated(x: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5) -> Callable[[], Any]:
    kernels_run(x, "fla-core")
    ops = needs("fla.modules.norm.layernorm_gated", "fla-core")
    return lambda: ops.rmsnorm_fn(
        x, weight, None, z=z, eps=eps, group_size=x.shape[-1] // groups, norm_before_gate=False
    )


PEERS = {
    "rms_norm": (
        Peer("F.rms_norm", torch_rms_norm, backward=True),
        Peer("liger", liger_rms_norm, backward=True),
    ),
    "modulated_rms_norm": (Peer("liger", liger_modulated, backward=True),),
    "gated_group_norm": (Peer("fla", fla_gated, backward=True),),
}
