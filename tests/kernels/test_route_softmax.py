"""The router by a softmax: its reference against plain PyTorch, its kernels against the reference, ties and extremes,
gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DEVICE, KERNELS
from torch import Tensor

from tt_kernels import reference, route

RUNS = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
INF, NAN = float("inf"), float("nan")
# Equal ones, neighbours in fp32, those whose exponentials are 0 or would be infinite, and what fp32 holds as 0.
LOGITS = (0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, 88.0, 700.0, -700.0, 1e4, -1e4, 1e30, -1e30, 2e-39, 1e-38)


def of_logits(rows: list[list[float]], K: int, norm: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A router that has these logits exactly."""
    x = torch.tensor(rows, dtype=dtype, device=DEVICE)
    weight = torch.eye(x.shape[1], dtype=dtype, device=DEVICE)
    return dict(x=x, weight=weight, top_k=K, scores="softmax", norm_topk_prob=norm)


def plain(logits: Tensor, K: int, norm: bool) -> Tensor:
    """The weights as transformers' blocks make them."""
    values = logits.softmax(-1).topk(K).values
    return values / values.sum(-1, keepdim=True) if norm else values


@st.composite
def routers(draw: st.DrawFn) -> dict[str, Any]:
    E = draw(st.integers(1, 9))
    row = st.lists(st.sampled_from(LOGITS) | st.floats(-1e3, 1e3, width=32), min_size=E, max_size=E)
    rows = draw(st.lists(row, min_size=1, max_size=5))
    return of_logits(rows, draw(st.integers(1, E)), draw(st.booleans()))


@given(routers())
@settings(max_examples=80, deadline=None)
def test_the_reference_is_what_it_says(kwargs: dict[str, Any]) -> None:
    """The largest logits, of equal ones the first; weights of the softmax; over the chosen alone where they are
    divided by their sum."""
    logits, K, norm = kwargs["x"], kwargs["top_k"], kwargs["norm_topk_prob"]
    ids, weights, pairs, offsets = reference.route(**kwargs)
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(len(row)), key=lambda e: -row[e])[:K]
    torch.testing.assert_close(weights, plain(logits, K, norm), rtol=1e-12, atol=1e-15)
    if norm:
        torch.testing.assert_close(weights, logits.topk(K).values.softmax(-1), rtol=1e-12, atol=1e-15)
    assert torch.equal(ids.flatten()[pairs], ids.flatten().sort().values) and offsets[-1] == ids.numel()


def assert_as_reference(kwargs: dict[str, Any], **bounds: float) -> None:
    got, want = route(**kwargs), reference.route(**kwargs)
    for name, value, expected in zip(want._fields, got, want, strict=True):
        if name == "topk_weights":
            torch.testing.assert_close(value, expected, equal_nan=True, **bounds)
        else:
            assert torch.equal(value, expected), name


@RUNS
@given(routers())
@settings(max_examples=8, deadline=None)
def test_any_logits(kwargs: dict[str, Any]) -> None:
    single = {name: kwargs[name].float() for name in ("x", "weight")}
    assert_as_reference(kwargs | single, rtol=2e-6, atol=1e-7)


@RUNS
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("T", [5, 40, 520])
def test_of_equal_logits_the_lower_expert_wins(T: int, norm: bool) -> None:
    """Four experts of each kind, all experts alike, and rows of numbers that are none."""
    torch.manual_seed(3)
    weight = torch.randn(6, 8).repeat(4, 1)
    x = torch.randn(T, 8)
    x[0], x[1], x[2, 3], x[3] = 0, 1e4, NAN, INF
    kwargs = dict(x=x.to(DEVICE), weight=weight.to(DEVICE), top_k=6, scores="softmax", norm_topk_prob=norm)
    assert_as_reference(kwargs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("fn", [route, reference.route], ids=["op", "reference"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("K", [1, 3, 7])
def test_gradients_are_those_of_plain_pytorch(K: int, norm: bool, fn: Any) -> None:
    """In fp64, where there are such kernels; on a GPU in fp32, whose sums of 11 terms are off by a few roundings."""
    torch.manual_seed(3)
    wide = torch.float32 if DEVICE == "cuda" else torch.float64
    x, weight = (torch.randn(*shape, dtype=wide, device=DEVICE).requires_grad_() for shape in ((9, 11), (7, 11)))
    dweights = torch.randn(9, K, dtype=wide, device=DEVICE)
    got = fn(x, weight, top_k=K, scores="softmax", norm_topk_prob=norm, scale=1.5).topk_weights
    want = 1.5 * plain(x @ weight.T, K, norm)
    for one, other in zip(
        torch.autograd.grad(got, (x, weight), dweights), torch.autograd.grad(want, (x, weight), dweights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 if wide == torch.float64 else 1e-5)
