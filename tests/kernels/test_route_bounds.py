"""The router's choice where sums in fp32 cannot tell who is better: planted neighbours, and the bound of the sums'
errors against the worst that tensor cores may do."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parity import DEVICE, INTERPRET, KERNELS, SANITIZE

from tt_kernels import reference, route
from tt_kernels.moe import route_launch
from tt_kernels.moe.route_launch import error_of_halves
from tt_kernels.runtime.launch import recording

Array = np.ndarray[Any, Any]
RUNS = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
# Products by parts: on the interpreter of fp32 numbers that bf16 holds.
HALVES = torch.float32 if INTERPRET else torch.bfloat16


def planted(
    seed: int, T: int, D: int, E: int, K: int, dtype: torch.dtype, size: float, groups: int, near: bool = False
) -> dict[str, Any]:
    """A router whose sums in fp64 are exact in any order, and where every other expert is the one before's neighbour.

    x are whole numbers, the same for two columns each. A weight of the first is a small number and one of up to `size`,
    which that of the second takes away: sums of products of `size` come to logits near 1. Neighbours share the small
    numbers, but for what x of the last column meets: 0, or down to 2^-38. near: both columns of a pair lie in one tile
    of 32, else half of D apart, and x of every other is 2^12 times as large, so that no tile's sum is exact."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=g).double()
    pairs = (D - 1) // 2
    x, weight = draw(-8, 9, T, D), torch.zeros(E, D, dtype=torch.float64)
    x[:, pairs : 2 * pairs] = x[:, :pairs]
    x[:, -1] = draw(1, 8, T)
    unit = size * 2**-22
    small = ((draw(-1024, 1025, E, pairs) * 2**-15 / unit).round() * unit).repeat_interleave(2, 0)[:E]
    large = draw(-(2**21), 2**21 + 1, E, pairs) * (2 * unit)
    if near:
        small[:, ::2] = 0
    weight[:, :pairs], weight[:, pairs : 2 * pairs] = small + large, -large
    if near:
        x[:, : 2 * pairs : 2] *= 2**12
        order = torch.arange(2 * pairs).view(-1, 2, 16).transpose(0, 1).flatten().argsort()
        x[:, : 2 * pairs], weight[:, : 2 * pairs] = x[:, order], weight[:, order]
    weight[:, -1] = draw(-1, 2, E) * 2.0 ** -torch.randint(20 if near else 28, 29 if near else 39, (E,), generator=g)
    bias = draw(0, 2, (E + 1) // 2).repeat_interleave(2)[:E] / 4 * (seed % 2)
    return dict(
        x=x.to(dtype).to(DEVICE), weight=weight.float().to(DEVICE), bias=bias.float().to(DEVICE), top_k=K,
        n_group=groups, topk_group=max(groups // 2, 1), scale=2.5,
    )  # fmt: skip


def of_softmax(kwargs: dict[str, Any], norm: bool) -> dict[str, Any]:
    kept = {name: kwargs[name] for name in ("x", "weight", "top_k", "scale")}
    return kept | dict(scores="softmax", norm_topk_prob=norm)


def check(kwargs: dict[str, Any], rtol: float = 2e-6) -> None:
    for name, value, want in zip(
        reference.moe.Routing._fields, route(**kwargs), reference.route(**kwargs), strict=True
    ):
        if name == "topk_weights":
            torch.testing.assert_close(value, want, rtol=rtol, atol=1e-7, equal_nan=True)
        else:
            assert torch.equal(value, want), name


@pytest.fixture
def by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_launch, "takes_halves", lambda *_: True)


def fp32_chooses_wrongly(kwargs: dict[str, Any]) -> bool:
    """Whether sums in fp32 would do: then a case tests nothing."""
    exact = kwargs["x"].double() @ kwargs["weight"].double().T
    rough = kwargs["x"].float() @ kwargs["weight"].T
    k = kwargs["top_k"]
    order = lambda logits: (
        (logits.double().sigmoid() + kwargs["bias"]).sort(dim=1, descending=True, stable=True).indices
    )
    return not torch.equal(order(exact)[:, :k], order(rough)[:, :k])


SIZES = st.sampled_from(((1, 70, 12, 3, 1), (9, 130, 24, 6, 1), (21, 70, 24, 4, 4), (5, 40, 8, 8, 1)))


@RUNS
@given(seed=st.integers(0, 2**16), sizes=SIZES, size=st.sampled_from((0.25, 4.0, 16.0)))
@settings(max_examples=12, deadline=None)
@example(seed=1, sizes=(9, 130, 24, 6, 1), size=4.0)
def test_neighbours_are_told_apart(seed: int, sizes: tuple[int, ...], size: float) -> None:
    T, D, E, K, groups = sizes
    check(planted(seed, T, D, E, K, torch.float32, size, groups))


@RUNS
@given(seed=st.integers(0, 2**16), sizes=SIZES, size=st.sampled_from((0.25, 4.0, 16.0)))
@settings(max_examples=12, deadline=None)
@example(seed=1, sizes=(9, 130, 24, 6, 1), size=4.0)
@example(seed=2, sizes=(9, 130, 12, 4, 4), size=4.0)
def test_neighbours_are_told_apart_by_halves(seed: int, sizes: tuple[int, ...], size: float) -> None:
    T, D, E, K, groups = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route_launch, "takes_halves", lambda *_: True)
        check(planted(seed, T, D, E, K, HALVES, size, groups))


@RUNS
@pytest.mark.sanitize
@pytest.mark.parametrize(
    "K,groups,size,near", [(6, 1, 16.0, False), (1, 1, 16.0, False), (5, 4, 16.0, False), (5, 1, 4.0, True)]
)
def test_neighbours_of_a_batch(by_halves: None, K: int, groups: int, size: float, near: bool) -> None:
    """bf16 as it is run, more than one tile, D in parts; the last that is chosen beside its neighbour."""
    check(planted(3, 70, 130, 24, K, torch.bfloat16 if SANITIZE else HALVES, size, groups, near))


@RUNS
@pytest.mark.sanitize
@pytest.mark.parametrize("E", [13, 16])
def test_lists_by_launches_of_their_own(by_halves: None, monkeypatch: pytest.MonkeyPatch, E: int) -> None:
    """As of more than 512 tokens, and of experts that are no power of two."""
    monkeypatch.setattr(route_launch, "is_few", lambda *_: False)
    check(planted(3, 37, 70, E, 3, torch.bfloat16 if SANITIZE else HALVES, 16.0, 1))


@RUNS
@pytest.mark.sanitize
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_neighbours_of_a_softmax(norm: bool, halves: bool) -> None:
    """Chosen by logits, which no score's rounding blurs. By halves, logits of who is no neighbour are off by fp32's
    rounding of numbers some 100 times as large."""
    dtype = torch.bfloat16 if SANITIZE else HALVES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route_launch, "takes_halves", lambda *_: halves)
        check(of_softmax(planted(3, 37, 130, 24, 6, dtype, 16.0, 1), norm), 1e-4 if halves else 2e-6)


@RUNS
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_in_two_groups(by_halves: None, seed: int) -> None:
    """Of every two neighbours one in each group: the groups' sums of two are neighbours, too. Weights of who is no
    neighbour come from logits by halves, as in `test_neighbours_of_a_softmax`."""
    kwargs = planted(seed, 9, 130, 12, 4, HALVES, 16.0, 2)
    order = torch.arange(12, device=DEVICE).view(6, 2).T.flatten()
    check(kwargs | dict(weight=kwargs["weight"][order].contiguous(), bias=kwargs["bias"][order].contiguous()), 1e-4)


def test_the_plants_are_beyond_fp32() -> None:
    for seed in range(4):
        assert fp32_chooses_wrongly(planted(seed, 21, 130, 24, 6, torch.float32, 4.0, 1))


@RUNS
@pytest.mark.parametrize("huge", [float("inf"), float("nan"), 2.0**100, 2.0**-100])
def test_rows_without_a_bound(by_halves: None, huge: float) -> None:
    """Numbers whose squares are none: every logit of theirs is computed anew, and other rows are as before."""
    kwargs = planted(5, 5, 40, 8, 3, HALVES, 4.0, 1)
    kwargs["x"][1, 3] = huge
    kwargs["x"][2] *= huge
    check(kwargs)
    check(of_softmax(kwargs, norm=False), 1e-4)  # as below: neighbours alone are computed anew


@RUNS
def test_weights_without_a_bound(by_halves: None) -> None:
    for scale in (2.0**70, 2.0**-90):
        kwargs = planted(5, 5, 40, 8, 3, HALVES, 4.0, 1)
        kwargs["weight"][2] *= scale
        check(kwargs)


# ---- the bound ----


def to_bits(x: Array, largest: Array, down: bool) -> Array:
    """x without the bits below 2^-23 of the largest's leading one: cut off, or rounded down."""
    unit = np.ldexp(1.0, np.frexp(largest)[1] - 24)
    return (np.floor if down else np.trunc)(x / unit) * unit


def tensor_core(c: Array, products: Array, down: bool) -> Array:
    """c + products [N, k], with no bit more than fp32 has."""
    terms = np.concatenate([c[:, None], products], axis=1)
    total = to_bits(terms, np.abs(terms).max(1, keepdims=True) + 1e-300, down).sum(1)  # exact
    return to_bits(total, np.abs(total) + 1e-300, down)


def leading(w: Array) -> Array:
    return (w.astype(np.float32).view(np.int32) & -0x10000).view(np.float32).astype(np.float64)


def by_parts(x: Array, w: Array, block_d: int, splits: int, step: int, down: bool) -> Array:
    """x w of [N, D] as `_route_halves_kernel` and `choose` sum it, where tensor cores take `step` products at once."""
    high = leading(w)
    middle = leading(w - high)
    parts = w - high - middle, middle, high
    turns = -(-x.shape[1] // block_d)
    depth = -(-turns // splits) * block_d
    pad = ((0, 0), (0, splits * depth - x.shape[1]))
    x, *parts = (np.pad(t, pad) for t in (x, *parts))
    whole = np.zeros(len(x), np.float32)
    for split in range(splits):
        total = np.zeros(len(x), np.float32)
        for offset in range(split * depth, (split + 1) * depth, block_d):
            acc = np.zeros(len(x))
            for part in parts:
                for k in range(offset, offset + block_d, step):
                    acc = tensor_core(acc, x[:, k : k + step] * part[:, k : k + step], down)
            total += acc.astype(np.float32)
        whole += total
    return whole.astype(np.float64)


def rows(kind: str, N: int, D: int) -> tuple[Array, Array]:
    """x of 8 bits and w of 24."""
    g = np.random.default_rng(7)
    x, w = g.standard_normal((N, D)), g.standard_normal((N, D))
    if kind == "positive":
        x, w = np.abs(x), np.abs(w)
    elif kind == "swallowed":  # every term but the first of each tile lies below the last bit
        x, w = np.full((N, D), 2.0**-12), np.full((N, D), 2.0**-12 * 1.999)
        x[:, ::32] = w[:, ::32] = 1.0
    elif kind == "cancelling":
        w[:, 1::2] = -w[:, ::2]
        x[:, 1::2] = x[:, ::2]
        w[:, -1] *= 2.0**-12
    elif kind == "wide":
        x, w = x * 2.0 ** g.integers(-20, 20, (N, D)), w * 2.0 ** g.integers(-20, 20, (N, D))
    bf16 = lambda t: torch.from_numpy(t).bfloat16().double().numpy()
    return bf16(x), w.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("kind", ["random", "positive", "swallowed", "cancelling", "wide"])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("step,down", [(8, False), (8, True), (16, False), (16, True)])
def test_sums_by_parts_are_within_the_bound(kind: str, splits: int, step: int, down: bool) -> None:
    """In units of what the choice adds up: the bound of the parts, and a rounding for each part of D."""
    N, D = 16, 700
    x, w = rows(kind, N, D)
    exact = (x.astype(np.longdouble) * w.astype(np.longdouble)).sum(1)
    error = np.abs(by_parts(x, w, 32, splits, step, down) - exact).astype(np.float64)
    A = (np.abs(x) * np.abs(w)).sum(1)
    lengths = np.sqrt((x * x).sum(1) * (w * w).sum(1))
    share = error / (error_of_halves(D, splits, 32) * lengths + (splits + 1) * 2.0**-24 * A)
    assert share.max() < 1
    if kind == "swallowed":  # a third of the bound would not hold
        assert share.max() > 1 / 3


@pytest.mark.parametrize("D", [1, 32, 2688, 7168])
def test_the_bound_grows_with_what_is_summed(D: int) -> None:
    assert error_of_halves(D, 1, 32) >= error_of_halves(D, 8, 32) > 40 * 2**-23
    assert error_of_halves(D, 8, 64) > error_of_halves(D, 8, 32)
    assert error_of_halves(D, 8, 32) < 1e-5  # or most rows would be chosen for twice


@pytest.mark.skipif(INTERPRET, reason="bf16")
def test_bf16_takes_no_product_of_fp64_but_for_few_tokens() -> None:
    for T, architecture, kernel in (
        (16, 90, "_route_few_kernel"),
        (16, 100, "_route_halves_kernel"),
        (512, 80, "_route_few_kernel"),
        (513, 80, "_route_halves_kernel"),
        (4096, 90, "_route_halves_kernel"),
        (4096, 100, "_route_halves_kernel"),
    ):
        x, weight, bias = (torch.empty(*shape, device="meta") for shape in ((T, 64), (16, 64), (16,)))
        with recording(architecture) as seen:
            route(x.bfloat16(), weight, bias, top_k=2)
        assert seen[0][0].__name__ == kernel, (T, architecture)
