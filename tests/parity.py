"""What tests of ops share: the cards' cases, inputs by name, and the bound that a kernel is held to."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tt_kernels import OPS, ExpertWeights, Op
from tt_kernels.launch import INTERPRET

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU and not INTERPRET else "cpu"
KERNELS = INTERPRET or GPU  # whether ops that have kernels run as such here
# The interpreter computes bf16 wrongly, a GPU has no fp64 kernels.
DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]


def case_id(name: str, dims: dict[str, int]) -> str:
    return f"{name}-" + "-".join(f"{k}{v}" for k, v in dims.items())


CASES = [pytest.param(op, dims, id=case_id(name, dims)) for name, op in OPS.items() for dims in op.cases]
FIRST = [pytest.param(op, op.cases[0], id=name) for name, op in OPS.items()]
WITH_KERNELS = [p for p in CASES if p.values[0].kernels]


def make(op: Op, dims: dict[str, int], dtype: torch.dtype, seed: int = 2) -> dict[str, Any]:
    """A case's arguments: made on the CPU, so that a GPU sees the same numbers."""
    torch.manual_seed(seed)
    kwargs = op.inputs(dtype, **dims)
    return with_leaves(kwargs, {name: t.to(DEVICE) for name, t in leaves(kwargs).items()})


def leaves(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments; field b of argument a is "a.b"."""
    flat = {}
    for name, value in kwargs.items():
        if isinstance(value, ExpertWeights):
            flat |= {f"{name}.{f.name}": getattr(value, f.name) for f in fields(value)}
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def with_leaves(kwargs: dict[str, Any], new: dict[str, Tensor]) -> dict[str, Any]:
    kwargs = dict(kwargs)
    for name, tensor in new.items():
        argument, _, field = name.partition(".")
        kwargs[argument] = replace(kwargs[argument], **{field: tensor}) if field else tensor
    return kwargs


def double(kwargs: dict[str, Any]) -> dict[str, Any]:
    return with_leaves(kwargs, {k: t.double() for k, t in leaves(kwargs).items() if t.is_floating_point()})


def outputs(op: Op, result: Any) -> dict[str, Tensor]:
    result = result if isinstance(result, tuple) else (result,)
    return dict(zip(op.outputs, result, strict=True))


def differentiated(op: Op, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {k: t.detach().clone().requires_grad_() for k, t in leaves(kwargs).items() if k in op.grads}


def values_and_gradients(
    op: Op, fn: Any, kwargs: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 1
) -> dict[str, Tensor]:
    """Every output, what it made of a copy of every argument that it writes, and as d<name> the gradient of every
    differentiable argument for one random cotangent, which holds numbers of `dtype`: runs in other dtypes then start
    from the same ones."""
    written = {name: t.clone() for name, t in leaves(kwargs).items() if name in op.writes}
    kwargs = with_leaves(kwargs, written)
    free = {} if op.kernels and op.forward_only else differentiated(op, kwargs)
    result = outputs(op, fn(**with_leaves(kwargs, free)))
    found = {name: t.detach() for name, t in (result | written).items()}
    grown = [t for t in result.values() if t.requires_grad]
    if grown:
        g = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype).to(t) for t in grown]
        gradients = torch.autograd.grad(grown, list(free.values()), cotangents, allow_unused=True)
        found |= {f"d{name}": d for name, d in zip(free, gradients, strict=True) if d is not None}
    return found


def assert_as_good(name: str, got: Tensor, low: Tensor, high: Tensor, scale: float, rms: float = 1.25) -> None:
    """error(kernel) <= 2 * (error(PyTorch in the same dtype) + one rounding), both against fp64: no tolerance of its
    own. For 16-bit results rounding at the end is most of the error, and a rounding more shows as 1.4 times the root
    mean square: at most `rms` times PyTorch's."""
    assert got.shape == low.shape and got.dtype == low.dtype, name
    if not got.is_floating_point():  # ids, tokens: no decision of these inputs is within rounding of a tie
        assert torch.equal(got, high.to(got.dtype)), name
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    if not got.numel():
        return
    high = high.double()
    error, theirs = (got.double() - high).abs().max(), (low.double() - high).abs().max()
    budget = 2 * (theirs + torch.finfo(got.dtype).eps * max(high.abs().max().item(), scale))
    assert error <= budget, f"{name}: error {error:.3e} above {budget:.3e} (PyTorch in {got.dtype}: {theirs:.3e})"
    if got.dtype.itemsize == 2 and got.numel() >= 32:
        ours, theirs = ((t.double() - high).square().mean().sqrt() for t in (got, low))
        assert ours <= rms * theirs + 1e-30, f"{name}: rms error {ours:.3e} above {rms} * {theirs:.3e}"
