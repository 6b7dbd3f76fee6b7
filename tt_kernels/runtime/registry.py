"""Which implementation of an op runs, and the registration of kernels as operators of PyTorch."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from types import UnionType
from typing import Any, ParamSpec, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .checks import is_skipping, refuse
from .launch import INTERPRET, ON_CPU, _properties, is_recording

_P = ParamSpec("_P")
_R = TypeVar("_R")

NAMESPACE = "tt"  # of registered operators: torch.ops.tt.<name>
_library = torch.library.Library(NAMESPACE, "DEF")

_implementation: ContextVar[str | None] = ContextVar("implementation", default=None)

# torch.compile can trace neither a context variable nor what it depends on. Graphs are made for a number of open `use`
# blocks, which they check, and while one is traced it asks for the thread's own; blocks inside a graph set the last.
_open_blocks, _counting = 0, Lock()

_in_graph: str | None = None


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every op inside the `with` block by its reference, on whatever device, to compare: use("reference").

    For this thread, or task, only. A compiled graph is traced again for it.
    """
    if implementation != "reference":
        refuse("use", "implementation", implementation, "'reference'")
    global _open_blocks, _in_graph
    if torch.compiler.is_compiling():
        outer, _in_graph = _in_graph, implementation
        try:
            yield
        finally:
            _in_graph = outer
        return
    before = _implementation.set(implementation)
    with _counting:
        _open_blocks += 1
    try:
        yield
    finally:
        with _counting:
            _open_blocks -= 1
        _implementation.reset(before)


def _constant(ask: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which imports all of Dynamo: a graph is made with the answer of now."""
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


@_constant
def _implementation_now() -> str | None:
    return _implementation.get()


def _uses_reference() -> bool:
    if torch.compiler.is_compiling():
        return _in_graph == "reference" or (_open_blocks > 0 and _implementation_now() == "reference")
    return _implementation.get() == "reference"


# Compute capabilities, times ten, that launches are made for: they take up to 163 KiB of shared memory a program on 8.0
# and 227 on the others, where consumer GPUs of the same generations have 99.
SERVED = (80, 90, 100, 103)

_REFERENCE = 'use it in `with tt_kernels.use("reference")`'


@_constant
def _capability(device: int) -> int:
    properties = _properties(device)
    return 10 * properties.major + properties.minor


def takes_kernel(op: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether `op` runs as a kernel: where x is on a GPU, and on a CPU where kernels run there; else as its reference.

    x and others are the floats that it computes with. Raises ValueError where they are on several devices, and
    NotImplementedError for GPUs and dtypes that kernels have no form of, rather than fall back.
    """
    on_gpu = x.is_cuda
    if not (on_gpu or ON_CPU or is_recording()) or _uses_reference():
        return False
    device, refused, why = x.device, None, ""
    if on_gpu:
        if (capability := _capability(device.index)) not in SERVED:
            raise NotImplementedError(
                f"{op}: {device} has compute capability {capability / 10}, kernels are made for "
                f"{', '.join(str(served / 10) for served in SERVED)}; {_REFERENCE}"
            )
        refused, why = torch.float64, f"no fp64 kernel on a GPU; {_REFERENCE}"
    elif INTERPRET:
        refused, why = torch.bfloat16, "Triton's interpreter computes bf16 wrongly; use fp16, fp32 or fp64 there"
    for t in others:
        if t is not None and t.device != device:
            raise ValueError(f"{op}: tensors are on {device} and {t.device}, expected one device")
    if refused is not None and any(t is not None and t.dtype == refused for t in (x, *others)):
        raise NotImplementedError(f"{op}: {why}")
    return True


def unasked(reference: Callable[_P, _R]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorates an op: inside `skip_checks`, on a CPU where no kernels run, it is its reference and asks nothing. What
    an op asks takes as long as some of its arithmetic does for a token or two."""

    def decorate(op: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(op)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if (
                torch.compiler.is_compiling()
                or not is_skipping()
                or ON_CPU
                or not (args and cast(Tensor, args[0]).is_cpu)
            ):
                return op(*args, **kwargs)
            return op(*args, **kwargs) if is_recording() else reference(*args, **kwargs)

        return run

    return decorate


def as_on_a_gpu(x: Tensor) -> bool:
    """Whether an op of PyTorch's operations alone runs in its form for a GPU: there, and where kernels are tested."""
    return not _uses_reference() and (x.device.type == "cuda" or ON_CPU or is_recording())


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd is to see an op of these: its forward-only kernels leave such calls to the reference."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


def _type(hint: Any) -> str:
    """Of an argument, in the words of schemas."""
    if hint in _TYPES:
        return _TYPES[hint]
    return _type(get_args(hint)[0]) + ("?" if get_origin(hint) is UnionType else "[]")


def _schema(launcher: Callable[..., Any], writes: tuple[str, ...], rest: type[tuple[Any, ...]] | None) -> str:
    parameters, hints = [*inspect.signature(launcher).parameters.values()], get_type_hints(launcher)
    if rest is not None:
        parameters, hints = [*parameters, *inspect.signature(rest).parameters.values()], hints | get_type_hints(rest)
    arguments = []
    for p in parameters:
        if p.kind is p.POSITIONAL_OR_KEYWORD:
            kind = _type(hints[p.name])
            if p.name in writes:
                kind = kind.replace("Tensor", f"Tensor({'ab'[writes.index(p.name)]}!)")
            arguments.append(f"{kind} {p.name}" + ("" if p.default is p.empty else f"={p.default}"))
    result = hints["return"]
    results = [] if result is type(None) else [result]
    if issubclass(get_origin(result) or result, tuple):
        results = [*(get_args(result) or get_type_hints(result).values())]  # of a NamedTuple
    return f"({', '.join(arguments)}) -> ({', '.join(map(_type, results))})"


def define(
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    writes: tuple[str, ...] = (),
    rest: type[tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Register _name as <NAMESPACE>::name, with its signature and shape rule; returns what calls it.

    Args:
        launcher: annotated; what is keyword-only is not registered.
        writes: its arguments that are written.
        rest: of which NamedTuple its *arguments are the fields.
    """
    name = launcher.__name__.removeprefix("_")
    _library.define(name + _schema(launcher, writes, rest))
    _library.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        # On meta tensors the registered op runs its shape rule; whoever records wants the launches.
        return launcher(*args) if is_recording() else registered(*args)

    return call
