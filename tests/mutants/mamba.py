"""Faults in the kernels of convolution and scan."""

from mutants import Mutant

CONV, STATES = "tt_kernels/conv1d/causal.py", "tt_kernels/conv1d/states.py"
BLOCK, STEP, TILE = "tt_kernels/ssd/block_kernels.py", "tt_kernels/ssd/step.py", "tt_kernels/ssd/tile.py"
CHUNK, SCAN = "tt_kernels/ssd/chunk_kernels.py", "tt_kernels/ssd/scan.py"

MUTANTS = (
    Mutant("causal_conv1d", CONV, "(k == K - 1 - back)", "(k == back)", "taps in reverse"),
    Mutant("causal_conv1d", CONV, "(S + source)[:, None]", "(S + source - 1)[:, None]", "state one column early"),
    Mutant("causal_conv1d", CONV, "if back > start:", "if back > start + 1:", "last tap into the state missed"),
    Mutant("causal_conv1d", CONV, "alive = alive & (after == 0)", "alive = alive", "packed sequences see each other"),
    Mutant("causal_conv1d", CONV, "b * L + source + 1, mask", "b * L + source, mask", "sequences start one late"),
    Mutant("causal_conv1d", CONV, "    if SILU:\n", "    if False:\n", "no activation"),
    Mutant("causal_conv1d", CONV, "    if bias_ptr is not None:", "    if bias_ptr is None:", "bias forgotten"),
    Mutant("causal_conv1d", CONV, "b * stride_sb + c", "c", "the first row's state for all"),
    Mutant("conv_state", STATES, "source = length - K + k", "source = length - K + k - 1", "one column early"),
    Mutant("conv_state", STATES, "(source + K) * stride_sk", "k * stride_sk", "state does not move on"),
    Mutant("conv_state", STATES, "tl.load(lengths_ptr + b), L)", "tl.load(lengths_ptr), L)", "one length for all"),
    Mutant("conv_state", STATES, "tl.where(source < 0, before", "tl.where(source <= 0, before", "first column lost"),
    Mutant("conv_state", STATES, "    if state_ptr is not None:\n", "    if False:\n", "state forgotten"),
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
    Mutant(
        "ssd_block", BLOCK, "[:, None] > t[None, :], a[:, None]", "[:, None] >= t[None, :], a[:, None]", "own decay"
    ),
    Mutant("ssd_block", TILE, "tl.where(i >= j, log,", "tl.where(i > j, log,", "a token does not see itself"),
    Mutant("ssd_block", TILE, "* dt  # masked", "# masked", "step forgotten"),
    Mutant("ssd_block", BLOCK, "* decay(tl.cumsum(a, axis=0))[:, None]", "", "state does not decay"),
    Mutant("ssd_block", BLOCK, "x.to(ACC) * tl.load(D_ptr + head).to(ACC)", "x.to(ACC)", "D forgotten"),
    Mutant("ssd_block", BLOCK, "C_ptr + b * stride_Cb + group * stride_Cg", "C_ptr + b * stride_Cb", "group 0's C"),
    Mutant("ssd_block", BLOCK, "before=False)[0]", "before=False)[0] * 1.001", "long blocks off"),
    Mutant("ssd_advance", BLOCK, "tl.load(lengths_ptr + b), L)", "tl.load(lengths_ptr + b) + 1, L)", "one too many"),
    Mutant("ssd_advance", BLOCK, "grow(state * decay(tl.sum(a, axis=0)), B", "grow(state, B", "state does not decay"),
    Mutant("ssd_advance", BLOCK, "decays_to_end(after) * dt", "decays_to_end(after)", "step forgotten"),
    Mutant("ssd_advance", BLOCK, "decays_to_end(after) * dt", "decays_to_end(a) * dt", "own decay counted"),
    Mutant("ssd_advance", BLOCK, "(t + 1 < start + BLOCK_T)", "(t + 1 < length)", "decay of the next tile twice"),
    Mutant("ssd_advance", BLOCK, "row[:, None] * stride_Bl + group * stride_Bg", "row[:, None] * stride_Bl", "group 0"),
    Mutant("ssd_step", STEP, "state = state * kept + ", "state = state + ", "state does not decay"),
    Mutant("ssd_step", STEP, "(x * dt)[:, None]", "x[:, None]", "step forgotten"),
    Mutant("ssd_step", STEP, " + x * tl.load(D_ptr + head).to(ACC)", "", "D forgotten"),
    Mutant("ssd_step", STEP, "C_ptr + b * stride_Cb + group * stride_Cg", "C_ptr + b * stride_Cb", "group 0's C"),
    Mutant("ssd_step", TILE, "softplus(dt + bias)", "softplus(dt)", "bias forgotten"),
    Mutant("ssd_step", STEP, "group = head // R", "group = head % R", "wrong group"),
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
    Mutant(
        "ssd_chunk",
        CHUNK,
        "known = tl.minimum(count, length - start)\n    is_known",
        "known = count\n    is_known",
        "lengths",
    ),
    Mutant("ssd_chunk", SCAN, "spans = triton.cdiv(tiles, span)", "spans = tiles // span", "last span missed"),
)
