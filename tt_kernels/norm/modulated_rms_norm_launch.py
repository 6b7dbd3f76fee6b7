"""The launches of `modulated_rms_norm`, forward and backward."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, multiprocessors, run
from ..runtime.structs import Parts, rows_of
from .modulated_rms_norm_kernels import _modulated_rms_norm_bwd_kernel, _modulated_rms_norm_fwd_kernel


def rms_norm_launch(D: int, elements: int, **more: int) -> Launch:
    """A row a program, `elements` of it a thread; masked lanes past D cost no traffic."""
    block = triton.next_power_of_2(D)
    return Launch(BLOCK_D=block, num_warps=min(max(block // (32 * elements), 1), 16), **more)


def fwd_launch(rows: int, D: int, multiprocessors: int) -> Launch:
    """16 a thread: two 16-byte loads in 16 bits leave registers for the vectors of a row, and of its experts. Where
    every program has a multiprocessor of its own 8, since nothing but its loads in flight is to be hidden.

    128 registers, which a program of 16 warps may have in any case: told so, ptxas has all loads on their way at once.
    By itself it takes half as many for one program more, and waits for memory two to four times.
    """
    return rms_norm_launch(D, 8 if rows <= multiprocessors else 16, maxnreg=128)


def bwd_launch(D: int) -> Launch:
    """8 a thread: up to eleven vectors of a row live at once."""
    return rms_norm_launch(D, 8)


def bwd_rows(B: int, L: int, multiprocessors: int) -> int:
    """Rows a program of the backward: two programs a multiprocessor bound the partial sums, one sequence at most."""
    return max(1, min(L, triton.cdiv(B * L, 2 * multiprocessors)))


class NormGradients(NamedTuple):
    """Empty where there was no argument; dbranch too where there is no gate: it is dx then."""

    dx: Tensor
    dweight: Tensor
    dshift: Tensor
    dscale: Tensor
    dbranch: Tensor
    dgate: Tensor


def launch_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    norm_first: bool,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
    parts: Parts | None = None,
    branch_weight: Tensor | None = None,
) -> None:
    """Writes y, residual and rstd: `out`. branch_weight [B * L], contiguous: of what is added to `parts`."""
    rows, D, L = x.shape[:-1].numel(), x.shape[-1], x.shape[-2] if x.dim() > 1 else 1
    run(
        _modulated_rms_norm_fwd_kernel,
        (rows if D else 0,),
        *(rows_of(x), weight.contiguous(), *map(rows_of, (shift, scale, branch, gate))),
        *(parts, branch_weight, *out, L, D),
        EPS=eps,
        NORM_FIRST=norm_first,
        K=0 if parts is None else parts.ids.shape[1],
        launch=fwd_launch(rows, D, multiprocessors(x)),
    )


def _modulated_rms_norm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    norm_first: bool,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _modulated_rms_norm_fwd_fake(x, weight, eps, dtype, norm_first, shift, scale, branch, gate)
    launch_fwd(x, weight, eps, norm_first, shift, scale, branch, gate, out)
    return out


def _modulated_rms_norm_bwd(
    dy: Tensor,
    dresidual: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    rstd: Tensor,
    norm_first: bool,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
) -> NormGradients:
    out = _modulated_rms_norm_bwd_fake(dy, dresidual, residual, weight, rstd, norm_first, shift, scale, branch, gate)
    D, L = residual.shape[-1], residual.shape[-2] if residual.dim() > 1 else 1
    B = residual.shape[:-2].numel()
    rows = bwd_rows(B, L, multiprocessors(residual))
    chunks = max(1, triton.cdiv(L, rows))
    sums = rstd.new_empty(4 if gate is not None else 3 if shift is not None else 1, B * chunks, D)
    run(
        _modulated_rms_norm_bwd_kernel,
        (B * chunks if D else 0,),
        *(rows_of(dy), rows_of(dresidual), rows_of(residual), weight.contiguous()),
        *(*map(rows_of, (shift, scale, branch, gate)), rstd, out.dx, out.dbranch, sums, L, D, chunks, rows),
        NORM_FIRST=norm_first,
        launch=bwd_launch(D),
    )
    of_weight, *of_rows = sums  # in the order of the gradients
    out.dweight.copy_(of_weight.sum(0))
    for gradient, parts in zip((out.dshift, out.dscale, out.dgate), of_rows, strict=False):
        if gradient.numel():
            gradient.copy_(parts.unflatten(0, (B, chunks)).sum(1).view_as(gradient))
    return out


def _modulated_rms_norm_fwd_fake(x, weight, eps, dtype, norm_first, shift, scale, branch, gate):
    y = x.new_empty(x.shape, dtype=dtype)
    residual = x.new_empty(0 if branch is None else x.shape)
    return y, residual, x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype, weight.dtype))


def _modulated_rms_norm_bwd_fake(dy, dresidual, residual, weight, rstd, norm_first, shift, scale, branch, gate):
    def like(t: Tensor | None) -> Tensor:
        return residual.new_empty(0) if t is None else t.new_empty(t.shape)

    dbranch = like(None if gate is None else branch)
    return NormGradients(like(residual), like(weight), like(shift), like(scale), dbranch, like(gate))
