"""Faults in the experts."""

MUTANTS = {
    ("experts", "moe/experts_kernels.py"): [
        ("last tile missed", "SPARE, 1) + BLOCK_T - 1) // BLOCK_T", "SPARE, 1)) // BLOCK_T"),
        ("wrong expert", "last[None, :] <= tile[:, None]", "last[None, :] < tile[:, None]"),
        (
            "sums without the weights' dtype",
            "if weights_ptr.dtype.element_ty == tl.float64 else acc",
            "if False else acc",
        ),
        ("the shared expert's weight forgotten", "shared *= tl.load(shared_weight_ptr + t).to(acc)", "shared *= 1"),
        ("all tokens weigh the shared expert as the first", "shared_weight_ptr + t)", "shared_weight_ptr)"),
        (
            "the shared expert without its weight's dtype",
            "if shared_weight_ptr.dtype.element_ty == tl.float64 else acc",
            "if False else acc",
        ),
        ("everybody takes the first expert", "first, expert * routed.step, n0", "first, 0 * routed.step, n0"),
        ("wrong token", "(pair.to(tl.int32) // sizes.top_k)", "(pair.to(tl.int32) // (sizes.top_k + 1))"),
        ("up forgotten beside the gate", "h *= a\n", "h = a\n"),
        ("dx without the gate", "y, y, h2, down2, down2,", "y, y, h, down, down,"),
        ("the shared expert sees the first row only", "tl.where(is_shared, rows, at)\n        N", "at\n        N"),
    ],
    ("experts", "moe/experts_kernels.py", "test_launches_experts.py::test_all_forms_give_the_same"): [
        ("a tile less for who walks the list", "axis=0).to(tl.int64)", "axis=0).to(tl.int64) - 1"),
    ],
    ("experts", "moe/experts_kernels.py", "test_launches_experts.py::test_tall_tiles_give_the_same"): [
        ("rows beyond a tile cut off", "until - first <= BLOCK_T + SPARE, until", "until - first <= BLOCK_T, until"),
    ],
    ("experts", "moe/lang.py", "test_launches_experts.py::test_tall_tiles_give_the_same"): [
        ("the tallest tile misses its last rows", "end - first > 2 * LOW + LOW // 2:", "end - first > 3 * LOW:"),
        # All of its rows in every tile are no fault that shows: neighbours then write the same numbers.
        (
            "the shared expert's last row missed",
            "tl.minimum(end, first + BLOCK_T), end)",
            "tl.minimum(end - 1, first + BLOCK_T), end)",
        ),
        ("no second half", "tl.minimum(n0 + BLOCK_N, N), HALF", "n0 + HALF, HALF"),
        ("every tile's h goes to the first rows", "(out + first.to(tl.int64) * N) + r", "out + r"),
        ("every tile reads the first rows of h", "(a + first.to(tl.int64) * K) + r", "a + r"),
        ("the last rows stored over the ones before", "N, R, TOP + LOW, REST", "N, R, TOP, REST"),
    ],
    ("experts", "moe/lang.py", "test_launches_experts.py::test_all_forms_give_the_same"): [
        ("all tiles found are an expert's first rows", "first = start + within * BLOCK_T", "first = start"),
    ],
    (
        "experts",
        "moe/operands.py",
        "test_launches_experts.py::test_halves_of_a_fused_tensor_give_what_copies_of_them_give",
    ): [
        ("experts of a part follow each other", "step = apart // D", "step = N"),
        ("the last expert of a part cut off", "((len(w) - 1) * step + N, D)", "((len(w) - 1) * step, D)"),
        ("columns of a wider tensor taken for rows", "inner == [D, 1] and ", ""),
    ],
    ("experts", "moe/lang.py"): [
        ("every tile reads the first rows", "a.load([first, k])", "a.load([0, k])"),
        ("relu, not its square", "h * h, 2 * h", "h, 2 * h"),
        ("sums in 16 bits", "acc, TRANSPOSED, SWAP)", "acc, TRANSPOSED, SWAP).to(tl.float16).to(acc.dtype)"),
        ("the shared expert misses the last row", "tile * 0 + T", "tile * 0 + T - 1"),
        ("an expert's last tile not found", "tl.maximum(end - start, 0) + BLOCK_T - 1)", "tl.maximum(end - start, 0))"),
        ("tiles of the experts before counted wrongly", "(tl.cumsum(count, 0) - count)", "tl.cumsum(count, 0)"),
        ("a tile of two experts", "(within < count)", "(within <= count)"),
        ("derivative of the square without its 2", "h * h, 2 * h", "h * h, h"),
        ("derivative of sigmoid, not silu", "s * (1 + h * (1 - s))", "s * (1 - s)"),
        ("GELU by the density at 2 h", "-0.7213475204444817 * h * h", "-2.885390081777927 * h * h"),
        ("GELU's approximation without its cube", "h * (1 + 0.044715 * h * h)", "h"),
        ("its derivative as of the cube's h", "(1 + 0.134145 * h * h)", "(1 + 0.044715 * h * h)"),
    ],
    ("experts", "runtime/lang.py"): [
        ("a token's last expert forgotten", "tl.static_range(K)", "tl.static_range(K - 1)"),
        ("routing weights forgotten", "pair *= tl.load", "tl.load"),
    ],
    ("experts_norm", "norm/modulated_rms_norm_kernels.py"): [
        ("the shared expert forgotten", "step += more", "step += 0"),
        ("its weight forgotten", "more *= tl.load(branch_weight_ptr + row).to(total)", "more *= 1"),
    ],
    (
        "experts_norm",
        "norm/modulated_rms_norm_kernels.py",
        "test_experts_norm.py::test_the_same_bits_as_two_ops",
    ): [
        ("the sum of experts not rounded", "step = step.to(dtype).to(acc)", "step = step.to(acc)"),
        (
            "the sum of experts without the dtype of weights",
            "tl.float64 if parts.weights.dtype.element_ty == tl.float64 else tl.float32",
            "tl.float32",
        ),
        (
            "the shared expert without its weight's dtype",
            "tl.float64 if branch_weight_ptr.dtype.element_ty == tl.float64 else total",
            "total",
        ),
    ],
    ("experts_norm", "moe/experts_norm.py"): [
        ("orders swapped", 'order == "norm_modulate"', 'order != "norm_modulate"'),
        ("the gate forgotten", "shift, scale, gate\n    return", "shift, scale, None\n    return"),
    ],
    (
        "experts_norm",
        "moe/experts_norm.py",
        "test_experts_norm.py::test_gradients_are_those_of_two_ops",
    ): [
        (
            "gradients of no one but x wanted",
            "if wants_gradients(x, routing.topk_weights, shared_weight, *data, *of_norm)",
            "if False",
        ),
    ],
    ("experts", "moe/experts_backward.py"): [
        ("hidden rows of the first expert", "first, expert * step, n0", "first, 0 * step, n0"),
        ("gradients of the shared expert without its weight", "h * w\n        to = ", "h\n        to = "),
        ("routing weight forgotten in dh", "dh = d * w\n", "dh = d\n"),
        ("dweights of the first tile of N", "parts.sum(0)", "parts[0]"),
        ("the second expert takes the first's rows too", "expert - 1, expert > 0", "expert - 1, expert > 1"),
        ("last row of an expert missed", "mask_r = rows < end", "mask_r = rows < end - 1"),
        ("tokens of the turn before", "r + BLOCK_R, end, T", "r, end, T"),
        ("rows of x by pair, not by token", '("a", "b") if hidden.x is x', '("a", "") if hidden.x is x'),
        ("sorted rows taken for tokens'", '("a", "b") if hidden.x is x', '("a", "b") if True'),
    ],
    ("experts", "moe/experts.py"): [
        ("pairs listed for the expert before theirs", "(topk_ids, len(up))", "(topk_ids - 1, len(up))")
    ],
}
