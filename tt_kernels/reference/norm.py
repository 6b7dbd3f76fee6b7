"""RMS norms, with modulation, gate and residual."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, compute_dtype, full_precision


class Modulated(NamedTuple):
    """The result of `modulated_rms_norm`."""

    y: Tensor  # [*, L, D], dtype of weight: what the next layer reads
    residual: Tensor  # [*, L, D], dtype of x: the stream with the branch


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()


@full_precision
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    acc = compute_dtype(x.dtype, weight.dtype)
    return cast(_normalise(cast(x, acc), eps) * cast(weight, acc), x.dtype)


@full_precision
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
    acc = compute_dtype(x.dtype, weight.dtype)
    residual = x
    if branch is not None:
        base, step = cast(x, acc), cast(branch, acc)
        residual = base + step if gate is None else torch.addcmul(base, step, cast(gate, acc).unsqueeze(-2))
        residual = cast(residual, x.dtype)
    y = cast(residual, acc)
    if shift is None or scale is None:
        return Modulated(cast(_normalise(y, eps) * cast(weight, acc), weight.dtype), residual)
    shift, scale = cast(shift, acc).unsqueeze(-2), 1 + cast(scale, acc).unsqueeze(-2)  # [B, 1, D]
    if order == "modulate_norm":
        y = _normalise(torch.addcmul(shift, y, scale), eps) * cast(weight, acc)
    else:
        y = torch.addcmul(shift, _normalise(y, eps) * cast(weight, acc), scale)
    return Modulated(cast(y, weight.dtype), residual)


@full_precision
def gated_group_norm(x: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    acc = compute_dtype(x.dtype, weight.dtype)
    gated = cast(x, acc) * F.silu(cast(z, acc))
    by_group = gated.view(*gated.shape[:-1], groups, gated.shape[-1] // groups)
    y = _normalise(by_group, eps).view_as(gated)
    return cast(y * cast(weight, acc), z.dtype)
