"""The router's launches and tickets, and choices that its card's random inputs do not come to."""

from collections.abc import Callable

import pytest
import torch
from parity import DEVICE, KERNELS, assert_as_good, double, leaves, make, values_and_gradients, with_leaves

from cards import OPS
from tt_kernels import ExpertWeights, Routing, experts, reference, route
from tt_kernels.moe import tickets as counters
from tt_kernels.moe.route_launch import (
    FewLaunch,
    is_few,
    route_few_launch,
    route_halves_launch,
    route_scores_launch,
    tile_rows,
)
from tt_kernels.runtime.launch import ON_CPU, overriding, recording

RUNS = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
ON_A_CPU = pytest.mark.skipif(not ON_CPU, reason="looks at kernels on a CPU")


@pytest.mark.parametrize("columns", [4, 128, 512, 1024, 4096])
@pytest.mark.parametrize("K", [1, 6, 8, 16])
def test_one_launch_sorts_what_one_program_holds(K: int, columns: int) -> None:
    """16 pairs a thread at most, and where those of each tile and expert begin in half of sm_80's shared memory."""
    few = [T for T in range(1, 1025) if is_few(T, K, columns)]
    assert few == list(range(1, len(few) + 1))
    tiles = -(-len(few) // tile_rows(len(few), columns))
    assert len(few) * K <= 16 * 256 and 4 * tiles * columns <= 128 * 1024 and tiles < counters.SLOT


def test_a_batch_of_blocks_takes_one_launch() -> None:
    assert all(is_few(T, 6, 128) for T in range(1, 16 * 32 + 1))


@pytest.mark.parametrize("E,D", [(4, 29), (128, 2688), (256, 7168), (512, 2048)])
def test_few_launch_fills_a_gpu_once(E: int, D: int) -> None:
    """While D is split there are two programs a multiprocessor at most, and all have columns; with more parts there
    would be more programs than that, or they would be as long, or more than 8."""
    turns, splits = -(-D // 512), set()
    for T in range(1, 513):
        launch = route_few_launch(T, E, D, columns=E)
        splits.add(launch.SPLITS)
        programs = -(-T // launch.BLOCK_T) * -(-E // launch.BLOCK_E) * launch.SPLITS
        each = -(-turns // launch.SPLITS)
        assert launch.BLOCK_E >= 16 and (launch.SPLITS == 1 or programs <= 2 * 132)
        assert (launch.SPLITS - 1) * each < turns
        assert 2 * programs > 256 or each == -(-turns // 8)
    assert len(splits) <= 5  # each is a kernel to compile


def test_tiles_keep_their_scores_in_registers() -> None:
    assert all(tile_rows(T, E) * E <= 2048 for T in (0, 1, 3, 9, 256, 1000) for E in (4, 128, 512, 2048))
    assert tile_rows(1000, 4096) == 1


@pytest.mark.parametrize("architecture", (80, 90, 100))
def test_scores_launch_fills_a_gpu_evenly(architecture: int) -> None:
    """Who has most products has at most twice the mean, once there is a tile for everybody."""
    for T in range(1024, 16385, 64):
        launch = route_scores_launch(T, 128, 2688, architecture)
        tiles = -(-T // launch.BLOCK_T) * (128 // launch.BLOCK_E)
        assert tiles >= 128 and (tiles < 132 or -(-tiles // 132) <= 2 * tiles / 132)


@pytest.mark.parametrize("E,D", [(8, 40), (128, 2688), (256, 7168)])
def test_halves_launch_fills_a_gpu_once(E: int, D: int) -> None:
    """While D is split three programs a multiprocessor at most, and all have columns; tiles are what tensor cores take,
    and a warp has 16 rows of them."""
    turns = -(-D // 32)
    for T in range(1, 16385, 61):
        launch = route_halves_launch(T, E, D)
        programs = -(-T // launch.BLOCK_T) * -(-E // launch.BLOCK_E)
        assert launch.SPLITS == 1 or programs * launch.SPLITS <= 3 * 132
        assert (launch.SPLITS - 1) * -(-turns // launch.SPLITS) < turns
        assert min(launch.BLOCK_E, launch.BLOCK_T) >= 16 and launch.num_warps * 16 == launch.BLOCK_E


def test_a_stream_has_tickets_of_its_own() -> None:
    pool = counters._Pool(torch.device("cpu"))
    slots = [pool.on(stream) for stream in range(counters.STREAMS)]
    assert len({t.data_ptr() for t in slots}) == counters.STREAMS
    assert all(t.shape == (counters.SLOT,) and not t.any() for t in slots)
    assert pool.on(0) is slots[0] and pool.on(counters.STREAMS) is None is pool.on(counters.STREAMS)
    first = counters.STREAMS
    assert min(pool.slots[next(pool.captured)].data_ptr() for _ in range(3)) == pool.slots[first].data_ptr()
    x = torch.ones(1)
    assert counters.tickets(x) is counters.tickets(x)
    with recording(90):
        assert counters.tickets(x.to("meta")).is_meta


def inputs(T: int, D: int, E: int, K: int, **groups: int) -> dict:
    torch.manual_seed(3)
    kwargs = OPS["route"].inputs(torch.float32, T=T, D=D, E=E, K=K, **groups)
    return with_leaves(kwargs, {name: t.to(DEVICE) for name, t in leaves(kwargs).items()})


@ON_A_CPU
def test_tickets_are_zero_after_a_launch() -> None:
    route(**inputs(37, 29, 8, 3))
    assert not counters._pool(torch.device("cpu")).slots.any()


@ON_A_CPU
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("splits", [1, 3])
def test_any_few_launch_chooses_the_same(rows: int, splits: int) -> None:
    kwargs = inputs(21, 600, 20, 4)
    launch = FewLaunch(BLOCK_T=rows, BLOCK_E=16, SLICES=4, SPLITS=splits, num_warps=4, num_stages=1)
    with overriding("_route_few_kernel", launch):
        got = route(**kwargs)
    for value, want in zip(got, reference.route(**kwargs), strict=True):
        torch.testing.assert_close(value, want)


@RUNS
@pytest.mark.parametrize("T", [5, 40, 600])
def test_of_equal_scores_the_lower_expert_wins(T: int) -> None:
    """Four experts of each kind; scores of 1 up to rounding, and of nothing, are told apart by their index too."""
    kwargs = inputs(T, 8, 24, 6)
    kwargs["weight"] = kwargs["weight"][:6].repeat(4, 1)
    kwargs["bias"] = kwargs["bias"][:6].repeat(4)
    kwargs["x"][0], kwargs["x"][1], kwargs["x"][2] = 0, 1e4, -1e4
    for value, want in zip(route(**kwargs), reference.route(**kwargs), strict=True):
        torch.testing.assert_close(value, want)


@RUNS
@pytest.mark.parametrize("T", [5, 600])
def test_negative_scores_lose_to_groups_left_out(T: int) -> None:
    """Scores outside the kept groups are 0: above those that a negative bias has pushed below it."""
    kwargs = inputs(T, 8, 12, 5, groups=4, kept=2)
    kwargs["bias"] -= 1
    for value, want in zip(route(**kwargs), reference.route(**kwargs), strict=True):
        torch.testing.assert_close(value, want)


@RUNS
@pytest.mark.parametrize("T", [5, 600])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [dict(), dict(groups=4, kept=2)], ids=["flat", "groups"])
def test_what_is_no_number_still_gets_experts_of_its_own(T: int, bad: float, groups: dict) -> None:
    """Lists stay lists of every pair, so that the experts read and write where they should."""
    kwargs = inputs(T, 8, 12, 5, **groups)
    kwargs["x"][1] = bad
    kwargs["bias"][3] = -float("inf")
    ids, _, order, ends = route(**kwargs)
    assert ids.min() >= 0 and ids.max() < 12 and all(len(set(row)) == 5 for row in ids.tolist())
    assert torch.equal(order.sort().values, torch.arange(T * 5, device=DEVICE)) and ends[-1] == T * 5
    assert torch.equal(ids.flatten()[order], ids.flatten().sort(stable=True).values)


@RUNS
@pytest.mark.parametrize("T", [5, 600])
@pytest.mark.parametrize("bias", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [dict(), dict(groups=4, kept=2)], ids=["flat", "groups"])
def test_any_bias_chooses_as_the_reference(T: int, bias: float, groups: dict) -> None:
    """NaN is above all, in groups too; of a whole group, of experts of several, and with one that is switched off."""
    for some in ([3], [0, 1, 2], [1, 5, 7, 10], list(range(12))):
        kwargs = inputs(T, 8, 12, 5, **groups)
        kwargs["bias"][some] = bias
        kwargs["bias"][4] = -float("inf")
        for value, want in zip(route(**kwargs), reference.route(**kwargs), strict=True):
            torch.testing.assert_close(value, want, equal_nan=True)


@pytest.mark.parametrize("fn", [route, reference.route], ids=["op", "reference"])
@pytest.mark.parametrize("T", [1, 5, 600])
def test_an_expert_that_is_switched_off_is_chosen_last(T: int, fn: Callable) -> None:
    """By a bias of -inf: after those that count as 0, for they are in no kept group."""
    for groups in (dict(), dict(groups=4, kept=2), dict(groups=2, kept=1)):
        kwargs = inputs(T, 8, 12, 5, **groups)
        off = [0, 4, 7]
        kwargs["bias"][off] = -float("inf")
        ids = fn(**kwargs)[0]
        kept = (kwargs["bias"].isfinite()).nonzero().flatten()
        assert torch.isin(ids, kept.to(ids.device)).all() and ids.shape == (T, 5)
        # The choice as it is described, group by group.
        biased = (kwargs["x"].double() @ kwargs["weight"].double().T).sigmoid() + kwargs["bias"]
        for row, chosen in zip(biased.tolist(), ids.tolist(), strict=True):
            count = kwargs["n_group"]
            parts = [row[g * 12 // count : (g + 1) * 12 // count] for g in range(count)]
            score = [sum(sorted(part)[-2:]) for part in parts]
            best = sorted(range(count), key=lambda g: -score[g])[: kwargs["topk_group"]]
            seen = [s if e * count // 12 in best or s == -float("inf") else 0.0 for e, s in enumerate(row)]
            assert chosen == sorted(range(12), key=lambda e: -seen[e])[:5]


def test_sizes_beyond_32_bits_are_refused() -> None:
    """Lists of pairs hold 32-bit ends. Expanded tensors: nothing is allocated."""
    x, weight = torch.ones(1, 1).expand(2**30, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"^route: x is \[1073741824, 2\], expected fewer than 2\^31 pairs"):
        route(x, weight, torch.ones(4), top_k=2)
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2)
    with pytest.raises(ValueError, match=r"^experts: topk_ids is \[1073741824, 2\], expected fewer than 2\^31 pairs"):
        experts(x, Routing(ids, x), ExpertWeights(*torch.ones(2, 4, 2, 2)))


@RUNS
@pytest.mark.parametrize("needs", [("x",), ("weight",), ("x", "weight")])
def test_only_wanted_gradients_are_computed(needs: tuple[str, ...]) -> None:
    kwargs = inputs(5, 8, 6, 2)
    free = {name: kwargs[name].requires_grad_() for name in needs}
    got = torch.autograd.grad(route(**kwargs)[1].square().sum(), list(free.values()))
    want = torch.autograd.grad(reference.route(**kwargs)[1].square().sum(), list(free.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@RUNS
@pytest.mark.parametrize("seed", [5, 6])
def test_the_weights_gradient_sums_many_tokens(seed: int) -> None:
    """Within a rounding of the sum: terms of fp32, added in fp32, are off by three of them at 530 tokens."""
    op = OPS["route"]
    kwargs = make(op, dict(T=530, D=8, E=6, K=2), torch.float32, seed)
    got, low = (values_and_gradients(op, fn, kwargs)["dweight"] for fn in (op.fn, op.reference))
    high = values_and_gradients(op, op.reference, double(kwargs))["dweight"]
    assert_as_good("dweight", got, low, high, 0.0)
