"""Faults in the experts."""

from . import Mutant

TILES = "tt_kernels/moe/experts/tiles.py"
FORWARD = "tt_kernels/moe/experts/forward.py"
BACKWARD = "tt_kernels/moe/experts/backward.py"
OP = "tt_kernels/moe/experts/op.py"

MUTANTS = (
    Mutant("experts", TILES, "(end - start + BLOCK_T - 1) // BLOCK_T", "(end - start) // BLOCK_T", "last tile missed"),
    Mutant("experts", TILES, "last[None, :] <= tile[:, None]", "last[None, :] < tile[:, None]", "wrong expert"),
    Mutant("experts", TILES, "axis=0).to(tl.int64)", "axis=0).to(tl.int64) - 1", "a tile less for who walks the list"),
    Mutant("experts", TILES, "a.load([first, k])", "a.load([0, k])", "every tile reads the first rows"),
    Mutant("experts", TILES, "        h = h * h\n", "", "relu, not its square"),
    Mutant("experts", TILES, "tl.static_range(K)", "tl.static_range(K - 1)", "a token's last expert forgotten"),
    Mutant("experts", TILES, "pair *= tl.load", "tl.load", "routing weights forgotten"),
    Mutant(
        "experts",
        TILES,
        "tl.float64 if weights_ptr.dtype.element_ty == tl.float64 else acc",
        "acc",
        "summed without the dtype of routing weights",
    ),
    Mutant(
        "experts",
        TILES,
        "acc = dot_tile(a_tile, w_tile, acc, TRANSPOSED, SWAP)",
        "acc = dot_tile(a_tile, w_tile, acc, TRANSPOSED, SWAP).to(tl.float16).to(acc.dtype)",
        "sums in 16 bits",
    ),
    Mutant("experts", FORWARD, "first, expert * N, n0", "first, 0 * N, n0", "everybody takes the first expert"),
    Mutant("experts", FORWARD, "(pair.to(tl.int32) // top_k)", "(pair.to(tl.int32) // (top_k + 1))", "wrong token"),
    Mutant("experts", FORWARD, "h *= activate(g, RELU2)", "h = activate(g, RELU2)", "up forgotten beside the gate"),
    Mutant(
        "experts", FORWARD, "product(y, y, h2, down2, down2,", "product(y, y, h, down, down,", "dx without the gate"
    ),
    Mutant(
        "experts",
        FORWARD,
        "at = tl.where(shared, rows, at)\n        N",
        "N",
        "the shared expert sees the first row only",
    ),
    Mutant("experts", TILES, "tile * 0 + T", "tile * 0 + T - 1", "the shared expert misses the last row"),
    Mutant("experts", BACKWARD, "v * v, 2 * v", "v * v, v", "derivative of the square without its 2"),
    Mutant("experts", BACKWARD, "s * (1 + v * (1 - s))", "s * (1 - s)", "derivative of sigmoid, not silu"),
    Mutant("experts", BACKWARD, "dh = d * w\n", "dh = d\n", "routing weight forgotten in dh"),
    Mutant("experts", BACKWARD, "parts.sum(0)", "parts[0]", "dweights of the first tile of N"),
    Mutant(
        "experts",
        BACKWARD,
        "expert - 1, expert > 0",
        "expert - 1, expert > 1",
        "the second expert takes the first's rows too",
    ),
    Mutant("experts", BACKWARD, "mask_r = rows < end", "mask_r = rows < end - 1", "last row of an expert missed"),
    Mutant("experts", BACKWARD, 'ends, up, "b"),', 'ends, up, ""),', "rows of x by pair, not by token"),
    Mutant(
        "experts",
        OP,
        "order, ends = index_lists(ids, len(up))",
        "order, ends = index_lists(ids - 1, len(up))",
        "pairs listed for the expert before theirs",
    ),
)
