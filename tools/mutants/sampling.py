"""Faults in the kernels of the unmasking step."""

from . import Mutant

COMMIT = "tt_kernels/sampling/commit.py"
GUMBEL_NOISE = "tt_kernels/sampling/gumbel_noise.py"
HEAD_SAMPLE_KERNELS = "tt_kernels/sampling/head_sample_kernels.py"
LANG = "tt_kernels/sampling/lang.py"
REFERENCE = "tt_kernels/reference/sampling.py"
RECORDS = "tt_kernels/sampling/records.py"
RUNTIME_LANG = "tt_kernels/runtime/lang.py"
SAMPLE = "tt_kernels/sampling/sample.py"
UNMASK = "tt_kernels/sampling/unmask.py"
ONLY_SAMPLE = "sample and not head_sample"
LITERAL = "tests/kernels/test_sampling.py::"
CORNERS = "tests/kernels/test_sampling_corners.py::"

MUTANTS = (
    Mutant("gumbel_noise", RUNTIME_LANG, "n_rounds=10", "n_rounds=9", "a round of Philox left out"),
    Mutant("gumbel_noise", RUNTIME_LANG, "4294967295.5 - word", "4294967296.0 - word", "u without its half"),
    Mutant(
        "gumbel_noise",
        RUNTIME_LANG,
        "c1.to(tl.uint32), c2.to(tl.uint32)",
        "c2.to(tl.uint32), c1.to(tl.uint32)",
        "swapped",
    ),
    Mutant("gumbel_noise", GUMBEL_NOISE, "out + 3, gumbel(w3", "out + 3, gumbel(w2", "a word twice"),
    Mutant(
        "gumbel_noise", GUMBEL_NOISE, "tl.load(position_ptr + row)", "tl.load(position_ptr)", "the first row's position"
    ),
    Mutant(
        "gumbel_noise", GUMBEL_NOISE, "(tl.program_id(0) // parts)", "(tl.program_id(0) % parts)", "the first rows only"
    ),
    Mutant("gumbel_noise", GUMBEL_NOISE, "tl.program_id(0) % parts * BLOCK_Q", "0 * BLOCK_Q", "the first tokens only"),
    Mutant("gumbel_noise", GUMBEL_NOISE, "mask=4 * quad + 3 < V", "mask=4 * quad + 7 < V", "the last word left out"),
    Mutant(ONLY_SAMPLE, LANG, "(ids < V) & (ids != suppress)", "(ids < V)", "the suppressed token counts"),
    Mutant(ONLY_SAMPLE, LANG, "(ids < V) & (ids != suppress)", "(ids != suppress)", "tokens past the vocabulary count"),
    Mutant(
        ONLY_SAMPLE,
        LANG,
        "tl.exp2((lower - shift) * 1.4426950408889634)",
        "1.0",
        "the sum below the lesser maximum not rescaled",
    ),
    Mutant(ONLY_SAMPLE, LANG, "token = start + at", "token = at", "a token counted from its tile"),
    Mutant(ONLY_SAMPLE, LANG, "kept = b.best <= a.best", "kept = b.best >= a.best", "the worse of two tiles"),
    Mutant(
        ONLY_SAMPLE,
        LANG,
        "raw = tl.sum(tl.where(local == at[None, :], x, 0.0), axis=0)",
        "raw = best",
        "the confidence of a score with its noise",
    ),
    Mutant(
        ONLY_SAMPLE,
        LANG,
        'score = tl.where(out, float("-inf"), score)',
        "score = tl.where(out, score, score)",
        "top-k and top-p forgotten",
    ),
    Mutant(
        ONLY_SAMPLE,
        LANG,
        "record.s * tl.exp2((record.m - shift[:, None]) * 1.4426950408889634)",
        "record.s",
        "parts not rescaled",
    ),
    Mutant(ONLY_SAMPLE, RUNTIME_LANG, "ids // 4, position", "ids, position", "a counter for every token"),
    Mutant(
        ONLY_SAMPLE, SAMPLE, "min(start + TILES * BLOCK_V, V)", "min(start + BLOCK_V, V)", "a part's second tile missed"
    ),
    Mutant(
        ONLY_SAMPLE,
        SAMPLE,
        "offs_t = tl.program_id(1) * BLOCK_T",
        "offs_t = tl.program_id(1)",
        "programs of several rows overlap",
    ),
    Mutant(ONLY_SAMPLE, SAMPLE, "part = tl.program_id(0)", "part = 0", "the first part for all"),
    Mutant(
        "sample",
        REFERENCE,
        "descending=True, stable",
        "descending=False, stable",
        "top-p keeps the worst",
        test=LITERAL + "test_top_k_keeps_what_equals_the_kth_and_top_p_what_crosses",
    ),
    Mutant(
        "sample",
        REFERENCE,
        "(top_k > 0) & (top_k < V)",
        "top_k > 0",
        "a top_k beyond the vocabulary",
        test=CORNERS + "test_limits_of_one_row_are_no_others",
    ),
    Mutant(
        "sample",
        REFERENCE,
        "(top_p < 1) & ~(lowest < least)",
        "~(lowest < least)",
        "a top_p of 1 that rounding takes for a limit",
        test=LITERAL + "test_a_top_p_of_1_is_no_limit",
    ),
    Mutant(
        "head_sample",
        HEAD_SAMPLE_KERNELS,
        "mask_k = k + offs_k < D",
        "mask_k = k + offs_k <= D",
        "a channel of the next row",
    ),
    Mutant(
        "head_sample", HEAD_SAMPLE_KERNELS, "h.T, x, input_precision", "h.T, input_precision", "only the last channels"
    ),
    Mutant("head_sample", HEAD_SAMPLE_KERNELS, "row_tiles * pieces, tl.num", "pieces, tl.num", "the last rows missed"),
    Mutant(
        "head_sample",
        HEAD_SAMPLE_KERNELS,
        "min(begin + tiles * BLOCK_V, V)",
        "min(begin + BLOCK_V, V)",
        "a part's last tiles missed",
    ),
    Mutant(
        "head_sample",
        HEAD_SAMPLE_KERNELS,
        "[None, :, None] == group",
        "[None, :, None] == 0",
        "the first columns' logits for all",
    ),
    Mutant(
        "head_sample",
        HEAD_SAMPLE_KERNELS,
        "any_hot = is_any_hot(row, mask_t, settings)",
        "any_hot = False",
        "no noise",
    ),
    Mutant(
        "head_sample",
        HEAD_SAMPLE_KERNELS,
        "parts + piece // store.depth",
        "parts + piece",
        "a tile's record in another's place",
    ),
    Mutant("head_sample", LANG, "range(1, store.depth)", "range(1, 1)", "all but the first tile of a part forgotten"),
    Mutant(
        "head_sample", LANG, "* (store.depth * store.parts) + offs_s", "* store.parts + offs_s", "another row's records"
    ),
    Mutant("head_sample", LANG, "tl.sum(tl.reshape(x", "tl.max(tl.reshape(x", "the largest term for the sum"),
    Mutant("commit", COMMIT, "1 + (m - 1) //", "m //", "the share rounded down"),
    Mutant("commit", COMMIT, "& (j < i)", "& (j <= i)", "a position before itself"),
    Mutant(
        "commit", COMMIT, "range(0, L, BLOCK_J)", "range(0, BLOCK_J, BLOCK_J)", "positions past the first tile unranked"
    ),
    Mutant(
        "commit", COMMIT, "tl.store(out.masked + b, m - count)", "tl.store(out.masked + b, m)", "committed ones counted"
    ),
    Mutant("commit", COMMIT, "masked = mask_l & (block == mask_token_id)", "masked = mask_l", "all positions masked"),
    Mutant("commit", COMMIT, "tl.load(rule.threshold + b)", "tl.load(rule.threshold) * 0", "the threshold forgotten"),
    Mutant("unmask", UNMASK, "axis=0) - masked.to(tl.int32)", "axis=0)", "every slot one too far"),
    Mutant("unmask", UNMASK, "slot = count + tl.cumsum", "slot = tl.cumsum", "slots of the second round from 0"),
    Mutant("unmask", UNMASK, "tl.where(masked, confidence, 0.0)", "confidence", "a confidence where nothing is masked"),
    Mutant("unmask", LANG, "other=0) + row % settings.L", "other=0)", "the block's position for all its tokens"),
    Mutant("unmask", RECORDS, "tl.store(token_ptr + to", "tl.store(token_ptr + row", "a token at its slot"),
    Mutant(
        "unmask",
        HEAD_SAMPLE_KERNELS,
        "row_s = tl.load(listed.index + first + offs_s, mask=mask_s, other=0)",
        "row_s = first + offs_s",
        "another row's noise",
    ),
    Mutant(
        "unmask",
        HEAD_SAMPLE_KERNELS,
        "tl.load(listed.count) - first",
        "tl.load(listed.count) - first - 1",
        "the last masked row missed",
    ),
    Mutant(
        "unmask",
        RECORDS,
        "self.listed.index[some] // self.L",
        "self.listed.index[some] % 3",
        "another row's top-k",
    ),
    Mutant("sample", LANG, "unit[None, :] * gumbel_tile", "gumbel_tile", "noise in another unit than its logits"),
    Mutant(
        "sample",
        LANG,
        'tl.where(power == float("inf"), 18446744073709551616.0, unit)',
        "unit",
        "an infinite temperature as the largest number",
        test=CORNERS + "test_logits_of_any_size_at_any_temperature",
    ),
    Mutant(
        "sample",
        LANG,
        "tl.maximum(temperature.to(tl.float32), 1.1754943508222875e-38)",
        "temperature.to(tl.float32)",
        "a temperature of 0 once narrowed",
        test=CORNERS + "test_tiny_temperatures_take_the_best",
    ),
    Mutant(
        "sample",
        LANG,
        "tl.minimum(tl.div_rn(t, unit), LARGEST32)",
        "tl.div_rn(t, unit)",
        "-inf over inf",
        test=CORNERS + "test_infinite_temperatures_draw_evenly_from_what_may_be_drawn",
    ),
    Mutant(
        "sample",
        LANG,
        "tl.where(token == suppress, token + 1, token)",
        "token",
        "the suppressed token where all are -inf",
        test=CORNERS + "test_rows_of_infinities_and_nan",
    ),
    Mutant(
        "sample",
        LANG,
        'tl.where(total < float("inf"), confidence, float("nan"))',
        "confidence",
        "a confidence in an infinite logit",
        test=CORNERS + "test_rows_of_infinities_and_nan",
    ),
    Mutant(
        "commit",
        COMMIT,
        "(nan_i & (confidence_j == confidence_j))",
        "(nan_j & (confidence_i == confidence_i))",
        "NaN first",
        test=CORNERS + "test_commit_orders_any_floats",
    ),
    Mutant(
        "commit",
        COMMIT,
        "tl.where(theirs, j, BLOCK_L)",
        "j",
        "positions that are not masked have a rank",
        test=CORNERS + "test_commit_beside_positions_that_are_not_masked",
    ),
    Mutant(
        "unmask",
        UNMASK,
        "tl.where(masked, offs_l, BLOCK_L)",
        "offs_l",
        "positions that are not masked have a rank in one program too",
        test=CORNERS + "test_a_spoiled_position_is_committed_last_and_not_as_a_mask",
    ),
)
