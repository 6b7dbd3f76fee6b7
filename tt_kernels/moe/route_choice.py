"""Inside the router's kernels: the choice of a tile of tokens.

Scores of a tile lie in BLOCK_P columns, BLOCK_N (a power of two) for each group of experts: column g * BLOCK_N + n is
expert g * (E / GROUPS) + n, so that columns ascend as experts do. A tile of R tokens has the shape [R, H, C], C at most
128 and H * C = BLOCK_P: a warp loads 128 scores of fp32 at a time, 16 bytes a lane, so that a token's lie in one warp
(if two held them, they would meet at a barrier in every round of the choice).

Scores that are chosen by are sigmoids and a bias, or, where CHOICE.SOFTMAX, the logits themselves: a softmax is in
their order.

The choice is made twice at most. First in fp32, where a round is one instruction of a warp: with it comes a bound of
what its scores are off by, and a token whose best TOP_K + 1 all lie further apart than that is chosen for. If any of
the tile is not, the tile is chosen for again, in fp64.
"""

import triton
import triton.language as tl

_TAKEN = tl.constexpr(-(2**63))  # below the key of any number

_NAN = tl.constexpr(2**63 - 1)  # above it

_TAKEN32 = tl.constexpr(-(2**31))

_NONE = tl.constexpr(2**31 - 1)  # also the key of NaN in 32 bits

# What an fp32 score plus bias is off by, besides what its logit is: with exp2 and a division that are off by 2^-22 of
# their results, and a logit's product with log2(e), a score is off by 2^-21.2 at most.
_SCORE = tl.constexpr(2.0**-20 + 2.0**-22)
_LEAST = tl.constexpr(2.0**-120)  # what parts of a logit below the smallest numbers add up to
_PART = tl.constexpr(2.0**-26)  # of a logit's parts, each rounded and added: a quarter of 2^-24 for each
_SUM = tl.constexpr(2.0**-23)  # of a sum with a bias, which may come from fp64


@triton.jit
def sigmoid64(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def columns(E, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """The experts of the columns, and which columns have one: [H, C] each."""
    C: tl.constexpr = min(BLOCK_P, 128)
    p = tl.arange(0, BLOCK_P // C)[:, None] * C + tl.arange(0, C)[None, :]
    return expert_of(p, E, GROUPS, BLOCK_N), (p // BLOCK_N < GROUPS) & (p % BLOCK_N < E // GROUPS)


@triton.jit
def expert_of(p, E, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    return p // BLOCK_N * (E // GROUPS) + p % BLOCK_N


@triton.jit
def bias_of(bias_ptr, E, CHOICE: tl.constexpr):
    """The bias of each column: [H, C]."""
    expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    if CHOICE.SOFTMAX:
        bias = tl.zeros(expert.shape, dtype=tl.float32)
    else:
        bias = tl.load(bias_ptr + expert, mask=real, other=0.0)
    return bias


@triton.jit
def logits_of(ptr, rows, T, E, CHOICE: tl.constexpr, SPLITS: tl.constexpr, dtype: tl.constexpr):
    """The sums over SPLITS parts [T, E] of rows, and the sums of the parts' sizes: [R, H, C] each. Past the first
    cache: other programs may have only just written them."""
    expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    mask = (rows < T)[:, None, None] & real[None, :, :]
    ptrs = ptr + rows[:, None, None] * E + expert[None, :, :]
    total = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg").to(dtype)
    size = tl.abs(total)
    for s in tl.static_range(1, SPLITS):
        part = tl.load(ptrs + s * T * E, mask=mask, other=0.0, cache_modifier=".cg").to(dtype)
        total += part
        size += tl.abs(part)
    return total, size


@triton.jit
def largest(x):
    """Of each token: [R] from [R, H, C]."""
    return tl.max(tl.max(x, axis=1), axis=1)


# ---- in fp32 ----


@triton.jit
def ordered32(x):
    """fp32 as int32 of the same order, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, _NONE, bits)


@triton.jit
def quick_best(keys, margin, NUMBER: tl.constexpr):
    """`best` for keys of 32 bits, and for which tokens that is certain: [R]. Keys are off by half of margin [R] at
    most: all that are taken, and the best that is not, must differ by more. NaN never does."""
    taken = tl.full(keys.shape, -1, dtype=tl.int32)
    before = tl.full(margin.shape, float("inf"), dtype=tl.float32)
    certain = margin < float("inf")
    for k in range(NUMBER):
        top = largest(keys)
        now = (keys == top[:, None, None]) & (keys > _TAKEN32)  # none where all are: then two were taken in one round
        value = tl.where(top < 0, top ^ 0x7FFFFFFF, top).to(tl.float32, bitcast=True)
        certain = certain & (before - value > margin)
        before = value
        taken = tl.where(now, k, taken)
        keys = tl.where(now, _TAKEN32, keys)
    top = largest(keys)
    value = tl.where(top < 0, top ^ 0x7FFFFFFF, top).to(tl.float32, bitcast=True)
    certain = certain & ((top == _TAKEN32) | (before - value > margin))
    number = tl.sum(tl.sum((taken >= 0).to(tl.int32), axis=1), axis=1)  # equal ones were taken in one round
    return taken, certain & (number == NUMBER)


@triton.jit
def quick_groups(biased, margin, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """`within_groups` in fp32, and for which tokens it is certain: a sum of two is off by twice as much as one."""
    R: tl.constexpr = biased.shape[0]
    BLOCK_G: tl.constexpr = biased.shape[1] * biased.shape[2] // BLOCK_N
    grouped = tl.reshape(biased, (R, BLOCK_G, BLOCK_N))
    first, second = best_two(grouped)
    keys = tl.where(tl.arange(0, BLOCK_G)[None, :] < GROUPS, ordered32(first + second), _TAKEN32)
    kept, certain = quick_best(keys[:, None, :], 2.5 * margin, TOPK_GROUP)
    stays = (tl.reshape(kept, (R, BLOCK_G, 1)) >= 0) | (grouped == -float("inf"))
    broken = tl.max(tl.max((grouped != grouped).to(tl.int32), axis=2), axis=1) > 0
    return tl.reshape(tl.where(stays, grouped, 0.0), biased.shape), certain & ~broken


@triton.jit
def best_two(grouped):
    """The two best of each group, NaN left out: [R, BLOCK_G] each."""
    n = tl.arange(0, grouped.shape[2])[None, None, :]
    numbers = tl.where(grouped != grouped, -float("inf"), grouped)
    first, at = tl.max(numbers, axis=2, return_indices=True, return_indices_tie_break_left=True)
    return first, tl.max(tl.where(n == at[:, :, None], -float("inf"), numbers), axis=2)


# ---- in fp64 ----


@triton.jit
def ordered(x):
    """fp64 as int64 of the same order, NaN above all: what is taken can then be told from every number."""
    bits = x.to(tl.int64, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return tl.where(x != x, _NAN, bits)


@triton.jit
def best(keys, NUMBER: tl.constexpr):
    """For each of keys [R, H, C] the round that takes it when each token's largest is taken NUMBER times, or -1; of
    equal ones the first is taken. By halves: a warp finds the largest 32-bit number in one instruction."""
    H: tl.constexpr = keys.shape[1]
    C: tl.constexpr = keys.shape[2]
    p = tl.arange(0, H)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    high = (keys >> 32).to(tl.int32)
    low = ((keys & 0xFFFFFFFF) - 0x80000000).to(tl.int32)  # in the order of unsigned numbers
    taken = tl.full(keys.shape, -1, dtype=tl.int32)
    for k in range(NUMBER):
        top = high == largest(high)[:, None, None]
        below = tl.where(top, low, -0x80000000)
        top = top & (low == largest(below)[:, None, None])
        first = tl.min(tl.min(tl.where(top, p, _NONE), axis=1), axis=1)
        now = p == first[:, None, None]
        taken = tl.where(now, k, taken)
        high = tl.where(now, -0x80000000, high)
        low = tl.where(now, -0x80000000, low)
    return taken


@triton.jit
def within_groups(biased, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Biased scores [R, H, C], -inf where there is no expert, with 0 outside the groups whose two best sum highest, but
    for what is -inf; and where they stay as they are."""
    R: tl.constexpr = biased.shape[0]
    BLOCK_G: tl.constexpr = biased.shape[1] * biased.shape[2] // BLOCK_N
    grouped = tl.reshape(biased, (R, BLOCK_G, BLOCK_N))
    broken = grouped != grouped  # a maximum would lose it
    first, second = best_two(grouped)
    keys = tl.where(tl.max(broken.to(tl.int32), axis=2) > 0, _NAN, ordered(first + second))
    keys = tl.where(tl.arange(0, BLOCK_G)[None, :] < GROUPS, keys, _TAKEN)
    kept = best(keys[:, None, :], TOPK_GROUP) >= 0
    stays = tl.reshape(kept, (R, BLOCK_G, 1)) | (grouped == -float("inf"))
    return tl.reshape(tl.where(stays, grouped, 0.0), biased.shape), tl.reshape(stays, biased.shape)


@triton.jit
def chosen_of(logits, bias_ptr, E, CHOICE: tl.constexpr):
    """The rounds that take experts with these logits [R, H, C] of fp64, their biased scores, and where those stay."""
    _, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    if CHOICE.SOFTMAX:
        biased = tl.where(logits == 0, 0.0, logits)  # -0 is no less than 0
    else:
        biased = sigmoid64(logits) + bias_of(bias_ptr, E, CHOICE).to(tl.float64)[None, :, :]
    stays = tl.broadcast_to(real[None, :, :], biased.shape)
    if CHOICE.GROUPS > 1:
        masked = tl.where(real[None, :, :], biased, -float("inf"))
        biased, kept = within_groups(masked, CHOICE.GROUPS, CHOICE.TOPK_GROUP, CHOICE.BLOCK_N)
        stays = stays & kept
    return best(tl.where(real[None, :, :], ordered(biased), _TAKEN), CHOICE.TOP_K), biased, stays


@triton.jit
def neighbours(taken, biased, margin, TOP_K: tl.constexpr):
    """Which scores decide the order of the chosen, or who is chosen, and are too close to others to do so: of two that
    differ by margin [R] or less, one of them chosen. All others may be off by half of margin each."""
    found = tl.full(taken.shape, 0, dtype=tl.int32)
    for k in range(TOP_K):
        value = largest(tl.where(taken == k, biased, -float("inf")))
        near = (~(tl.abs(biased - value[:, None, None]) > margin[:, None, None])).to(tl.int32)  # it is one of them
        several = (tl.sum(tl.sum(near, axis=1), axis=1) > 1).to(tl.int32)
        found |= near & several[:, None, None]
    return found > 0


@triton.jit
def of_groups(logits, bias_ptr, margin, E, CHOICE: tl.constexpr):
    """Which scores may be among the two best of their groups."""
    R: tl.constexpr = logits.shape[0]
    _, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    biased = sigmoid64(logits) + bias_of(bias_ptr, E, CHOICE).to(tl.float64)[None, :, :]
    masked = tl.where(real[None, :, :], biased, -float("inf"))
    grouped = tl.reshape(masked, (R, CHOICE.BLOCK_P // CHOICE.BLOCK_N, CHOICE.BLOCK_N))
    _, second = best_two(grouped)
    return tl.reshape(~(grouped < (second - margin[:, None])[:, :, None]), logits.shape) & real[None, :, :]


@triton.jit
def exact_logits(logits, wanted, x_ptr, weight_ptr, stride_x, stride_w, tile, D, E, CHOICE: tl.constexpr):
    """logits [R, H, C] with those that are wanted computed anew, in fp64, one after the other: there are few."""
    R: tl.constexpr = logits.shape[0]
    H: tl.constexpr = logits.shape[1]
    C: tl.constexpr = logits.shape[2]
    r = tl.arange(0, R)[:, None, None]
    n = (r * H + tl.arange(0, H)[None, :, None]) * C + tl.arange(0, C)[None, None, :]
    n = tl.where(wanted, n, _NONE)
    d = tl.arange(0, 1024)
    for _ in range(tl.sum(tl.sum(tl.sum(wanted.to(tl.int32), axis=2), axis=1), axis=0)):
        at = tl.min(tl.min(tl.min(n, axis=2), axis=1), axis=0)
        row = tile.to(tl.int64) * R + at // (H * C)
        expert = expert_of(at % (H * C), E, CHOICE.GROUPS, CHOICE.BLOCK_N).to(tl.int64)
        terms = tl.zeros((1024,), dtype=tl.float64)
        for offset in range(0, D, 1024):
            x = tl.load(x_ptr + row * stride_x + offset + d, mask=offset + d < D, other=0.0)
            w = tl.load(weight_ptr + expert * stride_w + offset + d, mask=offset + d < D, other=0.0)
            terms += x.to(tl.float64) * w.to(tl.float64)
        logits = tl.where(n == at, tl.sum(terms, axis=0), logits)
        n = tl.where(n == at, _NONE, n)
    return logits


@triton.jit
def rest_of(logits, taken, E, CHOICE: tl.constexpr):
    """The sum over the experts that a token does not go to, of exp(logit - the largest): [R]."""
    _, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    top = largest(tl.where(taken >= 0, logits, -float("inf")))
    terms = tl.where((taken < 0) & real[None, :, :], tl.exp(logits - top[:, None, None]), 0.0)
    return tl.sum(tl.sum(terms, axis=1), axis=1)


@triton.jit
def choose_again(
    given, quick, quick_biased, doubted, doubted_group, margin, tile, rows, found_ptr, rest_ptr, T, E,
    CHOICE: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The choice of a tile in fp64: the rounds that take experts [R, H, C]. Their logits are written to found_ptr
    [T, K], and where it is wanted `rest_of` to the first of each row of rest_ptr [T, K]: as results of a branch that
    nearly nobody takes, they would be in its layout for all."""
    _, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    logits, _ = logits_of(given.exact, rows, T, E, CHOICE, SPLITS, tl.float64)
    if SPLIT:
        operands = given.x, given.weight, given.stride_x, given.stride_w, tile, given.D, E
        if CHOICE.GROUPS > 1:
            wanted = doubted_group[:, None, None] & of_groups(logits, given.bias, margin, E, CHOICE)
            logits = exact_logits(logits, wanted, *operands, CHOICE)
            taken, biased, stays = chosen_of(logits, given.bias, E, CHOICE)
            wanted = stays & neighbours(taken, biased, margin, CHOICE.TOP_K)
        else:
            wanted = real[None, :, :] & neighbours(quick, quick_biased, margin, CHOICE.TOP_K)
        wanted = doubted[:, None, None] & wanted
        logits = exact_logits(logits, wanted, *operands, CHOICE)
    taken, _, _ = chosen_of(logits, given.bias, E, CHOICE)
    for n in range(CHOICE.TOP_K):
        one = tl.sum(tl.sum(tl.where(taken == n, logits, 0.0), axis=1), axis=1)
        tl.store(found_ptr + rows * CHOICE.TOP_K + n, one, mask=rows < T)
    if CHOICE.SOFTMAX and not CHOICE.NORM:
        rest = rest_of(logits, taken, E, CHOICE).to(rest_ptr.dtype.element_ty)
        tl.store(rest_ptr + rows * CHOICE.TOP_K, rest, mask=rows < T)
    tl.debug_barrier()  # other threads read them
    return taken


# ---- both ----


@triton.jit
def choose(
    given,  # Given
    error,  # [R]: what logits of fp32 are off by, besides their parts' rounding
    bias,  # [H, C]
    tile,
    rows,  # [R]: the tokens
    out,  # Outputs
    T,
    E,
    CHOICE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Choose a tile's experts and write them, their weights and their scores.

    Returns, [R, BLOCK_K] each: the pair t * K + k of a token and an expert, whether there is one, and its column;
    [H, C]: which tokens of the tile chose the column, a bit for each."""
    _, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    quick, size = logits_of(given.rounded, rows, T, E, CHOICE, SPLITS, tl.float32)
    if CHOICE.SOFTMAX:
        biased = tl.where(real[None, :, :], quick, -float("inf"))
        off = size * ((SPLITS + 1) * 4 * _PART)
    else:
        biased = 1 / (1 + tl.exp(-quick)) + bias.to(tl.float32)[None, :, :]
        biased = tl.where(real[None, :, :], biased, -float("inf"))
        # The sigmoid's slope is 1/4 at most. Numbers from 0 on are ordered as their bits.
        off = size * ((SPLITS + 1) * _PART) + tl.abs(biased) * _SUM
    off = tl.where(tl.abs(biased) < float("inf"), off, 0.0)
    off = largest(off.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    margin = 2 * (off + (error + _LEAST)) if CHOICE.SOFTMAX else 2 * (off + (0.25 * error + _SCORE))
    certain = margin < float("inf")
    if CHOICE.GROUPS > 1:
        biased, certain = quick_groups(biased, margin, CHOICE.GROUPS, CHOICE.TOPK_GROUP, CHOICE.BLOCK_N)
    certain_group = certain
    taken, certain_best = quick_best(tl.where(real[None, :, :], ordered32(biased), _TAKEN32), margin, CHOICE.TOP_K)
    certain = certain & certain_best
    doubted = ~certain & (rows < T)
    again = tl.max(doubted.to(tl.int32), axis=0) > 0
    if again:
        operands = given, taken, biased, doubted, doubted & ~certain_group, margin, tile, rows, out.chosen
        taken = choose_again(*operands, out.topk_weights, T, E, CHOICE, SPLITS, SPLIT)
    k = tl.arange(0, CHOICE.BLOCK_K)[None, :]
    column = columns_of(taken, CHOICE)
    paired = (k < CHOICE.TOP_K) & (rows < T)[:, None]
    pair = rows[:, None] * CHOICE.TOP_K + k
    expert = expert_of(column, E, CHOICE.GROUPS, CHOICE.BLOCK_N)
    ptrs = given.exact + rows[:, None] * E + expert
    logits = tl.load(ptrs, mask=paired, other=0.0, cache_modifier=".cg").to(tl.float64)
    for s in tl.static_range(1, SPLITS):
        logits += tl.load(ptrs + s * T * E, mask=paired, other=0.0, cache_modifier=".cg").to(tl.float64)
    if again:  # some may be computed anew
        logits = tl.load(out.chosen + pair, mask=paired, other=0.0)
    if CHOICE.SOFTMAX:
        logits = tl.where(k < CHOICE.TOP_K, logits, -float("inf"))
        scores = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        total = tl.sum(scores, axis=1)
        if not CHOICE.NORM:
            every, _ = logits_of(given.exact, rows, T, E, CHOICE, SPLITS, tl.float64)
            rest = rest_of(every, taken, E, CHOICE)
            if again:
                rest = tl.load(out.topk_weights + rows * CHOICE.TOP_K, mask=rows < T, other=0.0).to(tl.float64)
                tl.debug_barrier()  # other threads store weights there
            total += rest
        scores /= total[:, None]
        weights = scores * CHOICE.SCALE
    else:
        scores = sigmoid64(logits)
        weights = scores * CHOICE.SCALE
        if CHOICE.NORM:
            total = tl.sum(tl.where(k < CHOICE.TOP_K, scores, 0.0), axis=1)
            weights *= (1 / (total + 1e-20))[:, None]
    tl.store(out.topk_ids + pair, expert.to(tl.int64), mask=paired)
    tl.store(out.topk_weights + pair, weights.to(out.topk_weights.dtype.element_ty), mask=paired)
    tl.store(out.chosen + pair, scores, mask=paired)
    r = tl.arange(0, rows.shape[0])[:, None, None]
    return pair, paired, column, tl.sum(tl.where((taken >= 0) & (rows < T)[:, None, None], 1 << r, 0), axis=0)


@triton.jit
def columns_of(taken, CHOICE: tl.constexpr):
    """The columns that the rounds took: [R, BLOCK_K] from [R, H, C], 0 behind the last."""
    H: tl.constexpr = taken.shape[1]
    C: tl.constexpr = taken.shape[2]
    p = tl.arange(0, H)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    k = tl.arange(0, CHOICE.BLOCK_K)[None, :]
    found = tl.full((taken.shape[0], CHOICE.BLOCK_K), 0, dtype=tl.int32)
    for n in range(CHOICE.TOP_K):
        found = tl.where(k == n, largest(tl.where(taken == n, p, 0))[:, None], found)
    return found
