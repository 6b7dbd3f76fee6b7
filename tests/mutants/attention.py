"""Faults in the attention kernels."""

from mutants import Mutant

TILE = "tt_kernels/attention/tile.py"
CONTEXT = "tt_kernels/attention/context_kernels.py"
BLOCKS = "tt_kernels/attention/block_diffusion_kernels.py"
ANY = "causal_attention or block_diffusion"
TESTS = "tests/test_attention_context.py::test_"

MUTANTS = (
    Mutant("context_attention", TILE, "l = l * kept + ", "l = l + ", "the sum is not rescaled"),
    Mutant("context_attention", TILE, "o * kept[:, None]", "o", "the output is not rescaled"),
    Mutant(
        "context_attention",
        CONTEXT,
        "(full + offs_n < end)[None, :]",
        "(full + offs_n <= end)[None, :]",
        "a token past the length is seen",
    ),
    Mutant(
        "context_attention",
        CONTEXT,
        "    if full < end:\n",
        "    if full + 1 < end:\n",
        "a single last token is missed",
    ),
    Mutant(
        "context_attention", CONTEXT, "own[None, :] <= token[:, None]", "own[None, :] < token[:, None]", "not itself"
    ),
    Mutant("context_attention", CONTEXT, "head * R + rows % R", "head + rows % R", "another KV head's queries"),
    Mutant(
        "context_attention", CONTEXT, "    token = rows // R\n", "    token = rows // R + 1\n", "first token missed"
    ),
    Mutant(
        "context_attention",
        CONTEXT,
        "tl.minimum(length, start + size)",
        "tl.minimum(length, start + size - 1)",
        "a token between splits is missed",
    ),
    Mutant(
        "context_attention",
        CONTEXT,
        "weight = tl.exp2(m - tl.max(m, axis=0))",
        "weight = tl.where(m > -float('inf'), 1.0, 0.0)",
        "splits are not weighted",
    ),
    Mutant(
        "context_attention",
        TILE,
        "tl.load(table_ptr + tokens // page_size)",
        "tl.load(table_ptr + n // page_size)",
        "one page for a tile that spans several",
    ),
    Mutant(
        "context_attention",
        CONTEXT,
        "tl.cdiv(tl.cdiv(length, splits), 64) * 64, least)",
        "(length // splits) // 64 * 64, 1)",
        "splits do not reach the end",
    ),
    Mutant("context_attention", TILE, "at = page * page_size + n % page_size", "at = page * page_size", "page's start"),
    Mutant(
        "context_attention",
        CONTEXT,
        "page = page_of(table_ptr, n + BLOCK_N,",
        "page = page_of(table_ptr, n,",
        "stale page",
    ),
    Mutant(
        "context_attention",
        TILE,
        "v = v_desc.load([at, head.to(tl.int32) * P])",
        "v = v_desc.load([at, 0])",
        "KV head 0's values",
    ),
    Mutant(
        "context_attention",
        TILE,
        "v = tl.where((tokens < end)[:, None], v, tl.zeros_like(v))",
        "v = v + tl.zeros_like(v)",
        "what TMA brings from behind the end is not cleared",
        TESTS + "sixteen_bits_by_tma",
    ),
    Mutant(
        "context_attention",
        CONTEXT,
        "tl.minimum(tl.maximum(fill, tl.cdiv(length, 16 * least)), most)",
        "most",
        "splits that nobody computes",
        TESTS + "splits_of_a_row_in_a_larger_batch",
    ),
    Mutant(
        "context_attention",
        CONTEXT,
        "max(fill, triton.cdiv(length, 16 * least))",
        "fill",
        "too few splits are launched",
        TESTS + "splits_of_a_row_in_a_larger_batch",
    ),
    Mutant(
        "append_attention",
        CONTEXT,
        "tl.maximum(tl.load(lengths_ptr + b), 0)",
        "tl.load(lengths_ptr + b)",
        "a length below 0 writes before the row",
        TESTS + "a_length_below_zero_is_none",
    ),
    Mutant(
        "context_attention",
        TILE,
        '        s = tl.where(seen, s, -float("inf"))',
        '        s = tl.where(seen & (s == s), s, -float("inf"))',
        "a NaN that is seen is swallowed",
        TESTS + "nan_reaches_who_sees_it_and_nobody_else",
    ),
    Mutant(
        "append_attention",
        CONTEXT,
        "            to = length + at\n",
        "            to = length + at + 1\n",
        "a slot left out",
    ),
    Mutant("append_attention", CONTEXT, "& (at < count) &", "&", "tokens that do not count enter"),
    Mutant(
        "append_attention", CONTEXT, "& (at < count) &", "& (at < count - 1) &", "the last that counts does not enter"
    ),
    Mutant(
        "append_attention",
        CONTEXT,
        "slot = (to % page_size).to(tl.int64)",
        "slot = to.to(tl.int64)",
        "another page's keys overwritten",
    ),
    Mutant(
        "append_attention",
        CONTEXT,
        "to_v[:, None] + offs_p[None, :], v,",
        "to_v[:, None] + offs_p[None, :], k,",
        "keys as values",
    ),
    Mutant(
        "append_attention",
        CONTEXT,
        "at = (tile * BLOCK_M + R - 1) // R + tl",
        "at = (tile * BLOCK_M + BLOCK_M + R - 1) // R + tl",
        "each tile writes the next one's tokens",
    ),
    Mutant(
        "append_attention",
        CONTEXT,
        "table_ptr + to // page_size",
        "table_ptr + length // page_size",
        "one page for all tokens",
    ),
    Mutant(ANY, BLOCKS, "rows + 1 if CAUSAL", "rows if CAUSAL", "a token does not see itself"),
    Mutant(
        ANY, BLOCKS, "else rows // S * S  # [BLOCK_M]", "else rows // S * S + 1  # [BLOCK_M]", "own block seen clean"
    ),
    Mutant(ANY, BLOCKS, "== (rows // S)[:, None]", "<= (rows // S)[:, None]", "earlier noisy blocks are seen"),
    Mutant(ANY, BLOCKS, "(first + BLOCK_M - 1) // S * S + S, N)", "first // S * S + S, N)", "one noisy block a tile"),
    Mutant(
        ANY,
        BLOCKS,
        "    least = first + 1 if CAUSAL else first // S * S",
        "    least = first + BLOCK_M if CAUSAL else first // S * S + BLOCK_M",
        "the diagonal runs unmasked",
    ),
    Mutant(ANY, BLOCKS, "head // R * stride_kch", "head % R * stride_kch", "another KV head's keys"),
    Mutant(
        ANY,
        BLOCKS,
        "(of[None, :] == begin[:, None])",
        "(of[None, :] >= begin[:, None])",
        "a block of two sequences sees the later one",
        test="tests/test_attention_masks.py::test_block_diffusion",
    ),
    Mutant(ANY, BLOCKS, "        begin = tl.load(", "        begin = 0 * tl.load(", "packed sequences see each other"),
)
