"""Backward of the router: the gradient of the logits, then two products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, run


def _route_bwd_fake(dweights, x, weight, ids, chosen, scores, norm, scale, for_x, for_weight):
    return x.new_empty(x.shape if for_x else 0), weight.new_empty(weight.shape if for_weight else 0)


@triton.jit(do_not_specialize=["T"])
def _route_bwd_kernel(
    dweights_ptr,  # [T, K], contiguous, as the next two
    ids_ptr,
    chosen_ptr,  # fp64: the scores of the chosen
    logits_ptr,  # [T, E]; None: only those of the chosen have gradients
    dlogits_ptr,  # [T, E]
    T,
    E,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    programmatic_launch()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    mask = (rows < T)[:, None] & (k < TOP_K)[None, :]
    pair = rows[:, None] * TOP_K + k[None, :]
    ds = tl.load(dweights_ptr + pair, mask=mask, other=0.0).to(tl.float64) * SCALE  # [BLOCK_T, BLOCK_K]
    s = tl.load(chosen_ptr + pair, mask=mask, other=0.0)
    ids = tl.load(ids_ptr + pair, mask=mask, other=0)
    if SOFTMAX:
        common = tl.sum(ds * s, axis=1)[:, None]
        ds -= common
    elif NORM:
        total = tl.sum(s, axis=1)[:, None] + 1e-20
        ds = (ds - tl.sum(ds * s, axis=1)[:, None] / total) / total
    e = tl.arange(0, BLOCK_E)
    rest = tl.zeros((BLOCK_T, BLOCK_E), dtype=dlogits_ptr.dtype.element_ty)  # of the experts that are not chosen
    if logits_ptr is not None:
        at, mask_e = rows[:, None] * E + e[None, :], (rows < T)[:, None] & (e < E)[None, :]
        logits = tl.load(logits_ptr + at, mask=mask_e, other=0.0)
        top = tl.max(tl.where((e < E)[None, :], logits, -float("inf")), axis=1)
        p = tl.where((e < E)[None, :], tl.exp(logits - top[:, None]), 0.0)  # [BLOCK_T, BLOCK_E]
        rest = (-common / tl.sum(p, axis=1)[:, None] * p).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows[:, None] * E + e[None, :], rest, mask=(rows < T)[:, None] & (e < E)[None, :])
    tl.debug_barrier()  # other threads wrote those
    dlogits = (ds * s if SOFTMAX else ds * s * (1 - s)).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows[:, None] * E + ids, dlogits, mask=mask)


def _route_bwd(
    dweights: Tensor, x: Tensor, weight: Tensor, ids: Tensor, chosen: Tensor, scores: str, norm: bool, scale: float,
    for_x: bool, for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dweight, empty where not asked for. 4096 tokens, E=128: 0.5 MB read, 2.1 MB written, 2.8 GFLOP a product,
    in fp32 without tensor cores. dweight sums over all tokens, in fp64 as the logits: 500 fp32 terms are off by ten
    times the rounding of their sum. 4096 tokens at a time, whose x is then 88 MB at D=2688. A softmax over all has a
    gradient for every logit, which are then computed again: a product more."""
    (T, K), E = ids.shape, len(weight)
    acc = compute_dtype(x.dtype, weight.dtype)
    dlogits, logits = x.new_empty(T, E, dtype=acc), None
    if scores == "softmax" and not norm:
        logits = torch.cat([some.to(acc) @ weight.to(acc).T for some in x.split(4096)])
    block_k, block_e = triton.next_power_of_2(K), triton.next_power_of_2(E)
    launch = Launch(BLOCK_T=8)
    run(
        _route_bwd_kernel,
        (triton.cdiv(T, launch.BLOCK_T),),
        *(dweights.contiguous(), ids.contiguous(), chosen.contiguous(), logits, dlogits, T, E),
        **dict(TOP_K=K, SOFTMAX=scores == "softmax", NORM=norm, SCALE=scale, BLOCK_K=block_k, BLOCK_E=block_e),
        launch=launch,
    )
    dx = (dlogits @ weight.to(acc)).to(x.dtype) if for_x else x.new_empty(0)
    if not for_weight:
        return dx, weight.new_empty(0)
    parts = zip(dlogits.split(4096), x.split(4096), strict=True)
    return dx, sum(some.double().T @ rows.double() for some, rows in parts).to(weight.dtype)
