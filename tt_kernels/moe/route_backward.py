"""Backward of the router: the gradient of the logits, then two products."""

import triton
import triton.language as tl
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, run


def _route_bwd_fake(dweights, x, weight, ids, chosen, norm, scale, for_x, for_weight):
    return x.new_empty(x.shape if for_x else 0), weight.new_empty(weight.shape if for_weight else 0)


@triton.jit(do_not_specialize=["T"])
def _route_bwd_kernel(
    dweights_ptr,  # [T, K], contiguous, as the next two
    ids_ptr,
    chosen_ptr,  # fp64: the scores of the chosen
    dlogits_ptr,  # [T, E]
    T,
    E,
    TOP_K: tl.constexpr,
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
    if NORM:
        total = tl.sum(s, axis=1)[:, None] + 1e-20
        ds = (ds - tl.sum(ds * s, axis=1)[:, None] / total) / total
    e = tl.arange(0, BLOCK_E)
    zeros = tl.zeros((BLOCK_T, BLOCK_E), dtype=dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows[:, None] * E + e[None, :], zeros, mask=(rows < T)[:, None] & (e < E)[None, :])
    tl.debug_barrier()  # other threads wrote the zeros
    dlogits = (ds * s * (1 - s)).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows[:, None] * E + ids, dlogits, mask=mask)


def _route_bwd(
    dweights: Tensor, x: Tensor, weight: Tensor, ids: Tensor, chosen: Tensor, norm: bool, scale: float,
    for_x: bool, for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dweight, empty where not asked for. 4096 tokens, E=128: 0.5 MB read, 2.1 MB written, 2.8 GFLOP a product,
    in fp32 without tensor cores. dweight sums over all tokens, in fp64 as the logits: 500 fp32 terms are off by ten
    times the rounding of their sum. 4096 tokens at a time, whose x is then 88 MB at D=2688."""
    (T, K), E = ids.shape, len(weight)
    acc = compute_dtype(x.dtype, weight.dtype)
    dlogits = x.new_empty(T, E, dtype=acc)
    block_k, block_e = triton.next_power_of_2(K), triton.next_power_of_2(E)
    launch = Launch(BLOCK_T=8)
    run(
        _route_bwd_kernel,
        (triton.cdiv(T, launch.BLOCK_T),),
        *(dweights.contiguous(), ids.contiguous(), chosen.contiguous(), dlogits, T, E),
        **dict(TOP_K=K, NORM=norm, SCALE=scale, BLOCK_K=block_k, BLOCK_E=block_e),
        launch=launch,
    )
    dx = (dlogits @ weight.to(acc)).to(x.dtype) if for_x else x.new_empty(0)
    if not for_weight:
        return dx, weight.new_empty(0)
    parts = zip(dlogits.split(4096), x.split(4096), strict=True)
    return dx, sum(some.double().T @ rows.double() for some, rows in parts).to(weight.dtype)
