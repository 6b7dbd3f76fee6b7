"""The kernels of `modulated_rms_norm` and `rms_norm`: one program a row forward, several rows backward."""

import triton
import triton.language as tl

from ..runtime.lang import load_row, programmatic_launch, sum_of_pairs


@triton.jit(do_not_specialize=["L"])
def _modulated_rms_norm_fwd_kernel(
    x,  # Rows [B * L, D]
    weight_ptr,  # [D]
    shift,  # Rows [B, D] or None, as scale and gate
    scale,
    branch,  # Rows [B * L, D] or None
    gate,
    parts,  # Parts of the branch, to whose sum what `branch` holds is added, or None
    branch_weight_ptr,  # [B * L]: with parts, of what `branch` holds; None: 1
    y_ptr,  # [B * L, D], contiguous, as residual
    residual_ptr,
    rstd_ptr,  # [B * L], in the dtype of statistics and sums
    L,
    D,
    EPS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    K: tl.constexpr,  # parts of a row, 0 without
    BLOCK_D: tl.constexpr,
):
    programmatic_launch()
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    acc = rstd_ptr.dtype.element_ty
    # All loads before the store, which they do not pass: it may write what they read. So they are one round trip.
    r = load_row(x, row, cols, mask, acc)  # [BLOCK_D]
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    if scale is not None:
        add = load_row(shift, b, cols, mask, acc)
        factor = 1 + load_row(scale, b, cols, mask, acc)
    if gate is not None:
        opening = load_row(gate, b, cols, mask, acc)
    if parts is not None:  # as `experts` sums and rounds them
        dtype: tl.constexpr = parts.pairs.dtype.element_ty
        wide: tl.constexpr = tl.float64 if parts.weights.dtype.element_ty == tl.float64 else tl.float32
        total = tl.float64 if dtype == tl.float64 else wide
        if branch_weight_ptr is not None:
            total = tl.float64 if branch_weight_ptr.dtype.element_ty == tl.float64 else total
        step = sum_of_pairs(parts.pairs, parts.ids, parts.weights, row, cols, parts.experts, D, K, total)
        if branch is not None:
            more = load_row(branch, row, cols, mask, total)
            if branch_weight_ptr is not None:
                more *= tl.load(branch_weight_ptr + row).to(total)
            step += more
        step = step.to(dtype).to(acc)
    elif branch is not None:
        step = load_row(branch, row, cols, mask, acc)
    if branch is not None or parts is not None:
        if gate is not None:
            step *= opening
        rounded = (r + step).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * D + cols, rounded, mask=mask)
        r = rounded.to(acc)  # the norm reads the residual as the next layer will
    if scale is not None and not NORM_FIRST:
        r = r * factor + add
    rstd = 1 / tl.sqrt(tl.sum(r * r, axis=0) / D + EPS)
    tl.store(rstd_ptr + row, rstd)
    y = r * rstd * weight
    if scale is not None and NORM_FIRST:
        y = y * factor + add
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "chunks", "rows"])
def _modulated_rms_norm_bwd_kernel(
    dy,  # Rows [B * L, D]
    dresidual,  # Rows [B * L, D] or None
    residual,  # Rows [B * L, D]
    weight_ptr,  # [D]
    shift,  # Rows [B, D] or None, as scale and gate
    scale,
    branch,  # Rows [B * L, D]; read where there is a gate
    gate,
    rstd_ptr,  # [B * L], in the dtype of statistics and sums
    dx_ptr,  # [B * L, D], contiguous, as dbranch
    dbranch_ptr,
    sums_ptr,  # [4, B * chunks, D]: dweight, dshift, dscale, dgate of each program, added afterwards in a fixed order
    L,
    D,
    chunks,
    rows,
    NORM_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    programmatic_launch()
    # A program takes `rows` rows of one sequence, so that it loads their shift, scale and gate once.
    program = tl.program_id(0).to(tl.int64)
    b, chunk = program // chunks, program % chunks
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    acc = rstd_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)
    dweight = tl.zeros((BLOCK_D,), dtype=acc)
    if scale is not None:
        add = load_row(shift, b, cols, mask, acc)
        factor = 1 + load_row(scale, b, cols, mask, acc)
        dshift = tl.zeros((BLOCK_D,), dtype=acc)
        dscale = tl.zeros((BLOCK_D,), dtype=acc)
    if gate is not None:
        opening = load_row(gate, b, cols, mask, acc)
        dgate = tl.zeros((BLOCK_D,), dtype=acc)
    for row in range(b * L + chunk * rows, b * L + min((chunk + 1) * rows, L)):
        r = load_row(residual, row, cols, mask, acc)
        g = load_row(dy, row, cols, mask, acc)
        rstd = tl.load(rstd_ptr + row)
        m = r
        if scale is not None:
            if NORM_FIRST:
                dshift += g
                dscale += g * r * rstd * weight
                g = g * factor
            else:
                m = r * factor + add
        n = m * rstd  # normed, before the weight
        dweight += g * n
        dn = g * weight
        dm = rstd * (dn - n * (tl.sum(dn * n, axis=0) / D))
        if scale is not None and not NORM_FIRST:
            dshift += dm
            dscale += dm * r
            dm = dm * factor
        if dresidual is not None:
            dm += load_row(dresidual, row, cols, mask, acc)
        tl.store(dx_ptr + row * D + cols, dm.to(dx_ptr.dtype.element_ty), mask=mask)
        if gate is not None:
            dgate += dm * load_row(branch, row, cols, mask, acc)
            tl.store(dbranch_ptr + row * D + cols, (dm * opening).to(dbranch_ptr.dtype.element_ty), mask=mask)
    sums_ptr += program * D
    size = tl.num_programs(0).to(tl.int64) * D
    tl.store(sums_ptr + cols, dweight, mask=mask)
    if scale is not None:
        tl.store(sums_ptr + size + cols, dshift, mask=mask)
        tl.store(sums_ptr + 2 * size + cols, dscale, mask=mask)
    if gate is not None:
        tl.store(sums_ptr + 3 * size + cols, dgate, mask=mask)
