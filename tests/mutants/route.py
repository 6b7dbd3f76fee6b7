"""Faults in the router's kernels."""

from mutants import Mutant

CHOICE = "tt_kernels/moe/route/choice.py"
FEW = "tt_kernels/moe/route/few.py"
MANY = "tt_kernels/moe/route/many.py"
BACKWARD = "tt_kernels/moe/route/backward.py"

MUTANTS = (
    Mutant("route", CHOICE, "biased = scores + bias[None, :, :]", "biased = scores", "bias forgotten"),
    Mutant("route", CHOICE, "weights = scores * SCALE", "weights = biased * SCALE", "weights from biased scores"),
    Mutant("route", CHOICE, "tl.where(k >= 0, scores, 0.0)", "scores", "normalised over all experts"),
    Mutant("route", CHOICE, "ordered(first + second)", "ordered(first)", "a group's best score only"),
    Mutant(
        "route",
        CHOICE,
        "tl.min(tl.min(tl.where(top, p, _NONE), axis=1), axis=1)",
        "tl.max(tl.max(tl.where(top, p, -1), axis=1), axis=1)",
        "ties go to the higher expert",
    ),
    Mutant("route", CHOICE, "(p % BLOCK_N < size)", "(p % BLOCK_N < size - 1)", "last expert of a group missed"),
    Mutant("route", CHOICE, "tl.cumsum(ones, axis=0) - ones", "tl.cumsum(ones, axis=0)", "rank off by one"),
    Mutant(
        "route",
        FEW,
        "    return tl.sum(acc, axis=0)",
        "    return tl.sum(acc, axis=0).to(tl.float32).to(tl.float64)",
        "logits in fp32",
    ),
    Mutant("route", FEW, "tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)", "a part of D not added"),
    Mutant("route", FEW, "mask_d = offset + d < D", "mask_d = offset + d < D - 1", "last column of D missed"),
    Mutant(
        "route",
        FEW,
        "(ends - total)[None, :] + tl.cumsum(counts, axis=0) - counts",
        "(ends - total)[None, :] + counts - counts",
        "pairs of the tiles before forgotten",
    ),
    Mutant("route", FEW, "        tl.store(tickets_ptr + tile, 0)\n", "", "a tile's ticket not set back"),
    Mutant("route", FEW, "                tl.store(tickets_ptr + tiles, 0)\n", "", "the tiles' ticket not set back"),
    Mutant("route", FEW, "== tiles - 1:", "== tiles - 2:", "sorted before the last tile is there"),
    Mutant("route", MANY, "pair // per_tile * E", "pair // pairs * E", "every tile sorted as the first"),
    Mutant(
        "route", MANY, "tl.cumsum(counts, axis=0) - counts, mask", "tl.cumsum(counts, axis=0), mask", "scan inclusive"
    ),
    Mutant("route", BACKWARD, "ds * s * (1 - s)", "ds * s", "the sigmoid's gradient cut short"),
    Mutant(
        "route",
        BACKWARD,
        "(ds - tl.sum(ds * s, axis=1)[:, None] / total) / total",
        "ds / total",
        "the sum's gradient forgotten",
    ),
    Mutant("route", BACKWARD, ".to(tl.float64) * SCALE", ".to(tl.float64)", "scale forgotten"),
)
