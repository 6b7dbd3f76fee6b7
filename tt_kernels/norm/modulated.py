"""The RMS norm that opens a residual layer: gate and add the last branch, modulate and norm, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..core import Op, check, define, is_real, refuse, takes_kernel
from ..launch import Launch, by_row, multiprocessors, run
from ..reference.common import compute_dtype

# ---- kernels ----


@triton.jit
def _modulated_rms_norm_fwd_kernel(
    x_ptr,  # [B * L, D]
    weight_ptr,  # [D]
    shift_ptr,  # [B, D], as scale and gate
    scale_ptr,
    branch_ptr,  # [B * L, D]
    gate_ptr,
    y_ptr,  # [B * L, D], contiguous, as residual
    residual_ptr,
    rstd_ptr,  # [B * L], in the dtype of statistics and sums
    stride_x,
    stride_branch,
    stride_shift,
    stride_scale,
    stride_gate,
    L,
    D,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    MODULATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    acc = rstd_ptr.dtype.element_ty
    r = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(acc)  # [BLOCK_D]
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row * stride_branch + cols, mask=mask, other=0.0).to(acc)
        if HAS_GATE:
            branch *= tl.load(gate_ptr + b * stride_gate + cols, mask=mask, other=0.0).to(acc)
        rounded = (r + branch).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * D + cols, rounded, mask=mask)
        r = rounded.to(acc)  # the norm sees what the next layer will
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    if MODULATED:
        shift = tl.load(shift_ptr + b * stride_shift + cols, mask=mask, other=0.0).to(acc)
        scale = 1 + tl.load(scale_ptr + b * stride_scale + cols, mask=mask, other=0.0).to(acc)
        if not NORM_FIRST:
            r = r * scale + shift
    rstd = 1 / tl.sqrt(tl.sum(r * r, axis=0) / D + EPS)
    tl.store(rstd_ptr + row, rstd)
    y = r * rstd * weight
    if MODULATED and NORM_FIRST:
        y = y * scale + shift
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _modulated_rms_norm_bwd_kernel(
    dy_ptr,  # [B * L, D], as dresidual
    dresidual_ptr,
    residual_ptr,  # [B * L, D]
    weight_ptr,  # [D]
    shift_ptr,  # [B, D], as scale and gate
    scale_ptr,
    branch_ptr,  # [B * L, D]
    gate_ptr,
    rstd_ptr,  # [B * L], in the dtype of statistics and sums
    dx_ptr,  # [B * L, D], contiguous, as dbranch
    dbranch_ptr,
    dweight_ptr,  # [B * chunks, D]: one row a program, summed afterwards in a fixed order; as the next three
    dshift_ptr,
    dscale_ptr,
    dgate_ptr,
    stride_dy,
    stride_dresidual,
    stride_residual,
    stride_shift,
    stride_scale,
    stride_branch,
    stride_gate,
    L,
    D,
    chunks,
    rows,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    MODULATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program takes `rows` rows of one sequence, so that its shift, scale and gate are loaded once.
    program = tl.program_id(0).to(tl.int64)
    b, chunk = program // chunks, program % chunks
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    acc = rstd_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    dweight = tl.zeros((BLOCK_D,), dtype=acc)
    if MODULATED:
        shift = tl.load(shift_ptr + b * stride_shift + cols, mask=mask, other=0.0).to(acc)
        scale = 1 + tl.load(scale_ptr + b * stride_scale + cols, mask=mask, other=0.0).to(acc)
        dshift = tl.zeros((BLOCK_D,), dtype=acc)
        dscale = tl.zeros((BLOCK_D,), dtype=acc)
    if HAS_GATE:
        gate = tl.load(gate_ptr + b * stride_gate + cols, mask=mask, other=0.0).to(acc)
        dgate = tl.zeros((BLOCK_D,), dtype=acc)
    for row in range(b * L + chunk * rows, b * L + min((chunk + 1) * rows, L)):
        r = tl.load(residual_ptr + row * stride_residual + cols, mask=mask, other=0.0).to(acc)
        dy = tl.load(dy_ptr + row * stride_dy + cols, mask=mask, other=0.0).to(acc)
        rstd = tl.load(rstd_ptr + row)
        m = r
        if MODULATED:
            if NORM_FIRST:
                dshift += dy
                dscale += dy * r * rstd * weight
                dy = dy * scale
            else:
                m = r * scale + shift
        n = m * rstd  # normed, before the weight
        dweight += dy * n
        dn = dy * weight
        dm = rstd * (dn - n * (tl.sum(dn * n, axis=0) / D))
        if MODULATED and not NORM_FIRST:
            dshift += dm
            dscale += dm * r
            dm = dm * scale
        if HAS_DRESIDUAL:
            dm += tl.load(dresidual_ptr + row * stride_dresidual + cols, mask=mask, other=0.0).to(acc)
        tl.store(dx_ptr + row * D + cols, dm.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_GATE:
            branch = tl.load(branch_ptr + row * stride_branch + cols, mask=mask, other=0.0).to(acc)
            dgate += dm * branch
            tl.store(dbranch_ptr + row * D + cols, (dm * gate).to(dbranch_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + program * D + cols, dweight, mask=mask)
    if MODULATED:
        tl.store(dshift_ptr + program * D + cols, dshift, mask=mask)
        tl.store(dscale_ptr + program * D + cols, dscale, mask=mask)
    if HAS_GATE:
        tl.store(dgate_ptr + program * D + cols, dgate, mask=mask)


# ---- launches ----


def modulated_rms_norm_fwd_launch(D: int) -> Launch:
    """A row a program. 16 elements a thread (two 16-byte loads in 16 bits) leave room for the six vectors of a row;
    masked lanes past D cost no traffic."""
    block = triton.next_power_of_2(D)
    return Launch(BLOCK_D=block, num_warps=min(max(block // 512, 1), 16), num_stages=1)


def modulated_rms_norm_bwd_launch(D: int) -> Launch:
    """Up to eleven vectors of a row live at once: 8 elements a thread."""
    block = triton.next_power_of_2(D)
    return Launch(BLOCK_D=block, num_warps=min(max(block // 256, 1), 16), num_stages=1)


def bwd_rows(B: int, L: int, multiprocessors: int) -> int:
    """Rows a program of the backward: two programs a multiprocessor bound the partial sums, one sequence at most."""
    return max(1, min(L, triton.cdiv(B * L, 2 * multiprocessors)))


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _modulated_rms_norm_fwd(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    norm_first: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    L = x.shape[-2] if x.dim() > 1 else 1
    y, residual, rstd = _modulated_rms_norm_fwd_fake(x, weight, shift, scale, branch, gate, norm_first, eps, dtype)
    rows, branch, shift, scale, gate = (by_row(t) for t in (x, branch, shift, scale, gate))
    run(
        _modulated_rms_norm_fwd_kernel,
        (rows.shape[0] if D else 0,),
        *(rows, weight.contiguous(), shift, scale, branch, gate, y, residual, rstd),
        *(rows.stride(0), _stride(branch), _stride(shift), _stride(scale), _stride(gate), L, D),
        EPS=eps,
        HAS_BRANCH=branch is not None,
        HAS_GATE=gate is not None,
        MODULATED=shift is not None,
        NORM_FIRST=norm_first,
        launch=modulated_rms_norm_fwd_launch(D),
    )
    return y, residual, rstd


def _modulated_rms_norm_bwd(
    dy: Tensor,
    dresidual: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = residual.new_empty(residual.shape)
    dbranch = residual.new_empty(0) if gate is None else branch.new_empty(branch.shape)
    D = residual.shape[-1]
    L = residual.shape[-2] if residual.dim() > 1 else 1
    B = residual.shape[:-2].numel()
    rows = bwd_rows(B, L, multiprocessors(residual))
    chunks = max(1, triton.cdiv(L, rows))
    # [4, B * chunks, D]: dweight, dshift, dscale, dgate
    partial = rstd.new_empty(4 if gate is not None else 3 if shift is not None else 1, B * chunks, D)
    dys, dresiduals, residuals = by_row(dy), by_row(dresidual), by_row(residual)
    rows_of = [by_row(t) for t in (shift, scale, branch, gate)]
    run(
        _modulated_rms_norm_bwd_kernel,
        (B * chunks if D else 0,),
        *(dys, dresiduals, residuals, weight.contiguous(), *rows_of, rstd, dx, dbranch),
        *(partial[0], partial[1 % len(partial)], partial[2 % len(partial)], partial[3 % len(partial)]),
        *(dys.stride(0), _stride(dresiduals), residuals.stride(0)),
        *(*map(_stride, rows_of), L, D, chunks, rows),
        HAS_DRESIDUAL=dresidual is not None,
        HAS_GATE=gate is not None,
        MODULATED=shift is not None,
        NORM_FIRST=norm_first,
        launch=modulated_rms_norm_bwd_launch(D),
    )
    dweight = partial[0].sum(0).to(weight.dtype)

    def per_sequence(i: int, t: Tensor | None) -> Tensor:
        if t is None:
            return residual.new_empty(0)
        return partial[i].unflatten(0, (B, chunks)).sum(1).to(t.dtype).view(t.shape)

    return dx, dbranch, dweight, per_sequence(1, shift), per_sequence(2, scale), per_sequence(3, gate)


# ---- op ----


def _modulated_rms_norm_fwd_fake(x, weight, shift, scale, branch, gate, norm_first, eps, dtype):
    y = x.new_empty(x.shape, dtype=dtype)
    residual = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    return y, residual, x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype, weight.dtype))


def _modulated_rms_norm_bwd_fake(dy, dresidual, residual, weight, shift, scale, branch, gate, rstd, norm_first):
    def like(t: Tensor | None) -> Tensor:
        return residual.new_empty(0) if t is None else t.new_empty(t.shape)

    dbranch = residual.new_empty(0) if gate is None else branch.new_empty(branch.shape)
    return like(residual), dbranch, like(weight), like(shift), like(scale), like(gate)


_fwd = define(
    "modulated_rms_norm_fwd(Tensor x, Tensor weight, Tensor? shift, Tensor? scale, Tensor? branch, Tensor? gate, "
    "bool norm_first, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _modulated_rms_norm_fwd,
    _modulated_rms_norm_fwd_fake,
)
_bwd = define(
    "modulated_rms_norm_bwd(Tensor dy, Tensor? dresidual, Tensor residual, Tensor weight, Tensor? shift, "
    "Tensor? scale, Tensor? branch, Tensor? gate, Tensor rstd, bool norm_first) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _modulated_rms_norm_bwd,
    _modulated_rms_norm_bwd_fake,
)


class ModulatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, shift, scale, branch, gate, norm_first, eps, dtype):
        y, residual, rstd = _fwd(x, weight, shift, scale, branch, gate, norm_first, eps, dtype)
        kept = x if branch is None else residual
        ctx.save_for_backward(kept, weight, shift, scale, branch if gate is not None else None, gate, rstd)
        ctx.norm_first, ctx.has_branch = norm_first, branch is not None
        ctx.set_materialize_grads(False)
        return y, residual

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dresidual):
        residual, weight, shift, scale, branch, gate, rstd = ctx.saved_tensors
        if dy is None:  # only the residual is used further on
            dy = residual.new_zeros(residual.shape, dtype=weight.dtype)
        if not ctx.has_branch:
            dresidual = None  # the residual is x itself: its gradient does not come through here
        dx, dbranch, dweight, dshift, dscale, dgate = _bwd(
            dy, dresidual, residual, weight, shift, scale, branch, gate, rstd, ctx.norm_first
        )
        if gate is None:
            dbranch, dgate = dx if ctx.has_branch else None, None
        if shift is None:
            dshift = dscale = None
        return dx, dweight, dshift, dscale, dbranch, dgate, None, None, None


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
    rows = dict(shift=(shift, "* D"), scale=(scale, "* D"), gate=(gate, "* D"))
    check("modulated_rms_norm", 2, x=(x, "* L D"), weight=(weight, "D"), branch=(branch, "* L D"), **rows)
    if order not in ("modulate_norm", "norm_modulate"):
        refuse("modulated_rms_norm", "order", order, "'modulate_norm' or 'norm_modulate'")
    if (shift is None) != (scale is None):
        refuse("modulated_rms_norm", "shift" if shift is None else "scale", None, "shift and scale, or neither")
    if gate is not None and branch is None:
        refuse("modulated_rms_norm", "branch", None, "a branch beside the gate")
    if not (is_real(eps) and eps >= 0):
        refuse("modulated_rms_norm", "eps", eps, "a number, 0 or more")
    if not takes_kernel("modulated_rms_norm", x, weight, shift, scale, branch, gate):
        return reference.modulated_rms_norm(x, weight, shift, scale, branch=branch, gate=gate, order=order, eps=eps)
    norm_first = order == "norm_modulate"
    y, residual = ModulatedRMSNorm.apply(x, weight, shift, scale, branch, gate, norm_first, float(eps), weight.dtype)
    return y, x if branch is None else residual


# ---- card ----


def _modulated(dtype: torch.dtype, B: int, L: int, D: int, plain: int = 0, norm_first: int = 0) -> dict[str, object]:
    x, branch = torch.randn(2, B, L, D, dtype=dtype)
    weight = torch.randn(D, dtype=dtype)
    if plain:
        return dict(x=x, weight=weight, branch=branch)
    shift, scale, gate = torch.randn(3, B, D, dtype=dtype)
    order = "norm_modulate" if norm_first else "modulate_norm"
    return dict(x=x, weight=weight, shift=shift, scale=scale, branch=branch, gate=gate, order=order)


OPS = (
    Op(
        fn=modulated_rms_norm,
        reference=reference.modulated_rms_norm,
        inputs=_modulated,
        cases=(
            *(dict(B=2, L=3, D=29), dict(B=2, L=3, D=29, norm_first=1), dict(B=2, L=1, D=64, plain=1)),
            *(dict(B=3, L=13, D=6), dict(B=1, L=0, D=8)),
        ),
        shapes=(
            *(dict(B=1, L=16, D=2688), dict(B=1, L=16, D=2688, norm_first=1)),
            *(dict(B=1, L=16, D=2688, plain=1), dict(B=256, L=16, D=2688)),
        ),
        outputs=("y", "residual"),
        grads=("x", "weight", "shift", "scale", "branch", "gate"),
        kernels=("_modulated_rms_norm_fwd_kernel", "_modulated_rms_norm_bwd_kernel"),
        cost=lambda itemsize, B, L, D, plain=0, norm_first=0: (9 * B * L * D, 4 * B * L * D * itemsize),
    ),
)
