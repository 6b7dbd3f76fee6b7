"""Faults in the experts."""

from . import Mutant

EXPERTS = "tt_kernels/moe/experts.py"
EXPERTS_BACKWARD = "tt_kernels/moe/experts_backward.py"
EXPERTS_KERNELS = "tt_kernels/moe/experts_kernels.py"
LANG = "tt_kernels/moe/lang.py"

MUTANTS = (
    Mutant(
        "experts",
        EXPERTS_KERNELS,
        "(end - start + BLOCK_T - 1) // BLOCK_T",
        "(end - start) // BLOCK_T",
        "last tile missed",
    ),
    Mutant(
        "experts", EXPERTS_KERNELS, "last[None, :] <= tile[:, None]", "last[None, :] < tile[:, None]", "wrong expert"
    ),
    Mutant(
        "experts",
        EXPERTS_KERNELS,
        "axis=0).to(tl.int64)",
        "axis=0).to(tl.int64) - 1",
        "a tile less for who walks the list",
    ),
    Mutant("experts", LANG, "a.load([first, k])", "a.load([0, k])", "every tile reads the first rows"),
    Mutant("experts", LANG, "h * h, 2 * h", "h, 2 * h", "relu, not its square"),
    Mutant(
        "experts", EXPERTS_KERNELS, "tl.static_range(K)", "tl.static_range(K - 1)", "a token's last expert forgotten"
    ),
    Mutant("experts", EXPERTS_KERNELS, "pair *= tl.load", "tl.load", "routing weights forgotten"),
    Mutant(
        "experts",
        EXPERTS_KERNELS,
        "tl.float64 if weights_ptr.dtype.element_ty == tl.float64 else acc",
        "acc",
        "summed without the dtype of routing weights",
    ),
    Mutant(
        "experts",
        LANG,
        "acc = dot_tile(a_tile, w_tile, acc, TRANSPOSED, SWAP)",
        "acc = dot_tile(a_tile, w_tile, acc, TRANSPOSED, SWAP).to(tl.float16).to(acc.dtype)",
        "sums in 16 bits",
    ),
    Mutant("experts", EXPERTS_KERNELS, "first, expert * N, n0", "first, 0 * N, n0", "everybody takes the first expert"),
    Mutant(
        "experts",
        EXPERTS_KERNELS,
        "(pair.to(tl.int32) // sizes.top_k)",
        "(pair.to(tl.int32) // (sizes.top_k + 1))",
        "wrong token",
    ),
    Mutant("experts", EXPERTS_KERNELS, "h *= a\n", "h = a\n", "up forgotten beside the gate"),
    Mutant(
        "experts",
        EXPERTS_KERNELS,
        "y, y, h2, down2, down2,",
        "y, y, h, down, down,",
        "dx without the gate",
    ),
    Mutant(
        "experts",
        EXPERTS_KERNELS,
        "at = tl.where(is_shared, rows, at)\n        N",
        "pass\n        N",
        "the shared expert sees the first row only",
    ),
    Mutant("experts", LANG, "tile * 0 + T", "tile * 0 + T - 1", "the shared expert misses the last row"),
    Mutant("experts", LANG, "h * h, 2 * h", "h * h, h", "derivative of the square without its 2"),
    Mutant("experts", LANG, "s * (1 + h * (1 - s))", "s * (1 - s)", "derivative of sigmoid, not silu"),
    Mutant("experts", EXPERTS_BACKWARD, "dh = d * w\n", "dh = d\n", "routing weight forgotten in dh"),
    Mutant("experts", EXPERTS_BACKWARD, "parts.sum(0)", "parts[0]", "dweights of the first tile of N"),
    Mutant(
        "experts",
        EXPERTS_BACKWARD,
        "expert - 1, expert > 0",
        "expert - 1, expert > 1",
        "the second expert takes the first's rows too",
    ),
    Mutant(
        "experts", EXPERTS_BACKWARD, "mask_r = rows < end", "mask_r = rows < end - 1", "last row of an expert missed"
    ),
    Mutant(
        "experts",
        EXPERTS_BACKWARD,
        'weights.up, pairs, "b"),',
        'weights.up, pairs, ""),',
        "rows of x by pair, not by token",
    ),
    Mutant(
        "experts",
        EXPERTS,
        "sort_pairs(topk_ids, len(up))",
        "sort_pairs(topk_ids - 1, len(up))",
        "pairs listed for the expert before theirs",
    ),
)
