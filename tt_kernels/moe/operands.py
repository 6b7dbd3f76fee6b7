"""Operands of the experts' products as their kernels take them: descriptors where TMA can load, parts read in place."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..runtime.launch import by_tma
from .lang import ABSENT, Operands


def described(tensors: Sequence[Any], block: tuple[int, int] | None, architecture: int) -> list[Any]:
    """Descriptors of tiles of this shape in place of the tensors, if TMA can load them all; block None: never."""
    if block is None or not all(by_tma(t, architecture) for t in tensors if isinstance(t, Tensor)):
        return list(tensors)
    return [TensorDescriptor.from_tensor(t, list(block)) if isinstance(t, Tensor) else t for t in tensors]


def one_by_one(
    both: Sequence[Operands | None],
    architecture: int,
    rows: tuple[int, int] | None,
    weights: tuple[int, int] | None,
    half: tuple[int, int] | None = None,
) -> list[Any]:
    """What both have, as kernels take it, and None for all of one that is not there: a and a2, w and w2 as descriptors
    of tiles of these shapes where `described` makes them; with `half` w2 is w in tiles of that shape."""
    given = [o for o in both if o is not None]
    a = iter(described([t for o in given for t in (o.a, o.a2)], rows, architecture))
    w = iter(described([t for o in given for t in (o.w, o.w2)], weights, architecture))
    if half is not None:
        shapes = [described([o.w for o in given], shape, architecture) for shape in (weights, weights and half)]
        w = (t for pair in zip(*shapes, strict=True) for t in pair)
    absent = (None,) * len(Operands._fields)
    both = [o and o._replace(a=next(a), a2=next(a), w=next(w), w2=next(w)) for o in both]
    return [part for o in both for part in o or absent]


def stacked(w: Tensor, w2: Tensor | None = None) -> tuple[int, Tensor, Tensor | None]:
    """How many rows lie between the first ones of two experts, and [E, N, D] or [N, D] as rows of a matrix.

    N rows; more where w, and w2 alike, is such a part of a wider tensor as [:, :N] of [E, 2 N, D], which is read where
    it lies. What lies otherwise is copied."""
    N, D = w.shape[-2:]
    if w.dim() == 3 and not w.is_contiguous() and (w2 is None or w2.stride() == w.stride()):
        apart, *inner = w.stride()
        if inner == [D, 1] and apart % D == 0 and apart >= N * D:
            step = apart // D
            shape = ((len(w) - 1) * step + N, D)
            return step, w.as_strided(shape, (D, 1)), None if w2 is None else w2.as_strided(shape, (D, 1))
    return N, w.contiguous().flatten(0, -2), None if w2 is None else w2.contiguous().flatten(0, -2)


def operands(a: Tensor, w: Tensor, w2: Tensor | None, a2: Tensor | None = None) -> Operands:
    step, w, w2 = stacked(w, w2)
    return Operands(a, w, ABSENT if w2 is None else w2, ABSENT if a2 is None else a2, step=step)
