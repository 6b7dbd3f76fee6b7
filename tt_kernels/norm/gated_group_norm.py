"""The norm behind a Mamba-2 scan: gate by silu(z), then RMS-normalise by groups of channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.common import compute_dtype
from ..runtime.checks import check, is_real, is_whole, refuse
from ..runtime.lang import sigmoid
from ..runtime.launch import Launch, by_row, multiprocessors, run
from ..runtime.registry import define, takes_kernel

# ---- kernels ----


@triton.jit
def _gated_group_norm_fwd_kernel(
    x_ptr,  # [T, groups * N]
    z_ptr,  # [T, groups * N]
    weight_ptr,  # [groups * N]
    y_ptr,  # [T, groups * N], contiguous
    rstd_ptr,  # [T, groups], in the dtype of statistics and sums
    stride_x,
    stride_z,
    groups,
    N,
    EPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    cols = group[:, None] * N + offs_n[None, :]  # [BLOCK_G, BLOCK_N]
    mask = (group[:, None] < groups) & (offs_n[None, :] < N)
    acc = rstd_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(acc)
    z = tl.load(z_ptr + row * stride_z + cols, mask=mask, other=0.0).to(acc)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    u = x * (z * sigmoid(z))  # x z alone may overflow
    rstd = 1 / tl.sqrt(tl.sum(u * u, axis=1) / N + EPS)  # [BLOCK_G]
    tl.store(rstd_ptr + row * groups + group, rstd, mask=group < groups)
    y = u * rstd[:, None] * weight
    tl.store(y_ptr + row * groups * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_group_norm_bwd_kernel(
    dy_ptr,  # [T, groups * N], as x and z
    x_ptr,
    z_ptr,
    weight_ptr,  # [groups * N]
    rstd_ptr,  # [T, groups], in the dtype of statistics and sums
    dx_ptr,  # [T, groups * N], contiguous, as dz
    dz_ptr,
    dweight_ptr,  # [programs, groups * N]: summed afterwards in a fixed order
    stride_dy,
    stride_x,
    stride_z,
    T,
    groups,
    N,
    rows,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    cols = group[:, None] * N + offs_n[None, :]  # [BLOCK_G, BLOCK_N]
    mask = (group[:, None] < groups) & (offs_n[None, :] < N)
    acc = rstd_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    dweight = tl.zeros((BLOCK_G, BLOCK_N), dtype=acc)
    for row in range(program * rows, min((program + 1) * rows, T)):
        x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(acc)
        z = tl.load(z_ptr + row * stride_z + cols, mask=mask, other=0.0).to(acc)
        dy = tl.load(dy_ptr + row * stride_dy + cols, mask=mask, other=0.0).to(acc)
        rstd = tl.load(rstd_ptr + row * groups + group, mask=group < groups, other=0.0)[:, None]
        s = sigmoid(z)
        n = x * (z * s) * rstd  # normed, before the weight
        dweight += dy * n
        dn = dy * weight
        du = rstd * (dn - n * (tl.sum(dn * n, axis=1) / N)[:, None])
        tl.store(dx_ptr + row * groups * N + cols, (du * (z * s)).to(dx_ptr.dtype.element_ty), mask=mask)
        dz = du * x * (s * (1 + z * (1 - s)))
        tl.store(dz_ptr + row * groups * N + cols, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + program * groups * N + cols, dweight, mask=mask)


# ---- launches ----


def gated_group_norm_launch(T: int, groups: int, N: int, *, per_warp: int = 512) -> Launch:
    """Groups are independent: at few tokens a group a program fills the GPU; from some 500 rows on there are enough
    programs, and up to 4096 channels in one keep more bytes in flight for each launch of a program."""
    block_n = triton.next_power_of_2(N)
    together = max(1, min(triton.next_power_of_2(groups), 4096 // block_n)) if T >= 512 else 1
    warps = min(max(together * block_n // per_warp, 1), 16)
    return Launch(BLOCK_G=together, BLOCK_N=block_n, num_warps=warps, num_stages=1)


def _gated_group_norm_fwd(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = _gated_group_norm_fwd_fake(x, z, weight, groups, eps)
    rows, gates, N = by_row(x), by_row(z), x.shape[-1] // groups
    launch = gated_group_norm_launch(len(rows), groups, N)
    run(
        _gated_group_norm_fwd_kernel,
        (len(rows), triton.cdiv(groups, launch.BLOCK_G) if N else 0),
        *(rows, gates, weight.contiguous(), y, rstd, rows.stride(0), gates.stride(0), groups, N),
        EPS=eps,
        launch=launch,
    )
    return y, rstd


def _gated_group_norm_bwd(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dz, _ = _gated_group_norm_bwd_fake(dy, x, z, weight, rstd)
    dys, rows, gates, groups = by_row(dy), by_row(x), by_row(z), rstd.shape[-1]
    T, N = len(rows), x.shape[-1] // groups
    launch = gated_group_norm_launch(T, groups, N, per_warp=256)
    count = max(1, triton.cdiv(T, 2 * multiprocessors(x)))  # rows a program: bounds the partial sums
    dweight = rstd.new_empty(triton.cdiv(T, count), x.shape[-1])
    run(
        _gated_group_norm_bwd_kernel,
        (len(dweight), triton.cdiv(groups, launch.BLOCK_G) if N else 0),
        *(dys, rows, gates, weight.contiguous(), rstd, dx, dz, dweight),
        *(dys.stride(0), rows.stride(0), gates.stride(0), T, groups, N, count),
        launch=launch,
    )
    return dx, dz, dweight.sum(0).to(weight.dtype)


# ---- op ----


def _gated_group_norm_fwd_fake(x, z, weight, groups, eps):
    return z.new_empty(z.shape), x.new_empty((*x.shape[:-1], groups), dtype=compute_dtype(x.dtype, weight.dtype))


def _gated_group_norm_bwd_fake(dy, x, z, weight, rstd):
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


_fwd = define(
    "gated_group_norm_fwd(Tensor x, Tensor z, Tensor weight, SymInt groups, float eps) -> (Tensor, Tensor)",
    _gated_group_norm_fwd,
    _gated_group_norm_fwd_fake,
)

_bwd = define(
    "gated_group_norm_bwd(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _gated_group_norm_bwd,
    _gated_group_norm_bwd_fake,
)


class _GatedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, groups, eps):
        y, rstd = _fwd(x, z, weight, groups, eps)
        ctx.save_for_backward(x, z, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return *_bwd(dy, *ctx.saved_tensors), None, None


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
    Raises ValueError for sizes that disagree, groups that do not divide D, an eps below 0. Cost for T rows: 9 T D
    flops, 3 T D itemsize bytes, so bound by memory. Source: `rmsnorm_fn` of mamba_ssm with norm_before_gate=False.
    """
    check("gated_group_norm", 3, x=(x, "* D"), z=(z, "* D"), weight=(weight, "D"))
    if not is_whole(groups) or groups < 1 or x.shape[-1] % groups:
        refuse("gated_group_norm", "groups", groups, f"a divisor of D={x.shape[-1]}")
    if not (is_real(eps) and eps >= 0):
        refuse("gated_group_norm", "eps", eps, "a number, 0 or more")
    if not takes_kernel("gated_group_norm", x, z, weight):
        return reference.gated_group_norm(x, z, weight, groups=groups, eps=eps)
    return _GatedGroupNorm.apply(x, z, weight, int(groups), float(eps))
