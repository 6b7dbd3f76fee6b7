"""Faults in the router's kernels."""

NEIGHBOURS = "test_route_bounds.py::test_neighbours_of_a_batch"

MUTANTS = {
    ("route", "moe/route_choice.py"): [
        ("bias forgotten", "(1 + tl.exp(-quick)) + bias.to(tl.float32)[None, :, :]", "(1 + tl.exp(-quick))"),
        ("normalised over more than the chosen", "tl.where(k < CHOICE.TOP_K, scores, 0.0)", "scores"),
        ("a group's best score only", "ordered32(first + second)", "ordered32(first)"),
        ("ties go to the higher expert", "tl.min(tl.min(tl.where(top, p, _NONE", "tl.max(tl.max(tl.where(top, p, -1"),
        ("last expert of a group missed", "(p % BLOCK_N < E // GROUPS)", "(p % BLOCK_N < E // GROUPS - 1)"),
        ("a part of D not added", "range(1, SPLITS):\n        part", "range(2, SPLITS):\n        part"),
        ("a part of a weight's logit not added", "SPLITS):\n        log", "SPLITS - 1):\n        log"),
        ("a softmax over the chosen, not all", "            total += rest\n", ""),
        ("divided by the sum of all", "if not CHOICE.NORM:\n            every", "if CHOICE.TOP_K:\n            every"),
        ("who is not chosen counted with padding", "(taken < 0) & real[None, :, :]", "(taken < 0)"),
    ],
    (
        "route",
        "moe/route_choice.py",
        "test_route_softmax.py::test_of_equal_logits_the_lower_expert_wins",
    ): [
        ("chosen once more than there are", "(number == NUMBER)", "(number >= NUMBER)"),
    ],
    ("route", "moe/route_choice.py", NEIGHBOURS): [
        ("never chosen again", "    if again:\n        operands", "    if again & (T < 0):\n        operands"),
        ("any difference will do", "before - value > margin)\n        before", "before - value > 0.0)\n        before"),
        ("the best that is left is not looked at", "((top == _TAKEN32) | (before - value > margin))", "(top == top)"),
        ("neighbours not computed anew", "real[None, :, :] & neigh", "(T < 0) & neigh"),
        ("only one of two neighbours", "found |= near &", "found |= (taken == k).to(tl.int32) &"),
    ],
    ("route", "moe/route_choice.py", "test_route_bounds.py::test_neighbours_of_a_softmax"): [
        ("logits taken for exact", "2 * (off + (error + _LEAST))", "2 * _LEAST"),
    ],
    ("route", "moe/route_choice.py", "test_route_bounds.py::test_neighbours_are_told_apart_by_halves"): [
        ("a group's best score only, in fp64", " ordered(first + second)", " ordered(first)"),
    ],
    ("route", "moe/route_choice.py", "test_route_bounds.py::test_neighbours_in_two_groups"): [
        ("a group's neighbours not computed anew", "wanted = doubted_group[:, None, None] &", "wanted = (tile < 0) &"),
    ],
    ("route", "moe/route_kernels.py", NEIGHBOURS): [
        ("the middle part forgotten", "        acc = tl.dot(halved(middle), halves, acc)\n", ""),
    ],
    ("route", "moe/route_launch.py", "test_route_bounds.py::test_sums_by_parts_are_within_the_bound"): [
        ("half the bound", "1.02 * 20", "1.02 * 10"),
    ],
    ("route", "moe/route_kernels.py"): [
        ("logits in fp32", "    return a + b\n", "    return (a + b).to(tl.float32).to(tl.float64)\n"),
        ("last column of D missed", "mask_d = offset + d < given.D", "mask_d = offset + d < given.D - 1"),
        ("pairs of the tiles before forgotten", ")[None, :] + tl.cumsum(counts, axis=0) -", ")[None, :] + counts -"),
        ("rank off by one", "((1 << tl.arange(0, R)) - 1)", "((2 << tl.arange(0, R)) - 1)"),
        ("a tile's ticket not set back", "        tl.store(tickets_ptr + tile, 0)\n", ""),
        ("the tiles' ticket not set back", "            tl.store(tickets_ptr + tiles, 0)\n", ""),
        ("sorted before the last tile is there", "== tiles - 1:", "== tiles - 2:"),
        ("every tile sorted as the first", "pair // per_tile * E", "pair // pairs * E"),
        ("scan inclusive", "tl.cumsum(counts, axis=0) - counts, mask", "tl.cumsum(counts, axis=0), mask"),
    ],
    ("route", "moe/route_backward.py"): [
        ("the sigmoid's gradient cut short", "ds * s * (1 - s)", "ds * s"),
        ("the sum's gradient forgotten", "(ds - tl.sum(ds * s, axis=1)[:, None] / total) / total", "ds / total"),
        ("a softmax's gradient cut short", "        ds -= common\n", ""),
        ("the others' gradients forgotten", "(-common / tl.sum(p", "(0 * common / tl.sum(p"),
        ("scale forgotten", ".to(tl.float64) * SCALE", ".to(tl.float64)"),
    ],
}
