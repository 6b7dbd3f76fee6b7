"""What every op shares: which implementation runs, checks of shapes and dtypes, the op card.

No op has a kernel yet: a public op checks its arguments and runs its reference, on every device. A kernel comes in as
one line before that last one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every op inside the `with` block by the named implementation, to compare.

    "reference" is the only one so far, and what runs outside such a block too.
    """
    if implementation != "reference":
        refuse("use", "implementation", implementation, "'reference'")
    yield


def refuse(op: str, name: str, value: object, expected: str) -> NoReturn:
    """Name the argument, its value and what was expected."""
    raise ValueError(f"{op}: {name} is {value!r}, expected {expected}")


_trusted = False


@contextmanager
def trusted() -> Iterator[None]:
    """Leave out the comparison of shapes and dtypes inside the `with` block: for a model whose shapes are right by its
    construction and which checks what enters it. Saves 4 % of a small model's pass; an error then speaks of tensors."""
    global _trusted
    before, _trusted = _trusted, True
    try:
        yield
    finally:
        _trusted = before


_KINDS: dict[type, Callable[[torch.dtype], bool]] = {
    float: lambda dtype: dtype.is_floating_point,
    int: lambda dtype: dtype in (torch.int64, torch.int32),
    bool: lambda dtype: dtype == torch.bool,
}
# Shapes and dtypes that `check` has let pass. Ops are called hundreds of times a pass: a look-up takes 1 to 4 us where
# comparing takes 10.
_passed: set[tuple[Any, ...]] = set()


def check(op: str, **specs: tuple[Any, ...]) -> None:
    """check("route", x=(x, "T D"), ids=(ids, "T K", int)): bind sizes by name, complain in their terms.

    `*` stands for any leading dimensions, the same ones for all arguments. A tensor is of floats unless its kind says
    int (32 or 64 bit) or bool. None passes. One call an op; torch.compile leaves it out of its graphs.
    """
    if _trusted or torch.compiler.is_compiling():
        return
    try:
        key = (op, *[None if spec[0] is None else (spec[0].shape, spec[0].dtype) for spec in specs.values()])
        if key in _passed:
            return
    except (AttributeError, TypeError):  # what is no tensor is refused below
        key = ()
    for name, (tensor, *_) in specs.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            refuse(op, name, tensor, "a tensor")
    _compare(op, {name: (t, spec, *kind) for name, (t, spec, *kind) in specs.items() if t is not None})
    if len(_passed) >= 4096:  # prompts have many lengths
        _passed.clear()
    _passed.add(key)


def _compare(op: str, specs: dict[str, tuple[Any, ...]]) -> None:
    sizes: dict[str, tuple[Any, str]] = {}
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
            first, owner = sizes.setdefault(dim, (size, name))
            if first != size:
                raise ValueError(f"{op}: {name} has {dim}={size}, but {owner} has {dim}={first}")


@dataclass(frozen=True)
class Op:
    """One op's card: all that tests and benchmarks need to know about it."""

    fn: Callable[..., Any]  # the public function
    reference: Callable[..., Any]  # its twin: same name, same signature
    inputs: Callable[..., dict[str, Any]]  # (dtype, **dims) -> keyword arguments, random; the caller seeds torch
    cases: tuple[dict[str, int], ...]  # small dims, ragged and empty ones too; the first serves gradcheck and compile
    shapes: tuple[dict[str, int], ...]  # the published model's own
    outputs: tuple[str, ...]
    cost: Callable[..., tuple[int, int]]  # (itemsize, **dims) -> (flops, bytes read and written)
    grads: tuple[str, ...] = ()  # differentiable arguments; "a.b" is field b of argument a
    writes: tuple[str, ...] = ()  # arguments that the op changes
    compiles: bool = True  # into one graph; False: sizes on the way depend on the tensors' values
