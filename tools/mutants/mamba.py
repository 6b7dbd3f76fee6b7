"""Faults in the kernels of convolution and scan."""

from . import Mutant

CAUSAL_CONV1D = "tt_kernels/conv1d/causal_conv1d.py"
CONV_LANG = "tt_kernels/ssm/conv_lang.py"
CONV_STATES = "tt_kernels/conv1d/conv_states.py"
LANG = "tt_kernels/ssm/lang.py"
MAMBA_BLOCK_KERNELS = "tt_kernels/ssm/mamba_block_kernels.py"
MAMBA_EXTEND = "tt_kernels/ssm/mamba_extend.py"
MAMBA_BLOCK_LAUNCH = "tt_kernels/ssm/mamba_block_launch.py"
MAMBA_STEP = "tt_kernels/ssm/mamba_step.py"
RUNTIME_LANG = "tt_kernels/runtime/lang.py"
SSD_BLOCK_KERNELS = "tt_kernels/ssm/ssd_block_kernels.py"
SSD_BLOCK_LAUNCH = "tt_kernels/ssm/ssd_block_launch.py"
SSD_CHUNK_KERNELS = "tt_kernels/ssm/ssd_chunk_kernels.py"
SSD_CHUNK_LAUNCH = "tt_kernels/ssm/ssd_chunk_launch.py"
SSD_LAUNCH = "tt_kernels/ssm/launch.py"
SSD_STEP = "tt_kernels/ssm/ssd_step.py"

FAR = "tests/kernels/test_strides_mamba.py::test_any_dimension_may_be_far_apart"
STATES = "tests/kernels/test_states.py"
CORNERS = "tests/kernels/test_scan_corners.py::test_a_decay_of_nothing_and_of_all[-inf]"
# Strides multiplied in 32 bits: the operation and its argument whose dimension lies far apart then.
FAR_APART = (
    ("causal_conv1d", CAUSAL_CONV1D, "x.contiguous(), near(state)", "x.contiguous(), state", "conv_state-1"),
    ("conv_advance", CONV_STATES, "c.to(tl.int64) * stride_xc", "c * stride_xc", "x-2"),
    (
        "conv_advance",
        RUNTIME_LANG,
        "return slots.ptr + row * slots.stride",
        "return slots.ptr + row.to(tl.int32) * slots.stride",
        "conv_state-0",
    ),
    ("ssd_block", LANG, "row, head.to(tl.int64), ", "row, head, ", "dt-2"),
    ("ssd_step", LANG, "(head // R).to(tl.int64), offs_p", "head // R, offs_p", "B-1"),
    ("ssd_chunk", SSD_CHUNK_KERNELS, "head.to(tl.int64)[None, :] * stride_dth", "head[None, :] * stride_dth", "dt-2"),
    ("ssd_chunk", SSD_CHUNK_KERNELS, "group = (head // R).to(tl.int64)", "group = head // R", "B-2"),
    ("mamba_block", CONV_LANG, "c.to(tl.int64)[:, None] * stride_sc", "c[:, None] * stride_sc", "state.conv-1"),
    ("mamba_block", CONV_LANG, "(k + AHEAD).to(tl.int64)", "(k + AHEAD)", "state.conv-2"),
)

MUTANTS = (
    *(Mutant(op, file, old, new, f"far {case}", test=f"{FAR}[{op}-{case}]") for op, file, old, new, case in FAR_APART),
    Mutant(
        "ssd_advance", LANG, "tl.maximum(A, -3e38, propagate_nan=tl.PropagateNan.ALL)", "A", "0 * -inf", test=CORNERS
    ),
    Mutant("mamba_extend", MAMBA_EXTEND, "if L == 1 and counts is None:", "if L == 1:", "one token enters"),
    Mutant(
        "mamba_extend",
        MAMBA_EXTEND,
        "        mamba_advance(xBC, dt, w, s, counts, dt_limit=dt_limit)\n",
        "",
        "a block's states stay where they were",
    ),
    Mutant(
        "mamba_extend",
        MAMBA_EXTEND,
        "mamba_advance(xBC, dt, w, s, counts,",
        "mamba_advance(xBC, dt, w, s, None,",
        "all",
    ),
    Mutant("mamba_extend", MAMBA_EXTEND, "counts=counts, chunk_size", "chunk_size", "all of a long stretch"),
    Mutant(
        "mamba_extend",
        MAMBA_EXTEND,
        "conv_advance(xBC, s.conv, counts, state_indices=s.conv_indices, out_indices=s.conv_out_indices)",
        "conv_advance(xBC, s.conv, counts, state_indices=s.conv_indices)",
        "written to the plane that was read",
    ),
    Mutant("causal_conv1d", CAUSAL_CONV1D, "(k == K - 1 - back)", "(k == back)", "taps in reverse"),
    Mutant(
        "causal_conv1d", CAUSAL_CONV1D, "(S + source)[:, None]", "(S + source - 1)[:, None]", "state one column early"
    ),
    Mutant(
        "causal_conv1d", CAUSAL_CONV1D, "if back > start:", "if back > start + 1:", "last tap into the state missed"
    ),
    Mutant(
        "causal_conv1d",
        CAUSAL_CONV1D,
        "alive = alive & (after == 0)",
        "alive = alive",
        "packed sequences see each other",
    ),
    Mutant(
        "causal_conv1d", CAUSAL_CONV1D, "b * L + source + 1, mask", "b * L + source, mask", "sequences start one late"
    ),
    Mutant("causal_conv1d", CAUSAL_CONV1D, "    if SILU:\n", "    if False:\n", "no activation"),
    Mutant(
        "causal_conv1d", CAUSAL_CONV1D, "    if bias_ptr is not None:", "    if bias_ptr is None:", "bias forgotten"
    ),
    Mutant(
        "causal_conv1d", CAUSAL_CONV1D, "at_slot(state, b)", "at_slot(state, 0 * b)", "the first row's state for all"
    ),
    Mutant("conv_advance", CONV_STATES, "source = count - K + k", "source = count - K + k - 1", "one column early"),
    Mutant("conv_advance", CONV_STATES, "(source + K) * stride_sk", "k * stride_sk", "state does not move on"),
    Mutant("conv_advance", RUNTIME_LANG, "tl.load(counts_ptr + b), 0)", "tl.load(counts_ptr), 0)", "one count for all"),
    Mutant(
        "conv_advance", RUNTIME_LANG, "tl.maximum(tl.load(counts_ptr + b), 0)", "tl.load(counts_ptr + b)", "below 0"
    ),
    Mutant("conv_advance", RUNTIME_LANG, "0), L).to(tl.int32)", "0), L + 2).to(tl.int32)", "above L"),
    Mutant(
        "conv_advance", CONV_STATES, "tl.where(source < 0, before", "tl.where(source <= 0, before", "first column lost"
    ),
    Mutant(
        "conv_advance",
        CONV_STATES,
        "column = tl.where(source < 0, before.to(column.dtype), column)",
        "column = column + 0 * before.to(column.dtype)",
        "state lost",
    ),
    Mutant("conv_block_states", CONV_STATES, "source = start - back", "source = start - back + 1", "one column late"),
    Mutant("conv_block_states", CONV_STATES, "out + (K - back) * C", "out + (back - 1) * C", "columns in reverse"),
    Mutant("conv_block_states", CONV_STATES, "mask=alive & (source >= 0)", "mask=source >= 0", "sequences seep"),
    Mutant(
        "conv_block_states",
        CONV_STATES,
        "x_ptr + b * stride_xb + source.to(tl.int64) * stride_xl + c\n",
        "x_ptr + source.to(tl.int64) * stride_xl + c\n",
        "row 0",
    ),
    Mutant("conv_block_states", CONV_STATES, "(B * blocks, triton", "(B * blocks - 1, triton", "last block missed"),
    Mutant("ssd_block", LANG, "[:, None] > t[None, :], a[:, None]", "[:, None] >= t[None, :], a[:, None]", "own decay"),
    Mutant("ssd_block", LANG, "tl.where(i >= j, log,", "tl.where(i > j, log,", "a token does not see itself"),
    Mutant("ssd_block", LANG, "* dt  # masked", "# masked", "step forgotten"),
    Mutant("ssd_block", LANG, "* decay(tl.cumsum(a, axis=0))[:, None]", "", "state does not decay"),
    Mutant("ssd_block", LANG, "+ x.to(y.dtype) * D", "+ x.to(y.dtype)", "D forgotten"),
    Mutant(
        "ssd_block",
        SSD_BLOCK_KERNELS,
        "C_ptr + b * stride_Cb + group * stride_Cg",
        "C_ptr + b * stride_Cb",
        "group 0's C",
    ),
    Mutant(
        "ssd_block", SSD_BLOCK_LAUNCH, "dt_limit=(low, high))[0]", "dt_limit=(low, high))[0] * 1.001", "long blocks off"
    ),
    Mutant(
        "ssd_advance", RUNTIME_LANG, "tl.load(counts_ptr + b), 0)", "tl.load(counts_ptr + b) + 1, 0)", "one too many"
    ),
    Mutant("ssd_advance", SSD_BLOCK_KERNELS, "grow(state * left, B", "grow(state, B", "state does not decay"),
    Mutant("ssd_advance", LANG, "decays_to_end(after) * dt", "decays_to_end(after)", "step forgotten"),
    Mutant("ssd_advance", LANG, "decays_to_end(after) * dt", "decays_to_end(a) * dt", "own decay counted"),
    Mutant("ssd_advance", LANG, "(t + 1 < start + BLOCK_T)", "(t + 1 < count)", "decay of the next tile twice"),
    Mutant(
        "ssd_advance",
        SSD_BLOCK_KERNELS,
        "row[:, None] * stride_Bl + group * stride_Bg",
        "row[:, None] * stride_Bl",
        "group 0",
    ),
    Mutant("ssd_step", LANG, "state = state * decay(log_decay(dt, A)) + ", "state = state + ", "state does not decay"),
    Mutant("ssd_step", LANG, "(x * dt)[:, None]", "x[:, None]", "step forgotten"),
    Mutant("ssd_step", LANG, "axis=1) + x * D", "axis=1)", "D forgotten"),
    Mutant("ssd_step", SSD_STEP, "C_ptr + b * stride_Cb + group * stride_Cg", "C_ptr + b * stride_Cb", "group 0's C"),
    Mutant("ssd_step", LANG, "softplus(dt + bias)", "softplus(dt)", "bias forgotten"),
    Mutant("ssd_step", LANG, "(head // R).to(tl.int64), offs_p", "(head % R).to(tl.int64), offs_p", "wrong group"),
    Mutant(
        "ssd_chunk",
        SSD_CHUNK_KERNELS,
        "tl.store(kept_ptr + out, decays_to_end(after) * dt",
        "tl.store(kept_ptr + out, dt",
        "kept",
    ),
    Mutant("ssd_chunk", SSD_CHUNK_KERNELS, "state *= decay(", "state *= 1 + 0 * decay(", "state does not decay"),
    Mutant(
        "ssd_chunk",
        SSD_CHUNK_KERNELS,
        "added = tl.load(added_ptr + at * P * N",
        "added = 0 * tl.load(added_ptr + at * P * N",
        "spans",
    ),
    Mutant("ssd_chunk", SSD_CHUNK_KERNELS, "total += log", "total = log", "only a span's last tile decays"),
    Mutant("ssd_chunk", LANG, "tl.where(i == j, D, 0.0)", "tl.where(i == j, 0.0, 0.0)", "D forgotten"),
    Mutant("ssd_chunk", LANG, "j = (start + part + tl", "j = (start + tl", "parts of a tile mixed up"),
    Mutant("ssd_chunk", LANG, "!= 0, -128.0, a)", "!= 0, a, a)", "packed sequences see each other"),
    Mutant("ssd_chunk", SSD_CHUNK_KERNELS, "shown = tl.where(", "_ = tl.where(", "a state before a sequence starts"),
    Mutant(
        "ssd_chunk",
        SSD_CHUNK_KERNELS,
        "        if span == spans - 1:\n",
        "        if span == 0:\n",
        "the first span's last state",
    ),
    Mutant(
        "ssd_chunk", SSD_CHUNK_KERNELS, "count, tl.minimum(count, entering - start)", "count, count", "counts forgotten"
    ),
    Mutant(
        "ssd_chunk",
        SSD_CHUNK_KERNELS,
        "tl.minimum(chunk + chunk_size, L) - start",
        "L - start",
        "tiles reach over chunks",
    ),
    Mutant("ssd_chunk", LANG, "-128.0, propagate_nan=tl.PropagateNan.ALL", "-128.0", "NaN becomes a number"),
    Mutant("ssd_chunk", LANG, "tl.where(dt > HIGH, HIGH, dt)", "tl.where(dt <= HIGH, dt, HIGH)", "NaN is limited"),
    Mutant(
        "ssd_step",
        RUNTIME_LANG,
        "tl.where(log <= -64, 0.0, tl.exp2(1.4426950408889634 * log))",
        "tl.where(log > -64, tl.exp2(1.4426950408889634 * log), 0.0)",
        "NaN decays to nothing",
    ),
    Mutant(
        "ssd_chunk", SSD_CHUNK_LAUNCH, "spans = triton.cdiv(tiles, span)", "spans = tiles // span", "last span missed"
    ),
    Mutant("mamba_block", CONV_LANG, "own.to(ACC) * column(taps, K - 1,", "own.to(ACC) * column(taps, 0,", "own tap"),
    Mutant("mamba_block", CONV_LANG, "column(taps, K - 1 - back,", "column(taps, back,", "taps in reverse"),
    Mutant("mamba_block", CONV_LANG, "column(past, early + 1,", "column(past, early,", "past one column early"),
    Mutant(
        "mamba_block", CONV_LANG, "tl.static_range(1, K - 1 - early)", "tl.static_range(1, K - 2 - early)", "past cut"
    ),
    Mutant("mamba_block", CONV_LANG, "((source >= 0) & (t < count))", "(t < count)", "reads before the row"),
    Mutant("mamba_block", CONV_LANG, "y = bias.to(ACC)[None, :] + ", "y = ", "bias forgotten"),
    Mutant("mamba_block", CONV_LANG, "return silu(y).to(NARROW)", "return y.to(NARROW)", "no activation"),
    Mutant(
        "mamba_block", CONV_LANG, "(bundle >> (16 * k))", "(bundle >> (8 * k))", "16-bit columns come apart wrongly"
    ),
    Mutant(
        "mamba_block",
        MAMBA_BLOCK_LAUNCH,
        "_ssd_block(x, dt, A, B, C, D,",
        "_ssd_block(x, dt, A, C, B, D,",
        "long: B for C",
    ),
    Mutant("mamba_advance", MAMBA_BLOCK_KERNELS, "grow(state * left, B", "grow(state, B", "state does not decay"),
    Mutant(
        "mamba_advance",
        MAMBA_BLOCK_KERNELS,
        "count = row_count(counts_ptr, b, L)",
        "count = L",
        "counts forgotten",
    ),
    Mutant(
        "mamba_advance",
        RUNTIME_LANG,
        "tl.maximum(tl.load(counts_ptr + b), 0)",
        "tl.load(counts_ptr + b) + 0",
        "below 0",
    ),
    Mutant(
        "mamba_advance", MAMBA_BLOCK_KERNELS, "if (head % R == 0) &", "if (head == 0) &", "only group 0's conv state"
    ),
    Mutant(
        "mamba_advance",
        MAMBA_BLOCK_KERNELS,
        "at_slot(after_columns, b)",
        "at_slot(after_columns, 0 * b)",
        "row 0's conv state",
    ),
    Mutant(
        "mamba_advance",
        CONV_STATES,
        "mask=mask & (source < 0), other",
        "mask=mask & (source < -1), other",
        "column lost",
    ),
    Mutant(
        "mamba_advance",
        MAMBA_BLOCK_LAUNCH,
        "_conv_advance(xBC, conv, counts,",
        "_conv_advance(xBC, conv, None,",
        "long: counts forgotten",
    ),
    Mutant(
        "ssd_step",
        SSD_STEP,
        "tl.load(before_ptr + offs_s",
        "tl.load(after_ptr + offs_s",
        "reads where it writes",
        test=STATES,
    ),
    Mutant(
        "ssd_step",
        SSD_LAUNCH,
        "before if out is None else Slots.of(used, out)",
        "before",
        "writes where it reads",
        test=STATES,
    ),
    Mutant(
        "conv_advance",
        RUNTIME_LANG,
        "tl.minimum(tl.maximum(tl.load(slots.indices + row), 0), slots.number - 1)",
        "tl.maximum(tl.load(slots.indices + row), 0)",
        "a slot behind the last",
        test=STATES,
    ),
    Mutant(
        "mamba_step",
        CONV_STATES,
        "copy_to_slots(pool, new, read)",
        "copy_to_slots(pool, new, None)",
        "rows 0, 1, ..",
        test=STATES,
    ),
    Mutant(
        "ssd_chunk",
        SSD_CHUNK_LAUNCH,
        "initial = Slots.of(read_slots(initial.ptr, initial.indices, b, own=True))",
        "pass",
        "raced",
        sanitize=True,
        test=STATES,
    ),
    Mutant("mamba_step", CONV_LANG, "(k + AHEAD).to", "k.to", "state does not move on"),
    Mutant("mamba_step", CONV_LANG, "own[:, None], past", "own[:, None] * 0, past", "own column forgotten"),
    Mutant("mamba_step", CONV_LANG, "axis=1) + bias.to(ACC)", "axis=1)", "bias forgotten"),
    Mutant("mamba_step", CONV_LANG, "return silu(y).to(own.dtype)", "return y.to(own.dtype)", "no activation"),
    Mutant("mamba_step", MAMBA_STEP, "if (head % R == 0) &", "if (head == 0) &", "only group 0's conv state"),
    Mutant("mamba_step", MAMBA_STEP, "c_C = c_B + G * N", "c_C = c_B + N", "C of other channels"),
)
