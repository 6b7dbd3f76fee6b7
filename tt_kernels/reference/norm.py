"""RMS norms, with modulation, gate and residual."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, compute_dtype


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    acc = compute_dtype(x.dtype, weight.dtype)
    return F.rms_norm(cast(x, acc), weight.shape, cast(weight, acc), eps).to(x.dtype)


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
        base, step = cast(x, acc), cast(branch, acc)
        residual = base + step if gate is None else torch.addcmul(base, step, cast(gate, acc).unsqueeze(-2))
        residual = cast(residual, x.dtype)
    y = cast(residual, acc)
    if shift is None or scale is None:
        return F.rms_norm(y, weight.shape, cast(weight, acc), eps).to(weight.dtype), residual
    shift, scale = cast(shift, acc).unsqueeze(-2), 1 + cast(scale, acc).unsqueeze(-2)  # [B, 1, D]
    if order == "modulate_norm":
        y = F.rms_norm(torch.addcmul(shift, y, scale), weight.shape, cast(weight, acc), eps)
    else:
        y = torch.addcmul(shift, F.rms_norm(y, weight.shape, cast(weight, acc), eps), scale)
    return cast(y, weight.dtype), residual


def gated_group_norm(x: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    acc = compute_dtype(x.dtype, weight.dtype)
    gated = cast(x, acc) * F.silu(cast(z, acc))
    by_group = gated.view(*gated.shape[:-1], groups, gated.shape[-1] // groups)
    y = F.rms_norm(by_group, by_group.shape[-1:], None, eps).view_as(gated)
    return cast(y * cast(weight, acc), z.dtype)
