"""What several references share: the dtype of sums, the head, packed sequences."""

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def full_precision(reference: Callable[_P, _R]) -> Callable[_P, _R]:
    """The reference with autocast off: its docstring says in which dtypes it computes, and training is to compute what
    inference does."""

    @functools.wraps(reference)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch._C._is_any_autocast_enabled():  # a sixth of the time that finding the device takes
            return reference(*args, **kwargs)
        device = next((t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), "meta")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return run


def without_gradients(reference: Callable[_P, _R]) -> Callable[_P, _R]:
    """The reference under torch.no_grad(), which costs more than a small step where gradients are off already."""

    @functools.wraps(reference)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_grad_enabled():
            return reference(*args, **kwargs)
        with torch.no_grad():
            return reference(*args, **kwargs)

    return run


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: fp32, or fp64 where an input is fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes ten times as long to find that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


# Numbers of a weight from which on it is worth a second thread's start: half a megabyte, 40 us of one thread.
_LARGE = 2**17


def _threads() -> int:
    return torch.get_num_threads()


# What torch.compiler.assume_constant_result does, but that it imports the compiler: a graph keeps the number that it
# was made with.
_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear. Of a single row in fp32 on a CPU, where PyTorch has one thread read the weight, in a part a thread."""
    N, K = weight.shape
    if x.numel() != K or N * K < _LARGE or weight.dtype != torch.float32 or not x.is_cpu:
        return F.linear(x, weight)
    parts = math.gcd(N, _threads())
    if parts == 1 or weight.stride(1 if weight.stride(0) >= K else 0) != 1:
        return F.linear(x, weight)
    y = torch.bmm(x.reshape(1, 1, K).expand(parts, 1, K), weight.unflatten(0, (parts, N // parts)).mT)
    return y.view(*x.shape[:-1], N)


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden weight^T, not rounded to 16 bits. A 16-bit head is widened a slice at a time: it can be gigabytes."""
    acc = compute_dtype(hidden.dtype, weight.dtype)
    if weight.dtype == acc or torch.compiler.is_compiling():  # the number of slices would depend on a size
        return product(hidden.to(acc), weight.to(acc))
    return torch.cat([F.linear(hidden.to(acc), part.to(acc)) for part in weight.split(16384)], -1)


def can_look(t: Tensor) -> bool:
    """Whether the values of t may be read on the host: a GPU is not waited for, nor a graph broken, and a fake tensor
    has none."""
    return t.is_cpu and type(t) is Tensor and not torch.compiler.is_compiling()


def check_counts(op: str, counts: Tensor | None, L: int) -> None:
    """Refuse counts of tokens that are not 0 to L, where one can look; kernels cut them."""
    if counts is None or not can_look(counts):
        return
    for count in counts.tolist():
        if not 0 <= count <= L:
            raise ValueError(f"{op}: counts is {count}, expected 0 to L={L}")


def of_rows(name: str, value: object, rows: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """A tensor as it is, a number for all rows. ValueError for what is neither, or another kind of number."""
    if isinstance(value, Tensor):
        return value
    whole, real = (Integral, torch.SymInt), (Real, torch.SymInt, torch.SymFloat)
    kinds = {torch.bool: ((bool,), "True or False"), torch.int64: (whole, "a whole number")}
    kind, expected = kinds.get(dtype, (real, "a number"))
    if not isinstance(value, kind) or (isinstance(value, bool) and dtype is not torch.bool):
        raise ValueError(f"{name} is {value!r}, expected {expected}, or a tensor of one for each row")
    return torch.full((rows,), value, dtype=dtype, device=device)  # type: ignore[arg-type]


def check_starts(op: str, cu_seqlens: Tensor | None, tokens: int) -> list[int] | None:
    """Where packed sequences begin, and where the last ends: from 0, ascending, up to `tokens`; refuses all else. None
    where one cannot look; `sequence_starts` then takes every entry for a start, wherever it lies."""
    if cu_seqlens is None or not can_look(cu_seqlens):
        return None
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] > tokens or any(a > b for a, b in pairwise(starts)):
        shown = starts if len(starts) <= 8 else f"[{', '.join(map(str, starts[:8]))}, ...]"
        raise ValueError(f"{op}: cu_seqlens is {shown}, expected 0 first, ascending, up to the {tokens} tokens")
    return starts


def sequence_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[tokens + 1] int8: 1 where a packed sequence begins. Tokens behind the last entry are one more; entries
    outside 0 to `tokens` mean nothing."""
    starts = torch.zeros(tokens + 1, dtype=torch.int8, device=cu_seqlens.device)
    return starts.index_fill_(0, cu_seqlens.long().clamp(0, tokens), 1)


def sequence_index(cu_seqlens: Tensor, B: int, L: int) -> Tensor:
    """Which packed sequence each token belongs to: [B, L] int64, counted over the flattened B*L tokens from 1."""
    return sequence_starts(cu_seqlens, B * L)[:-1].cumsum(0).view(B, L)
