"""Experts and the norm that follows them: bit for bit the two ops, whose gradients they are."""

import re
from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, SANITIZE, leaves, make, with_leaves
from torch import Tensor

from cards import OPS
from tools import aot
from tt_kernels import Modulated, experts, experts_norm, modulated_rms_norm
from tt_kernels.runtime.launch import INTERPRET, recording

OP = OPS["experts_norm"]
HALF = torch.bfloat16 if SANITIZE else torch.float16
KERNELS_ONLY = pytest.mark.skipif(not KERNELS, reason="kernels run with TRITON_INTERPRET=1 or a GPU")
DIMS = dict(B=2, L=3, D=40, N=16, E=4, K=2)


def two_ops(
    x: Tensor, routing: Any, weights: Any, residual: Tensor, norm_weight: Tensor, shift: Any = None, scale: Any = None,
    *, shared: Any = None, shared_weight: Any = None, activation: str = "relu2", **norm: Any,
) -> Modulated:  # fmt: skip
    moe = dict(shared=shared, shared_weight=shared_weight, activation=activation)
    branch = experts(x, routing, weights, **moe).view(residual.shape)
    return modulated_rms_norm(residual, norm_weight, shift, scale, branch=branch, **norm)


@pytest.mark.kernels
@pytest.mark.sanitize
@pytest.mark.parametrize("more", [dict(M=24), dict(gated=1, plain=1), dict(M=16, norm_first=1, L=70, weighted=1)])
@pytest.mark.parametrize(
    "wide", [(), ("residual",), ("norm_weight", "shift", "scale"), ("routing.topk_weights",), ("shared_weight",)]
)
def test_the_same_bits_as_two_ops(more: dict[str, int], wide: tuple[str, ...]) -> None:
    """Whichever of its arguments is in a wider dtype; of rows that lie apart, too."""
    summed_in_fp64 = {"routing.topk_weights", "shared_weight"} & {*wide} and not SANITIZE and DEVICE == "cpu"
    dtype, wider = (torch.float32, torch.float64) if summed_in_fp64 else (HALF, torch.float32)
    kwargs = make(OP, DIMS | more, dtype)
    kwargs = with_leaves(kwargs, {name: t.to(wider) for name, t in leaves(kwargs).items() if name in wide})
    kwargs["residual"] = torch.stack((kwargs["residual"],) * 2, -2)[..., 0, :]
    for got, want in zip(experts_norm(**kwargs), two_ops(**kwargs), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="no fp64 kernels on a GPU")
def test_gradients_are_those_of_two_ops() -> None:
    kwargs = make(OP, DIMS | dict(M=24, weighted=1), torch.float64)
    found = []
    for fn in (experts_norm, two_ops):
        free = {k: t.clone().requires_grad_() for k, t in leaves(kwargs).items() if t.is_floating_point()}
        y, residual = fn(**with_leaves(kwargs, free))
        found.append(torch.autograd.grad((y.sin() + residual.cos()).sum(), list(free.values())))
    for name, got, want in zip(free, *found, strict=True):
        assert torch.equal(got, want) and got.any(), name


@pytest.mark.skipif(INTERPRET, reason="launches are not recorded")
@pytest.mark.parametrize("wanted", [False, True])
def test_a_launch_less(wanted: bool) -> None:
    with torch.device("meta"), recording(90) as seen:
        kwargs = OP.inputs(torch.bfloat16, **DIMS)
        kwargs["residual"].requires_grad_(wanted)
        experts_norm(**kwargs)
    names = [kernel.__name__ for kernel, *_ in seen]
    sums = ["_experts_combine_kernel"] * wanted
    assert names == ["_experts_up_kernel", "_experts_down_kernel", *sums, "_modulated_rms_norm_fwd_kernel"]


@pytest.mark.kernels
@KERNELS_ONLY
def test_experts_that_are_elsewhere_are_not_read() -> None:
    """What is no number there stays there."""
    kwargs = make(OP, DIMS, torch.float32)
    ids = kwargs["routing"].topk_ids
    ids[:, 0] = torch.tensor([-1, 4, -1, 2**40, 4, -(2**40)])
    kwargs["routing"].topk_weights[:, 0] = float("nan")
    got, want = experts_norm(**kwargs), two_ops(**kwargs)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "wrong,message",
    [
        (dict(residual=torch.ones(2, 4, 29)), "experts_norm: residual is [2, 4, 29], expected T=6 tokens of D=29"),
        (dict(residual=torch.ones(6, 2, 29)), "experts_norm: shift has *=[2], but residual has *=[6]"),
        (dict(residual=None), "experts_norm: residual is None, expected a tensor"),
        (dict(norm_weight=torch.ones(28)), "experts_norm: norm_weight has D=28, but residual has D=29"),
        (dict(shift=None), "experts_norm: shift is None, expected shift and scale, or neither"),
        (dict(order="norm"), "experts_norm: order is 'norm', expected 'modulate_norm' or 'norm_modulate'"),
        (dict(activation="tanh"), "experts_norm: activation is 'tanh', expected 'relu2' or 'silu'"),
        (dict(eps=-1), "experts_norm: eps is -1, expected a number, 0 or more"),
    ],
)
def test_bad_input(wrong: dict[str, Any], message: str) -> None:
    kwargs = make(OP, OP.cases[0], torch.float32)
    with pytest.raises(ValueError) as error:
        experts_norm(**kwargs | wrong)
    assert message in str(error.value)


@pytest.mark.skipif(INTERPRET, reason="kernels that are interpreted cannot be compiled")
@pytest.mark.parametrize("wide", [(), ("residual",)])
@pytest.mark.parametrize("B", [1, 32])
def test_compiled_sums_are_those_of_the_norm_alone(B: int, wide: tuple[str, ...], monkeypatch: Any) -> None:
    """A row lies in the same way in the same number of threads, so its squares are added in the same order."""
    monkeypatch.setattr(aot.driver, "_active", aot.Target(90))
    found = []
    for fn in (experts_norm, two_ops):
        with torch.device("meta"), recording(90) as seen:
            kwargs = OP.inputs(torch.bfloat16, B=B, L=16, D=2688, N=64, E=8, K=6, M=64)
            fn(**with_leaves(kwargs, {name: kwargs[name].float() for name in wide}))
        kernel, _, args, options = seen[-1]
        ttgir = kernel.warmup(*args, grid=(1,), **options).asm["ttgir"]
        layout = re.search(r'"tt\.reduce".*?\}\) : \(tensor<\w+, (#\w+)>\)', ttgir, re.S)[1]
        found.append((kernel, options["num_warps"], re.search(rf"^{layout} = (.*)$", ttgir, re.M)[1]))
    assert found[0] == found[1]
