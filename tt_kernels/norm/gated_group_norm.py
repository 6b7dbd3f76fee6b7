"""The norm behind a Mamba-2 scan: gate by silu(z), then RMS-normalise by groups of channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.common import compute_dtype
from ..runtime.checks import check, eps_of, is_whole, refuse
from ..runtime.lang import load_row, programmatic_launch, sigmoid
from ..runtime.launch import Launch, multiprocessors, run
from ..runtime.registry import define, takes_kernel, unasked
from ..runtime.structs import rows_of


@triton.jit
def _gated_group_norm_fwd_kernel(
    x,  # Rows [T, groups * N], as z
    z,
    weight_ptr,  # [groups * N]
    y_ptr,  # [T, groups * N], contiguous
    rstd_ptr,  # [T, groups], in the dtype of statistics and sums
    groups,
    N,
    EPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    programmatic_launch()
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    cols = group[:, None] * N + offs_n[None, :]  # [BLOCK_G, BLOCK_N]
    mask = (group[:, None] < groups) & (offs_n[None, :] < N)
    acc = rstd_ptr.dtype.element_ty
    v = load_row(x, row, cols, mask, acc)  # [BLOCK_G, BLOCK_N]
    g = load_row(z, row, cols, mask, acc)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    u = v * (g * sigmoid(g))  # v g alone may overflow
    rstd = 1 / tl.sqrt(tl.sum(u * u, axis=1) / N + EPS)  # [BLOCK_G]
    tl.store(rstd_ptr + row * groups + group, rstd, mask=group < groups)
    y = u * rstd[:, None] * weight
    tl.store(y_ptr + row * groups * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "rows"])
def _gated_group_norm_bwd_kernel(
    dy,  # Rows [T, groups * N], as x and z
    x,
    z,
    weight_ptr,  # [groups * N]
    rstd_ptr,  # [T, groups], in the dtype of statistics and sums
    dx_ptr,  # [T, groups * N], contiguous, as dz
    dz_ptr,
    dweight_ptr,  # [programs, groups * N]: summed afterwards in a fixed order
    T,
    groups,
    N,
    rows,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    programmatic_launch()
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    cols = group[:, None] * N + offs_n[None, :]  # [BLOCK_G, BLOCK_N]
    mask = (group[:, None] < groups) & (offs_n[None, :] < N)
    acc = rstd_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    dweight = tl.zeros((BLOCK_G, BLOCK_N), dtype=acc)
    for row in range(program * rows, min((program + 1) * rows, T)):
        v = load_row(x, row, cols, mask, acc)
        g = load_row(z, row, cols, mask, acc)
        d = load_row(dy, row, cols, mask, acc)
        rstd = tl.load(rstd_ptr + row * groups + group, mask=group < groups, other=0.0)[:, None]
        s = sigmoid(g)
        n = v * (g * s) * rstd  # normed, before the weight
        dweight += d * n
        dn = d * weight
        du = rstd * (dn - n * (tl.sum(dn * n, axis=1) / N)[:, None])
        tl.store(dx_ptr + row * groups * N + cols, (du * (g * s)).to(dx_ptr.dtype.element_ty), mask=mask)
        dz = du * v * (s * (1 + g * (1 - s)))
        tl.store(dz_ptr + row * groups * N + cols, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + program * groups * N + cols, dweight, mask=mask)


def gated_group_norm_launch(T: int, groups: int, N: int, *, per_warp: int = 512) -> Launch:
    """Groups are independent.

    | rows      | a program takes         | reason                                                        |
    |-----------|-------------------------|---------------------------------------------------------------|
    | below 512 | one group               | a program for each group fills the GPU                        |
    | 512 on    | groups of 4096 channels | enough programs are left, and each keeps more bytes in flight |
    """
    block_n = triton.next_power_of_2(N)
    together = max(1, min(triton.next_power_of_2(groups), 4096 // block_n)) if T >= 512 else 1
    warps = min(max(together * block_n // per_warp, 1), 16)
    return Launch(BLOCK_G=together, BLOCK_N=block_n, num_warps=warps)


def _gated_group_norm_fwd(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = _gated_group_norm_fwd_fake(x, z, weight, groups, eps)
    T, N = x.shape[:-1].numel(), x.shape[-1] // groups
    launch = gated_group_norm_launch(T, groups, N)
    run(
        _gated_group_norm_fwd_kernel,
        (T, triton.cdiv(groups, launch.BLOCK_G) if N else 0),
        *(rows_of(x), rows_of(z), weight.contiguous(), y, rstd, groups, N),
        EPS=eps,
        launch=launch,
    )
    return y, rstd


def _gated_group_norm_bwd(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dz, dweight = _gated_group_norm_bwd_fake(dy, x, z, weight, rstd)
    groups = rstd.shape[-1]
    T, N = x.shape[:-1].numel(), x.shape[-1] // groups
    launch = gated_group_norm_launch(T, groups, N, per_warp=256)
    count = max(1, triton.cdiv(T, 2 * multiprocessors(x)))  # rows a program: bounds the partial sums
    parts = rstd.new_empty(triton.cdiv(T, count), x.shape[-1])
    run(
        _gated_group_norm_bwd_kernel,
        (len(parts), triton.cdiv(groups, launch.BLOCK_G) if N else 0),
        *(rows_of(dy), rows_of(x), rows_of(z), weight.contiguous(), rstd, dx, dz, parts),
        *(T, groups, N, count),
        launch=launch,
    )
    dweight.copy_(parts.sum(0))
    return dx, dz, dweight


def _gated_group_norm_fwd_fake(x, z, weight, groups, eps):
    rstd = x.new_empty((*x.shape[:-1], groups), dtype=compute_dtype(x.dtype, weight.dtype))
    return z.new_empty(z.shape), rstd


def _gated_group_norm_bwd_fake(dy, x, z, weight, rstd):
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


_fwd = define(_gated_group_norm_fwd, _gated_group_norm_fwd_fake)

_bwd = define(_gated_group_norm_bwd, _gated_group_norm_bwd_fake)


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


@unasked(reference.gated_group_norm)
def gated_group_norm(x: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    """Gate x by silu(z), then RMS-normalise within each of `groups` equal runs of channels, times weight.

    Args:
        x:      [*, D] float, any strides: the scan's output.
        z:      [*, D] float: the gate.
        weight: [D] float.
        groups: divides D.
        eps:    added to the mean square.
    Returns:
        y: [*, D] dtype of z.

    Numerics: computes in fp32 (fp64 where x or weight is fp64) and rounds once. Deterministic.
    Gradients: for all tensors.
    Raises: ValueError for sizes that disagree, groups that do not divide D, an eps below 0.
    Cost: for T rows 9 T D flops and 3 T D itemsize bytes: bound by memory.
    Source: `rmsnorm_fn` of mamba_ssm with norm_before_gate=False.

    Example:
        >>> x, z = torch.randn(2, 4, 4096)
        >>> y = gated_group_norm(x, z, torch.ones(4096), groups=8)
    """
    check("gated_group_norm", 3, x=(x, "* D"), z=(z, "* D"), weight=(weight, "D"))
    if not is_whole(groups) or groups < 1 or x.shape[-1] % groups:
        refuse("gated_group_norm", "groups", groups, f"a divisor of D={x.shape[-1]}")
    eps = eps_of("gated_group_norm", eps)
    if not takes_kernel("gated_group_norm", x, z, weight):
        return reference.gated_group_norm(x, z, weight, groups=groups, eps=eps)
    y: Tensor = _GatedGroupNorm.apply(x, z, weight, int(groups), eps)
    return y
