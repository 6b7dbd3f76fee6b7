"""Faults in the router's kernels."""

MUTANTS = {
    ("route", "moe/route_kernels.py"): [
        ("bias forgotten", "biased = scores + bias[None, :, :]", "biased = scores"),
        ("weights from biased scores", "weights = scores * CHOICE.SCALE", "weights = biased * CHOICE.SCALE"),
        ("normalised over all experts", "tl.where(k >= 0, scores, 0.0)", "scores"),
        ("a group's best score only", "ordered(first + second)", "ordered(first)"),
        ("ties go to the higher expert", "tl.min(tl.min(tl.where(top, p, _NONE", "tl.max(tl.max(tl.where(top, p, -1"),
        ("last expert of a group missed", "(p % BLOCK_N < size)", "(p % BLOCK_N < size - 1)"),
        ("rank off by one", "tl.cumsum(ones, axis=0) - ones", "tl.cumsum(ones, axis=0)"),
        ("logits in fp32", "return tl.sum(acc, axis=0)", "return tl.sum(acc, axis=0).to(tl.float32).to(tl.float64)"),
        ("a part of D not added", "tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)"),
        ("last column of D missed", "mask_d = offset + d < D", "mask_d = offset + d < D - 1"),
        ("pairs of the tiles before forgotten", ")[None, :] + tl.cumsum(counts, axis=0) -", ")[None, :] + counts -"),
        ("a tile's ticket not set back", "        tl.store(tickets_ptr + tile, 0)\n", ""),
        ("the tiles' ticket not set back", "                tl.store(tickets_ptr + tiles, 0)\n", ""),
        ("sorted before the last tile is there", "== tiles - 1:", "== tiles - 2:"),
        ("every tile sorted as the first", "pair // per_tile * E", "pair // pairs * E"),
        ("scan inclusive", "tl.cumsum(counts, axis=0) - counts, mask", "tl.cumsum(counts, axis=0), mask"),
    ],
    ("route", "moe/route_backward.py"): [
        ("the sigmoid's gradient cut short", "ds * s * (1 - s)", "ds * s"),
        ("the sum's gradient forgotten", "(ds - tl.sum(ds * s, axis=1)[:, None] / total) / total", "ds / total"),
        ("scale forgotten", ".to(tl.float64) * SCALE", ".to(tl.float64)"),
    ],
}
