"""Faults in the kernels of the unmasking step."""

MUTANTS = {
    ("gumbel_noise", "runtime/lang.py"): [
        ("a round of Philox left out", "n_rounds=10", "n_rounds=9"),
        ("u without its half", "4294967295.5 - word", "4294967296.0 - word"),
        ("swapped", "c1.to(tl.uint32), c2.to(tl.uint32)", "c2.to(tl.uint32), c1.to(tl.uint32)"),
    ],
    ("gumbel_noise", "sampling/gumbel_noise.py"): [
        ("a word twice", "out + 72, gumbel(w3", "out + 72, gumbel(w2"),
        ("the first row's position", "tl.load(position_ptr + row)", "tl.load(position_ptr)"),
        ("the first rows only", "(tl.program_id(0) // parts)", "(tl.program_id(0) % parts)"),
        ("the first tokens only", "tl.program_id(0) % parts * BLOCK_Q", "0 * BLOCK_Q"),
        ("the last word left out", "mask=token + 72 < V", "mask=token + 76 < V"),
    ],
    ("sample and not head_sample", "sampling/lang.py"): [
        ("the suppressed token counts", "(ids < V) & (ids != suppress)", "(ids < V)"),
        ("tokens past the vocabulary count", "(ids < V) & (ids != suppress)", "(ids != suppress)"),
        ("the sum below the lesser maximum not rescaled", "tl.exp2((lower - shift) * 1.4426950408889634)", "1.0"),
        ("a token counted from its tile", "token = start + at", "token = at"),
        ("the worse of two tiles", "kept = b.best <= a.best", "kept = b.best >= a.best"),
        ("the confidence of a score with its noise", "tl.sum(tl.where(local == at[None, :], x, 0.0), axis=0)", "best"),
        ("top-k and top-p forgotten", 'tl.where(out, float("-inf"), score)', "tl.where(out, score, score)"),
        ("parts not rescaled", "record.s * tl.exp2((record.m - shift[:, None]) * 1.4426950408889634)", "record.s"),
    ],
    ("sample and not head_sample", "runtime/lang.py"): [
        ("a counter for every token", "counter, position[None", "start + local, position[None")
    ],
    ("sample and not head_sample", "sampling/sample.py"): [
        ("a part's second tile missed", "min(start + TILES * BLOCK_V, V)", "min(start + BLOCK_V, V)"),
        ("programs of several rows overlap", "offs_t = tl.program_id(1) * BLOCK_T", "offs_t = tl.program_id(1)"),
        ("the first part for all", "part = tl.program_id(0)", "part = 0"),
    ],
    ("sample", "reference/sampling.py", "test_sampling_limits.py::test_the_cut_is_the_references[ties-whole]"): [
        ("top-p keeps the worst", "descending=True, stable", "descending=False, stable"),
        ("a top_k beyond the vocabulary", "(top_k > 0) & (top_k < V)", "top_k > 0"),
    ],
    ("sample", "reference/sampling.py", "test_sampling.py::test_a_top_p_of_1_is_no_limit"): [
        ("a top_p of 1 that rounding takes for a limit", "(top_p < 1) & ~(lowest < least)", "~(lowest < least)")
    ],
    ("head_sample", "sampling/head_sample_kernels.py"): [
        ("a channel of the next row", "mask_k = k + offs_k < D", "mask_k = k + offs_k <= D"),
        ("only the last channels", "h.T, x, input_precision", "h.T, input_precision"),
        ("the last rows missed", "row_tiles * pieces, tl.num", "pieces, tl.num"),
        ("a part's last tiles missed", "min(begin + tiles * BLOCK_V, V)", "min(begin + BLOCK_V, V)"),
        ("the first columns' logits for all", "[None, :, None] == group", "[None, :, None] == 0"),
        ("no noise", "any_hot = is_any_hot(row, mask_t, settings)", "any_hot = False"),
        ("a tile's record in another's place", "parts + piece // store.depth", "parts + piece"),
    ],
    ("head_sample", "sampling/lang.py"): [
        ("all but the first tile of a part forgotten", "range(1, store.depth)", "range(1, 1)"),
        ("another row's records", "* (store.depth * store.parts) + offs_s", "* store.parts + offs_s"),
        ("the largest term for the sum", "tl.sum(tl.reshape(x", "tl.max(tl.reshape(x"),
    ],
    ("commit", "sampling/commit.py"): [
        ("the share rounded down", "1 + (m - 1) //", "m //"),
        ("a position before itself", "& (j < i)", "& (j <= i)"),
        ("positions past the first tile unranked", "range(0, L, BLOCK_J)", "range(0, BLOCK_J, BLOCK_J)"),
        ("committed ones counted", "tl.store(out.masked + b, m - count)", "tl.store(out.masked + b, m)"),
        ("all positions masked", "masked = mask_l & (block == mask_token_id)", "masked = mask_l"),
        ("the threshold forgotten", "tl.load(rule.threshold + b)", "tl.load(rule.threshold) * 0"),
    ],
    ("unmask", "sampling/unmask.py"): [
        ("every slot one too far", "axis=0) - masked.to(tl.int32)", "axis=0)"),
        ("slots of the second round from 0", "slot = count + tl.cumsum", "slot = tl.cumsum"),
        ("a confidence where nothing is masked", "tl.where(masked, confidence, 0.0)", "confidence"),
    ],
    ("unmask", "sampling/lang.py"): [("the block's position for all its tokens", "other=0) + place", "other=0)")],
    ("unmask", "sampling/records.py"): [
        ("a token at its slot", "tl.store(token_ptr + to", "tl.store(token_ptr + row"),
    ],
    ("unmask", "sampling/head_sample_kernels.py"): [
        ("another row's noise", "tl.load(listed.index + first + offs_s, mask=mask_s, other=0)", "first + offs_s"),
        ("the last masked row missed", "tl.load(listed.count) - first", "tl.load(listed.count) - first - 1"),
    ],
    ("sample", "sampling/lang.py"): [
        ("noise in another unit than its logits", "unit[None, :] * gumbel_tile", "gumbel_tile")
    ],
    ("sample", "sampling/lang.py", "test_sampling_records.py::test_tiles_that_cannot_win_are_left_out_exactly"): [
        ("a tile that noise may lift left out", "+ unit * LARGEST_NOISE", "+ unit"),
        ("a missing number left out", " & (s == s))", ")"),
    ],
    ("sample", "sampling/sample.py", "test_sampling_records.py::test_tiles_that_cannot_win_are_left_out_exactly"): [
        ("another row's best score", "known_ptr += first + offs_t", "known_ptr += first"),
    ],
    ("sample", "sampling/lang.py", "test_sampling_corners.py::test_logits_of_any_size_at_any_temperature"): [
        ("an infinite temperature as the largest number", 'power == float("inf")', "power != power")
    ],
    ("sample", "sampling/lang.py", "test_sampling_corners.py::test_tiny_temperatures_take_the_best"): [
        (
            "a temperature of 0 once narrowed",
            "temperature.to(tl.float32), 1.1754943508222875e-38)",
            "temperature.to(tl.float32), 0.0)",
        )
    ],
    (
        "sample",
        "sampling/lang.py",
        "test_sampling_corners.py::test_infinite_temperatures_draw_evenly_from_what_may_be_drawn",
    ): [("-inf over inf", "tl.minimum(tl.div_rn(t, unit), LARGEST32)", "tl.div_rn(t, unit)")],
    ("sample", "sampling/lang.py", "test_sampling_corners.py::test_rows_of_infinities_and_nan"): [
        ("the suppressed token where all are -inf", "tl.where(token == suppress, token + 1, token)", "token"),
        ("a confidence in an infinite logit", 'tl.where(total < float("inf"), confidence, float("nan"))', "confidence"),
    ],
    ("sample", "sampling/limits_kernels.py", "test_sampling_limits.py::test_the_cut_is_the_references[ties-short]"): [
        ("what is above a window forgotten", "tl.where(fits, above, window.above)", "window.above"),
        ("a list that every tile begins anew", "(found + tl.cumsum(lanes", "(tl.cumsum(lanes"),
        ("what is above a list forgotten", "base = window.above", "base = base * 1"),
        ("what reaches p is left out", "measure, 0), axis=0) > aim", "measure, 0), axis=0) >= aim"),
        ("the best of lanes left out", "whole, aim) - 1, todo", "whole, aim), todo"),
        ("the suppressed token counts", "tl.where(places == numbers.suppress, LOWEST, x)", "x"),
        ("of equals as many as p is in all", "return cut, aim - above", "return cut, aim"),
        ("top-p of all that top-k left out too", "start = tl.maximum(floor, flip(", "start = tl.minimum(floor, flip("),
    ],
    (
        "sample",
        "sampling/limits_kernels.py",
        "test_sampling_limits.py::test_of_equals_those_before_p_and_the_one_that_exceeds_it",
    ): [
        ("equals one too few", "fits = half * weight <= share", "fits = half * weight < share"),
        ("equals one too many", "nth = times(", "nth = 1 + times("),
        ("a limit at temperature 0", "by_k = hot & (k > 0)", "by_k = (k > 0)"),
        ("a share of p at temperature 0", "by_p = hot & (", "by_p = ("),
    ],
    ("sample", "sampling/limits_kernels.py", "test_sampling_limits.py::test_the_cut_is_the_references[equal-listed]"): [
        ("the place of an equal counted from its tile", "(before == nth - seen)", "(before == nth)"),
    ],
    (
        "unmask",
        "sampling/limits_kernels.py",
        "test_sampling_limits.py::test_rows_that_are_listed_and_rows_that_walk",
    ): [
        ("another row's limits", "b = b // L", "b = b % 3"),
        ("the first records' rows for all", "b = first + record", "b = record"),
        ("only the first rows", "tl.program_id(0), count, tl.num", "tl.program_id(0), min(count, 4), tl.num"),
    ],
    (
        "sample",
        "sampling/lang.py",
        "test_sampling_limits.py::test_tiles_that_are_left_out_have_no_noise_and_others_do",
    ): [("the tile of the least number left out", "loses | (m < least)", "loses | (m <= least)")],
    ("sample", "reference/sampling.py", "test_sampling_limits.py::test_weights_are_powers_of_two_and_fall"): [
        ("a bit of a step lost", "steps & 0xFFFFFF", "steps & 0xFFFFFE"),
        ("a coefficient of 2^-f", "59385867", "59385067"),
    ],
    ("commit", "sampling/commit.py", "test_sampling_corners.py::test_commit_orders_any_floats"): [
        ("NaN first", "(nan_i & (confidence_j == confidence_j))", "(nan_j & (confidence_i == confidence_i))")
    ],
    ("commit", "sampling/commit.py", "test_sampling_corners.py::test_commit_beside_positions_that_are_not_masked"): [
        ("positions that are not masked have a rank", "tl.where(theirs, j, BLOCK_L)", "j")
    ],
    (
        "unmask",
        "sampling/unmask.py",
        "test_sampling_corners.py::test_a_spoiled_position_is_committed_last_and_not_as_a_mask",
    ): [
        ("positions that are not masked have a rank in one program too", "tl.where(masked, offs_l, BLOCK_L)", "offs_l")
    ],
}
