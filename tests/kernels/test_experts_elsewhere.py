"""Pairs whose expert is elsewhere contribute nothing; lists of pairs that are wrong are refused, or do no harm."""

from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, leaves, make, values_and_gradients
from torch import Tensor

import tt_kernels
from cards import OPS
from tt_kernels import ExpertWeights, experts
from tt_kernels.reference.moe import index_lists

pytestmark = pytest.mark.kernels
OP = OPS["experts"]
# One token, few, many (the persistent form), and rows that fit grouped_mm.
SIZES = [
    dict(T=1, D=8, N=16, E=4, K=3, M=8),
    dict(T=9, D=8, N=16, E=6, K=3, M=8, gated=1),
    dict(T=128, D=8, N=16, E=1, K=1, M=8),
    dict(T=12, D=16, N=24, E=4, K=2),
]
WIDE = torch.float32 if DEVICE == "cuda" else torch.float64


def literal(kwargs: dict[str, Any]) -> Tensor:
    """The docstring's formula, a pair at a time, over the pairs whose expert is here."""
    x, w, shared = kwargs["x"], kwargs["expert_weights"], kwargs["shared"]

    def expert(row: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return down @ (up @ row).relu().square()
        return down @ (torch.nn.functional.silu(gate @ row) * (up @ row))

    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t]) if shared is None else expert(x[t], shared.up, shared.down, shared.gate)
        for k, e in enumerate(kwargs["ids"][t].tolist()):
            if 0 <= e < len(w.up):
                y = y + kwargs["weights"][t, k] * expert(
                    x[t], w.up[e], w.down[e], None if w.gate is None else w.gate[e]
                )
        rows.append(y)
    return torch.stack(rows)


def spread(dims: dict[str, int], dtype: torch.dtype = WIDE) -> dict[str, Any]:
    """A case whose ids go from -2 to E + 1, with one token that has no expert here at all."""
    kwargs = make(OP, dims, dtype)
    E, shape = dims["E"], kwargs["ids"].shape
    ids = (torch.arange(shape.numel()).view(shape) * 7 + 2) % (E + 4) - 2
    if len(ids) > 1:
        ids[-1] = torch.tensor([-1, E, 2**40])[: shape[1]]
    return kwargs | dict(ids=ids.to(DEVICE))


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
    outside = (kwargs["ids"] < 0) | (kwargs["ids"] >= dims["E"])
    assert outside.any() and not want["dweights"][outside].any()
    if listed:
        order, ends = index_lists(kwargs["ids"], dims["E"])
        kwargs |= dict(order=order, ends=ends)
    for fn in (OP.fn, OP.reference):
        assert_same(values_and_gradients(OP, fn, kwargs), want)


@pytest.mark.parametrize("T", [1, 5, 130])
def test_no_expert_here_is_no_routed_part(T: int) -> None:
    kwargs = make(OP, dict(T=T, D=8, N=16, E=1, K=1, M=8), WIDE)
    kwargs["ids"] = kwargs["ids"] - 1
    got = values_and_gradients(OP, OP.fn, kwargs)
    assert_same(got, values_and_gradients(OP, lambda **kw: literal(kw), kwargs))
    zero = ("dweights", "dexpert_weights.up", "dexpert_weights.down")
    assert all(got[name].shape == leaves(kwargs)[name[1:]].shape and not got[name].any() for name in zero)


@pytest.mark.parametrize("dims", [dims for dims in SIZES if dims["E"] > 1], ids=str)
def test_experts_spread_over_devices_add_up(dims: dict[str, int]) -> None:
    """Halves of the experts, ids shifted to each: their sum is the whole layer, with its gradients."""
    kwargs = make(OP, dims, WIDE)
    half = dims["E"] // 2

    def parallel(**kw: Any) -> Tensor:
        y, w = 0, kw["expert_weights"]
        for first in (0, half):
            e = slice(first, first + half)
            local = ExpertWeights(w.up[e], w.down[e], None if w.gate is None else w.gate[e])
            shared = None if first else kw["shared"]
            y = y + experts(
                kw["x"], kw["ids"] - first, kw["weights"], local, shared=shared, activation=kw["activation"]
            )
        return y

    assert_same(values_and_gradients(OP, parallel, kwargs), values_and_gradients(OP, OP.fn, kwargs))


@pytest.mark.parametrize("fn", [OP.fn, OP.reference], ids=["op", "reference"])
@pytest.mark.parametrize("dims", SIZES, ids=str)
def test_what_is_no_number_elsewhere_is_not_seen(dims: dict[str, int], fn: Any) -> None:
    """Neither the weight of such a pair nor the x of a token without an expert here spoils what is here."""
    kwargs = spread(dims) | dict(shared=None)
    want = values_and_gradients(OP, fn, kwargs)
    outside = (kwargs["ids"] < 0) | (kwargs["ids"] >= dims["E"])
    bad = kwargs | dict(weights=kwargs["weights"].masked_fill(outside, float("nan")), x=kwargs["x"].clone())
    alone = outside.all(1)
    bad["x"][alone] = float("inf")
    got = values_and_gradients(OP, fn, bad)
    assert_same(got, want)
    assert not got["y"][alone].any() and not got["dx"][alone].any()


@pytest.mark.parametrize("dims", SIZES, ids=str)
def test_lists_may_be_of_either_integer(dims: dict[str, int]) -> None:
    kwargs = spread(dims)
    want = OP.fn(**kwargs)
    order, ends = index_lists(kwargs["ids"], dims["E"])
    for dtype in (torch.int32, torch.int64):
        ids = kwargs["ids"].clamp(-(2**31), 2**31 - 1).to(dtype)
        got = OP.fn(**kwargs | dict(ids=ids, order=order.to(dtype), ends=ends.to(dtype)))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ids [[0, 1], [3, 1], [0, 2], [1, 7]], 4 experts: pairs by expert 0 4 | 1 3 6 | 5 | 2 | 7 elsewhere.
IDS = [[0, 1], [3, 1], [0, 2], [1, 7]]
ORDER, ENDS = [0, 4, 1, 3, 6, 5, 2, 7], [2, 5, 6, 7]
LISTS = [
    (ORDER[:6], ENDS, r"order has 6 elements, expected T*K=8 (T=4, K=2)"),
    ([*ORDER, 0], ENDS, r"order has 9 elements, expected T*K=8 (T=4, K=2)"),
    (ORDER, ENDS[:3], "ends has E=3, but up has E=4"),
    ([8, *ORDER[1:]], ENDS, "order is 8, expected pairs 0 to T*K-1=7"),
    ([-1, *ORDER[1:]], ENDS, "order is -1, expected pairs 0 to T*K-1=7"),
    ([4, *ORDER[1:]], ENDS, "order has 4 twice, expected every pair once"),
    (ORDER, [2, 5, 4, 7], "ends[2] is 4, expected 6: so many ids are 0 to 2"),
    (ORDER, [2, 5, 6, 8], "ends[3] is 8, expected 7: so many ids are 0 to 3"),
    (ORDER, [-1, 5, 6, 7], "ends[0] is -1, expected 2: so many ids are 0 to 0"),
    ([0, 1, 4, 3, 6, 5, 2, 7], ENDS, "order has 1 before 4, expected pairs sorted by expert, those without one last"),
    ([0, 4, 1, 3, 6, 5, 7, 2], ENDS, "order has 7 before 2, expected pairs sorted by expert, those without one last"),
]


def listed(order: list[int], ends: list[int]) -> dict[str, Any]:
    kwargs = make(OP, dict(T=4, D=8, N=16, E=4, K=2, M=8), torch.float32)
    lists = dict(ids=torch.tensor(IDS), order=torch.tensor(order), ends=torch.tensor(ends, dtype=torch.int32))
    return kwargs | {name: t.to(DEVICE) for name, t in lists.items()}


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
    order, ends = index_lists(kwargs["ids"], 2)
    kwargs |= dict(order=torch.full_like(order, wild), ends=ends)
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
    kwargs["ids"] = torch.full_like(kwargs["ids"], expert)
    want = values_and_gradients(OP, OP.fn, kwargs)
    order, ends = torch.arange(2 * T, device=DEVICE), torch.tensor([first, second], device=DEVICE)
    with tt_kernels.skip_checks():
        got = values_and_gradients(OP, OP.fn, kwargs | dict(order=order, ends=ends))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
def test_lists_of_another_length_reach_no_kernel() -> None:
    kwargs = listed(ORDER[:6], ENDS)
    with tt_kernels.skip_checks(), pytest.raises(ValueError, match=r"experts: order is \[6\], expected T\*K=8 pairs"):
        OP.fn(**kwargs)
    kwargs = listed(ORDER, ENDS[:3])
    with tt_kernels.skip_checks(), pytest.raises(ValueError, match=r"experts: ends is \[3\], expected E=4 of them"):
        OP.fn(**kwargs)
