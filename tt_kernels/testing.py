"""What it takes to hold an op to its reference: arguments by name, values and gradients, the bound on their errors.

A card is anything with the fields of `Card`; this repository's lie in cards/. Nothing here needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# 16-bit results are held to a root mean square of errors over so many elements, of several seeds where one has fewer.
# Where a kernel and PyTorch round independently, the ratio of their rms scatters by 1.5 / sqrt(elements): the squared
# error of rounding normal numbers has 4.4 times its mean squared as variance. Here that is 0.09, and the bound of 1.25
# lies 2.7 of it above 1. Of 54 elements it is 0.2, and every tenth result would fail.
POOL = 256


class Card(Protocol):
    """One op, its reference, and how to call both."""

    @property
    def reference(self) -> Callable[..., Any]: ...
    @property
    def inputs(self) -> Callable[..., dict[str, Any]]: ...  # (dtype, **dims) -> keyword arguments, random
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def grads(self) -> tuple[str, ...]: ...  # differentiable arguments; "a.b" is field b of argument a
    @property
    def writes(self) -> tuple[str, ...]: ...  # arguments that the op changes
    @property
    def kernels(self) -> tuple[str, ...]: ...
    @property
    def forward_only(self) -> bool: ...


def make(
    op: Card, dims: Mapping[str, int], dtype: torch.dtype, seed: int = 2, *, device: str = "cpu"
) -> dict[str, Any]:
    """A case's arguments: made on the CPU, so that a GPU sees the same numbers."""
    torch.manual_seed(seed)
    kwargs = op.inputs(dtype, **dims)
    return with_leaves(kwargs, {name: t.to(device) for name, t in leaves(kwargs).items()})


def is_structure(value: Any) -> bool:
    return is_dataclass(value) or hasattr(value, "_fields")


def parts_of(structure: Any) -> dict[str, Any]:
    names = getattr(structure, "_fields", None) or [f.name for f in fields(structure)]
    return {name: getattr(structure, name) for name in names}


def leaves(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments; field b of argument a is "a.b"."""
    flat: dict[str, Tensor] = {}
    for name, value in kwargs.items():
        if is_structure(value):
            flat |= {f"{name}.{part}": t for part, t in leaves(parts_of(value)).items()}
        elif isinstance(value, Tensor):
            flat[name] = value
    return flat


def with_leaves(kwargs: Mapping[str, Any], new: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments with other tensors in the places that `leaves` names."""
    changed = dict(kwargs)
    for name, tensor in new.items():
        argument, _, rest = name.partition(".")
        if rest:
            parts = with_leaves(parts_of(changed[argument]), {rest: tensor})
            changed[argument] = type(changed[argument])(**parts)
        else:
            changed[argument] = tensor
    return changed


def widened(kwargs: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return with_leaves(kwargs, {k: t.to(dtype) for k, t in leaves(kwargs).items() if t.is_floating_point()})


def outputs(op: Card, result: Any) -> dict[str, Tensor]:
    """What the op returned, by name; without what it returned None for."""
    result = result if isinstance(result, tuple) else () if result is None else (result,)
    return {name: t for name, t in zip(op.outputs, result, strict=True) if t is not None}


def copies_of_written(op: Card, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of every argument that the op writes a copy with the same strides."""
    tensors = {name: t for name, t in leaves(kwargs).items() if name in op.writes}
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        for name, t in tensors.items()
    }


def results(op: Card, fn: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every output, and what the op made of a copy of every argument that it writes."""
    written = copies_of_written(op, kwargs)
    return outputs(op, fn(**with_leaves(kwargs, written))) | written


def differentiated(op: Card, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: t.detach().clone().requires_grad_() for k, t in leaves(kwargs).items() if k in op.grads}


def values_and_gradients(
    op: Card,
    fn: Callable[..., Any],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 1,
    grads: bool | None = None,
) -> dict[str, Tensor]:
    """Run an op once and return all that it computes.

    Args:
        kwargs: arguments by name; those that the op writes are copied first.
        dtype: of the cotangents' numbers, so that runs in other dtypes start from the same ones.
        grads: whether gradients are wanted; None: where the op's kernels have a backward.
    Returns:
        Every output, the copy of every argument that the op writes, and as d<name> the gradient of every
        differentiable argument for one random cotangent.
    """
    written = copies_of_written(op, kwargs)
    kwargs = with_leaves(kwargs, written)
    grads = not (op.kernels and op.forward_only) if grads is None else grads
    free = differentiated(op, kwargs) if grads else {}
    result = outputs(op, fn(**with_leaves(kwargs, free)))
    found = {name: t.detach() for name, t in (result | written).items()}
    grown = [t for t in result.values() if t.requires_grad]
    if grown:
        g = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype).to(t) for t in grown]
        gradients = torch.autograd.grad(grown, list(free.values()), cotangents, allow_unused=True)
        found |= {f"d{name}": d for name, d in zip(free, gradients, strict=True) if d is not None}
    return found


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
    """Hold a result to error(kernel) <= 2 * (error(PyTorch in the same dtype) + one rounding), both against fp64.

    There is no tolerance besides. For 16-bit results rounding at the end is most of the error, and a rounding more
    shows as 1.4 times the root mean square: at most `rms` times PyTorch's, over POOL elements or more.

    Args:
        low, high: the reference's result in the same dtype, and in fp64.
        scale: the largest number that the result is a sum of, where terms may cancel: one rounding is of that.
    """
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


def largest(results: Mapping[str, Tensor]) -> float:
    """The `scale` for gradients of these results: sums of terms as large as their largest factors, which may cancel."""
    return max((t.abs().max().item() for t in results.values() if t.is_floating_point() and t.numel()), default=0.0)
