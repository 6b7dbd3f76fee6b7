"""Faults in the router's kernels."""

from . import Mutant

ROUTE_BACKWARD = "tt_kernels/moe/route_backward.py"
ROUTE_KERNELS = "tt_kernels/moe/route_kernels.py"

MUTANTS = (
    Mutant("route", ROUTE_KERNELS, "biased = scores + bias[None, :, :]", "biased = scores", "bias forgotten"),
    Mutant(
        "route",
        ROUTE_KERNELS,
        "weights = scores * CHOICE.SCALE",
        "weights = biased * CHOICE.SCALE",
        "weights from biased scores",
    ),
    Mutant("route", ROUTE_KERNELS, "tl.where(k >= 0, scores, 0.0)", "scores", "normalised over all experts"),
    Mutant("route", ROUTE_KERNELS, "ordered(first + second)", "ordered(first)", "a group's best score only"),
    Mutant(
        "route",
        ROUTE_KERNELS,
        "tl.min(tl.min(tl.where(top, p, _NONE), axis=1), axis=1)",
        "tl.max(tl.max(tl.where(top, p, -1), axis=1), axis=1)",
        "ties go to the higher expert",
    ),
    Mutant("route", ROUTE_KERNELS, "(p % BLOCK_N < size)", "(p % BLOCK_N < size - 1)", "last expert of a group missed"),
    Mutant("route", ROUTE_KERNELS, "tl.cumsum(ones, axis=0) - ones", "tl.cumsum(ones, axis=0)", "rank off by one"),
    Mutant(
        "route",
        ROUTE_KERNELS,
        "    return tl.sum(acc, axis=0)",
        "    return tl.sum(acc, axis=0).to(tl.float32).to(tl.float64)",
        "logits in fp32",
    ),
    Mutant("route", ROUTE_KERNELS, "tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)", "a part of D not added"),
    Mutant("route", ROUTE_KERNELS, "mask_d = offset + d < D", "mask_d = offset + d < D - 1", "last column of D missed"),
    Mutant(
        "route",
        ROUTE_KERNELS,
        "(ends - total)[None, :] + tl.cumsum(counts, axis=0) - counts",
        "(ends - total)[None, :] + counts - counts",
        "pairs of the tiles before forgotten",
    ),
    Mutant("route", ROUTE_KERNELS, "        tl.store(tickets_ptr + tile, 0)\n", "", "a tile's ticket not set back"),
    Mutant(
        "route",
        ROUTE_KERNELS,
        "                tl.store(tickets_ptr + tiles, 0)\n",
        "",
        "the tiles' ticket not set back",
    ),
    Mutant("route", ROUTE_KERNELS, "== tiles - 1:", "== tiles - 2:", "sorted before the last tile is there"),
    Mutant("route", ROUTE_KERNELS, "pair // per_tile * E", "pair // pairs * E", "every tile sorted as the first"),
    Mutant(
        "route",
        ROUTE_KERNELS,
        "tl.cumsum(counts, axis=0) - counts, mask",
        "tl.cumsum(counts, axis=0), mask",
        "scan inclusive",
    ),
    Mutant("route", ROUTE_BACKWARD, "ds * s * (1 - s)", "ds * s", "the sigmoid's gradient cut short"),
    Mutant(
        "route",
        ROUTE_BACKWARD,
        "(ds - tl.sum(ds * s, axis=1)[:, None] / total) / total",
        "ds / total",
        "the sum's gradient forgotten",
    ),
    Mutant("route", ROUTE_BACKWARD, ".to(tl.float64) * SCALE", ".to(tl.float64)", "scale forgotten"),
)
