"""Whether an op's results are right at a shape of any size: against wide arithmetic, and as good as plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cards import Op
from tt_kernels.testing import assert_as_good, largest, values_and_gradients, widened

from .clock import DeviceClock, HostClock
from .peers import difference

Clock = HostClock | DeviceClock
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
ROWS = ("T", "R", "L", "N")  # the first of these that an op's dims have counts its rows
FEW = 64  # rows that an oracle is cut down to where the whole does not fit


def make(op: Op, dims: Mapping[str, int], dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Arguments drawn on the device itself: published shapes are gigabytes."""
    torch.manual_seed(seed)
    with torch.device(device):
        return op.inputs(dtype, **dims)


@dataclass(frozen=True)
class Judgement:
    """Errors of an op's results, of plain PyTorch's in the same dtype, and what is wrong."""

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # over the oracle's root mean square
    faults: dict[str, str] = field(default_factory=dict)

    def of(self, op: Op, backward: bool) -> Judgement:
        """The part of it that a pass is held to."""
        gradients = {f"d{name}" for name in op.grads}
        mine = lambda name: (name in gradients) == backward
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
        self.op, self.dtype, self.grads = op, dtype, grads
        self.note = DTYPES[wide]  # what it is, and over how many rows if not all
        self.kwargs = make(op, dims, dtype, device, seed=2)
        self.low = self.run(op.reference, self.kwargs)
        self.high = self.run(op.reference, widened(self.kwargs, wide))

    def run(self, fn: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.grads):
            return values_and_gradients(self.op, fn, kwargs, self.dtype, grads=self.grads)

    def judge(self, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Judgement:
        """Run the op inside `around()` and hold each result to the tests' bound: no tolerance of its own."""
        with around():
            got = self.run(self.op.fn, self.kwargs)
        judgement = Judgement()
        judgement.faults.update(dict.fromkeys(got.keys() ^ self.high.keys(), "there on one side only"))
        scale = largest(self.high)
        for name in got.keys() & self.high.keys():
            low, high = self.low[name], self.high[name]
            gradient = name not in (*self.op.outputs, *self.op.writes)
            try:
                assert_as_good(name, got[name], low, high, scale if gradient else 0.0, self.op.rms)
            except AssertionError as error:
                judgement.faults[name] = next(iter(str(error).splitlines()), name)
            if high.is_floating_point() and high.shape == got[name].shape == low.shape:
                judgement.errors[name] = (difference(got[name], high), difference(low, high))
        return judgement


def oracle(op: Op, dims: Mapping[str, int], dtype: torch.dtype, clock: Clock, grads: bool) -> tuple[Oracle, Judgement]:
    """An oracle that fits into memory, and what it says of the op: fp64, else over fewer rows, else fp32 over those."""
    few = {name: min(dims[name], FEW) for name in [name for name in ROWS if name in dims][:1]}
    for fewer, wide in (({}, torch.float64), (few, torch.float64), (few, torch.float32)):
        try:
            with clock.scope():
                found = Oracle(op, {**dims, **fewer}, dtype, wide, clock.device, grads)
                found.note = " ".join([found.note, *(f"{name}={size}" for name, size in fewer.items())])
                return found, found.judge()
        except torch.OutOfMemoryError:
            found = None
        clock.release()  # outside of `except`, which holds on to the frames that failed
    raise MemoryError(f"{op.fn.__name__} {dict(dims)}: no oracle fits into memory")
