"""Faults in the attention kernels."""

from mutants import Mutant

TILE = "tt_kernels/attention/tile.py"
CONTEXT = "tt_kernels/attention/context_kernels.py"
BLOCKS = "tt_kernels/attention/block_diffusion_kernels.py"
ANY = "causal_attention or block_diffusion"

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
        "tl.minimum(length, start + split_size) if SPLIT else length",
        "tl.minimum(length, start + split_size - 1) if SPLIT else length",
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
        CONTEXT,
        "tl.load(table_ptr + tokens // page_size)",
        "tl.load(table_ptr + n // page_size)",
        "one page for a tile that spans several",
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
    Mutant(ANY, BLOCKS, "        begin = tl.load(", "        begin = 0 * tl.load(", "packed sequences see each other"),
)
