"""The RMS norm that opens a residual layer: gate and add the last branch, modulate and norm, in one pass."""

import torch
import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, by_row, multiprocessors, run
from .modulated_rms_norm_kernels import _modulated_rms_norm_bwd_kernel, _modulated_rms_norm_fwd_kernel

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
