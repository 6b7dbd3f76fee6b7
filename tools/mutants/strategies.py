"""Faults in the strategies of unmasking, and in remasking."""

LOOKED_AT = "test_strategies.py::test_second_best_and_entropy_from_tiles_and_parts"
HEADS = "test_strategies.py::test_heads_places_and_limits_of_mixed_rows"
FINISHED = "test_strategies_rows.py::test_kernels_finish_logits_as_the_reference"
ONE_PLACE = "test_strategies_rows.py::test_blocks_of_one_position_have_no_place_before"
DRAWN = "test_strategies_drawn.py::test_the_kernels_draw_as_the_reference"
CAPPED = "test_strategies_rows.py::test_caps_of_any_size"
BOUNDS = "test_strategies.py::test_the_kernel_decides_as_the_reference"
DECIDED = "test_strategies.py::test_the_kernel_decides_by_the_formulas"
REMASKED = "test_remask.py::test_every_rule_is_its_formula"
SHARED = "test_remask.py::test_shares_are_of_what_is_not_masked"
LIMITED = "test_remask.py::test_the_least_probable_are_masked_first_and_no_more_than_the_limit"

MUTANTS = {
    ("unmask", "sampling/lang.py", LOOKED_AT): [
        ("a worse second best", "second = tl.maximum(lower, tl.maximum(", "second = tl.minimum(lower, tl.maximum("),
        ("a moment about another maximum", "(moment + by * s) * scale", "moment * scale"),
        (
            "the second best of other parts forgotten",
            "record.second, record.m), axis=1)",
            "record.second, top[:, None]), axis=1)",
        ),
        ("parts' moments not added", "tl.log(total) - sum_pairs(tl.trans(moments)) / total", "tl.log(total)"),
        ("equals in a tile are no second best", "second = tl.where(equal > 1, m, second)", "second = second"),
        ("equals in two parts are no second best", "second = tl.where(bests > 1, top, second)", "second = second"),
    ],
    ("unmask", "sampling/lang.py", HEADS): [
        (
            "the distribution before temperature",
            "tempered = (tl.load(look.tempered",
            "tempered = 0 * (tl.load(look.tempered",
        ),
        (
            "no top-k and top-p in what is looked at",
            "tl.where(tempered[None, :] & out, ",
            "tl.where(tempered[None, :] & out & (ids < 0), ",
        ),
        ("the first state's logits one too early", "row -= (place > 0)", "row -= (place >= 0)"),
        ("the bias forgotten", "x += bias", "x += 0 * bias"),
        ("the soft cap forgotten", "x = softcap * tanh(x / softcap)", "x = x"),
    ],
    ("unmask_logits", "sampling/sample.py", HEADS): [
        ("another row's logits", "source_of(row, settings, SHIFT) if BY_ROW else offs_t", "offs_t"),
    ],
    ("unmask_logits", "sampling/sample.py", FINISHED): [
        (
            "logits that nothing comes after",
            "finish(x.to(acc_dtype), ids, V, bias_ptr, softcap)",
            "finish(x.to(acc_dtype), ids, V, bias_ptr, None)",
        ),
    ],
    ("unmask_logits", "runtime/lang.py", CAPPED): [
        ("a large cap changes logits", "945.0), 1.0 - e)", "940.0), 1.0 - e)"),
    ],
    ("unmask_logits", "sampling/finished.py", FINISHED): [
        ("finished logits of the place itself", "settings, SHIFT)", "settings, False)"),
        ("other records' finished logits", "listed.index + first + record", "listed.index + record * 0"),
        ("limits of logits that nothing came after", "not narrows(rows.sampling)", "narrows(rows.sampling)"),
    ],
    ("unmask_logits", "sampling/records.py", ONE_PLACE): [
        ("a place before the only one", "shift and L > 1", "shift"),
    ],
    ("unmask_logits", "sampling/limits_kernels.py", HEADS): [
        ("limits of another row's logits", "            place = b\n", "            place = record\n"),
        ("limits of logits that are not moved", "place -= (b % L > 0)", "place -= (b % L < 0)"),
    ],
    ("unmask_logits", "sampling/strategies.py", LOOKED_AT): [
        ("margins for entropies", "tl.where(kind == 2, -entropy", "tl.where(kind == 2, margin"),
    ],
    ("unmask_logits", "sampling/strategies.py", HEADS): [
        ("the noise of tokens", "uniform(seed, position, step, -1)", "uniform(seed, position, step, 0)"),
        ("a block's chance for all its positions", "other=0) + place\n", "other=0)\n"),
    ],
    ("unmask_logits", "sampling/strategies.py", DRAWN): [
        ("an order that is not drawn", "score + t * gumbel(", "score + 0 * gumbel("),
        ("the draw of random confidences", "tl.full(position.shape, -3,", "tl.full(position.shape, -1,"),
        ("drawn below temperature 0", "tl.where(t > 0, tl.minimum(t, 1e30), 0.0)", "tl.minimum(t, 1e30)"),
        ("others stand by their scores", "score_ptr if judged.key is None else judged.key", "score_ptr"),
        ("each stands by its own score", "key = tl.load(key_ptr + at, mask=masked, other=0.0)", "key = score"),
    ],
    ("unmask", "sampling/strategies.py", DECIDED): [
        (
            "positions after one that does not pass",
            "tl.min(tl.where(masked & (passes == 0), rank.to(tl.int64), m)",
            "tl.max(tl.where(masked & (passes == 0), rank.to(tl.int64) * 0, m)",
        ),
        ("none commits", "count = tl.minimum(m, 1)", "count = m * 0"),
        ("a number only above others", "tl.where(number >= 0, number, count)", "tl.maximum(number, count)"),
    ],
    ("unmask", "sampling/strategies.py", BOUNDS): [
        ("the share rounded down", "1 + (m - 1) // tl.where", "m // tl.where"),
        ("no order from the left", "key = tl.where(in_order, 0.0, key)", "key = key"),
        ("others not from the left", "sure = tl.where(theirs & in_order, 0.0, sure)", "sure = sure"),
        ("another kind from the left", "tl.load(rules.confidence + b) == 4", "tl.load(rules.confidence + b) == 1"),
        ("positions past the first tile unranked", "range(0, L, BLOCK_J)", "range(0, BLOCK_J, BLOCK_J)"),
        ("a factor's n from 0", "n = (rank + 2)", "n = (rank + 1)"),
        ("the largest entropy counts", "spread = total + own - tl.maximum(most, own)", "spread = total + own"),
        ("a bound below 0 rounded up", "tl.floor(bound * 4294967296.0)", "tl.maximum(bound * 4294967296.0, 0.0)"),
    ],
    ("remask", "sampling/remask.py", LIMITED): [
        ("the most probable first", "tl.where(theirs, -probable", "tl.where(theirs, probable"),
        ("one too many", "(rank < most)", "(rank <= most)"),
        ("none where there is no limit", "((most < 0) | (rank < most))", "(rank < most)"),
        (
            "what is edited takes up the limit",
            "theirs = theirs & ((found == other) | (surely_better == 0))",
            "theirs = theirs",
        ),
        (
            "what may not change takes up the limit",
            "theirs = theirs & (tl.load(known.may_change",
            "theirs = theirs | (tl.load(known.may_change",
        ),
    ],
    ("remask", "sampling/remask.py", SHARED): [
        ("shares of masked positions, too", "terms = tl.where(filled, ", "terms = tl.where(mask_l, "),
    ],
    ("remask", "sampling/remask.py", REMASKED): [
        ("an edit into the same token counts", "free & (token != block) & (sure >", "free & (sure >"),
        ("what was edited is doubted too", "free = free & (better == 0)", "free = free & (better <= 1)"),
        ("an edit at its bound", "(sure > tl.load(rules.edit + b)", "(sure >= tl.load(rules.edit + b)"),
        ("a doubt at its bound", "doubted = free & (own < least)", "doubted = free & (own <= least)"),
        ("a share where none is asked for", "tl.load(rules.shared + b) != 0", "tl.load(rules.shared + b) == 0"),
        (
            "what may not change does",
            "free = free & (tl.load(known.may_change",
            "free = free | (tl.load(known.may_change",
        ),
        (
            "another position's chance",
            "tl.load(noise.position + b) + offs_l",
            "tl.load(noise.position + b) + offs_l + 1",
        ),
        ("the chance of random confidences", "tl.zeros_like(offs_l), -2)", "tl.zeros_like(offs_l), -1)"),
    ],
}
