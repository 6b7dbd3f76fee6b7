"""The loss of masked tokens at its corners: what is not read, nothing to read, 16 bits, autocast, ids that are none."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tt_kernels import linear_cross_entropy


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    hidden, weight = torch.randn(2, 5, 6).to(dtype).requires_grad_(), torch.randn(11, 6).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(11, (2, 5)), torch.rand(2, 5) < 0.5


def compiled(*args: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(*args)


LossOf = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("loss_of", (linear_cross_entropy, compiled), ids=("eager", "graph"))


@BOTH
def test_what_is_not_masked_is_not_read(loss_of: LossOf) -> None:
    hidden, weight, targets, mask = inputs()
    want = linear_cross_entropy(hidden, weight, targets, mask)
    grads = torch.autograd.grad(want, (hidden, weight))
    for spoiled, other in ((math.nan, -100), (math.inf, 11), (-math.inf, -(2**63)), (3e38, 2**63 - 1)):
        dirty = hidden.detach().masked_fill(~mask.unsqueeze(-1), spoiled).requires_grad_()
        loss = loss_of(dirty, weight, targets.masked_fill(~mask, other), mask)
        torch.testing.assert_close(loss, want)
        got = torch.autograd.grad(loss, (dirty, weight))
        torch.testing.assert_close(got, grads)
        assert (got[0][~mask] == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_nothing_masked_is_no_loss(loss_of: LossOf, dtype: torch.dtype) -> None:
    hidden, weight, targets, mask = inputs(dtype)
    for some, none in ((slice(None), torch.zeros_like(mask)), (slice(0), mask[:0])):
        loss = loss_of(hidden[some], weight, targets[some], none)
        assert loss == 0 and loss.dtype == torch.float32 and loss.shape == ()
        for gradient, t in zip(torch.autograd.grad(loss, (hidden, weight)), (hidden, weight), strict=True):
            assert gradient.dtype == dtype and gradient.shape == t.shape and (gradient == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_16_bits_and_autocast_compute_in_fp32(loss_of: LossOf, dtype: torch.dtype) -> None:
    hidden, weight, targets, mask = inputs(dtype)
    want = linear_cross_entropy(hidden.double(), weight.double(), targets, mask)
    grads = torch.autograd.grad(want, (hidden, weight))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(hidden, weight, targets, mask)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        if autocast and loss_of is compiled:
            continue  # PyTorch traces the backward of a graph under the autocast around it
        for got, exact in zip(torch.autograd.grad(loss, (hidden, weight)), grads, strict=True):
            torch.testing.assert_close(got, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)  # a rounding or two


def test_a_head_of_many_slices() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, 2).bfloat16(), torch.randn(40_000, 2).bfloat16()
    targets = torch.tensor([0, 16_384, 39_999])
    logits = hidden.double() @ weight.double().T
    want = torch.nn.functional.cross_entropy(logits, targets)
    for loss_of in (linear_cross_entropy, compiled):
        torch.testing.assert_close(loss_of(hidden, weight, targets).double(), want, rtol=1e-6, atol=0)


@BOTH
def test_one_token_without_dimensions_and_32_bit_targets(loss_of: LossOf) -> None:
    hidden, weight, targets, _ = inputs()
    want = -(weight @ hidden[0, 0]).log_softmax(-1)[targets[0, 0]]
    for mask in (None, torch.tensor(True)):
        for target in (targets[0, 0], targets[0, 0].int()):
            torch.testing.assert_close(loss_of(hidden[0, 0], weight, target, mask), want)
    assert loss_of(hidden[0, 0], weight, targets[0, 0], torch.tensor(False)) == 0
    one = loss_of(hidden, weight[:1], torch.zeros_like(targets))
    assert one == 0 and torch.autograd.grad(one, hidden)[0].abs().max() == 0


@pytest.mark.parametrize("wrong", (-1, 11, -100, 2**31, -(2**63)))
def test_targets_that_are_no_ids_stop_a_graph_too(wrong: int) -> None:
    hidden, weight, targets, mask = inputs()
    targets[0, 0] = wrong
    mask[0, 0] = True
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: targets has {wrong}, expected token ids below V=11$"):
        linear_cross_entropy(hidden, weight, targets, mask)
