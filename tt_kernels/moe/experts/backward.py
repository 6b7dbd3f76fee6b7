"""Backward of the experts: hidden rows again and their gradients in one kernel, weights' gradients without atomics."""

import triton
import triton.language as tl
from torch import Tensor

from ...lang import sigmoid
from ...launch import run
from ...reference.common import compute_dtype
from .forward import gathered, rows_down
from .launches import Sizes, hidden_launch, weights_launch
from .tiles import Tiles, by_tma, combine, end_of, find_tile, operand, pairs_of, product, stacked

# ---- kernels ----


@triton.jit
def _experts_bwd_hidden_kernel(
    x,  # [T, D] pointer, as dy; descriptors where A_TMA: of [R, D] in sorted order, or of [T, D] where DENSE
    dy,
    up,  # [E * N, D], pointer or descriptor, as gate
    gate,
    down,  # [E * D, N], pointer or descriptor
    weights_ptr,  # [R] by pair, None where DENSE
    du_ptr,  # [R, N] in sorted order, as dg and wh; [T, N] where DENSE
    dg_ptr,
    wh_ptr,
    dweights_ptr,  # [tiles of N, R]: a part of the sum over N each, by pair
    order_ptr,  # [R] int64
    tiles_ptr,
    T,
    R,
    top_k,
    D,
    N,
    DENSE: tl.constexpr,
    GATED: tl.constexpr,
    RELU2: tl.constexpr,
    A_TMA: tl.constexpr,
    UP_TMA: tl.constexpr,
    DOWN_TMA: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    UP: tl.constexpr = (A_TMA, UP_TMA, False, False, BLOCK_T, BLOCK_N, BLOCK_K)
    DOWN: tl.constexpr = (A_TMA, DOWN_TMA, True, False, BLOCK_T, BLOCK_N, BLOCK_K)
    n_tiles = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % n_tiles
    expert, first, end = find_tile(tiles_ptr, tl.program_id(0) // n_tiles, T, DENSE, BLOCK_T)
    if expert >= 0:
        rows = first.to(tl.int64) + tl.arange(0, BLOCK_T)
        mask_t = rows < end
        pairs = rows
        if not DENSE:
            pairs = pairs_of(order_ptr, rows, mask_t, R).to(tl.int32)
        at = rows
        if not (SORTED or DENSE):
            at = (pairs // top_k).to(tl.int64)
        n0 = n * BLOCK_N
        acc = tl.float64 if du_ptr.dtype.element_ty == tl.float64 else tl.float32
        zeros = tl.zeros((BLOCK_T, BLOCK_N), dtype=acc)
        u, g = product(zeros, zeros, x, up, gate, at, mask_t, first, expert * N, n0, N, D, GATED, UP)
        # The gradient of h before the routing weight.
        d, _ = product(zeros, zeros, dy, down, down, at, mask_t, first, expert * D, n0, N, D, False, DOWN)
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask = mask_t[:, None] & (offs_n < N)[None, :]
        v = g if GATED else u  # what the activation sees
        if RELU2:
            v = tl.maximum(v, 0, propagate_nan=tl.PropagateNan.ALL)
            a, da = v * v, 2 * v
        else:
            s = sigmoid(v)
            a, da = v * s, s * (1 + v * (1 - s))
        h = a * u if GATED else a
        dh = d
        wh = h
        if not DENSE:
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
def _experts_bwd_weights_kernel(
    a_ptr,  # [R, P] in sorted order, or [T, P]
    b_ptr,  # [R, Q], or [T, Q]
    out_ptr,  # [E, P, Q]
    order_ptr,  # [R] int64
    ends_ptr,  # [E]
    T,
    top_k,
    P,
    Q,
    DENSE: tl.constexpr,
    GATHER_A: tl.constexpr,  # a is by token, not by pair
    GATHER_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out_e = a^T b over the rows of expert e: a program a tile walks them all, in order. No rows: 0."""
    q_tiles = tl.cdiv(Q, BLOCK_Q)
    expert = tl.program_id(1)
    offs_p = (tl.program_id(0) // q_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = (tl.program_id(0) % q_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_p, mask_q = offs_p < P, offs_q < Q
    start, end = expert * 0, expert * 0 + T
    if not DENSE:
        end = end_of(ends_ptr, expert, expert >= 0, T * top_k)
        start = end_of(ends_ptr, expert - 1, expert > 0, T * top_k)
    acc = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    out = tl.zeros((BLOCK_P, BLOCK_Q), dtype=acc)
    for r in range(start, end, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = rows < end
        at_a = rows
        at_b = rows
        if GATHER_A:
            at_a = (pairs_of(order_ptr, rows, mask_r, T * top_k).to(tl.int32) // top_k).to(tl.int64)
        if GATHER_B:
            at_b = (pairs_of(order_ptr, rows, mask_r, T * top_k).to(tl.int32) // top_k).to(tl.int64)
        a = tl.load(a_ptr + at_a[:, None] * P + offs_p[None, :], mask=mask_r[:, None] & mask_p[None, :], other=0.0)
        b = tl.load(b_ptr + at_b[:, None] * Q + offs_q[None, :], mask=mask_r[:, None] & mask_q[None, :], other=0.0)
        out = tl.dot(tl.trans(a), b, out, input_precision="ieee", out_dtype=out.dtype)
    to = out_ptr + (expert.to(tl.int64) * P + offs_p)[:, None] * Q + offs_q[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_q[None, :])


# ---- launches ----


def hidden_bwd(
    x: Tensor,
    dy: Tensor,
    order: Tensor | None,
    tiles: Tiles | None,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    weights: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """du, dg and w h [R, N] in sorted order, dweights [T, K]: h is computed again from x, which costs 2 R D N flops and
    spares the forward R N elements a layer (at 8192 tokens 182 MB in bf16); dweights = <dy down, h> needs no y."""
    (T, D), dense = x.shape, order is None
    E, N = (1, len(up)) if dense else up.shape[:2]
    R = T if dense else len(order)
    top_k = R // T
    sizes = Sizes.of(x, rows=R, experts=E, N=N, K=D, two=gate is not None)
    launch = hidden_launch(sizes)
    du, wh = x.new_empty(2, R, N)
    dg = None if gate is None else x.new_empty(R, N)
    n_tiles = triton.cdiv(N, launch.BLOCK_N)
    # 0 for pairs without an expert, which no tile writes.
    parts = None if dense else x.new_zeros(n_tiles, R, dtype=compute_dtype(x.dtype, weights.dtype))
    listed, most = (None, triton.cdiv(T, launch.BLOCK_T)) if dense else tiles(launch.BLOCK_T)
    if launch.SORTED and not dense:
        x, dy = (gathered(t, order, top_k) for t in (x, dy))
    up, gate, down = stacked(up), stacked(gate), stacked(down)
    arch = sizes.architecture
    up_tma = by_tma(up, arch) and (gate is None or by_tma(gate, arch))
    down_tma = by_tma(down, arch) and D % launch.BLOCK_K == 0  # else a tile runs into the next expert's rows
    a_tma = bool(dense or launch.SORTED) and by_tma(x, arch) and by_tma(dy, arch)
    blocks = (launch.BLOCK_T, launch.BLOCK_K), (launch.BLOCK_N, launch.BLOCK_K), (launch.BLOCK_K, launch.BLOCK_N)
    run(
        _experts_bwd_hidden_kernel,
        (most * n_tiles,),
        *(operand(x, a_tma, *blocks[0]), operand(dy, a_tma, *blocks[0])),
        *(operand(up, up_tma, *blocks[1]), operand(gate, up_tma, *blocks[1]), operand(down, down_tma, *blocks[2])),
        *(weights, du, dg, wh, parts, order, listed, T, R, top_k, D, N),
        DENSE=dense,
        GATED=gate is not None,
        RELU2=activation == "relu2",
        A_TMA=a_tma,
        UP_TMA=up_tma,
        DOWN_TMA=down_tma,
        launch=launch,
    )
    return du, dg, wh, None if dense else parts.sum(0).view(T, top_k)


def weights_bwd(
    a: Tensor, b: Tensor, order: Tensor | None, ends: Tensor | None, like: Tensor, by_token: str = ""
) -> Tensor:
    """[E, P, Q]: sum over an expert's rows of a [*, P] times b [*, Q]; one of them ("a" or "b") has a row a token.

    2 R P Q flops; writes E P Q elements, reads a ceil(Q / BLOCK_Q) times and b ceil(P / BLOCK_P) times through L2."""
    E, (P, Q), dense = 1 if order is None else len(ends), like.shape[-2:], order is None
    R = len(a) if dense else len(order)
    T = min(len(a), len(b))
    out = like.new_empty(like.shape)
    launch = weights_launch(Sizes.of(a, rows=R, experts=E, N=P, K=Q, two=False))
    run(
        _experts_bwd_weights_kernel,
        (triton.cdiv(P, launch.BLOCK_P) * triton.cdiv(Q, launch.BLOCK_Q), E),
        *(a, b, out, order, ends, T, R // T, P, Q),
        DENSE=dense,
        GATHER_A=by_token == "a",
        GATHER_B=by_token == "b",
        launch=launch,
    )
    return out


def experts_bwd(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate: Tensor | None,
    order: Tensor,
    ends: Tensor,
    activation: str,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weights and, where `needed`, of up, down, gate, shared_up, shared_down, shared_gate."""
    dy, x, order, ends = (t.contiguous() for t in (dy, x, order, ends))
    D = x.shape[1]
    tiles = Tiles(ends, len(order))
    du, dg, wh, dweights = hidden_bwd(x, dy, order, tiles, up, gate, down, weights.contiguous(), activation)
    shared_du = shared_dg = shared_h = None
    if shared_up is not None:
        shared_du, shared_dg, shared_h, _ = hidden_bwd(
            x, dy, None, None, shared_up, shared_gate, shared_down, None, activation
        )

    none = None, None
    products = (  # what each gradient is of, in the order of `needed`
        (du, x, order, ends, up, "b"),
        (dy, wh, order, ends, down, "a"),
        (dg, x, order, ends, gate, "b"),
        (shared_du, x, *none, shared_up),
        (dy, shared_h, *none, shared_down),
        (shared_dg, x, *none, shared_gate),
    )
    # Frozen matrices cost neither the work nor the memory.
    grads = (
        weights_bwd(*operands) if wanted and operands[4] is not None else x.new_empty(0)
        for wanted, operands in zip(needed, products, strict=True)
    )
    pairs, shared_dx = rows_down(
        du, dg, order, tiles, up, gate, shared_du, shared_dg, shared_up, shared_gate, D, transposed=True
    )
    dx = combine(pairs, ids.contiguous(), None, shared_dx, x.new_empty(x.shape), len(up))
    return dx, dweights.to(weights.dtype), *grads
