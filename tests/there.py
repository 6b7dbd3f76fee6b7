"""Tests that are written in fp64 on a CPU, run where kernels run and in the widest dtype that these have there."""

import functools
from collections.abc import Callable
from typing import Any

import fp64
import torch
from parity import DEVICE
from torch import Tensor

DTYPE = torch.float32 if DEVICE == "cuda" else torch.float64  # a GPU has no fp64 kernels


def there(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op where kernels run and in the widest dtype that they have there; results on the CPU, wide as the inputs."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        wide = any(t.dtype == torch.float64 for t in tensors)

        def go(t: Any) -> Any:
            return t.to(DEVICE, DTYPE if t.dtype == torch.float64 else t.dtype) if isinstance(t, Tensor) else t

        result = op(*map(go, args), **{name: go(t) for name, t in kwargs.items()})
        back = [t.cpu().double() if wide else t.cpu() for t in (result if isinstance(result, tuple) else (result,))]
        return tuple(back) if isinstance(result, tuple) else back[0]

    return call


def randn(*shape: int) -> Tensor:
    """fp64 numbers that the dtype of the kernels holds."""
    return torch.randn(*shape).to(DTYPE).double()


def close(got: Tensor, want: Tensor) -> None:
    """As in fp64; in fp32 80 eps of the largest number, for 40 terms each off by the rounding of its decay and its
    product."""
    if DEVICE == "cpu":
        return fp64.close(got, want)
    largest = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, largest))
