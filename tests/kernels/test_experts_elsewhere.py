"""Pairs whose expert is elsewhere contribute nothing; lists of pairs that are wrong are refused, or do no harm."""

from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, leaves, make, values_and_gradients
from torch import Tensor

import tt_kernels
from cards import OPS
from tt_kernels import ExpertWeights, Routing, experts
from tt_kernels.reference.moe import sort_pairs

pytestmark = pytest.mark.kernels
OP = OPS["experts"]
# One token, few, many (rows are the products' M), and rows that fit grouped_mm.
SIZES = [
    dict(T=1, D=8, N=16, E=4, K=3, M=8),
    dict(T=9, D=8, N=16, E=6, K=3, M=8, gated=1, weighted=1),
    dict(T=128, D=8, N=16, E=1, K=1, M=8),
    dict(T=12, D=16, N=24, E=4, K=2),
]
WIDE = torch.float32 if DEVICE == "cuda" else torch.float64


def literal(kwargs: dict[str, Any]) -> Tensor:
    """The docstring's formula, a pair at a time, over the pairs whose expert is here."""
    x, routing, w, shared = kwargs["x"], kwargs["routing"], kwargs["weights"], kwargs["shared"]

    def expert(row: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return down @ (up @ row).relu().square()
        return down @ (torch.nn.functional.silu(gate @ row) * (up @ row))

    weight = torch.ones_like(x[:, 0]) if kwargs["shared_weight"] is None else kwargs["shared_weight"]
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t]) if shared is None else weight[t] * expert(x[t], *shared)
        for k, e in enumerate(routing.topk_ids[t].tolist()):
            if 0 <= e < len(w.up):
                y = y + routing.topk_weights[t, k] * expert(
                    x[t], w.up[e], w.down[e], None if w.gate is None else w.gate[e]
                )
        rows.append(y)
    return torch.stack(rows)


def spread(dims: dict[str, int], dtype: torch.dtype = WIDE) -> dict[str, Any]:
    """A case whose ids go from -2 to E + 1, with one token that has no expert here at all."""
    kwargs = make(OP, dims, dtype)
    E, shape = dims["E"], kwargs["routing"].topk_ids.shape
    ids = (torch.arange(shape.numel()).view(shape) * 7 + 2) % (E + 4) - 2
    if len(ids) > 1:
        ids[-1] = torch.tensor([-1, E, 2**40])[: shape[1]]
    return with_ids(kwargs, ids)


def with_ids(kwargs: dict[str, Any], ids: Tensor, **lists: Tensor) -> dict[str, Any]:
    lists = {name: t.to(DEVICE) for name, t in (lists | dict(topk_ids=ids)).items()}
    return kwargs | dict(routing=kwargs["routing"]._replace(**lists))


def with_lists(kwargs: dict[str, Any], E: int) -> dict[str, Any]:
    routing = kwargs["routing"]
    return kwargs | dict(routing=Routing(*routing[:2], *sort_pairs(routing.topk_ids, E)))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    tolerance = 1e-12 if DEVICE == "cpu" else 1e-5  # of numbers up to about 10: 80 and 4500 roundings
    assert set(got) >= set(want)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("listed", [False, True], ids=["ids", "lists"])
@pytest.mark.parametrize("dims", SIZES, ids=str)
def test_pairs_elsewhere_contribute_nothing(dims: dict[str, int], listed: bool) -> None:
    """To y and to all gradients, the memory behind them being what it may."""
    kwargs = spread(dims)
    want = values_and_gradients(OP, lambda **kw: literal(kw), kwargs)
    ids = kwargs["routing"].topk_ids
    outside = (ids < 0) | (ids >= dims["E"])
    assert outside.any() and not want["drouting.topk_weights"][outside].any()
    if listed:
        kwargs = with_lists(kwargs, dims["E"])
    for fn in (OP.fn, OP.reference):
        assert_same(values_and_gradients(OP, fn, kwargs), want)


@pytest.mark.parametrize("T", [1, 5, 130])
def test_no_expert_here_is_no_routed_part(T: int) -> None:
    kwargs = make(OP, dict(T=T, D=8, N=16, E=1, K=1, M=8), WIDE)
    kwargs = with_ids(kwargs, kwargs["routing"].topk_ids - 1)
    got = values_and_gradients(OP, OP.fn, kwargs)
    assert_same(got, values_and_gradients(OP, lambda **kw: literal(kw), kwargs))
    zero = ("drouting.topk_weights", "dweights.up", "dweights.down")
    assert all(got[name].shape == leaves(kwargs)[name[1:]].shape and not got[name].any() for name in zero)


@pytest.mark.parametrize("dims", [dims for dims in SIZES if dims["E"] > 1], ids=str)
def test_experts_spread_over_devices_add_up(dims: dict[str, int]) -> None:
    """Halves of the experts, ids shifted to each: their sum is the whole layer, with its gradients."""
    kwargs = make(OP, dims, WIDE)
    half = dims["E"] // 2

    def parallel(**kw: Any) -> Tensor:
        y, w, ids = 0, kw["weights"], kw["routing"].topk_ids
        for first in (0, half):
            e = slice(first, first + half)
            local = ExpertWeights(w.up[e], w.down[e], None if w.gate is None else w.gate[e])
            names = () if first else ("shared", "shared_weight")
            shared = {name: kw[name] for name in names}
            routing = kw["routing"]._replace(topk_ids=ids - first)
            y = y + experts(kw["x"], routing, local, **shared, activation=kw["activation"])
        return y

    assert_same(values_and_gradients(OP, parallel, kwargs), values_and_gradients(OP, OP.fn, kwargs))


@pytest.mark.parametrize("fn", [OP.fn, OP.reference], ids=["op", "reference"])
@pytest.mark.parametrize("dims", SIZES, ids=str)
def test_what_is_no_number_elsewhere_is_not_seen(dims: dict[str, int], fn: Any) -> None:
    """Neither the weight of such a pair nor the x of a token without an expert here spoils what is here."""
    kwargs = spread(dims) | dict(shared=None, shared_weight=None)
    want = values_and_gradients(OP, fn, kwargs)
    ids, weights, *_ = kwargs["routing"]
    outside = (ids < 0) | (ids >= dims["E"])
    bad = kwargs | dict(routing=Routing(ids, weights.masked_fill(outside, float("nan"))), x=kwargs["x"].clone())
    alone = outside.all(1)
    bad["x"][alone] = float("inf")
    got = values_and_gradients(OP, fn, bad)
    assert_same(got, want)
    assert not got["y"][alone].any() and not got["dx"][alone].any()


@pytest.mark.parametrize("dims", SIZES, ids=str)
def test_lists_may_be_of_either_integer(dims: dict[str, int]) -> None:
    kwargs = spread(dims)
    want = OP.fn(**kwargs)
    ids, weights, *_ = kwargs["routing"]
    lists = sort_pairs(ids, dims["E"])
    for dtype in (torch.int32, torch.int64):
        few = ids.clamp(-(2**31), 2**31 - 1).to(dtype)
        got = OP.fn(**kwargs | dict(routing=Routing(few, weights, *(t.to(dtype) for t in lists))))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ids [[0, 1], [3, 1], [0, 2], [1, 7]], 4 experts: pairs by expert 0 4 | 1 3 6 | 5 | 2 | 7 elsewhere.
IDS = [[0, 1], [3, 1], [0, 2], [1, 7]]
ORDER, ENDS = [0, 4, 1, 3, 6, 5, 2, 7], [2, 5, 6, 7]
LISTS = [
    (ORDER[:6], ENDS, r"sorted_pairs has 6 elements, expected T*K=8 (T=4, K=2)"),
    ([*ORDER, 0], ENDS, r"sorted_pairs has 9 elements, expected T*K=8 (T=4, K=2)"),
    (ORDER, ENDS[:3], "offsets has E=3, but up has E=4"),
    ([8, *ORDER[1:]], ENDS, "sorted_pairs is 8, expected pairs 0 to T*K-1=7"),
    ([-1, *ORDER[1:]], ENDS, "sorted_pairs is -1, expected pairs 0 to T*K-1=7"),
    ([4, *ORDER[1:]], ENDS, "sorted_pairs has 4 twice, expected every pair once"),
    (ORDER, [2, 5, 4, 7], "offsets[2] is 4, expected 6: so many ids are 0 to 2"),
    (ORDER, [2, 5, 6, 8], "offsets[3] is 8, expected 7: so many ids are 0 to 3"),
    (ORDER, [-1, 5, 6, 7], "offsets[0] is -1, expected 2: so many ids are 0 to 0"),
    (
        [0, 1, 4, 3, 6, 5, 2, 7],
        ENDS,
        "sorted_pairs has 1 before 4, expected pairs sorted by expert, those without one last",
    ),
    (
        [0, 4, 1, 3, 6, 5, 7, 2],
        ENDS,
        "sorted_pairs has 7 before 2, expected pairs sorted by expert, those without one last",
    ),
]


def listed(order: list[int], ends: list[int]) -> dict[str, Any]:
    kwargs = make(OP, dict(T=4, D=8, N=16, E=4, K=2, M=8), torch.float32)
    sorted_pairs, offsets = torch.tensor(order), torch.tensor(ends, dtype=torch.int32)
    return with_ids(kwargs, torch.tensor(IDS), sorted_pairs=sorted_pairs, offsets=offsets)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is not waited for")
@pytest.mark.parametrize("order,ends,message", LISTS, ids=range(len(LISTS)))
def test_lists_that_do_not_fit_are_refused(order: list[int], ends: list[int], message: str) -> None:
    OP.fn(**listed(ORDER, ENDS))
    with pytest.raises(ValueError) as error:
        OP.fn(**listed(order, ends))
    assert str(error.value) == f"experts: {message}"


@pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("T", [3, 128], ids=["few", "many"])
@pytest.mark.parametrize("wild", [2**31 - 1, -(2**45)])
def test_order_is_cut_to_the_pairs_that_there_are(T: int, wild: int) -> None:
    """Where nobody has looked at it kernels run through: the numbers mean nothing, and no other memory is touched."""
    kwargs = make(OP, dict(T=T, D=16, N=64, E=2, K=2), torch.float32)
    kwargs = with_lists(kwargs, 2)
    kwargs["routing"].sorted_pairs.fill_(wild)
    with tt_kernels.skip_checks():
        assert values_and_gradients(OP, OP.fn, kwargs)["y"].shape == (T, 16)


@pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
@pytest.mark.parametrize("T", [3, 128], ids=["few", "many"])
@pytest.mark.parametrize(
    "first,second,expert",
    [(2**45, -(2**45), 0), (256, 0, 0), (-1, 2**31 - 1, 1), (-1, -1, 2)],
)
def test_ends_are_cut_to_the_pairs_that_there_are(T: int, first: int, second: int, expert: int) -> None:
    """Beyond the last pair they are the last, below 0 they are 0, and they never fall: here all pairs are of one
    expert of two, or of none."""
    kwargs = make(OP, dict(T=T, D=16, N=64, E=2, K=2), torch.float32)
    kwargs = with_ids(kwargs, torch.full_like(kwargs["routing"].topk_ids, expert))
    want = values_and_gradients(OP, OP.fn, kwargs)
    wrong = dict(sorted_pairs=torch.arange(2 * T), offsets=torch.tensor([first, second]))
    with tt_kernels.skip_checks():
        got = values_and_gradients(OP, OP.fn, with_ids(kwargs, kwargs["routing"].topk_ids, **wrong))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
def test_lists_of_another_length_reach_no_kernel() -> None:
    kwargs = listed(ORDER[:6], ENDS)
    with (
        tt_kernels.skip_checks(),
        pytest.raises(ValueError, match=r"experts: sorted_pairs is \[6\], expected T\*K=8 pairs"),
    ):
        OP.fn(**kwargs)
    kwargs = listed(ORDER, ENDS[:3])
    with tt_kernels.skip_checks(), pytest.raises(ValueError, match=r"experts: offsets is \[3\], expected E=4 of them"):
        OP.fn(**kwargs)
