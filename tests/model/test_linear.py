"""Linear layers for a token at a time: the same numbers as nn.Linear, whatever lies behind them."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_kernels.reference import common
from tt_model.modeling import linear
from tt_model.modeling.linear import LARGE, Linear, product, turned


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == want.shape
    # Sums of K products of order 1 in fp32, in any order.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * x.shape[-1])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("N", [LARGE // 256 - 1, LARGE // 256, LARGE // 128, 3 * LARGE // 256 + 1])
@pytest.mark.parametrize("lies", ["rows", "columns", "apart"])
def test_a_product_in_parts_is_the_product(threads: int, shape: tuple[int, ...], N: int, lies: str) -> None:
    g = torch.Generator().manual_seed(N)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((*shape, 256), (N, 256), (N,)))
    if lies == "columns":
        weight = turned(weight)
    if lies == "apart":
        weight = weight.repeat_interleave(2, 1)[:, ::2]
    close(product(x, weight, bias), x, weight, bias)
    close(product(x, weight), x, weight)
    close(common.product(x, weight), x, weight)


def test_parts_have_gradients(threads: int) -> None:
    x, weight = torch.randn(1, 256), torch.randn(LARGE // 256 * 2, 256)
    for function in (product, common.product):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        function(*leaves).square().sum().backward()
        wanted = [t.clone().requires_grad_() for t in (x, weight)]
        F.linear(*wanted).square().sum().backward()
        for got, want in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-2)


def test_large_is_one_number() -> None:
    assert common._LARGE == linear.LARGE


def test_what_widens_is_kept_turned_while_it_stays() -> None:
    layer, x = Linear(8, 24, bias=True), torch.randn(2, 8)
    assert layer.matrix is layer.weight, "a gradient is wanted"
    with torch.no_grad():
        kept = layer.matrix
        assert kept is not layer.weight and kept.stride() == (1, 24) and torch.equal(kept, layer.weight)
        close(layer(x), x, layer.weight, layer.bias)
        layer.weight.mul_(2)
        assert layer.matrix is kept and torch.equal(kept, layer.weight)
        layer.bfloat16()
        assert layer.matrix is layer.weight and layer(x.bfloat16()).dtype == torch.bfloat16
    assert Linear(8, 23, bias=False).turned is None
    assert [*layer.state_dict()] == ["weight", "bias"] and isinstance(layer, nn.Linear)
