"""Faults in the kernels of convolution and scan."""

from mutants import Mutant

CONV, STATES = "tt_kernels/conv1d/causal.py", "tt_kernels/conv1d/states.py"
BLOCK, STEP, TILE = "tt_kernels/ssd/block_kernels.py", "tt_kernels/ssd/step.py", "tt_kernels/ssd/tile.py"
LANG = "tt_kernels/lang.py"
CHUNK, SCAN = "tt_kernels/ssd/chunk_kernels.py", "tt_kernels/ssd/scan.py"
FUSED, KERNELS, TOKEN = "tt_kernels/mamba/conv.py", "tt_kernels/mamba/kernels.py", "tt_kernels/mamba/step.py"

FAR = "tests/test_strides_mamba.py::test_any_dimension_may_be_far_apart"
CORNERS = "tests/test_scan_corners.py::test_a_decay_of_nothing_and_of_all[-inf]"
# Strides multiplied in 32 bits: the operation and its argument whose dimension lies far apart then.
FAR_APART = (
    ("causal_conv1d", CONV, "x.contiguous(), near(state)", "x.contiguous(), state", "state-1"),
    ("conv_state", STATES, "c.to(tl.int64) * stride_xc", "c * stride_xc", "x-2"),
    ("conv_state", STATES, "c.to(tl.int64) * stride_sc", "c * stride_sc", "state-1"),
    ("conv_state", STATES, "(source + K).to(tl.int64)", "(source + K)", "state-2"),
    ("ssd_block", TILE, "row, head.to(tl.int64), ", "row, head, ", "dt-2"),
    ("ssd_step", TILE, "(head // R).to(tl.int64), offs_p", "head // R, offs_p", "B-1"),
    ("ssd_chunk", CHUNK, "head.to(tl.int64)[None, :] * stride_dth", "head[None, :] * stride_dth", "dt-2"),
    ("ssd_chunk", CHUNK, "group = (head // R).to(tl.int64)", "group = head // R", "B-2"),
    ("mamba_block", FUSED, "c.to(tl.int64)[:, None] * stride_sc", "c[:, None] * stride_sc", "conv_state-1"),
    ("mamba_step", FUSED, "(k + AHEAD).to(tl.int64)", "(k + AHEAD)", "conv_state-2"),
)

MUTANTS = (
    *(Mutant(op, file, old, new, f"far {case}", f"{FAR}[{op}-{case}]") for op, file, old, new, case in FAR_APART),
    Mutant("ssd_advance", TILE, "tl.maximum(A, -3e38, propagate_nan=tl.PropagateNan.ALL)", "A", "0 * -inf", CORNERS),
    Mutant("causal_conv1d", CONV, "(k == K - 1 - back)", "(k == back)", "taps in reverse"),
    Mutant("causal_conv1d", CONV, "(S + source)[:, None]", "(S + source - 1)[:, None]", "state one column early"),
    Mutant("causal_conv1d", CONV, "if back > start:", "if back > start + 1:", "last tap into the state missed"),
    Mutant("causal_conv1d", CONV, "alive = alive & (after == 0)", "alive = alive", "packed sequences see each other"),
    Mutant("causal_conv1d", CONV, "b * L + source + 1, mask", "b * L + source, mask", "sequences start one late"),
    Mutant("causal_conv1d", CONV, "    if SILU:\n", "    if False:\n", "no activation"),
    Mutant("causal_conv1d", CONV, "    if bias_ptr is not None:", "    if bias_ptr is None:", "bias forgotten"),
    Mutant("causal_conv1d", CONV, "b * stride_sb + c", "c", "the first row's state for all"),
    Mutant("conv_state", STATES, "source = length - K + k", "source = length - K + k - 1", "one column early"),
    Mutant("conv_state", STATES, "(source + K).to", "k.to", "state does not move on"),
    Mutant("conv_state", LANG, "tl.load(lengths_ptr + b), 0)", "tl.load(lengths_ptr), 0)", "one length for all"),
    Mutant("conv_state", LANG, "tl.maximum(tl.load(lengths_ptr + b), 0)", "tl.load(lengths_ptr + b)", "below 0"),
    Mutant("conv_state", LANG, "0), L).to(tl.int32)", "0), L + 2).to(tl.int32)", "above L"),
    Mutant("conv_state", STATES, "tl.where(source < 0, before", "tl.where(source <= 0, before", "first column lost"),
    Mutant(
        "conv_state", STATES, "other=0.0)\n    if state_ptr is not None:\n", "other=0.0)\n    if False:\n", "state lost"
    ),
    Mutant("conv_block_states", STATES, "source = start - back", "source = start - back + 1", "one column late"),
    Mutant("conv_block_states", STATES, "out + (K - back) * C", "out + (back - 1) * C", "columns in reverse"),
    Mutant("conv_block_states", STATES, "mask=alive & (source >= 0)", "mask=source >= 0", "sequences seep"),
    Mutant(
        "conv_block_states",
        STATES,
        "x_ptr + b * stride_xb + source.to(tl.int64) * stride_xl + c\n",
        "x_ptr + source.to(tl.int64) * stride_xl + c\n",
        "row 0",
    ),
    Mutant("conv_block_states", STATES, "(B * blocks, triton", "(B * blocks - 1, triton", "last block missed"),
    Mutant("ssd_block", TILE, "[:, None] > t[None, :], a[:, None]", "[:, None] >= t[None, :], a[:, None]", "own decay"),
    Mutant("ssd_block", TILE, "tl.where(i >= j, log,", "tl.where(i > j, log,", "a token does not see itself"),
    Mutant("ssd_block", TILE, "* dt  # masked", "# masked", "step forgotten"),
    Mutant("ssd_block", TILE, "* decay(tl.cumsum(a, axis=0))[:, None]", "", "state does not decay"),
    Mutant("ssd_block", TILE, "+ x.to(ACC) * D", "+ x.to(ACC)", "D forgotten"),
    Mutant("ssd_block", BLOCK, "C_ptr + b * stride_Cb + group * stride_Cg", "C_ptr + b * stride_Cb", "group 0's C"),
    Mutant("ssd_block", BLOCK, "None, low, high)[0]", "None, low, high)[0] * 1.001", "long blocks off"),
    Mutant("ssd_advance", LANG, "tl.load(lengths_ptr + b), 0)", "tl.load(lengths_ptr + b) + 1, 0)", "one too many"),
    Mutant("ssd_advance", BLOCK, "grow(state * left, B", "grow(state, B", "state does not decay"),
    Mutant("ssd_advance", TILE, "decays_to_end(after) * dt", "decays_to_end(after)", "step forgotten"),
    Mutant("ssd_advance", TILE, "decays_to_end(after) * dt", "decays_to_end(a) * dt", "own decay counted"),
    Mutant("ssd_advance", TILE, "(t + 1 < start + BLOCK_T)", "(t + 1 < length)", "decay of the next tile twice"),
    Mutant("ssd_advance", BLOCK, "row[:, None] * stride_Bl + group * stride_Bg", "row[:, None] * stride_Bl", "group 0"),
    Mutant("ssd_step", TILE, "state = state * decay(log_decay(dt, A)) + ", "state = state + ", "state does not decay"),
    Mutant("ssd_step", TILE, "(x * dt)[:, None]", "x[:, None]", "step forgotten"),
    Mutant("ssd_step", TILE, "axis=1) + x * D", "axis=1)", "D forgotten"),
    Mutant("ssd_step", STEP, "C_ptr + b * stride_Cb + group * stride_Cg", "C_ptr + b * stride_Cb", "group 0's C"),
    Mutant("ssd_step", TILE, "softplus(dt + bias)", "softplus(dt)", "bias forgotten"),
    Mutant("ssd_step", TILE, "(head // R).to(tl.int64), offs_p", "(head % R).to(tl.int64), offs_p", "wrong group"),
    Mutant(
        "ssd_chunk", CHUNK, "tl.store(kept_ptr + out, decays_to_end(after) * dt", "tl.store(kept_ptr + out, dt", "kept"
    ),
    Mutant("ssd_chunk", CHUNK, "state *= decay(", "state *= 1 + 0 * decay(", "state does not decay"),
    Mutant(
        "ssd_chunk",
        CHUNK,
        "added = tl.load(added_ptr + at * P * N",
        "added = 0 * tl.load(added_ptr + at * P * N",
        "spans",
    ),
    Mutant("ssd_chunk", CHUNK, "total += log", "total = log", "only a span's last tile decays"),
    Mutant("ssd_chunk", TILE, "tl.where(i == j, D, 0.0)", "tl.where(i == j, 0.0, 0.0)", "D forgotten"),
    Mutant("ssd_chunk", TILE, "j = (start + part + tl", "j = (start + tl", "parts of a tile mixed up"),
    Mutant("ssd_chunk", TILE, "!= 0, -128.0, a)", "!= 0, a, a)", "packed sequences see each other"),
    Mutant("ssd_chunk", CHUNK, "shown = tl.where(", "_ = tl.where(", "a state before a sequence starts"),
    Mutant("ssd_chunk", CHUNK, "    if span == spans - 1:\n", "    if span == 0:\n", "the first span's last state"),
    Mutant("ssd_chunk", CHUNK, "count, tl.minimum(count, length - start)", "count, count", "lengths forgotten"),
    Mutant("ssd_chunk", CHUNK, "tl.minimum(chunk + chunk_size, L) - start", "L - start", "tiles reach over chunks"),
    Mutant("ssd_chunk", TILE, "-128.0, propagate_nan=tl.PropagateNan.ALL", "-128.0", "NaN becomes a number"),
    Mutant("ssd_chunk", TILE, "tl.where(dt > HIGH, HIGH, dt)", "tl.where(dt <= HIGH, dt, HIGH)", "NaN is limited"),
    Mutant(
        "ssd_step",
        LANG,
        "tl.where(log <= -64, 0.0, tl.exp2(1.4426950408889634 * log))",
        "tl.where(log > -64, tl.exp2(1.4426950408889634 * log), 0.0)",
        "NaN decays to nothing",
    ),
    Mutant("ssd_chunk", SCAN, "spans = triton.cdiv(tiles, span)", "spans = tiles // span", "last span missed"),
    Mutant("mamba_block", FUSED, "own.to(ACC) * column(taps, K - 1,", "own.to(ACC) * column(taps, 0,", "own tap"),
    Mutant("mamba_block", FUSED, "column(taps, K - 1 - back,", "column(taps, back,", "taps in reverse"),
    Mutant("mamba_block", FUSED, "column(past, early + 1,", "column(past, early,", "past one column early"),
    Mutant("mamba_block", FUSED, "tl.static_range(1, K - 1 - early)", "tl.static_range(1, K - 2 - early)", "past cut"),
    Mutant("mamba_block", FUSED, "((source >= 0) & (t < length))", "(t < length)", "reads before the row"),
    Mutant("mamba_block", FUSED, "y = bias.to(ACC)[None, :] + ", "y = ", "bias forgotten"),
    Mutant("mamba_block", FUSED, "return silu(y).to(NARROW)", "return y.to(NARROW)", "no activation"),
    Mutant("mamba_block", FUSED, "(bundle >> (16 * k))", "(bundle >> (8 * k))", "16-bit columns come apart wrongly"),
    Mutant("mamba_block", KERNELS, "_ssd_block(x, dt, A, B, C, D,", "_ssd_block(x, dt, A, C, B, D,", "long: B for C"),
    Mutant("mamba_advance", KERNELS, "grow(state * left, B", "grow(state, B", "state does not decay"),
    Mutant("mamba_advance", KERNELS, "length = row_length(lengths_ptr, b, L)", "length = L", "lengths forgotten"),
    Mutant("mamba_advance", LANG, "tl.maximum(tl.load(lengths_ptr + b), 0)", "tl.load(lengths_ptr + b) + 0", "below 0"),
    Mutant("mamba_advance", KERNELS, "if (head % R == 0) &", "if (head == 0) &", "only group 0's conv state"),
    Mutant("mamba_advance", KERNELS, "new_conv_ptr += b * (H", "new_conv_ptr += 0 * b * (H", "row 0's conv state"),
    Mutant(
        "mamba_advance", STATES, "mask=mask & (source < 0), other", "mask=mask & (source < -1), other", "column lost"
    ),
    Mutant("mamba_advance", KERNELS, "_conv_state(xBC, lengths,", "_conv_state(xBC, None,", "long: lengths forgotten"),
    Mutant("mamba_step", FUSED, "(k + AHEAD).to", "k.to", "state does not move on"),
    Mutant("mamba_step", FUSED, "own[:, None], past", "own[:, None] * 0, past", "own column forgotten"),
    Mutant("mamba_step", FUSED, "axis=1) + bias.to(ACC)", "axis=1)", "bias forgotten"),
    Mutant("mamba_step", FUSED, "return silu(y).to(own.dtype)", "return y.to(own.dtype)", "no activation"),
    Mutant("mamba_step", TOKEN, "if (head % R == 0) &", "if (head == 0) &", "only group 0's conv state"),
    Mutant("mamba_step", TOKEN, "c_C = c_B + G * N", "c_C = c_B + N", "C of other channels"),
)
