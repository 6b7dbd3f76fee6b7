"""RMS norms, with modulation, gate and residual."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import compute_dtype


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    acc = compute_dtype(x.dtype, weight.dtype)
    return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(x.dtype)


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
    acc = compute_dtype(x.dtype, weight.dtype)
    residual = x
    if branch is not None:
        base, step = x.to(acc), branch.to(acc)
        residual = base + step if gate is None else torch.addcmul(base, step, gate.to(acc).unsqueeze(-2))
        residual = residual.to(x.dtype)
    y = residual.to(acc)
    if shift is None or scale is None:
        return F.rms_norm(y, weight.shape, weight.to(acc), eps).to(weight.dtype), residual
    shift, scale = shift.to(acc).unsqueeze(-2), 1 + scale.to(acc).unsqueeze(-2)  # [B, 1, D]
    if order == "modulate_norm":
        y = F.rms_norm(torch.addcmul(shift, y, scale), weight.shape, weight.to(acc), eps)
    else:
        y = torch.addcmul(shift, F.rms_norm(y, weight.shape, weight.to(acc), eps), scale)
    return y.to(weight.dtype), residual


def gated_group_norm(x: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    acc = compute_dtype(x.dtype, weight.dtype)
    gated = (x.to(acc) * F.silu(z.to(acc))).unflatten(-1, (groups, -1))
    y = F.rms_norm(gated, gated.shape[-1:], None, eps).flatten(-2)
    return (y * weight.to(acc)).to(z.dtype)
