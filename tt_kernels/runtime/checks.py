"""Checks of what callers pass: shapes, dtypes, devices and options."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from ..reference.common import can_look


def refuse(op: str, name: str, value: object, expected: str) -> NoReturn:
    """Name the argument, its value and what was expected."""
    shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else " ".join(repr(value).split())
    if len(shown) > 80:  # as an array's
        shown = f"{shown[:77]}..."
    raise ValueError(f"{op}: {name} is {shown}, expected {expected}")


def is_whole(value: Any) -> bool:
    """Whether an option is a whole number of 64 bits, numpy's too; no bool, and no tensor: one would wait for it."""
    whole = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
    return whole and -(2**63) <= value < 2**63


def is_real(value: Any) -> bool:
    """Whether an option is a finite number that PyTorch can compute with: whole ones have 64 bits."""
    if isinstance(value, (int, torch.SymInt, Integral)):
        return is_whole(value)
    if not isinstance(value, (float, torch.SymFloat, Real)):
        return False
    if not isinstance(value, (float, torch.SymFloat)):  # as numpy's, which would take the bounds for their own type
        try:
            value = float(value)
        except OverflowError:
            return False
    return -sys.float_info.max <= value <= sys.float_info.max


def as_float(value: Any) -> float:
    """A number that `is_real` let pass, for PyTorch: a symbol stays one."""
    return cast(float, value) if isinstance(value, torch.SymFloat) else float(value)


def eps_of(op: str, eps: Any) -> float:
    if not (is_real(eps) and eps >= 0):
        refuse(op, "eps", eps, "a number, 0 or more")
    return as_float(eps)


_skipping: ContextVar[bool] = ContextVar("skipping", default=False)
is_skipping = _skipping.get


def looks_at(t: Tensor) -> bool:
    """Whether an op reads the values of a tensor of indices to refuse wrong ones: on a CPU, where reading them waits
    for nothing, outside of graphs and of `skip_checks`. Kernels stay within their tensors whatever the values are."""
    return can_look(t) and not _skipping.get()


@contextmanager
def skip_checks() -> Iterator[None]:
    """Leave out the comparison of shapes and dtypes inside the `with` block: for a model whose shapes are right by its
    construction and which checks what enters it. On a CPU the ops that a tower is made of then go to their references
    and compare options neither, which saves a tenth of a small model's pass over one token; a wrong shape fails inside
    PyTorch, whose message does not name the argument. Applies to this thread, or task, only."""
    if torch.compiler.is_compiling():  # graphs leave the comparison out in any case
        yield
        return
    before = _skipping.set(True)
    try:
        yield
    finally:
        _skipping.reset(before)


def trusted() -> AbstractContextManager[None]:
    """The name of `skip_checks` up to 0.1; it goes with the next release."""
    warnings.warn("trusted() is called skip_checks() now", DeprecationWarning, stacklevel=2)
    return skip_checks()


# Channels, experts, heads, taps, vocabulary, slots of a page: with none of them there is nothing to compute.
NEVER_EMPTY = frozenset(("C", "E", "H", "Hq", "Hkv", "K", "P", "V", "page_size"))

_KINDS: dict[type, Callable[[torch.dtype], bool]] = {
    float: lambda dtype: dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    int: lambda dtype: dtype in (torch.int64, torch.int32),
    bool: lambda dtype: dtype == torch.bool,
    object: lambda dtype: True,  # the op compares it
}

# Shapes and dtypes that `check` has let pass. Ops are called hundreds of times a pass, and a look-up is cheaper than
# comparing.
_passed: set[tuple[Any, ...]] = set()


def check(op: str, needed: int = 0, /, **specs: tuple[Any, ...]) -> None:
    """check("experts", x=(x, "T D"), ids=(ids, "T K", int), order=(order, "T*K", int)): bind sizes by name, complain in
    their terms.

    `*` stands for any leading dimensions, the same ones for all arguments. `T*K` is the product of sizes that other
    arguments bind, `sequences+1` binds `sequences`. A tensor is of floats unless its kind says int (32 or 64 bit) or
    bool. None passes, but for the first `needed` arguments, and then all are to be on one device. Sizes in NEVER_EMPTY
    are 1 or more. One call an op; torch.compile leaves it out of its graphs. NotImplementedError for tensors that
    torch.func.vmap batches.
    """
    if torch.compiler.is_compiling() or _skipping.get():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse_batched(op, specs)
    try:
        key = (op, *[None if (t := spec[0]) is None else (t.shape, t.dtype, t.device) for spec in specs.values()])
        if key in _passed:
            return
    except (AttributeError, TypeError):  # no tensor, which is refused below, or a size that is a symbol
        key = None
    for i, (name, (tensor, *_)) in enumerate(specs.items()):
        if not isinstance(tensor, Tensor) and (tensor is not None or i < needed):
            refuse(op, name, tensor, "a tensor")
    if needed:
        _compare_devices(op, {name: spec[0].device for name, spec in specs.items() if spec[0] is not None})
    _compare(op, {name: (t, spec, *kind) for name, (t, spec, *kind) in specs.items() if t is not None})
    if len(_passed) >= 4096:  # prompts have many lengths
        _passed.clear()
    if key is not None:
        _passed.add(key)


def _refuse_batched(op: str, specs: dict[str, tuple[Any, ...]]) -> None:
    """A kernel takes a tensor's memory as it lies: the dimension that torch.func.vmap hides would be lost."""
    for name, (tensor, *_) in specs.items():
        if isinstance(tensor, Tensor) and torch._C._functorch.is_batchedtensor(tensor):
            raise NotImplementedError(
                f"{op}: {name} is batched by torch.func.vmap; expected a plain tensor: "
                "give the batch as a dimension of the op's own, or loop over it"
            )


def _compare_devices(op: str, devices: dict[str, torch.device]) -> None:
    owner, first = next(iter(devices.items()))
    for name, device in devices.items():
        if device != first:
            raise ValueError(f"{op}: {name} is on {device}, but {owner} is on {first}")


def _compare(op: str, specs: dict[str, tuple[Any, ...]]) -> None:
    sizes: dict[str, tuple[Any, str]] = {}
    products = []
    for name, (tensor, spec, *kind) in specs.items():
        wanted = kind[0] if kind else float
        if not _KINDS[wanted](tensor.dtype):
            refuse(op, name, tensor.dtype, f"a tensor of {wanted.__name__}s")
        shape, dims = list(tensor.shape), spec.split()
        lead = len(shape) - len(dims) + 1
        if dims[0] == "*" and lead >= 0:
            shape = [shape[:lead], *shape[lead:]]
        if len(shape) != len(dims):
            refuse(op, name, list(tensor.shape), f"[{', '.join(dims)}]")
        for dim, size in zip(dims, shape, strict=True):
            if "*" in dim[1:]:
                products.append((name, dim, size))
                continue
            dim, _, more = dim.partition("+")
            if more and (size := size - int(more)) < 0:
                refuse(op, name, list(tensor.shape), f"[{', '.join(dims)}]")
            if size == 0 and dim in NEVER_EMPTY:
                raise ValueError(f"{op}: {name} has {dim}=0, expected 1 or more")
            first, owner = sizes.setdefault(dim, (size, name))
            if first != size:
                raise ValueError(f"{op}: {name} has {dim}={size}, but {owner} has {dim}={first}")
    for name, dim, size in products:
        factors = {factor: sizes[factor][0] for factor in dim.split("*")}
        if size != (expected := math.prod(factors.values())):
            known = ", ".join(f"{factor}={n}" for factor, n in factors.items())
            raise ValueError(f"{op}: {name} has {size} elements, expected {dim}={expected} ({known})")
