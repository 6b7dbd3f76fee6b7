"""Faults in the kernels of convolution and scan."""

MUTANTS = {
    ("ssd_advance", "ssm/lang.py", "test_scan_corners.py::test_a_decay_of_nothing_and_of_all[-inf]"): [
        ("0 * -inf", "tl.maximum(A, -3e38, propagate_nan=tl.PropagateNan.ALL)", "A")
    ],
    ("mamba_extend", "ssm/mamba_extend.py"): [
        ("one token enters", "if xBC.shape[1] == 1 and counts is None:", "if xBC.shape[1] == 1:"),
        (
            "many rows' scan states stay",
            "    _ssd_advance(x, dt, A, B, dt_bias, ssm, counts,",
            "    (x, dt, A, B, ssm,",
        ),
        (
            "all enter the scan of many rows",
            "_ssd_advance(x, dt, A, B, dt_bias, ssm, counts,",
            "_ssd_advance(x, dt, A, B, dt_bias, ssm, None,",
        ),
        ("all enter the conv states", "columns, after_columns, counts)", "columns, after_columns)"),
        ("all of few rows", "after_columns, after, counts,", "after_columns, after, None,"),
        ("all of a long stretch", "ssm, counts, *places, None, None", "ssm, None, *places, None, None"),
    ],
    ("mamba_extend", "ssm/lang.py"): [
        ("own decay counted", "tl.where(t + 1 < count, after, 0.0)", "tl.where(t < count, a, 0.0)"),
        ("what does not enter decays tokens", "tl.where(t + 1 < count, after, 0.0)", "after"),
        (
            "what does not enter decays the state",
            "decay(tl.sum(tl.where(t < count, a, 0.0), axis=0))",
            "decay(tl.sum(a, axis=0))",
        ),
        ("step forgotten", "* tl.where(t < count, dt, 0.0)", "* tl.where(t < count, 1.0, 0.0)"),
        (
            "state does not decay",
            "grow(state * left, B, x, weight, SPLIT, PRECISION)",
            "grow(state, B, x, weight, SPLIT, PRECISION)",
        ),
    ],
    ("mamba_extend", "ssm/lang.py", "test_launches_mamba.py::test_what_lies_past_a_row_does_not_show"): [
        ("NaN of x past the count", "= tl.where(enters, x, 0.0), tl.where(enters, B", "= x, tl.where(enters, B"),
        ("NaN of B past the count", "tl.where(enters, B, 0.0)", "B"),
        ("NaN of dt past the count", "* tl.where(t < count, dt, 0.0)", "* dt"),
    ],
    ("mamba_extend", "ssm/mamba_block_kernels.py"): [
        ("only group 0's conv state", "        if (head % R == 0) &", "        if (head == 0) &"),
        (
            "row 0's conv state",
            "        after_conv_ptr = at_slot(after_columns, b)",
            "        after_conv_ptr = at_slot(after_columns, 0 * b)",
        ),
        ("row 0's state", "b, L), at_slot(after, b) +", "b, L), at_slot(after, 0 * b) +"),
        (
            "the last head's state",
            "at_slot(after, b) + head * stride_sh\n        after_conv",
            "at_slot(after, b) + (H - 1) * stride_sh\n        after_conv",
        ),
    ],
    ("mamba_extend", "conv1d/causal_conv1d.py"): [
        ("row 0's conv state", "at_slot(after_state, b)", "at_slot(after_state, 0 * b)"),
        ("counts forgotten", "row_count(counts_ptr, b, L)", "L"),
        ("only rows of one tile", "        if start == 0:", "        if tiles == 1:"),
    ],
    ("causal_conv1d", "conv1d/causal_conv1d.py"): [
        ("taps in reverse", "(k == K - 1 - back)", "(k == back)"),
        ("state one column early", "(S + source)[:, None]", "(S + source - 1)[:, None]"),
        ("last tap into the state missed", "in tl.range(1, K):", "in tl.range(1, K - 1):"),
        ("the state's taps in reverse", "(k == K - 1 - gone)", "(k == gone)"),
        ("the state counts behind the row too", "((source < 0) & (t < L))[:, None]", "(t < L)[:, None]"),
        ("packed sequences see each other", "alive = alive & (after == 0)", "alive = alive"),
        ("sequences start one late", "b * L + source + 1, mask", "b * L + source, mask"),
        ("no activation", "    if SILU:\n", "    if False:\n"),
        ("bias forgotten", "    if bias_ptr is not None:", "    if bias_ptr is None:"),
        ("the first row's state for all", "at_slot(state, b)", "at_slot(state, 0 * b)"),
    ],
    ("conv_advance", "conv1d/conv_states.py"): [
        ("one column early", "source = count - K + k", "source = count - K + k - 1"),
        ("state does not move on", "(source + K) * stride_sk", "k * stride_sk"),
        ("first column lost", "tl.where(source < 0, before", "tl.where(source <= 0, before"),
        ("state lost", "tl.where(source < 0, before.to(column.dtype), column", "column + 0 * before.to(column.dtype"),
    ],
    ("conv_advance", "runtime/lang.py"): [
        ("one count for all", "tl.load(counts_ptr + b), 0)", "tl.load(counts_ptr), 0)"),
        ("below 0", "tl.maximum(tl.load(counts_ptr + b), 0)", "tl.load(counts_ptr + b)"),
        ("above L", "0), L).to(tl.int32)", "0), L + 2).to(tl.int32)"),
    ],
    ("conv_block_states", "conv1d/conv_states.py"): [
        ("one column late", "source = start - back", "source = start - back + 1"),
        ("columns in reverse", "out + (K - back) * C", "out + (back - 1) * C"),
        ("sequences seep", "mask=alive & (source >= 0)", "mask=source >= 0"),
        ("row 0", "b * stride_xb + source.to(tl.int64) * stride_xl + c\n", "source.to(tl.int64) * stride_xl + c\n"),
        ("last block missed", "(B * blocks, triton", "(B * blocks - 1, triton"),
    ],
    ("ssd_block", "ssm/lang.py"): [
        ("own decay", "[:, None] > t[None, :], a[:, None]", "[:, None] >= t[None, :], a[:, None]"),
        ("a token does not see itself", "tl.where(i >= j, log,", "tl.where(i > j, log,"),
        ("step forgotten", "* dt  # masked", "# masked"),
        ("state does not decay", "* decay(tl.cumsum(a, axis=0))[:, None]", ""),
        ("D forgotten", "+ x.to(y.dtype) * D", "+ x.to(y.dtype)"),
    ],
    ("ssd_block", "ssm/ssd_block_kernels.py"): [
        ("group 0's C", "C_ptr + b * stride_Cb + group * stride_Cg", "C_ptr + b * stride_Cb")
    ],
    ("ssd_block", "ssm/ssd_block_launch.py"): [
        ("long blocks off", "dt_limit=(low, high))[0]", "dt_limit=(low, high))[0] * 1.001")
    ],
    ("ssd_advance", "runtime/lang.py"): [
        ("one too many", "tl.load(counts_ptr + b), 0)", "tl.load(counts_ptr + b) + 1, 0)")
    ],
    ("ssd_advance", "ssm/ssd_block_kernels.py"): [
        ("state does not decay", "grow(state * left, B", "grow(state, B"),
        ("group 0", "row[:, None] * stride_Bl + group * stride_Bg", "row[:, None] * stride_Bl"),
    ],
    ("ssd_advance", "ssm/lang.py"): [
        ("step forgotten", "decays_to_end(after) * dt", "decays_to_end(after)"),
        ("own decay counted", "decays_to_end(after) * dt", "decays_to_end(a) * dt"),
        ("decay of the next tile twice", "(t + 1 < start + BLOCK_T)", "(t + 1 < count)"),
    ],
    ("ssd_step", "ssm/lang.py"): [
        ("state does not decay", "state = state * decay(log_decay(dt, A)) + ", "state = state + "),
        ("step forgotten", "(x * dt)[:, None]", "x[:, None]"),
        ("D forgotten", "axis=1) + x * D", "axis=1)"),
        ("bias forgotten", "softplus(dt + bias)", "softplus(dt)"),
        ("wrong group", "(head // R).to(tl.int64), offs_p", "(head % R).to(tl.int64), offs_p"),
    ],
    ("ssd_step", "ssm/ssd_step.py"): [
        ("group 0's C", "C_ptr + b * stride_Cb + group * stride_Cg", "C_ptr + b * stride_Cb")
    ],
    ("ssd_chunk", "ssm/ssd_chunk_kernels.py"): [
        ("kept", "tl.store(kept_ptr + out, decays_to_end(after) * dt", "tl.store(kept_ptr + out, dt"),
        ("state does not decay", "state *= decay(", "state *= 1 + 0 * decay("),
        ("spans", "added = tl.load(added_ptr + at * P * N", "added = 0 * tl.load(added_ptr + at * P * N"),
        ("only a span's last tile decays", "total += log", "total = log"),
        ("a state before a sequence starts", "shown = tl.where(", "_ = tl.where("),
        ("the first span's last state", "        if span == spans - 1:\n", "        if span == 0:\n"),
        ("counts forgotten", "count, tl.minimum(count, entering - start)", "count, count"),
        ("tiles reach over chunks", "tl.minimum(chunk + chunk_size, L) - start", "L - start"),
    ],
    ("ssd_chunk", "ssm/lang.py"): [
        ("D forgotten", "tl.where(i == j, D, 0.0)", "tl.where(i == j, 0.0, 0.0)"),
        ("parts of a tile mixed up", "j = (start + part + tl", "j = (start + tl"),
        ("packed sequences see each other", "!= 0, -128.0, a)", "!= 0, a, a)"),
        ("NaN becomes a number", "-128.0, propagate_nan=tl.PropagateNan.ALL", "-128.0"),
        ("NaN is limited", "tl.where(dt > HIGH, HIGH, dt)", "tl.where(dt <= HIGH, dt, HIGH)"),
    ],
    ("ssd_step", "runtime/lang.py"): [
        ("NaN decays to nothing", "tl.where(log <= -64, 0.0", "tl.where(~(log > -64), 0.0")
    ],
    ("ssd_chunk", "ssm/ssd_chunk_launch.py"): [
        ("last span missed", "spans = triton.cdiv(tiles, span)", "spans = tiles // span")
    ],
    ("mamba_block", "ssm/conv_lang.py"): [
        ("own tap", "own.to(ACC) * column(taps, K - 1,", "own.to(ACC) * column(taps, 0,"),
        ("taps in reverse", "column(taps, K - 1 - back,", "column(taps, back,"),
        ("past one column early", "column(past, early + 1,", "column(past, early,"),
        ("past cut", "tl.static_range(1, K - 1 - early)", "tl.static_range(1, K - 2 - early)"),
        ("reads before the row", "((source >= 0) & (t < count))", "(t < count)"),
        ("bias forgotten", "y = bias.to(ACC)[None, :] + ", "y = "),
        ("no activation", "return silu(y).to(NARROW)", "return y.to(NARROW)"),
        ("16-bit columns come apart wrongly", "(bundle >> (16 * k))", "(bundle >> (8 * k))"),
    ],
    ("mamba_block", "ssm/mamba_block_launch.py"): [
        ("long: B for C", "_ssd_block(x, dt, A, B, C, D,", "_ssd_block(x, dt, A, C, B, D,")
    ],
    ("mamba_advance", "ssm/mamba_block_kernels.py"): [
        ("state does not decay", "grow(state * left, B", "grow(state, B"),
        ("counts forgotten", "count = row_count(counts_ptr, b, L)", "count = L"),
        ("only group 0's conv state", "\n    if (head % R == 0) &", "\n    if (head == 0) &"),
        (
            "row 0's conv state",
            "\n    after_conv_ptr = at_slot(after_columns, b)",
            "\n    after_conv_ptr = at_slot(after_columns, 0 * b)",
        ),
    ],
    ("mamba_advance", "runtime/lang.py"): [
        ("below 0", "tl.maximum(tl.load(counts_ptr + b), 0)", "tl.load(counts_ptr + b) + 0")
    ],
    ("mamba_advance", "conv1d/conv_states.py"): [
        ("column lost", "mask=mask & (source < 0), other", "mask=mask & (source < -1), other")
    ],
    ("mamba_advance", "ssm/mamba_block_launch.py"): [
        ("long: counts forgotten", "_conv_advance(xBC, conv, counts,", "_conv_advance(xBC, conv, None,")
    ],
    ("ssd_step", "ssm/ssd_step.py", "test_states.py"): [
        ("reads where it writes", "tl.load(before_ptr + offs_s", "tl.load(after_ptr + offs_s")
    ],
    ("ssd_step", "ssm/launch.py", "test_states.py"): [
        ("writes where it reads", "before if out is None else Slots.of(used, out)", "before")
    ],
    ("conv_advance", "runtime/lang.py", "test_states.py"): [
        (
            "a slot behind the last",
            "tl.load(slots.indices + row), 0), (slots.odd_slots >> 1) - 1)",
            "tl.load(slots.indices + row), 0), 1 << 30)",
        )
    ],
    ("mamba_step", "conv1d/conv_states.py", "test_states.py"): [
        ("rows 0, 1, ..", "copy_to_slots(pool, new, read)", "copy_to_slots(pool, new, None)")
    ],
    ("mamba_step", "ssm/conv_lang.py"): [
        ("state does not move on", "(k + AHEAD).to", "k.to"),
        ("own column forgotten", "own[:, None], past", "own[:, None] * 0, past"),
        ("bias forgotten", "axis=1) + bias.to(ACC)", "axis=1)"),
        ("no activation", "return silu(y).to(own.dtype)", "return y.to(own.dtype)"),
    ],
    ("mamba_step", "ssm/mamba_step.py"): [
        ("only group 0's conv state", "if (head % R == 0) &", "if (head == 0) &"),
        ("C of other channels", "c_C = c_B + G * N", "c_C = c_B + N"),
    ],
}
# Strides multiplied in 32 bits: the operation and its argument whose dimension lies far apart then.
for case, file, old, new in (
    (
        "causal_conv1d-conv_state-1",
        "conv1d/causal_conv1d.py",
        "Slots.of(near(state), state_indices)",
        "Slots.of(state, state_indices)",
    ),
    ("conv_advance-x-2", "conv1d/conv_states.py", "c.to(tl.int64) * stride_xc", "c * stride_xc"),
    (
        "conv_advance-conv_state-0",
        "runtime/lang.py",
        "slots.ptr + row * slots",
        "slots.ptr + row.to(tl.int32) * slots",
    ),
    ("ssd_block-dt-2", "ssm/lang.py", "row, head.to(tl.int64), ", "row, head, "),
    ("ssd_step-B-1", "ssm/lang.py", "(head // R).to(tl.int64), offs_p", "head // R, offs_p"),
    (
        "ssd_chunk-dt-2",
        "ssm/ssd_chunk_kernels.py",
        "head.to(tl.int64)[None, :] * stride_dth",
        "head[None, :] * stride_dth",
    ),
    ("ssd_chunk-B-2", "ssm/ssd_chunk_kernels.py", "group = (head // R).to(tl.int64)", "group = head // R"),
    (
        "mamba_block-state.conv-1",
        "ssm/conv_lang.py",
        "c.to(tl.int64)[:, None] * stride_sc",
        "c[:, None] * stride_sc",
    ),
    ("mamba_block-state.conv-2", "ssm/conv_lang.py", "(k + AHEAD).to(tl.int64)", "(k + AHEAD)"),
):
    MUTANTS.setdefault((case.partition("-")[0], file, "test_strides_mamba.py"), []).append((case, old, new))
