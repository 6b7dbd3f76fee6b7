"""The RMS norm that opens a residual layer: gate and add the last branch, modulate and norm, in one pass."""

import triton
import triton.language as tl


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
