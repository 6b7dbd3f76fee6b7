"""The experts' tiles: chosen by sizes alone, counted for the worst choice of experts, within a GPU's shared memory."""

import math
from dataclasses import replace

import pytest
import torch
from parity import KERNELS, SANITIZE, assert_as_good, double, make

from cards import OPS
from tt_kernels.moe.experts_launch import (
    ProductLaunch,
    Sizes,
    UpLaunch,
    down_launch,
    hidden_launch,
    most_tiles,
    up_launch,
    weights_launch,
)
from tt_kernels.reference.moe import sort_pairs
from tt_kernels.runtime.launch import ON_CPU, overriding, recording

UP = Sizes(rows=96, experts=128, N=1856, K=2688)
DOWN = replace(UP, N=2688, K=1856)
TOKENS = (1, 16, 64, 128, 512, 1024, 2048, 4096, 16384)


def stage(launch, itemsize: int = 2, two: bool = False) -> int:
    """Bytes that a pipeline stage of a product holds: a tile of rows and one or two of weights."""
    return (launch.BLOCK_T + (1 + two) * launch.BLOCK_N) * launch.BLOCK_K * itemsize


def traffic(block: int, width: int, tokens: int, N: int) -> float:
    """Elements that an expert's products read from the L2 cache, over K: its weights for each of its tiles, its rows
    for each tile of N. 6 of 128 experts a token, all alike: exact, by the binomial distribution of an expert's rows."""
    k = torch.arange(tokens + 1, dtype=torch.float64)
    log = torch.lgamma(torch.tensor(tokens + 1.0).double()) - torch.lgamma(k + 1) - torch.lgamma(tokens - k + 1)
    share = 6 / 128
    p = (log + k * math.log(share) + (tokens - k) * math.log1p(-share)).exp()
    tiles = (p * (k / block).ceil()).sum()
    return (tiles * N + tokens * share * math.ceil(N / width)).item()


@pytest.mark.parametrize("sizes", (UP, DOWN), ids=("up", "down"))
def test_no_count_of_tokens_has_tiles_that_load_much_more_than_others(sizes: Sizes) -> None:
    """A fifth at most: where the rows of many experts just exceed a tile, weights are read twice."""
    ladder = sorted({round(2 ** (i / 8)) for i in range(13 * 8 + 1)} | {383, 850})
    all_tiles = {(x.BLOCK_T, x.BLOCK_N) for t in ladder for x in [up_launch(replace(sizes, rows=6 * t))]}
    assert len(all_tiles) == 4
    for tokens in ladder:
        for launch in (up_launch, down_launch):
            x = launch(replace(sizes, rows=6 * tokens))
            least = min(traffic(*tile, tokens, sizes.N) for tile in all_tiles)
            assert traffic(x.BLOCK_T, x.BLOCK_N, tokens, sizes.N) <= 1.2 * least, (tokens, x)


def test_few_rows_take_small_tiles() -> None:
    """Where every tile loads the same, the smaller one waits for less before its first product."""
    assert up_launch(replace(UP, rows=96)).BLOCK_T == 16
    tiles = [up_launch(replace(UP, rows=6 * t)).BLOCK_T for t in range(1, 8193)]
    assert tiles == sorted(tiles)


@pytest.mark.parametrize("sizes", (UP, DOWN), ids=("up", "down"))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("architecture", (80, 90, 100))
@pytest.mark.parametrize("two", (False, True))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_fits_shared_memory(sizes: Sizes, tokens: int, architecture: int, two: bool, itemsize: int) -> None:
    sizes = replace(sizes, rows=6 * tokens, architecture=architecture, two=two, itemsize=itemsize)
    limit = (163 if architecture == 80 else 227) * 1024
    for launch in (up_launch(sizes), hidden_launch(sizes)):
        assert launch.num_stages * stage(launch, itemsize, two) <= limit


@pytest.mark.parametrize("tokens", (1, 16, 64, 128, 512, 1024))
def test_two_programs_share_a_multiprocessor_while_weights_are_streamed(tokens: int) -> None:
    launch = up_launch(replace(UP, rows=6 * tokens))
    assert launch.SWAP and launch.BLOCK_N >= 64 and launch.num_warps == 4  # weights are wgmma's M operand
    taken = launch.num_stages * stage(launch)
    assert 2 * taken <= 220 * 1024 and 2 * taken >= 64 * 1024


def test_many_rows_are_the_m_operand_of_large_tiles() -> None:
    many = replace(UP, rows=6 * 4096)
    launch = up_launch(many)
    assert not launch.SWAP and (launch.BLOCK_T, launch.BLOCK_N) == (128, 256)
    assert up_launch(replace(many, two=True)).BLOCK_N == 128  # two accumulators


def test_small_problems_take_small_tiles() -> None:
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
    """List, up, down, sum; the shared expert rides along."""
    op = OPS["experts"]
    with torch.device("meta"), recording(90) as seen:
        inputs = op.inputs(torch.float16, T=tokens, D=2688, N=1856, E=128, K=6, M=3712)
        op.fn(**inputs)
    assert len(seen) == 4
    # 96 pairs hit at most 96 experts; the shared expert is 3712 wide.
    grids = [grid for _, grid, _, _ in seen]
    if tokens == 16:
        assert grids == [(48,), (58 + 96 * 29,), (42 + 96 * 42,), (16, 3)]


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
    with overriding("_experts_up_kernel", up):
        by_up = op.fn(**kwargs)
    with overriding("_experts_down_kernel", down):
        by_down = op.fn(**kwargs)
    low, high = op.reference(**kwargs), op.reference(**double(kwargs))
    for got in (by_up, by_down):
        assert_as_good("y", got, low, high, 0.0)


def fused(dims: dict[str, int], dtype: torch.dtype, device: str) -> tuple[dict, torch.Tensor]:
    """A case with gates whose routed gate and up are the halves of one tensor, as transformers stores them."""
    kwargs = make(OPS["experts"], dims, dtype) if device != "meta" else None
    if kwargs is None:
        with torch.device("meta"):
            kwargs = OPS["experts"].inputs(dtype, **dims)
    weights = kwargs["weights"]
    both = torch.cat((weights.gate, weights.up), 1)
    gate, up = both.chunk(2, 1)
    assert not gate.is_contiguous()
    return kwargs | dict(weights=weights._replace(gate=gate, up=up)), both


def test_a_part_of_a_fused_tensor_is_read_where_it_lies() -> None:
    kwargs, both = fused(dict(T=64, D=256, N=128, E=8, K=2, M=64, gated=1), torch.bfloat16, "meta")
    kwargs["x"].requires_grad_()
    with torch.device("meta"), recording(90) as seen:
        OPS["experts"].fn(**kwargs).sum().backward()
    read = {"_experts_up_kernel": 2, "_experts_down_kernel": 0, "_experts_bwd_hidden_kernel": 2}
    for kernel, _, args, _ in seen:
        tensors = [getattr(a, "base", a) for a in args]
        mine = [t for t in tensors if isinstance(t, torch.Tensor)]
        found = sum(t.untyped_storage()._cdata == both.untyped_storage()._cdata for t in mine)
        if (name := kernel.__name__) in read and "shared" not in name:
            expected = read.pop(name)
            assert found == expected, name
    assert not read


@pytest.mark.kernels
@pytest.mark.sanitize
@pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("dims", [dict(T=9, M=24), dict(T=60, E=2, K=1)])
def test_a_part_of_a_fused_tensor_counts_as_a_copy_of_it(dims: dict[str, int]) -> None:
    dtype = torch.bfloat16 if SANITIZE else torch.float32
    kwargs, _ = fused(dict(D=24, N=40, E=4, K=2, gated=1) | dims, dtype, "")
    weights = kwargs["weights"]
    whole = kwargs | dict(weights=weights._replace(gate=weights.gate.contiguous(), up=weights.up.contiguous()))
    grads = []
    for each in (kwargs, whole):
        leaves = [each["x"].clone().requires_grad_(), *(w.detach().requires_grad_() for w in each["weights"])]
        y = OPS["experts"].fn(**each | dict(x=leaves[0], weights=type(weights)(*leaves[1:])))
        grads.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)
