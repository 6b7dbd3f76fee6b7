"""Faults in the attention kernels."""

MUTANTS = {
    ("context_attention", "attention/lang.py"): [
        ("the sum is not rescaled", "l = l * kept + ", "l = l + "),
        ("the output is not rescaled", "o * kept[:, None]", "o"),
        (
            "one page for a tile that spans several",
            "tl.load(table_ptr + tokens // page",
            "tl.load(table_ptr + n // page",
        ),
        ("page's start", "at = page * page_size + n % page_size", "at = page * page_size"),
        ("KV head 0's values", "v = v_desc.load([at, head.to(tl.int32) * P])", "v = v_desc.load([at, 0])"),
    ],
    ("context_attention", "attention/context_attention_kernels.py"): [
        ("a token past the length is seen", "(full + offs_n < end)[None, :]", "(full + offs_n <= end)[None, :]"),
        ("a single last token is missed", "    if full < end:\n", "    if full + 1 < end:\n"),
        ("not itself", "own[None, :] <= token[:, None]", "own[None, :] < token[:, None]"),
        ("another KV head's queries", "head * R + rows % R", "head + rows % R"),
        ("first token missed", "    token = rows // R\n", "    token = rows // R + 1\n"),
        ("a token between splits is missed", "(length, start + size)", "(length, start + size - 1)"),
        ("splits are not weighted", "tl.exp2(high - most[:, None])", "tl.where(high > -float('inf'), 1.0, 0.0)"),
        (
            "splits do not reach the end",
            "tl.cdiv(tl.cdiv(span, splits), 64) * 64, min_tokens)",
            "(span // splits) // 64 * 64, 1)",
        ),
        (
            "stale page",
            "n + BLOCK_N, end, page_size, BLOCK_N, IN_PAGE)\n        m, l, o",
            "n, end, page_size, BLOCK_N, IN_PAGE)\n        m, l, o",
        ),
        (
            "own tiles at the diagonal run unmasked",
            "seen_by_all = tl.minimum(L, tile * BLOCK_M // R + 1)",
            "seen_by_all = tl.minimum(L, tile * BLOCK_M // R + BLOCK_N)",
        ),
    ],
    ("context_attention", "attention/lang.py", "test_attention_context.py::test_sixteen_bits_by_tma"): [
        ("what TMA brings from behind the end stays", "tl.where((tokens < end)[:, None], v, tl.zeros_like(v))", "v")
    ],
    (
        "context_attention",
        "attention/context_attention_kernels.py",
        "test_attention_context.py::test_splits_of_a_row_in_a_larger_batch",
    ): [("splits that nobody computes", "tl.maximum(fill, tl.cdiv(span, 16 * min_tokens))", "max_splits")],
    (
        "context_attention",
        "attention/context_attention_launch.py",
        "test_attention_context.py::test_splits_of_a_row_in_a_larger_batch",
    ): [("too few splits are launched", "max(self.fill, triton.cdiv(length, 16 * self.min_tokens))", "self.fill")],
    ("context_attention", "attention/context_attention_kernels.py", "test_attention_windows.py"): [
        (
            "a token too many in windows of cached ones",
            "begin = tl.minimum(token, L - 1) - window + 1",
            "begin = tl.minimum(token, L - 1) - window",
        ),
        (
            "a page too few in splits of a window",
            "start = tl.maximum(length - window + 1, 0) // 64 * 64",
            "start = tl.cdiv(tl.maximum(length - window + 1, 0), 64) * 64",
        ),
        (
            "the tile in which a window begins runs unmasked",
            "tl.cdiv(tl.maximum(length + latest, 0), BLOCK_N) * BLOCK_N, full)",
            "tl.maximum(length + latest, 0) // BLOCK_N * BLOCK_N, full)",
        ),
        (
            "tiles before a window are masked, and not skipped",
            "tl.maximum(start, tl.maximum(low, 0) // BLOCK_N * BLOCK_N)",
            "start",
        ),
        ("values before every window come through", "TMA, False, True)", "TMA, False, False)"),
    ],
    ("causal_attention", "attention/block_attention_kernels.py", "test_attention_windows.py"): [
        ("a token too few in a window", "rows - window + 1", "rows - window + 2"),
        (
            "a window that begins in a tile runs unmasked",
            "inner = tl.minimum((latest + BLOCK_N - 1)",
            "inner = tl.minimum(latest",
        ),
    ],
    ("causal_attention", "runtime/lang.py", "test_attention_windows.py"): [
        ("tanh of small scores cancels", "small = size * size, size < 0.125", "small = size * size, size < 0.0"),
        ("the sign of capped scores is lost", "tl.where(z < 0, -t, t)", "t"),
    ],
    ("causal_attention", "attention/lang.py", "test_attention_windows.py"): [
        ("masked scores are at the cap, as if it came after masks", '(seen, s, -float("inf"))', "(seen, s, -1.0)"),
        ("the cap comes twice", "softcap * log2e", "softcap * softcap * log2e"),
    ],
    (
        "append_attention",
        "attention/context_attention_kernels.py",
        "test_attention_context.py::test_a_length_below_zero_is_none",
    ): [
        ("a length below 0 writes before the row", "cache_lengths_ptr + b), 0)", "cache_lengths_ptr + b), -(1 << 30))")
    ],
    (
        "context_attention",
        "attention/lang.py",
        "test_attention_context.py::test_nan_reaches_who_sees_it_and_nobody_else",
    ): [("a NaN that is seen is swallowed", '(seen, s, -float("inf"))', '(seen & (s == s), s, -float("inf"))')],
    ("append_attention", "attention/context_attention_kernels.py", "test_attention_lse.py"): [
        ("the sum of a split is not in the logarithm", "(most + tl.log2(l))", "most"),
        ("the largest score is not scaled in the logarithm", "(m * scale + tl.log2(l))", "(m + tl.log2(l))"),
    ],
    ("append_attention", "attention/lang.py", "test_attention_nan.py::test_any_scale"): [
        ("the sign of the scale is lost", "s = s * factor", "s = s * tl.abs(factor)"),
        ("a scale that is 0 in fp32 gives NaN", "if 1e-30 < scale <= 1 else", "if 0 < scale <= 1 else"),
    ],
    ("causal_attention or block_diffusion", "attention/lang.py"): [
        ("the last tile's values are left out", "o = add_values(p, _whole(v,", "add_values(p, _whole(v,"),
        ("values of the tile whose weights are to come", "n - BLOCK_N, head, N", "n, head, N"),
        ("another row's keys by TMA", "desc.load([b.to(tl.int32) * N + n,", "desc.load([n,"),
        (
            "earlier results are kept whole",
            "o = add_values(p, v_tile, o, kept)",
            "o = add_values(p, v_tile, o, kept * 0 + 1)",
        ),
    ],
    ("append_attention", "attention/context_attention_kernels.py"): [
        ("a slot left out", "            to = length + at\n", "            to = length + at + 1\n"),
        ("tokens that do not count enter", "& (at < count) &", "&"),
        ("the last that counts does not enter", "& (at < count) &", "& (at < count - 1) &"),
        ("another page's keys overwritten", "slot = (to % page_size).to(tl.int64)", "slot = to.to(tl.int64)"),
        ("keys as values", "(v_pages, page, slot, head, offs_p), v_new", "(v_pages, page, slot, head, offs_p), k_new"),
        ("each tile writes the next one's tokens", "(tile * BLOCK_M + R - 1)", "(tile * BLOCK_M + BLOCK_M + R - 1)"),
        ("one page for all tokens", "table_ptr + to // page_size", "table_ptr + length // page_size"),
    ],
    ("causal_attention or block_diffusion", "attention/block_attention_kernels.py"): [
        ("a token does not see itself", "rows + 1 if CAUSAL", "rows if CAUSAL"),
        ("own block seen clean", "else rows // S * S  # [BLOCK_M]", "else rows // S * S + 1  # [BLOCK_M]"),
        ("earlier noisy blocks are seen", "== (rows // S)[:, None]", "<= (rows // S)[:, None]"),
        ("one noisy block a tile", "(first + BLOCK_M - 1) // S * S + S, N)", "first // S * S + S, N)"),
        (
            "the diagonal runs unmasked",
            "    least = first + 1 if CAUSAL else first // S * S",
            "    least = first + BLOCK_M if CAUSAL else first // S * S + BLOCK_M",
        ),
        (
            "another KV head's keys",
            "tile_of(k_clean, b, n + offs_n, head // R, offs_p, most, P)",
            "tile_of(k_clean, b, n + offs_n, head % R, offs_p, most, P)",
        ),
        ("packed sequences see each other", "        begin = tl.load(", "        begin = 0 * tl.load("),
    ],
    (
        "causal_attention or block_diffusion",
        "attention/block_attention_kernels.py",
        "test_attention_masks.py::test_block_diffusion",
    ): [("a block of two sequences sees the later one", "[None, :] == begin[:, None]", "[None, :] >= begin[:, None]")],
}
