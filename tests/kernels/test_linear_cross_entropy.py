"""The loss of masked tokens at its corners: what is not read, nothing to read, 16 bits, autocast, ids that are none."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tt_kernels import linear_cross_entropy, use
from tt_kernels.runtime.launch import recording

module = importlib.import_module("tt_kernels.loss.linear_cross_entropy")  # the package's name is the function's


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    hidden, weight = torch.randn(2, 5, 6).to(dtype).requires_grad_(), torch.randn(11, 6).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(11, (2, 5)), torch.rand(2, 5) < 0.5


def compiled(*args: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(*args)


def in_parts(*args: Tensor) -> Tensor:
    """As on a GPU, of four ids of the vocabulary at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "as_on_a_gpu", lambda x: True)
        patch.setattr(module, "LOGITS", 0)
        patch.setattr(module, "MORE_LOGITS", 0)
        patch.setattr(module, "NARROWEST", 4)
        return linear_cross_entropy(*args)


LossOf = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("loss_of", (linear_cross_entropy, compiled, in_parts), ids=("eager", "graph", "parts"))


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
    for loss_of in (linear_cross_entropy, compiled, in_parts):
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


def backward_in_parts(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(module, "as_on_a_gpu", lambda x: True)
    monkeypatch.setattr(module, "LOGITS", most)
    monkeypatch.setattr(module, "MORE_LOGITS", 2 * most)
    monkeypatch.setattr(module, "NARROWEST", 1)


@pytest.mark.parametrize("most", (0, 1280, 10**6))
def test_parts_of_a_vocabulary_are_the_whole(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(9, 6).double().requires_grad_(), torch.randn(300, 6).double().requires_grad_()
    targets, mask = torch.randint(300, (9,)), torch.arange(9) % 3 > 0
    with use("reference"):
        want = linear_cross_entropy(hidden, weight, targets, mask)
    grads = torch.autograd.grad(3 * want, (hidden, weight))
    backward_in_parts(monkeypatch, most)
    got = linear_cross_entropy(hidden, weight, targets, mask)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)  # sums of 300 terms in another order
    for a, b in zip(torch.autograd.grad(3 * got, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_gradients_of_16_bits_are_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities of 1e-6 among one of nearly 1, whose 16-bit rounding would be larger than all of them."""
    torch.manual_seed(2)
    hidden, weight = torch.randn(64, 8).to(dtype).requires_grad_(), torch.randn(5000, 8).to(dtype).requires_grad_()
    targets = (hidden @ weight.T).argmax(-1)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    with use("reference"):
        grads = torch.autograd.grad(linear_cross_entropy(*exact, targets), exact)
    backward_in_parts(monkeypatch, 64 * 1024)
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for a, b in zip(got, grads, strict=True):
        rounded = b.to(dtype).double() - b
        error = (a.double() - b).square().mean().sqrt()
        assert error <= 1.05 * rounded.square().mean().sqrt()


def test_a_gpu_is_not_waited_for_and_its_head_not_copied() -> None:
    """On meta tensors, which hold nothing that the host could read."""
    T, D, V = 4096, 64, 131072
    with torch.device("meta"):
        hidden = torch.zeros(T, D, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
        targets, mask = torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.bool)
    with recording(90):
        loss = linear_cross_entropy(hidden, weight, targets, mask)
        dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32 and loss.shape == ()
    for gradient, t in ((dhidden, hidden), (dweight, weight)):
        assert gradient.shape == t.shape and gradient.dtype == t.dtype
    for most in (module.LOGITS, module.MORE_LOGITS):
        widths = [part.stop - part.start for part, *_ in module._Rows.of(hidden, weight, targets, mask).parts(most)]
        assert sum(widths) == V and len(set(widths)) == 1 and T * widths[0] == most


def test_the_reference_is_there_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, mask = inputs()
    monkeypatch.setattr(module, "_LinearCrossEntropy", None)
    with use("reference"):
        linear_cross_entropy(hidden, weight, targets, mask)
