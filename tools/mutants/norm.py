"""Faults in the norm kernels."""

MUTANTS = {
    ("rms_norm and not modulated", "norm/modulated_rms_norm_kernels.py"): [
        ("eps forgotten", "tl.sum(r * r, axis=0) / D + EPS", "tl.sum(r * r, axis=0) / D"),
        ("mean over lanes", "tl.sum(r * r, axis=0) / D + EPS", "tl.sum(r * r, axis=0) / BLOCK_D + EPS"),
        ("weight forgotten", "    y = r * rstd * weight", "    y = r * rstd"),
        ("the mean's gradient forgotten", "dn - n * (tl.sum(dn * n, axis=0) / D)", "dn"),
        ("weight's gradient of the last row only", "        dweight += g * n\n", "        dweight = g * n\n"),
        (
            "an fp64 weight forgotten in the dtype of sums",
            "    acc = rstd_ptr.dtype.element_ty\n    # All loads",
            "    acc = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32\n    # All loads",
        ),
    ],
    ("rms_norm and not modulated", "runtime/lang.py"): [
        ("padding counted", "rows.stride + cols, mask=mask, other=0.0", "rows.stride + cols, mask=mask, other=1.0"),
    ],
    ("rms_norm and not modulated", "norm/modulated_rms_norm_launch.py"): [
        ("last row missed", "(rows if D else 0,),", "(rows - 1 if D else 0,),")
    ],
    ("modulated", "norm/modulated_rms_norm_kernels.py"): [
        (
            "and in that of gradients",
            "    acc = rstd_ptr.dtype.element_ty\n    weight = ",
            "    acc = tl.float64 if residual.ptr.dtype.element_ty == tl.float64 else tl.float32\n    weight = ",
        ),
        ("gate added", "step *= opening", "step += opening"),
        ("residual left out of the norm", "r = rounded.to(acc)  # the norm reads", "r = step  # the norm reads"),
        (
            "1 + forgotten",
            "factor = 1 + load_row(scale, b, cols, mask, acc)\n    if gate",
            "factor = load_row(scale, b, cols, mask, acc)\n    if gate",
        ),
        ("the first sequence's shift for all", "    b = row // L\n", "    b = row * 0\n"),
        (
            "orders swapped",
            "is not None and not NORM_FIRST:\n        r = ",
            "is not None and NORM_FIRST:\n        r = ",
        ),
        ("gradient of the residual lost", "        if dresidual is not None:\n", "        if False:\n"),
        ("gate's gradient from y alone", "            dgate += dm * load_row", "            dgate += g * load_row"),
        ("scale forgotten on the way back", "                g = g * factor\n", ""),
        ("last row of a chunk missed", "min((chunk + 1) * rows, L)", "min((chunk + 1) * rows - 1, L)"),
    ],
    ("modulated", "norm/modulated_rms_norm_launch.py"): [
        ("rstd without the dtype of weight", "compute_dtype(x.dtype, weight.dtype)", "compute_dtype(x.dtype)")
    ],
    ("gated_group_norm", "norm/gated_group_norm.py"): [
        (
            "an fp64 weight forgotten in the dtype of sums",
            "    acc = rstd_ptr.dtype.element_ty\n    v = load_row(x,",
            "    acc = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32\n    v = load_row(x,",
        ),
        ("sigmoid for SiLU", "u = v * (g * sigmoid(g))", "u = v * sigmoid(g)"),
        ("mean over lanes", "tl.sum(u * u, axis=1) / N + EPS", "tl.sum(u * u, axis=1) / BLOCK_N + EPS"),
        (
            "the first group's weight for all",
            "tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)\n    u = v",
            "tl.load(weight_ptr + cols - group[:, None] * N, mask=mask, other=0.0).to(acc)\n    u = v",
        ),
        ("weight forgotten", "    y = u * rstd[:, None] * weight", "    y = u * rstd[:, None]"),
        ("wrong derivative of SiLU", "s * (1 + g * (1 - s))", "s * (1 + g)"),
        ("wrong mean on the way back", "(tl.sum(dn * n, axis=1) / N)[:, None]", "(tl.sum(dn, axis=1) / N)[:, None]"),
        ("weight's gradient of the last row only", "        dweight += d * n\n", "        dweight = d * n\n"),
    ],
}
