"""Faults in the norm kernels."""

from . import Mutant

GATED_GROUP_NORM = "tt_kernels/norm/gated_group_norm.py"
MODULATED_RMS_NORM_KERNELS = "tt_kernels/norm/modulated_rms_norm_kernels.py"
MODULATED_RMS_NORM_LAUNCH = "tt_kernels/norm/modulated_rms_norm_launch.py"
RMS = "rms_norm and not modulated"

MUTANTS = (
    Mutant(
        RMS, MODULATED_RMS_NORM_KERNELS, "tl.sum(r * r, axis=0) / D + EPS", "tl.sum(r * r, axis=0) / D", "eps forgotten"
    ),
    Mutant(
        RMS,
        MODULATED_RMS_NORM_KERNELS,
        "tl.sum(r * r, axis=0) / D + EPS",
        "tl.sum(r * r, axis=0) / BLOCK_D + EPS",
        "mean over lanes",
    ),
    Mutant(RMS, MODULATED_RMS_NORM_KERNELS, "    y = r * rstd * weight", "    y = r * rstd", "weight forgotten"),
    Mutant(
        RMS,
        MODULATED_RMS_NORM_KERNELS,
        "    return tl.load(rows.ptr + i * rows.stride + cols, mask=mask, other=0.0)",
        "    return tl.load(rows.ptr + i * rows.stride + cols, mask=mask, other=1.0)",
        "padding counted",
    ),
    Mutant(
        RMS, MODULATED_RMS_NORM_KERNELS, "dn - n * (tl.sum(dn * n, axis=0) / D)", "dn", "the mean's gradient forgotten"
    ),
    Mutant(
        RMS,
        MODULATED_RMS_NORM_KERNELS,
        "        dweight += g * n\n",
        "        dweight = g * n\n",
        "weight's gradient of the last row only",
    ),
    Mutant(
        RMS,
        MODULATED_RMS_NORM_LAUNCH,
        "        (x.shape[:-1].numel() if D else 0,),",
        "        (x.shape[:-1].numel() - 1 if D else 0,),",
        "last row missed",
    ),
    Mutant(
        RMS,
        MODULATED_RMS_NORM_KERNELS,
        "    acc = rstd_ptr.dtype.element_ty\n    r = _load(x,",
        "    acc = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32\n    r = _load(x,",
        "an fp64 weight forgotten in the dtype of sums",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "    acc = rstd_ptr.dtype.element_ty\n    weight = ",
        "    acc = tl.float64 if residual.ptr.dtype.element_ty == tl.float64 else tl.float32\n    weight = ",
        "and in that of gradients",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_LAUNCH,
        "dtype=compute_dtype(x.dtype, weight.dtype))",
        "dtype=compute_dtype(x.dtype))",
        "rstd without the dtype of weight",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "step *= _load(gate,",
        "step += _load(gate,",
        "gate added",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "        r = rounded.to(acc)  # the norm reads the residual as the next layer will",
        "        r = step",
        "residual left out of the norm",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "factor = 1 + _load(scale, b, cols, mask, acc)\n        if",
        "factor = _load(scale, b, cols, mask, acc)\n        if",
        "1 + forgotten",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "    b = row // L\n",
        "    b = row * 0\n",
        "the first sequence's shift for all",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "        if not NORM_FIRST:\n            r = r",
        "        if NORM_FIRST:\n            r = r",
        "orders swapped",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "        if dresidual is not None:\n",
        "        if False:\n",
        "gradient of the residual lost",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "            dgate += dm * _load",
        "            dgate += g * _load",
        "gate's gradient from y alone",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "                g = g * factor\n",
        "",
        "scale forgotten on the way back",
    ),
    Mutant(
        "modulated",
        MODULATED_RMS_NORM_KERNELS,
        "min((chunk + 1) * rows, L)",
        "min((chunk + 1) * rows - 1, L)",
        "last row of a chunk missed",
    ),
    Mutant(
        "gated_group_norm",
        GATED_GROUP_NORM,
        "    acc = rstd_ptr.dtype.element_ty\n    v = _load(x,",
        "    acc = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32\n    v = _load(x,",
        "an fp64 weight forgotten in the dtype of sums",
    ),
    Mutant("gated_group_norm", GATED_GROUP_NORM, "u = v * (g * sigmoid(g))", "u = v * sigmoid(g)", "sigmoid for SiLU"),
    Mutant(
        "gated_group_norm",
        GATED_GROUP_NORM,
        "tl.sum(u * u, axis=1) / N + EPS",
        "tl.sum(u * u, axis=1) / BLOCK_N + EPS",
        "mean over lanes",
    ),
    Mutant(
        "gated_group_norm",
        GATED_GROUP_NORM,
        "tl.load(weight_ptr + cols, mask=mask, other=0.0).to(acc)\n    u = v",
        "tl.load(weight_ptr + cols - group[:, None] * N, mask=mask, other=0.0).to(acc)\n    u = v",
        "the first group's weight for all",
    ),
    Mutant(
        "gated_group_norm",
        GATED_GROUP_NORM,
        "    y = u * rstd[:, None] * weight",
        "    y = u * rstd[:, None]",
        "weight forgotten",
    ),
    Mutant("gated_group_norm", GATED_GROUP_NORM, "s * (1 + g * (1 - s))", "s * (1 + g)", "wrong derivative of SiLU"),
    Mutant(
        "gated_group_norm",
        GATED_GROUP_NORM,
        "(tl.sum(dn * n, axis=1) / N)[:, None]",
        "(tl.sum(dn, axis=1) / N)[:, None]",
        "wrong mean on the way back",
    ),
    Mutant(
        "gated_group_norm",
        GATED_GROUP_NORM,
        "        dweight += d * n\n",
        "        dweight = d * n\n",
        "weight's gradient of the last row only",
    ),
)
