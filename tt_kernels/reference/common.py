"""What several references share: the dtype of sums, the head, packed sequences."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_P, _R = ParamSpec("_P"), TypeVar("_R")


def full_precision(reference: Callable[_P, _R]) -> Callable[_P, _R]:
    """The reference with autocast off: its docstring says in which dtypes it computes, and training is to compute what
    inference does."""

    @functools.wraps(reference)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next((t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), "meta")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return run


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: fp32, or fp64 where an input is fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes ten times as long to find that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden weight^T, not rounded to 16 bits. A 16-bit head is widened a slice at a time: it can be gigabytes."""
    acc = compute_dtype(hidden.dtype, weight.dtype)
    if weight.dtype == acc or torch.compiler.is_compiling():  # the number of slices would depend on a size
        return F.linear(hidden.to(acc), weight.to(acc))
    return torch.cat([F.linear(hidden.to(acc), part.to(acc)) for part in weight.split(16384)], -1)


def check_lengths(op: str, lengths: Tensor | None, L: int) -> None:
    """Refuse lengths of rows that are not 0 to L. Only where they lie on the CPU: a GPU is not waited for, nor a graph
    broken; kernels cut them."""
    if lengths is None or lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for length in lengths.tolist():
        if not 0 <= length <= L:
            raise ValueError(f"{op}: lengths is {length}, expected 0 to L={L}")


def sequence_index(cu_seqlens: Tensor, B: int, L: int) -> Tensor:
    """Which packed sequence each token belongs to: [B, L] int64. cu_seqlens counts over the flattened B*L tokens."""
    tokens = torch.arange(B * L, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long().contiguous(), tokens, right=True).view(B, L)
