"""The experts' tiles: chosen by sizes alone, counted for the worst choice of experts, within a GPU's shared memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from parity import KERNELS, SANITIZE, assert_as_good, double, fresh_memory_filled, make

from cards import OPS
from tt_kernels import ExpertWeights
from tt_kernels.moe.experts_launch import (
    ProductLaunch,
    Sizes,
    UpLaunch,
    down_launch,
    heights,
    hidden_launch,
    most_tiles,
    spare,
    up_launch,
    weights_launch,
)
from tt_kernels.reference.moe import sort_pairs
from tt_kernels.runtime.launch import ON_CPU, overriding, recording

UP = Sizes(rows=96, experts=128, N=1856, K=2688)
DOWN = replace(UP, N=2688, K=1856)
TOKENS = (1, 16, 64, 128, 512, 1024, 2048, 4096, 16384)
LADDER = sorted({round(2 ** (i / 16)) for i in range(14 * 16 + 1)})  # 1 to 16384 tokens, 4 % apart


def stage(launch, itemsize: int = 2, weights: int = 1) -> int:
    """Bytes that a pipeline stage of a product holds: a tile of rows and one or two of weights."""
    return (launch.BLOCK_T + weights * launch.BLOCK_N) * launch.BLOCK_K * itemsize


@cache
def spread(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows an expert may have, and how likely: 6 of 128 experts a token, all alike."""
    n, rows, share = torch.tensor(tokens).double(), torch.arange(tokens + 1).double(), 6 / 128
    ways = torch.lgamma(n + 1) - torch.lgamma(rows + 1) - torch.lgamma(n - rows + 1)
    return rows, (ways + rows * math.log(share) + (n - rows) * math.log1p(-share)).exp()


def tiles_of(block: int, tokens: int) -> float:
    """Tiles that an expert has on average."""
    rows, likely = spread(tokens)
    return (likely * ((rows - spare(block)) / block).ceil().maximum(rows.clamp(max=1))).sum().item()


def filled(block: int, tokens: int) -> float:
    """Rows that an expert's tiles compute on average."""
    rows, likely = spread(tokens)
    sizes = torch.tensor(heights(block)).double()
    before = ((rows - spare(block)) / block).ceil().clamp(min=1) - 1  # tiles but the last
    last = sizes[torch.searchsorted(sizes, (rows - before * block).clamp(min=1))]
    return (likely * torch.where(rows > 0, before * block + last, 0)).sum().item()


def seconds(block: int, width: int, tokens: int, s: Sizes) -> float:
    """Of a product in 16 bits, by the limits of an H200: bytes from memory, bytes from the L2 cache (an expert's
    weights for each of its tiles, its rows for each tile of N), and operations, padding included."""
    tiles, hit, columns = 128 * tiles_of(block, tokens), 128 * tiles_of(tokens, tokens), math.ceil(s.N / width)
    memory = 2 * (hit * s.N * s.K + s.rows * (s.N + s.K)) / 4.3e12
    cache = 2 * s.K * (tiles * s.N + s.rows * columns) / 8.5e12
    if len(heights(block)) > 1:  # the last columns in half a tile where they fit
        columns = math.ceil(2 * s.N / width) / 2
    return max(memory, cache, 2 * 128 * filled(block, tokens) * columns * width * s.K / 8e14)


PRODUCTS = pytest.mark.parametrize("sizes,launch", [(UP, up_launch), (DOWN, down_launch)], ids=["up", "down"])


@PRODUCTS
def test_no_count_of_tokens_has_tiles_much_slower_than_the_best(sizes: Sizes, launch: Callable) -> None:
    """Such as where many experts' rows just exceed a tile."""
    for tokens in LADDER:
        s = replace(sizes, rows=6 * tokens)
        forms = [(t, n) for t in (16, 32, 64, 128) for n in (64, 128, 256)] + [(192, 256)]
        best = min(seconds(*form, tokens, s) for form in forms)
        assert seconds(launch(s).BLOCK_T, launch(s).BLOCK_N, tokens, s) <= 1.05 * best, tokens


@PRODUCTS
def test_many_tokens_stay_within_a_fifth_of_the_limit(sizes: Sizes, launch: Callable) -> None:
    """By bytes and operations: no count of tokens makes experts' last tiles, or weights that are read again, cost
    more."""
    for tokens in (t for t in LADDER if t >= 1024):
        s = replace(sizes, rows=6 * tokens)
        x = launch(s)
        least = max(2 * s.rows * s.N * s.K / 8e14, 2 * (128 * s.N * s.K + s.rows * (s.N + s.K)) / 4.3e12)
        assert seconds(x.BLOCK_T, x.BLOCK_N, tokens, s) <= 1.2 * least, tokens


@PRODUCTS
def test_weights_are_read_once_while_reading_them_is_what_takes_time(sizes: Sizes, launch: Callable) -> None:
    """Up to 1024 tokens an expert that is hit has one tile, but for one in ten."""
    for tokens in (t for t in LADDER if t <= 1024):
        block = launch(replace(sizes, rows=6 * tokens)).BLOCK_T
        assert tiles_of(block, tokens) <= 1.1 * tiles_of(tokens, tokens), tokens


@PRODUCTS
def test_no_tile_is_larger_than_rows_need(sizes: Sizes, launch: Callable) -> None:
    """Below 128 rows half a tile would leave more experts with two; a larger one waits longer for its first loads."""
    tiles = [launch(replace(sizes, rows=6 * t)).BLOCK_T for t in LADDER]
    assert tiles == sorted(tiles)
    for tokens, block in zip(LADDER, tiles, strict=True):
        if len(heights(block)) > 1:  # it computes no more than it has
            assert filled(block, tokens) <= filled(64, tokens)
            continue
        assert block == 16 or tiles_of(block // 2, tokens) > 1.02 * tiles_of(block, tokens), tokens


@PRODUCTS
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_multiprocessor_has_a_program(sizes: Sizes, launch: Callable, tokens: int) -> None:
    """In the model's sizes, and without the shared expert, whose tiles ride along."""
    x = launch(replace(sizes, rows=6 * tokens))
    assert 128 * tiles_of(x.BLOCK_T, tokens) * math.ceil(sizes.N / x.BLOCK_N) >= 132


@pytest.mark.parametrize("sizes", (UP, DOWN), ids=("up", "down"))
@pytest.mark.parametrize("architecture", (80, 90, 100))
@pytest.mark.parametrize("two", (False, True))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_fits_shared_memory(sizes: Sizes, architecture: int, two: bool, itemsize: int) -> None:
    limit = (163 if architecture == 80 else 227) * 1024
    for tokens in TOKENS:
        s = replace(sizes, rows=6 * tokens, architecture=architecture, two=two, itemsize=itemsize)
        for launch in (up_launch(s), hidden_launch(s)):
            assert launch.num_stages * stage(launch, itemsize, 1 + two) <= limit
        for transposed in (False, True):  # one product after the other
            launch = down_launch(s, transposed)
            assert launch.num_stages * stage(launch, itemsize) <= limit
        launch = weights_launch(s)
        assert launch.num_stages * (launch.BLOCK_P + launch.BLOCK_Q) * launch.BLOCK_R * itemsize <= limit


@pytest.mark.parametrize("architecture", (80, 90, 100))
@pytest.mark.parametrize("two", (False, True))
def test_a_product_does_not_wait_for_the_loads_it_has_just_begun(architecture: int, two: bool) -> None:
    """Three stages: two turns' loads are on their way while a third is multiplied. With two, Triton waits for all."""
    for tokens in TOKENS:
        s = replace(UP, rows=6 * tokens, architecture=architecture, two=two)
        for launch in (up_launch(s), down_launch(s), down_launch(s, True), hidden_launch(s), weights_launch(s)):
            assert launch.num_stages >= 3, launch


@pytest.mark.parametrize("tokens", (1, 16, 64, 128, 512, 1024))
def test_two_programs_share_a_multiprocessor_while_weights_are_streamed(tokens: int) -> None:
    launch = up_launch(replace(UP, rows=6 * tokens))
    assert launch.SWAP and launch.BLOCK_N >= 64 and launch.num_warps == 4  # weights are wgmma's M operand
    taken = launch.num_stages * stage(launch)
    assert 2 * taken <= 220 * 1024 and 2 * taken >= 64 * 1024


@pytest.mark.parametrize("architecture", (80, 90, 100))
@pytest.mark.parametrize("two", (False, True))
def test_sums_leave_registers_for_the_loop(architecture: int, two: bool) -> None:
    """128 of 255 a thread at most, 192 in tall tiles. Rows in large tiles are the tensor cores' M: a warp has no fewer
    than 16."""
    for tokens in LADDER:
        launch = up_launch(replace(UP, rows=6 * tokens, architecture=architecture, two=two))
        most = 192 if launch.tall else 128
        assert (1 + two) * launch.BLOCK_T * launch.BLOCK_N <= most * 32 * launch.num_warps
        assert (launch.BLOCK_N if launch.SWAP else launch.BLOCK_T) >= 16 * launch.num_warps


def test_small_problems_take_small_tiles() -> None:
    """No more than sizes need, but 16, as tensor cores do."""
    small = Sizes(rows=10, experts=4, N=11, K=6, itemsize=4)
    for launch in (up_launch(small), down_launch(small)):
        assert (launch.BLOCK_T, launch.BLOCK_N, launch.BLOCK_K) == (16, 16, 16)
    assert weights_launch(small).BLOCK_P == weights_launch(small).BLOCK_Q == 16


def test_transposed_weights_come_in_whole_tiles() -> None:
    assert all(1856 % down_launch(replace(DOWN, rows=6 * t), transposed=True).BLOCK_K == 0 for t in TOKENS)


@pytest.mark.parametrize("block", (1, 2, 4, 16))
def test_no_choice_needs_more_tiles(block: int) -> None:
    torch.manual_seed(0)
    for rows in (0, 1, 5, 23, 64):
        for experts in (1, 3, 8):
            most = most_tiles(rows, experts, block)
            seen = 0
            for _ in range(50):
                share = torch.rand(experts) ** 4 + 1e-6
                counts = torch.bincount(torch.multinomial(share, max(rows, 1), True)[:rows], minlength=experts)
                seen = max(seen, int(((counts + block - 1) // block).sum()))
            assert seen <= most
            hit = min(experts, rows)  # reached: one row in all but one, which has the rest
            assert most == (hit - 1 + -(-(rows - hit + 1) // block) if hit else 0)


def test_index_lists_are_those_of_the_router() -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (30, 3))
    order, ends = sort_pairs(ids, 9)
    pairs = ids.flatten()[order]
    assert torch.equal(pairs, pairs.sort().values) and ends.dtype == torch.int32
    assert torch.equal(ends.long(), torch.bincount(ids.flatten(), minlength=9).cumsum(0))
    same = pairs[1:] == pairs[:-1]
    assert (order[1:] > order[:-1])[same].all()  # within an expert by token


@pytest.mark.parametrize("tokens", [16, 4096])
def test_a_pass_is_few_launches(tokens: int) -> None:
    """Up, down, sum; the shared expert rides along. A list of tiles only where a multiprocessor has one program, which
    would wait for its search."""
    op = OPS["experts"]
    with torch.device("meta"), recording(90) as seen:
        inputs = op.inputs(torch.float16, T=tokens, D=2688, N=1856, E=128, K=6, M=3712)
        op.fn(**inputs)
    listed = [grid for kernel, grid, *_ in seen if kernel.__name__ == "_experts_schedule_kernel"]
    up, down, total = (grid for _, grid, *_ in seen[len(listed) :])
    assert len(listed) == (tokens > 1000)
    launches = up_launch(replace(UP, rows=6 * tokens)), down_launch(replace(DOWN, rows=6 * tokens))
    for (count,), launch, N, M in zip((up, down), launches, (1856, 2688), (3712, 2688), strict=True):
        routed = most_tiles(6 * tokens, 128, launch.BLOCK_T) * math.ceil(N / launch.BLOCK_N)
        assert count == routed + math.ceil(tokens / launch.BLOCK_T) * math.ceil(M / launch.BLOCK_N)
    assert total[0] == tokens


@pytest.mark.parametrize("sizes", [dict(), dict(D=2690), dict(N=1000), dict(N=1854), dict(M=1000)])
def test_tall_tiles_take_weights_by_tma_only(sizes: dict[str, int]) -> None:
    """By pointers they would spill."""
    dims = dict(T=4096, D=2688, N=1856, E=128, K=6, M=3712) | sizes
    with torch.device("meta"), recording(90) as seen:
        inputs = OPS["experts"].inputs(torch.float16, **dims)
        inputs["x"].requires_grad_()
        OPS["experts"].fn(**inputs).sum().backward()
    forms = []
    for _, _, (_, w, *_), options in (launch for launch in seen if "SWAP" in launch[3]):
        forms.append(len(heights(options["BLOCK_T"])) > 1)
        assert hasattr(w, "base") or not forms[-1]
    assert len(forms) == 3 and (all(forms) or sizes)


def test_frozen_matrices_cost_nothing() -> None:
    op = OPS["experts"]
    with torch.device("meta"):
        inputs = op.inputs(torch.bfloat16, T=64, D=256, N=128, E=8, K=2, M=64)
    inputs["x"].requires_grad_()
    with torch.device("meta"), recording(90) as seen:
        op.fn(**inputs).sum().backward()
    kernels = [kernel.__name__ for kernel, *_ in seen]
    assert "_experts_bwd_hidden_kernel" in kernels and "_experts_bwd_weights_kernel" not in kernels
    assert inputs["x"].grad is not None


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("gated", [0, 1])
def test_nan_stays_nan(gated: int) -> None:
    """What has diverged shows, also behind relu."""
    op = OPS["experts"]
    kwargs = make(op, dict(T=3, D=8, N=16, E=2, K=1, gated=gated), torch.float32)
    kwargs["x"][1, 2] = float("nan")
    got, want = op.fn(**kwargs), op.reference(**kwargs)
    assert torch.equal(got.isnan(), want.isnan()) and want[1].isnan().all() and not want[0].isnan().any()


@pytest.mark.kernels
@pytest.mark.sanitize
@pytest.mark.skipif(not ON_CPU, reason="looks at kernels on a CPU")
@pytest.mark.parametrize("dims", [dict(T=19, M=24), dict(T=40, M=0), dict(T=33, M=16, gated=1)])
@pytest.mark.parametrize("form", [(1, 0, 1), (1, 1, 1), (0, 1, 1), (0, 0, 0), (1, 0, 0)])
def test_all_forms_give_the_same(dims: dict[str, int], form: tuple[int, int, int]) -> None:
    """Also the persistent one, which nothing but a measurement chooses: rows sorted first or gathered, either operand
    the tensor cores' M."""
    persistent, is_sorted, swap = form
    op, dtype = OPS["experts"], torch.bfloat16 if SANITIZE else torch.float32
    kwargs = make(op, dict(D=48, N=32, E=5, K=2) | dims, dtype)
    up = UpLaunch(BLOCK_T=16, BLOCK_N=16, BLOCK_K=16, SWAP=swap, PERSISTENT=persistent, SORTED=is_sorted)
    down = ProductLaunch(**{name: value for name, value in up.options.items() if name != "SORTED"})
    with overriding("_experts_up_kernel", up), fresh_memory_filled():
        by_up = op.fn(**kwargs)
    with overriding("_experts_down_kernel", down), fresh_memory_filled():
        by_down = op.fn(**kwargs)
    low, high = op.reference(**kwargs), op.reference(**double(kwargs))
    for got in (by_up, by_down):
        assert_as_good("y", got, low, high, 0.0)


@pytest.mark.kernels
@pytest.mark.sanitize
@pytest.mark.skipif(not ON_CPU, reason="looks at kernels on a CPU")
@pytest.mark.parametrize("block,dims", [(192, dict(N=40, M=24)), (192, dict(N=24, M=0)), (96, dict(N=24, M=24))])
def test_tall_tiles_give_the_same(block: int, dims: dict[str, int]) -> None:
    """Tiles of every height, whole columns, half of them and a part; an expert without rows and a pair without one."""
    op, dtype = OPS["experts"], torch.bfloat16 if SANITIZE else torch.float32
    counts = [n * block // 192 for n in (384, 224, 350, 312, 40, 0, 2)]  # the last are of pairs without an expert
    tiles = (192, 192, 224, 192, 158, 192, 120, 40)  # by the list: a search, of tiles below 128, knows no spare rows
    assert {min(h for h in heights(192) if h >= n) for n in tiles} == set(heights(192))
    kwargs = make(op, dict(T=sum(counts), D=48, E=6, K=1) | dims, dtype)
    ids = torch.arange(7).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    kwargs["routing"] = kwargs["routing"]._replace(topk_ids=ids[:, None])
    up = UpLaunch(BLOCK_T=block, BLOCK_N=32, BLOCK_K=16, SWAP=0, PERSISTENT=0, SORTED=0, num_warps=4)
    down = ProductLaunch(**{name: value for name, value in up.options.items() if name != "SORTED"})

    def results(run: Callable, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        x = kwargs["x"].detach().clone().requires_grad_()
        y = run(**kwargs | dict(x=x))
        return y, *torch.autograd.grad(y.sum(), x)

    low, high = results(op.reference, kwargs), results(op.reference, double(kwargs))
    for kernel, launch in (("_experts_up_kernel", up), ("_experts_down_kernel", down)):
        # What is left out would be what the memory held before.
        with overriding(kernel, launch), fresh_memory_filled():
            got = results(op.fn, kwargs)
        for name, *values in zip(("y", "dx"), got, low, high, strict=True):
            assert_as_good(name, *values, 0.0)


def fused(kwargs: dict[str, Any], dim: int = 1) -> tuple[dict[str, Any], torch.Tensor]:
    """A case whose routed gate and up are the halves of one tensor: of [E, 2 N, D], as transformers stores them, or, in
    no rows of their own, of [E, N, 2 D]."""
    weights = kwargs["weights"]
    both = torch.cat((weights.gate, weights.up), dim)
    gate, up = both.chunk(2, dim)
    return kwargs | dict(weights=weights._replace(gate=gate, up=up)), both


def test_halves_of_a_fused_tensor_are_read_in_place() -> None:
    with torch.device("meta"), recording(90) as seen:
        kwargs = OPS["experts"].inputs(torch.bfloat16, T=64, D=256, N=128, E=8, K=2, M=64, gated=1)
        kwargs, both = fused(kwargs)
        kwargs["x"].requires_grad_()
        OPS["experts"].fn(**kwargs).sum().backward()
    read = dict.fromkeys(("_experts_up_kernel", "_experts_down_kernel", "_experts_bwd_hidden_kernel"), 0)
    for kernel, _, args, _ in seen:
        if kernel.__name__ in read:
            tensors = [t for t in (getattr(a, "base", a) for a in args) if isinstance(t, torch.Tensor)]
            read[kernel.__name__] += sum(t._base is both for t in tensors)
    assert list(read.values()) == [2, 2, 2]  # dx = du up + dg gate is a launch of the down kernel


@pytest.mark.kernels
@pytest.mark.sanitize
@pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dims", [dict(T=9, M=24), dict(T=60, E=2, K=1)])
def test_halves_of_a_fused_tensor_give_what_copies_of_them_give(dims: dict[str, int], dim: int) -> None:
    whole = make(
        OPS["experts"], dict(D=24, N=40, E=4, K=2, gated=1) | dims, torch.bfloat16 if SANITIZE else torch.float32
    )
    results = []
    for kwargs in (whole, fused(whole, dim)[0]):
        weights = [w.detach().requires_grad_() for w in kwargs["weights"]]
        x = kwargs["x"].clone().requires_grad_()
        y = OPS["experts"].fn(**kwargs | dict(x=x, weights=ExpertWeights(*weights)))
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *weights])))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
