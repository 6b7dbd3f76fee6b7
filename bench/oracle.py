"""Whether an op's results are right at a shape of any size: against wide arithmetic, and as good as plain PyTorch's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cards import Op

from .clock import DeviceClock, HostClock

# The bound that tests hold kernels to. Not as tests.parity: a package named tests may be somebody else's.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from parity import assert_as_good, copies_of_written, leaves, outputs, with_leaves

Clock = HostClock | DeviceClock
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
ROWS = ("T", "R", "L", "N")  # the first of these that an op's dims have counts its rows
FEW = 64  # rows that an oracle is cut down to where the whole does not fit


def make(op: Op, dims: Mapping[str, int], dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Arguments drawn on the device itself: published shapes are gigabytes."""
    torch.manual_seed(seed)
    with torch.device(device):
        return op.inputs(dtype, **dims)


def run(op: Op, fn: Callable[..., Any], kwargs: dict[str, Any], grads: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output, and as d<name> the gradient of every differentiable argument for one random cotangent, which was
    rounded to `dtype`, so that all compute from the same one."""
    written = copies_of_written(op, kwargs)
    kwargs = with_leaves(kwargs, written)
    if not grads:
        with torch.no_grad():
            return outputs(op, fn(**kwargs)) | written
    free, grown, result = differentiable(op, fn, kwargs)
    found = {name: t.detach() for name, t in (result | written).items()}
    if not grown:
        return found
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g).to(dtype).to(t) for t in grown]
    gradients = torch.autograd.grad(grown, list(free.values()), cotangents, allow_unused=True)
    return found | {f"d{name}": d for name, d in zip(free, gradients, strict=True) if d is not None}


def differentiable(
    op: Op, fn: Callable[..., Any], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """The arguments with gradients, the outputs that depend on them, all outputs."""
    free = {name: t.detach().requires_grad_() for name, t in leaves(kwargs).items() if name in op.grads}
    result = outputs(op, fn(**with_leaves(kwargs, free)))
    return free, [t for t in result.values() if t.requires_grad], result


@dataclass(frozen=True)
class Judgement:
    """Errors of an op's results, of plain PyTorch's in the same dtype, and what is wrong."""

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the oracle's root mean square
    faults: dict[str, str] = field(default_factory=dict)

    def of(self, op: Op, backward: bool) -> Judgement:
        """The part of it that a pass is held to."""
        mine = lambda name: (name not in (*op.outputs, *op.writes)) == backward
        return Judgement(*({k: v for k, v in part.items() if mine(k)} for part in (self.errors, self.faults)))

    @property
    def worst(self) -> tuple[float, float]:
        """The pair with the largest error of ours."""
        return max(self.errors.values(), default=(0.0, 0.0))


class Oracle:
    """What an op should return for one set of arguments: in wide arithmetic, and by PyTorch in the same dtype."""

    def __init__(
        self, op: Op, dims: Mapping[str, int], dtype: torch.dtype, wide: torch.dtype, device: str, grads: bool
    ):
        self.op, self.dims, self.dtype, self.wide, self.grads = op, dims, dtype, wide, grads
        self.kwargs = make(op, dims, dtype, device, seed=2)
        floats = {name: t.to(wide) for name, t in leaves(self.kwargs).items() if t.is_floating_point()}
        self.low = run(op, op.reference, self.kwargs, grads, dtype)
        self.high = run(op, op.reference, with_leaves(self.kwargs, floats), grads, dtype)

    @property
    def note(self) -> str:
        cut = [f"{name}={self.dims[name]}" for name in rows_of(self.dims)]
        return " ".join([DTYPES[self.wide], *cut])

    def judge(self, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Judgement:
        """Run the op inside `around()` and hold each result to the tests' bound: no tolerance of its own."""
        with around():
            got = run(self.op, self.op.fn, self.kwargs, self.grads, self.dtype)
        judgement = Judgement()
        if got.keys() != self.high.keys():
            names = got.keys() ^ self.high.keys()
            judgement.faults.update(dict.fromkeys(names, "there on one side only"))
        largest = [t.abs().max().item() for t in self.high.values() if t.is_floating_point() and t.numel()]
        for name in got.keys() & self.high.keys():
            low, high = self.low[name], self.high[name]
            try:  # a gradient is a sum of terms that may cancel: one rounding of the largest number about
                scale = 0.0 if name in (*self.op.outputs, *self.op.writes) else max(largest, default=0.0)
                assert_as_good(name, got[name], low, high, scale, self.op.rms)
            except AssertionError as error:
                judgement.faults[name] = next(iter(str(error).splitlines()), name)
            if high.is_floating_point() and high.shape == got[name].shape == low.shape:
                judgement.errors[name] = (_error(got[name], high), _error(low, high))
        return judgement


def _error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    size = want.norm().item()
    return ((got.double() - want).norm().item() / size) if size else 0.0


def rows_of(dims: Mapping[str, int]) -> list[str]:
    return [name for name in ROWS if name in dims][:1]


def oracle(op: Op, dims: Mapping[str, int], dtype: torch.dtype, clock: Clock, grads: bool) -> tuple[Oracle, Judgement]:
    """An oracle that fits into memory, and what it says of the op: fp64, else over fewer rows, else fp32 over those."""
    few = {**dims, **{name: min(dims[name], FEW) for name in rows_of(dims)}}
    for size, wide in ((dims, torch.float64), (few, torch.float64), (few, torch.float32)):
        try:
            with clock.scope():
                found = Oracle(op, size, dtype, wide, clock.device, grads)
                return found, found.judge()
        except torch.OutOfMemoryError:
            found = None
        clock.release()  # outside of `except`, which holds on to the frames that failed
    raise MemoryError(f"{op.fn.__name__} {dict(dims)}: no oracle fits into memory")
