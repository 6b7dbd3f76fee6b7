"""What tests of ops share: the cards' cases, inputs by name, and the bound that a kernel is held to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cards import OPS, Op
from tt_kernels.runtime.launch import INTERPRET, ON_CPU

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU and not ON_CPU else "cpu"
KERNELS = ON_CPU or GPU  # whether ops that have kernels run as such here
SANITIZE = ON_CPU and not INTERPRET  # in ttsem (tests/sanitize.py): for bf16, the other dtypes are the interpreter's
# The interpreter computes bf16 wrongly, a GPU has no fp64 kernels.
DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [torch.bfloat16] if SANITIZE else DTYPES
HALF = torch.bfloat16 if SANITIZE else torch.float16


def case_id(name: str, dims: dict[str, int]) -> str:
    return f"{name}-" + "-".join(f"{k}{v}" for k, v in dims.items())


CASES = [pytest.param(op, dims, id=case_id(name, dims)) for name, op in OPS.items() for dims in op.cases]
FIRST = [pytest.param(op, op.cases[0], id=name) for name, op in OPS.items()]
WITH_KERNELS = [p for p in CASES if p.values[0].kernels]

# 16-bit results are held to a root mean square of errors over so many elements, of several seeds where one has fewer.
# Where a kernel and PyTorch round independently, the ratio of their rms scatters by 1.5 / sqrt(elements): the squared
# error of rounding normal numbers has 4.4 times its mean squared as variance. Here that is 0.09, and the bound of 1.25
# lies 2.7 of it above 1. Of 54 elements it is 0.2, and every tenth result would fail.
POOL = 256
SEEDS = 16  # at most: results of fewer than POOL / SEEDS elements are left out, other cases of the op have more


def make(op: Op, dims: dict[str, int], dtype: torch.dtype, seed: int = 2) -> dict[str, Any]:
    """A case's arguments: made on the CPU, so that a GPU sees the same numbers."""
    torch.manual_seed(seed)
    kwargs = op.inputs(dtype, **dims)
    return with_leaves(kwargs, {name: t.to(DEVICE) for name, t in leaves(kwargs).items()})


def is_structure(value: Any) -> bool:
    return is_dataclass(value) or hasattr(value, "_fields")


def parts_of(structure: Any) -> dict[str, Any]:
    names = getattr(structure, "_fields", None) or [f.name for f in fields(structure)]
    return {name: getattr(structure, name) for name in names}


def leaves(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments; field b of argument a is "a.b"."""
    flat: dict[str, Tensor] = {}
    for name, value in kwargs.items():
        if is_structure(value):
            flat |= {f"{name}.{part}": t for part, t in leaves(parts_of(value)).items()}
        elif isinstance(value, Tensor):
            flat[name] = value
    return flat


def with_leaves(kwargs: dict[str, Any], new: dict[str, Tensor]) -> dict[str, Any]:
    kwargs = dict(kwargs)
    for name, tensor in new.items():
        argument, _, rest = name.partition(".")
        if rest:
            parts = with_leaves(parts_of(kwargs[argument]), {rest: tensor})
            kwargs[argument] = type(kwargs[argument])(**parts)
        else:
            kwargs[argument] = tensor
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


def assert_op_as_good(
    op: Op, dims: dict[str, int], dtype: torch.dtype, own: dict[str, torch.dtype] | None = None
) -> None:
    """Hold a case's values and gradients to the reference's; `own`: dtypes of arguments that differ from `dtype`."""
    own, cotangents = own or {}, HALF if own else dtype
    pools: dict[str, list[list[Tensor]]] = {}
    for seed in range(2, 2 + SEEDS):
        kwargs = make(op, dims, dtype, seed)
        kwargs = with_leaves(kwargs, {name: t.to(own[name]) for name, t in leaves(kwargs).items() if name in own})
        got = values_and_gradients(op, op.fn, kwargs, cotangents)
        low = values_and_gradients(op, op.reference, kwargs, cotangents)
        high = values_and_gradients(op, op.reference, double(kwargs), cotangents)
        assert set(got) == set(low) == set(high)
        scale = max((t.abs().max().item() for t in high.values() if t.is_floating_point() and t.numel()), default=0.0)
        for name in got:
            wide = got[name].dtype == low[name].dtype == torch.float64 != dtype
            if wide and name in ("dbranch", "drouting.topk_weights"):
                # Passed through the dtype of x on its way, as that of the residual and of what experts return.
                got[name], low[name] = got[name].to(dtype), low[name].to(dtype)
            # A gradient is a sum of terms as large as its largest factors, which may cancel: one rounding of those.
            assert_as_good(name, got[name], low[name], high[name], scale if name not in op.outputs else 0.0, op.rms)
            if is_half(got[name]) and POOL <= got[name].numel() * SEEDS < POOL * SEEDS:
                pools.setdefault(name, []).append([t.double().flatten() for t in (got[name], low[name], high[name])])
        if all(sum(len(run[0]) for run in runs) >= POOL for runs in pools.values()):
            break
    for name, runs in pools.items():
        assert_rms(name, *(torch.cat(parts) for parts in zip(*runs, strict=True)), op.rms)


@contextmanager
def fresh_memory_filled() -> Iterator[None]:
    """torch.empty and its kin return NaN, or the largest integer: inside registered ops and backward passes too, where
    no dispatch mode looks."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def is_half(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize == 2


def assert_rms(name: str, got: Tensor, low: Tensor, high: Tensor, rms: float) -> None:
    ours, theirs = ((t.double() - high.double()).square().mean().sqrt() for t in (got, low))
    assert ours <= rms * theirs + 1e-30, (
        f"{name}: rms error {ours:.3e} above {rms} * {theirs:.3e} ({got.numel()} elements)"
    )


def assert_as_good(name: str, got: Tensor, low: Tensor, high: Tensor, scale: float, rms: float = 1.25) -> None:
    """error(kernel) <= 2 * (error(PyTorch in the same dtype) + one rounding), both against fp64: no tolerance of its
    own. For 16-bit results rounding at the end is most of the error, and a rounding more shows as 1.4 times the root
    mean square: at most `rms` times PyTorch's, over POOL elements or more."""
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
    if is_half(got) and got.numel() >= POOL:
        assert_rms(name, got, low, high, rms)
