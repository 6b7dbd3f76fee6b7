"""Backward of the experts: hidden rows again and their gradients in one kernel, weights' gradients without atomics."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..reference.common import compute_dtype
from ..reference.moe import PlainWeights
from ..runtime.lang import programmatic_launch
from ..runtime.launch import run
from .experts_forward import combine
from .experts_launch import (
    Pairs,
    Sizes,
    by_owner,
    hidden_launch,
    rows_down,
    weights_launch,
)
from .lang import activate, end_of, find_tile, pairs_of, product
from .operands import described, operands, stacked


@triton.jit(do_not_specialize=["T", "R"])
def _experts_bwd_hidden_kernel(
    x,  # [T, D], as dy: pointers; descriptors of [R, D] in sorted order, or of [T, D] of the shared expert
    dy,
    up,  # each expert's [N, D], `step` rows apart, pointer or descriptor, as gate, which may be None
    gate,
    step,
    down,  # each expert's [D, N], `down_step` rows apart, pointer or descriptor
    down_step,
    weights_ptr,  # [R] by pair; of the shared expert [T], or None: 1
    du_ptr,  # [R, N] in sorted order, as dg and wh; [T, N] of the shared expert
    dg_ptr,
    wh_ptr,
    dweights_ptr,  # [tiles of N, R]: a part of the sum over N each, by pair
    sorted_pairs_ptr,  # [R] int64
    tiles_ptr,  # None: the shared expert, which sees all rows
    T,
    R,
    top_k,
    D,
    N,
    ACTIVATION: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    programmatic_launch()
    DENSE: tl.constexpr = tiles_ptr is None
    GATED: tl.constexpr = gate is not None
    n_tiles = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % n_tiles
    expert, first, end = find_tile(tiles_ptr, tl.program_id(0) // n_tiles, T, DENSE, BLOCK_T)
    if expert >= 0:
        rows = first.to(tl.int64) + tl.arange(0, BLOCK_T)
        mask_t = rows < end
        pairs = rows
        if not DENSE:
            pairs = pairs_of(sorted_pairs_ptr, rows, mask_t, R).to(tl.int32)
        at = rows
        if not (SORTED or DENSE):
            at = (pairs // top_k).to(tl.int64)
        n0 = n * BLOCK_N
        acc = tl.float64 if du_ptr.dtype.element_ty == tl.float64 else tl.float32
        zeros = tl.zeros((BLOCK_T, BLOCK_N), dtype=acc)
        u, g = product(
            zeros, zeros, x, up, gate, at, mask_t, first, expert * step, n0, N, D, GATED, False, False, BLOCK_N, BLOCK_K
        )
        # The gradient of h before the routing weight.
        d, _ = product(
            *(zeros, zeros, dy, down, down, at, mask_t, first, expert * down_step, n0, N, D),
            *(False, True, False, BLOCK_N, BLOCK_K),
        )
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask = mask_t[:, None] & (offs_n < N)[None, :]
        a, da = activate(g if GATED else u, ACTIVATION)
        h = a * u if GATED else a
        dh = d
        wh = h
        if weights_ptr is not None:
            part = tl.sum(tl.where(mask, d * h, 0), axis=1)  # [BLOCK_T]
            tl.store(dweights_ptr + n.to(tl.int64) * R + pairs, part, mask=mask_t)
            w = tl.load(weights_ptr + pairs, mask=mask_t, other=0.0).to(acc)[:, None]
            dh = d * w
            wh = h * w
        to = rows[:, None] * N + offs_n[None, :]
        tl.store(wh_ptr + to, wh.to(wh_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(du_ptr + to, (dh * a).to(du_ptr.dtype.element_ty), mask=mask)
            tl.store(dg_ptr + to, (dh * u * da).to(dg_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(du_ptr + to, (dh * da).to(du_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tokens_of(sorted_pairs_ptr, first, end, T, top_k, GATHER: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tokens of sorted rows first to first + BLOCK_R - 1, where they are asked for."""
    rows = first + tl.arange(0, BLOCK_R).to(tl.int64)
    if GATHER:
        rows = (pairs_of(sorted_pairs_ptr, rows, rows < end, T * top_k).to(tl.int32) // top_k).to(tl.int64)
    return rows


@triton.jit(do_not_specialize=["T"])
def _experts_bwd_weights_kernel(
    a_ptr,  # [R, P] in sorted order, or [T, P]
    b_ptr,  # [R, Q], or [T, Q]
    out_ptr,  # [E, P, Q]
    sorted_pairs_ptr,  # [R] int64
    offsets_ptr,  # [E]; None: one expert sees all T rows
    T,
    top_k,
    P,
    Q,
    GATHER_A: tl.constexpr,  # a is by token, not by pair
    GATHER_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out_e = a^T b over the rows of expert e: a program a tile walks them all, in order. No rows: 0."""
    programmatic_launch()
    q_tiles = tl.cdiv(Q, BLOCK_Q)
    expert = tl.program_id(1)
    offs_p = (tl.program_id(0) // q_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = (tl.program_id(0) % q_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_p, mask_q = offs_p < P, offs_q < Q
    start, end = expert * 0, expert * 0 + T
    if offsets_ptr is not None:
        end = end_of(offsets_ptr, expert, expert >= 0, T * top_k)
        start = end_of(offsets_ptr, expert - 1, expert > 0, T * top_k)
    acc = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    out = tl.zeros((BLOCK_P, BLOCK_Q), dtype=acc)
    GATHER: tl.constexpr = GATHER_A or GATHER_B
    # A turn ahead: the pipeline would not overlap loads with products where they wait for other loads of their turn.
    at = _tokens_of(sorted_pairs_ptr, start, end, T, top_k, GATHER, BLOCK_R)
    for r in range(start, end, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = rows < end
        at_a = at if GATHER_A else rows
        at_b = at if GATHER_B else rows
        at = _tokens_of(sorted_pairs_ptr, r + BLOCK_R, end, T, top_k, GATHER, BLOCK_R)
        a = tl.load(a_ptr + at_a[:, None] * P + offs_p[None, :], mask=mask_r[:, None] & mask_p[None, :], other=0.0)
        b = tl.load(b_ptr + at_b[:, None] * Q + offs_q[None, :], mask=mask_r[:, None] & mask_q[None, :], other=0.0)
        out = tl.dot(tl.trans(a), b, out, input_precision="ieee", out_dtype=out.dtype)
    to = out_ptr + (expert.to(tl.int64) * P + offs_p)[:, None] * Q + offs_q[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_q[None, :])


class Hidden(NamedTuple):
    """Hidden rows, in sorted order, and gradients."""

    du: Tensor  # [R, N]
    dg: Tensor | None  # [R, N], None without a gate
    wh: Tensor  # [R, N]: h times its weight
    dweights: Tensor | None  # of the shape of weights; None without
    x: Tensor  # as given, or [R, D] in sorted order where it was to be gathered, as dy
    dy: Tensor


def hidden_bwd(
    x: Tensor,
    dy: Tensor,
    matrices: PlainWeights,
    activation: str,
    pairs: Pairs | None = None,
    weights: Tensor | None = None,
) -> Hidden:
    """h is computed again from x, which costs 2 R D N flops and spares the forward R N elements a layer (at 8192 tokens
    182 MB in bf16); dweights = <dy down, h> needs no y. Without pairs: of the shared expert, and weights of its
    rows, or 1."""
    (T, D), (N, _) = x.shape, matrices.up.shape[-2:]
    R, E = (T, 1) if pairs is None else (len(pairs.order), len(pairs.offsets))
    top_k = R // T
    sizes = Sizes.of(x, rows=R, experts=E, N=N, K=D, two=matrices.gate is not None)
    launch = hidden_launch(sizes, activation)
    du, wh = x.new_empty(2, R, N)
    dg = None if matrices.gate is None else x.new_empty(R, N)
    n_tiles = triton.cdiv(N, launch.BLOCK_N)
    parts = listed = None
    most, arch = triton.cdiv(T, launch.BLOCK_T), sizes.architecture
    if weights is not None:
        # 0 for pairs without an expert, which no tile writes.
        parts = x.new_zeros(n_tiles, R, dtype=compute_dtype(x.dtype, weights.dtype))
    if pairs is not None:
        listed, most = pairs.tiles(launch.BLOCK_T)
        if launch.SORTED:
            x, dy = pairs.tokens(x), pairs.tokens(dy)
    step, up, gate = stacked(matrices.up, matrices.gate)
    down_step, down, _ = stacked(matrices.down)
    in_order = launch.SORTED or pairs is None
    whole = D % launch.BLOCK_K == 0  # else a tile of down runs into the next expert's rows
    run(
        _experts_bwd_hidden_kernel,
        (most * n_tiles,),
        *described((x, dy), (launch.BLOCK_T, launch.BLOCK_K) if in_order else None, arch),
        *described((up, gate), (launch.BLOCK_N, launch.BLOCK_K), arch),
        step,
        *described((down,), (launch.BLOCK_K, launch.BLOCK_N) if whole else None, arch),
        down_step,
        *(weights, du, dg, wh, parts, None if pairs is None else pairs.order, listed, T, R, top_k, D, N),
        ACTIVATION=activation,
        launch=launch,
    )
    dweights = None if parts is None or weights is None else parts.sum(0).view(weights.shape).to(weights.dtype)
    return Hidden(du, dg, wh, dweights, x, dy)


def weights_bwd(a: Tensor, b: Tensor, like: Tensor, pairs: Pairs | None = None, by_token: str = "") -> Tensor:
    """[E, P, Q]: sum over an expert's rows of a [*, P] times b [*, Q]; one of them ("a" or "b") has a row a token.

    2 R P Q flops; writes E P Q elements, reads a ceil(Q / BLOCK_Q) times and b ceil(P / BLOCK_P) times through L2."""
    P, Q = like.shape[-2:]
    R, E = (len(a), 1) if pairs is None else (len(pairs.order), len(pairs.offsets))
    T = min(len(a), len(b))
    out = like.new_empty(like.shape)
    launch = weights_launch(Sizes.of(a, rows=R, experts=E, N=P, K=Q, two=False))
    lists = (None, None) if pairs is None else (pairs.order, pairs.offsets)
    run(
        _experts_bwd_weights_kernel,
        (triton.cdiv(P, launch.BLOCK_P) * triton.cdiv(Q, launch.BLOCK_Q), E),
        *(a, b, out, *lists, T, R // T, P, Q),
        GATHER_A=by_token == "a",
        GATHER_B=by_token == "b",
        launch=launch,
    )
    return out


def _experts_bwd(
    dy: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    shared_weight: Tensor | None,
    topk_ids: Tensor,
    sorted_pairs: Tensor,
    offsets: Tensor,
    matrices: Sequence[Tensor | None],
    activation: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of x, topk_weights, shared_weight and, where `needed`, of the matrices, in their order; else empty."""
    weights, shared = by_owner(matrices)
    dy, x, pairs = dy.contiguous(), x.contiguous(), Pairs(sorted_pairs.contiguous(), offsets.contiguous())
    hidden, alone = hidden_bwd(x, dy, weights, activation, pairs, topk_weights.contiguous()), None
    dshared_weight = None
    # What each gradient is of, in the order of matrices.
    by_a, by_b = ("a", "b") if hidden.x is x else ("", "")
    products: list[tuple[Tensor | None, Tensor, Tensor | None, Pairs | None, str]] = [
        (hidden.du, hidden.x, weights.up, pairs, by_b),
        (hidden.dy, hidden.wh, weights.down, pairs, by_a),
        (hidden.dg, hidden.x, weights.gate, pairs, by_b),
    ]
    if shared is not None:
        factor = None if shared_weight is None else shared_weight.contiguous()
        du, dg, wh, dshared_weight, *_ = hidden_bwd(x, dy, shared, activation, weights=factor)
        products += [(du, x, shared.up, None, ""), (dy, wh, shared.down, None, ""), (dg, x, shared.gate, None, "")]
        alone = operands(du, shared.up, shared.gate, dg)
    grads = [x.new_empty(0) for _ in matrices]
    for i, (a, b, like, lists, by_token) in enumerate(products):
        if needed[i] and a is not None and like is not None:  # frozen matrices cost neither work nor memory
            grads[i] = weights_bwd(a, b, like, lists, by_token)
    routed = operands(hidden.du, weights.up, weights.gate, hidden.dg)
    rows, shared_dx = rows_down(routed, alone, pairs, x.shape[1], transposed=True)
    dx = combine(rows, topk_ids.contiguous(), x.new_empty(x.shape), len(weights.up), shared=shared_dx)
    assert hidden.dweights is not None
    return dx, hidden.dweights, x.new_empty(0) if dshared_weight is None else dshared_weight, grads
