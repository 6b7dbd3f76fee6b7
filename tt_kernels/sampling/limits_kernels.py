"""What top_k and top_p leave of rows of logits: each row's cut, found without sorting.

For top_k a token counts 1, for top_p its weight in whole numbers (`weigh`), so sums are the reference's whatever their
order. The cut is the least number with no more than `aim` above it. It lies in a window of numbers, as integers in the
order of floats (`flip`). Passes over the row sum what is above seven pivots, and list what is left in the window, until
so few are left that they are halved in registers.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..runtime.lang import programmatic_launch
from .lang import flip


class Narrowing(NamedTuple):
    """Pointers to what narrows sequences of L rows; top_k and top_p may be None."""

    temperature: Any
    top_k: Any
    top_p: Any


class Numbers(NamedTuple):
    """Logits of a row, or some of them."""

    ptr: Any
    count: Any
    suppress: Any  # the place of one that counts as -inf
    best: Any  # the row's largest
    halvings: Any  # of a weight for each unit that a logit is below it


class Window(NamedTuple):
    """The cut is above low and not above high."""

    low: Any
    high: Any
    above: Any  # what is above high


class Seven(NamedTuple):
    """Numbers to compare with, from the lowest to the highest, or what is not below each."""

    a: Any
    b: Any
    c: Any
    d: Any
    e: Any
    f: Any
    g: Any


STAGES = tl.constexpr(4)  # three tiles of 8 KB on their way outlast a round trip to memory

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def weigh(below):
    """The reference's `weights`."""
    counts = below < 41
    steps = (tl.where(counts, below, 0.0) * 16777216.0).to(tl.int32)
    f = steps.to(tl.uint32, bitcast=True) << 8
    power = 9895605 - tl.umulhi(f, 1018364).to(tl.int32)
    power = 59385867 - tl.umulhi(f, power.to(tl.uint32)).to(tl.int32)
    power = 257895614 - tl.umulhi(f, power.to(tl.uint32)).to(tl.int32)
    power = 744257900 - tl.umulhi(f, power.to(tl.uint32)).to(tl.int32)
    power = 1073741824 - tl.umulhi(f, power.to(tl.uint32)).to(tl.int32)
    return tl.where(counts, (power.to(tl.int64) << 10) >> (steps >> 24).to(tl.int64), 0)


@triton.jit
def load_tile(numbers, start, acc_dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Places and numbers [LANES, EACH] from start on: neighbours are a thread's, and so is what is summed over them.
    -inf for what is none, and no -0, which equals 0. NaN is above nothing and below nothing: it is never left out."""
    places = start + tl.arange(0, SHAPE[0])[:, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :]
    x = tl.load(numbers.ptr + places, mask=places < numbers.count, other=LOWEST).to(acc_dtype) + 0.0
    return places, tl.where(places == numbers.suppress, LOWEST, x)


@triton.jit
def bests(numbers, acc_dtype: tl.constexpr, SHAPE: tl.constexpr):
    """[LANES]: the largest number of each lane."""
    most = tl.full((SHAPE[0],), LOWEST, dtype=acc_dtype)
    for start in tl.range(0, numbers.count, SHAPE[0] * SHAPE[1], num_stages=STAGES):
        _, x = load_tile(numbers, start, acc_dtype, SHAPE)
        most = tl.maximum(most, tl.max(x, axis=1))
    return most


@triton.jit
def edge(key, acc_dtype: tl.constexpr):
    """The least number above a key; NaN above infinity."""
    return flip(key + 1, acc_dtype)


@triton.jit
def middle(low, high):
    """Of two integers, rounded down; their sum may not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def sevenths(window, acc_dtype: tl.constexpr):
    """Seven edges that divide a window in eight."""
    low, high = window.low, window.high
    d = middle(low, high)
    b, f = middle(low, d), middle(d, high)
    a, c, e, g = middle(low, b), middle(b, d), middle(d, f), middle(f, high)
    return Seven(
        *(edge(a, acc_dtype), edge(b, acc_dtype), edge(c, acc_dtype), edge(d, acc_dtype)),
        *(edge(e, acc_dtype), edge(f, acc_dtype), edge(g, acc_dtype)),
    )


@triton.jit
def likely(best, unit):
    """Edges where the cut is likely; bad ones cost time, no token. Of top_p a unit is that of e: most of a softmax is
    within some ten of its best. Of top_k it is a sixth of the way from the best of all lanes' bests to the least, which
    is among the first thousands of a row's numbers; twice as far is the middle of a normal row."""
    return Seven(
        *(best - 13 * unit, best - 10.5 * unit, best - 9 * unit, best - 7.5 * unit),
        *(best - 6 * unit, best - 4 * unit, best - 2 * unit),
    )


@triton.jit
def sum_above(numbers, mass, lowest, edges, acc_dtype: tl.constexpr, SHAPE: tl.constexpr):
    """What is not below the lowest that counts, and not below each edge."""
    zero = tl.zeros((SHAPE[0],), dtype=tl.int64)
    total, sums = zero, Seven(zero, zero, zero, zero, zero, zero, zero)
    for start in range(0, numbers.count, SHAPE[0] * SHAPE[1]):
        _, x = load_tile(numbers, start, acc_dtype, SHAPE)
        measure = tl.full(SHAPE, 1, dtype=tl.int64)
        if mass:
            measure = weigh((numbers.best - x) * numbers.halvings)
        total += tl.sum(tl.where(x >= lowest, measure, 0), axis=1)
        sums = Seven(
            sums.a + tl.sum(tl.where(x >= edges.a, measure, 0), axis=1),
            sums.b + tl.sum(tl.where(x >= edges.b, measure, 0), axis=1),
            sums.c + tl.sum(tl.where(x >= edges.c, measure, 0), axis=1),
            sums.d + tl.sum(tl.where(x >= edges.d, measure, 0), axis=1),
            sums.e + tl.sum(tl.where(x >= edges.e, measure, 0), axis=1),
            sums.f + tl.sum(tl.where(x >= edges.f, measure, 0), axis=1),
            sums.g + tl.sum(tl.where(x >= edges.g, measure, 0), axis=1),
        )
    return tl.sum(total, axis=0), Seven(
        *(tl.sum(sums.a, axis=0), tl.sum(sums.b, axis=0), tl.sum(sums.c, axis=0), tl.sum(sums.d, axis=0)),
        *(tl.sum(sums.e, axis=0), tl.sum(sums.f, axis=0), tl.sum(sums.g, axis=0)),
    )


@triton.jit
def tighten(window, edge, above, aim):
    """The window, by what is not below an edge that is no lower than those before."""
    pivot = flip(edge, window.low.dtype) - 1
    fits = (above <= aim) & (pivot < window.high)
    low = tl.where(above > aim, tl.maximum(pivot, window.low), window.low)
    return Window(low, tl.where(fits, pivot, window.high), tl.where(fits, above, window.above))


@triton.jit
def collect(numbers, list_ptr, window, acc_dtype: tl.constexpr, ROOM: tl.constexpr, SHAPE: tl.constexpr):
    """List what is in a window, up to ROOM of it, and say how many there are. The list may be where the numbers are:
    what is written lies before what is still to be read."""
    found = tl.zeros((), dtype=tl.int32)
    low, high = edge(window.low, acc_dtype), edge(window.high, acc_dtype)
    tl.debug_barrier()  # all have read the list that is written over
    SIZE: tl.constexpr = SHAPE[0] * SHAPE[1]
    _, x = load_tile(numbers, 0, acc_dtype, SHAPE)
    for start in range(SIZE, numbers.count + SIZE, SIZE):
        _, following = load_tile(numbers, start, acc_dtype, SHAPE)
        inside = (x >= low) & ((x >= high) == 0)  # high may be NaN
        ones = inside.to(tl.int32)
        lanes = tl.sum(ones, axis=1)
        more = tl.sum(lanes, axis=0)
        if (more > 0) & (found < ROOM):
            slot = (found + tl.cumsum(lanes, axis=0) - lanes)[:, None] + tl.cumsum(ones, axis=1) - ones
            tl.store(list_ptr + slot, x.to(list_ptr.dtype.element_ty), mask=inside & (slot < ROOM))
        found += more
        x = following
    tl.debug_barrier()  # the list is read by others than wrote it
    return found


@triton.jit
def halve(key, measure, window, aim):
    """The cut, of a window whose keys are all here."""
    low, high = window.low, window.high
    while low < high - 1:
        pivot = middle(low, high)
        over = window.above + tl.sum(tl.where(key > pivot, measure, 0), axis=0) > aim
        low, high = tl.where(over, pivot, low), tl.where(over, high, pivot)
    return high


@triton.jit
def share_of(p, total):
    """The weight that is p of the total."""
    return (tl.maximum(p.to(tl.float64), 0.0) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def find_cut(
    numbers,
    list_ptr,  # [ROOM]
    mass,  # whether weights count, or tokens
    floor,  # all that counts is above it
    few,  # whether little is
    unit,  # of the first edges' distance from the best
    aim,  # how much may be above the cut; where mass it is p of all
    p,
    acc_dtype: tl.constexpr,
    ROOM: tl.constexpr,
    LISTED: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """The cut, what may yet be drawn of what equals it, how many do, and how many are listed if all above the floor
    are, else -1. Where the aim is all, the cut is the floor."""
    window = Window(floor, flip(numbers.best, floor.dtype), tl.zeros((), dtype=tl.int64))
    total = aim + 1
    found = tl.zeros((), dtype=tl.int32) + (ROOM + 1)
    if few | (window.low >= window.high - 1):
        found = collect(numbers, list_ptr, window, acc_dtype, ROOM, SHAPE)
    passes = 0
    while (found > LISTED) & (window.low < window.high - 1):
        edges = sevenths(window, acc_dtype)
        if passes == 0:
            edges = likely(numbers.best, unit)
        base = tl.zeros((), dtype=tl.int64)
        if found <= ROOM:
            nowhere = tl.zeros((), dtype=tl.int32) - 1
            numbers = Numbers(list_ptr, found, nowhere, numbers.best, numbers.halvings)
            base = window.above
        whole, sums = sum_above(numbers, mass, edge(floor, acc_dtype), edges, acc_dtype, SHAPE)
        if mass & (passes == 0):
            total = whole
            aim = share_of(p, total)
        window = tighten(window, edges.a, base + sums.a, aim)
        window = tighten(window, edges.b, base + sums.b, aim)
        window = tighten(window, edges.c, base + sums.c, aim)
        window = tighten(window, edges.d, base + sums.d, aim)
        window = tighten(window, edges.e, base + sums.e, aim)
        window = tighten(window, edges.f, base + sums.f, aim)
        window = tighten(window, edges.g, base + sums.g, aim)
        found = collect(numbers, list_ptr, window, acc_dtype, ROOM, SHAPE)
        passes += 1
    cut, above, equal = window.high, window.above, found
    if found <= LISTED:
        offs = tl.arange(0, LISTED)
        x = tl.load(list_ptr + offs, mask=offs < found, other=LOWEST).to(acc_dtype)
        key = tl.where(offs < found, flip(x, floor.dtype), floor)
        measure = (offs < found).to(tl.int64)
        if mass:
            measure = tl.where(offs < found, weigh((numbers.best - x) * numbers.halvings), 0)
            if passes == 0:
                total = tl.sum(measure, axis=0)
                aim = share_of(p, total)
        cut = halve(key, measure, window, aim)
        above += tl.sum(tl.where(key > cut, measure, 0), axis=0)
        equal = tl.sum((key == cut).to(tl.int32), axis=0)
    elif mass & (passes == 0):  # they are all equal
        total = found * weigh((numbers.best - flip(cut, acc_dtype)) * numbers.halvings)
        aim = share_of(p, total)
    cut = tl.where(aim < total, cut, floor)
    return cut, aim - above, equal, tl.where((passes == 0) & (found <= ROOM), found, -1)


@triton.jit
def times(weight, share, most):
    """How often a weight is in a share, below `most`: a quotient of 64 bits is a call, which takes registers."""
    low, high = most * 0, most
    while low < high - 1:
        half = (low + high) // 2
        fits = half * weight <= share
        low, high = tl.where(fits, half, low), tl.where(fits, high, half)
    return low


@triton.jit
def nth_of(numbers, cut, nth, acc_dtype: tl.constexpr, SHAPE: tl.constexpr):
    """The place of the nth number, from 0, of those that equal the cut."""
    seen = tl.zeros((), dtype=tl.int32)
    token = tl.zeros((), dtype=tl.int32)
    for start in range(0, numbers.count, SHAPE[0] * SHAPE[1]):
        places, x = load_tile(numbers, start, acc_dtype, SHAPE)
        ones = (x == cut).to(tl.int32)
        lanes = tl.sum(ones, axis=1)
        here = tl.sum(lanes, axis=0)
        if (seen <= nth) & (nth < seen + here):
            before = (tl.cumsum(lanes, axis=0) - lanes)[:, None] + tl.cumsum(ones, axis=1) - ones
            at = (ones == 1) & (before == nth - seen)
            token = tl.max(tl.max(tl.where(at, places, 0), axis=1), axis=0)
        seen += here
    return token


@triton.jit(do_not_specialize=["R", "first", "L"])
def _limits_kernel(
    logits_ptr,  # [R, V]: of records first to first + R; where BY_ROW [rows, V]
    stride_logits,
    narrowing,  # Narrowing
    listed,  # Listed, or None: record n is of row n
    limits,  # Limits of the R records
    lists_ptr,  # [programs, ROOM]
    R,
    first,
    L,  # rows of a sequence
    V,
    suppress,
    BY_ROW: tl.constexpr,
    SHIFT: tl.constexpr,
    ROOM: tl.constexpr,  # numbers that a program may list
    LISTED: tl.constexpr,  # of them in registers
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    programmatic_launch()
    acc_dtype: tl.constexpr = limits.least.dtype.element_ty
    integer: tl.constexpr = tl.int64 if acc_dtype == tl.float64 else tl.int32
    SHAPE: tl.constexpr = (LANES, EACH)
    no_place = tl.zeros((), dtype=tl.int32) - 1
    count = R
    if listed is not None:
        count = min(R, tl.load(listed.count) - first)
    list_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * ROOM
    for record in range(tl.program_id(0), count, tl.num_programs(0)):
        b = first + record
        if listed is not None:
            b = tl.load(listed.index + b)
        place = record
        if BY_ROW:
            place = b
            if SHIFT:
                place -= (b % L > 0).to(place.dtype)
        b = b // L
        tl.store(limits.least + record, LOWEST)
        tl.store(limits.last + record, V)
        by_k, by_p = False, False
        hot = tl.load(narrowing.temperature + b) > 0  # in its own dtype: narrowed, it may become 0
        if narrowing.top_k is not None:
            k = tl.load(narrowing.top_k + b)
            by_k = hot & (k > 0) & (k < V)
        if narrowing.top_p is not None:
            by_p = hot & (tl.load(narrowing.top_p + b) < 1)
        if by_k | by_p:
            logits = logits_ptr + (tl.zeros((), dtype=tl.int64) + place) * stride_logits
            row = Numbers(logits, no_place + 1 + V, no_place + 1 + suppress, LOWEST, 1.0)
            most = bests(row, acc_dtype, SHAPE)
            best, lane = tl.max(most, axis=0), tl.min(most, axis=0)
            floor = (flip(tl.zeros((), dtype=acc_dtype) + LOWEST, integer) - 1).to(integer)
            kept = no_place
            for mass in range(2):
                # What is read again here need not stay in registers.
                aim, p = tl.zeros((), dtype=tl.int64), tl.zeros((), dtype=tl.float64)
                start, few, unit = floor, kept >= 0, (best - lane) * 0.16
                unit = tl.where(best < float("inf"), unit, 0.0)
                halvings, todo = unit, False
                if mass == 0:
                    if narrowing.top_k is not None:
                        k = tl.load(narrowing.top_k + b)
                        todo = by_k
                        aim = k.to(tl.int64) - 1
                        if k <= LANES:  # so many lanes have a best that is not below the kth of them
                            whole = Window(floor, flip(best, integer), aim * 0)
                            ones = tl.full((LANES,), 1, dtype=tl.int64)
                            start, few = halve(flip(most, integer), ones, whole, aim) - 1, todo
                elif narrowing.top_p is not None:
                    todo = by_p & (best < float("inf")) & (best > LOWEST)
                    p = tl.load(narrowing.top_p + b).to(tl.float64)
                    temperature = tl.load(narrowing.temperature + b)
                    if acc_dtype == tl.float64:  # `halvings` of the reference
                        unit = tl.maximum(temperature.to(tl.float64), 2.2250738585072014e-308)
                        halvings = 1.4426950408889634 / unit
                    else:
                        unit = tl.maximum(temperature.to(tl.float32), 1.1754943508222875e-38)
                        halvings = tl.div_rn(tl.zeros_like(unit) + 1.4426950408889634, unit)
                    # What is 42 halvings below the best has no weight.
                    start = tl.maximum(floor, flip(best - 29.2 * unit, integer) - 1)
                    few = few | (lane < flip(start, acc_dtype))
                if todo:
                    some = Numbers(row.ptr, row.count, row.suppress, best, halvings)
                    if kept >= 0:
                        some = Numbers(list_ptr, kept, no_place, best, halvings)
                    cut, rest, equal, kept = find_cut(
                        *(some, list_ptr, mass == 1, start, few, unit, aim, p),
                        *(acc_dtype, ROOM, LISTED, SHAPE),
                    )
                    if cut > start:
                        least, floor = flip(cut, acc_dtype), cut - 1
                        tl.store(limits.least + record, least)
                        if mass == 1:
                            nth = times(weigh((best - least) * halvings), rest, equal)
                            if nth + 1 < equal:
                                tl.store(limits.last + record, nth_of(row, least, nth, acc_dtype, SHAPE))
