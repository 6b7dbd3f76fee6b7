"""What every op shares: which implementation runs, operator registration, checks of shapes and dtypes, the op card."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral, Real
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import Tensor

from .launch import INTERPRET, ON_CPU, Launch, _properties, is_recording

_library = torch.library.Library("tt", "DEF")
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
    if torch.compiler.is_compiling():
        with _used_in_graph(implementation):
            yield
        return
    global _open_blocks
    before = _implementation.set(implementation)
    with _counting:
        _open_blocks += 1
    try:
        yield
    finally:
        with _counting:
            _open_blocks -= 1
        _implementation.reset(before)


@contextmanager
def _used_in_graph(implementation: str) -> Iterator[None]:
    global _in_graph
    before, _in_graph = _in_graph, implementation
    try:
        yield
    finally:
        _in_graph = before


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
    if _uses_reference() or not (x.is_cuda or ON_CPU or is_recording()):
        return False
    device, refused, why = x.device, None, ""
    if x.is_cuda:
        if (capability := _capability(device.index)) not in SERVED:
            raise NotImplementedError(
                f"{op}: {device} has compute capability {capability / 10}, kernels are made for "
                f"{', '.join(str(served / 10) for served in SERVED)}; {_REFERENCE}"
            )
        refused, why = torch.float64, f"no fp64 kernel on a GPU; {_REFERENCE}"
    elif INTERPRET:
        refused, why = torch.bfloat16, "Triton's interpreter computes bf16 wrongly; use fp16, fp32 or fp64 there"
    for t in (x, *others):
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"{op}: tensors are on {device} and {t.device}, expected one device")
        if t.dtype == refused:
            raise NotImplementedError(f"{op}: {why}")
    return True


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd is to see an op of these: its forward-only kernels leave such calls to the reference."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def define(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register tt::<name> with one schema, one launcher and its shape rule; returns what calls it."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tt::{name}", fake, lib=_library)
    registered = getattr(torch.ops.tt, name).default

    def call(*args: Any) -> Any:
        # On meta tensors the registered op runs its shape rule; whoever records wants the launches.
        return launcher(*args) if is_recording() else registered(*args)

    return call


def refuse(op: str, name: str, value: object, expected: str) -> NoReturn:
    """Name the argument, its value and what was expected."""
    shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else " ".join(repr(value).split())
    if len(shown) > 80:  # as an array's
        shown = f"{shown[:77]}..."
    raise ValueError(f"{op}: {name} is {shown}, expected {expected}")


def is_whole(value: object) -> bool:
    """Whether an option is a whole number of 64 bits, numpy's too; no bool, and no tensor: one would wait for it."""
    whole = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
    return whole and -(2**63) <= value < 2**63


def is_real(value: Any) -> bool:
    """Whether an option is a finite number that PyTorch can compute with: whole ones have 64 bits."""
    if isinstance(value, (int, torch.SymInt, Integral)):
        return is_whole(value)
    return isinstance(value, (float, torch.SymFloat, Real)) and -math.inf < value < math.inf


_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


def looks_at(t: Tensor) -> bool:
    """Whether an op is to look at what a tensor of indices holds, to refuse what is wrong: on a CPU, where nothing is
    waited for, outside of graphs and of `trusted`. Kernels stay within their tensors whatever it is."""
    real = t.device.type == "cpu" and type(t) is Tensor  # a fake tensor has no values
    return real and not torch.compiler.is_compiling() and not _trusted.get()


@contextmanager
def trusted() -> Iterator[None]:
    """Leave out the comparison of shapes and dtypes inside the `with` block: for a model whose shapes are right by its
    construction and which checks what enters it. Saves 4 % of a small model's pass; an error then speaks of tensors.
    For this thread, or task, only."""
    if torch.compiler.is_compiling():  # where nothing is compared
        yield
        return
    before = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(before)


# Channels, experts, heads, taps, vocabulary, slots of a page: with none there is nothing to do.
NEVER_EMPTY = frozenset(("C", "E", "H", "Hq", "Hkv", "K", "P", "V", "page_size"))
_KINDS: dict[type, Callable[[torch.dtype], bool]] = {
    float: lambda dtype: dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    int: lambda dtype: dtype in (torch.int64, torch.int32),
    bool: lambda dtype: dtype == torch.bool,
}
# Shapes and dtypes that `check` has let pass. Ops are called hundreds of times a pass: a look-up takes 1 to 4 us where
# comparing takes 10.
_passed: set[tuple[Any, ...]] = set()


def check(op: str, needed: int = 0, /, **specs: tuple[Any, ...]) -> None:
    """check("experts", x=(x, "T D"), ids=(ids, "T K", int), order=(order, "T*K", int)): bind sizes by name, complain in
    their terms.

    `*` stands for any leading dimensions, the same ones for all arguments. `T*K` is the product of sizes that other
    arguments bind, `sequences+1` binds `sequences`. A tensor is of floats unless its kind says int (32 or 64 bit) or
    bool. None passes, but for the first `needed` arguments, and then all are to be on one device. Sizes in NEVER_EMPTY
    are 1 or more. One call an op; torch.compile leaves it out of its graphs.
    """
    if torch.compiler.is_compiling() or _trusted.get():
        return
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
    kernels: tuple[str, ...] = ()  # names of the Triton kernels it runs as; none: the reference on every device
    forward_only: bool = False  # its kernels have no backward: where gradients are wanted the reference runs
    grows: dict[str, int] = field(default_factory=dict)  # sizes that differ from call to call, and how far they go
    # Kernels that must compile to wgmma on sm_90, and the tile that is the products' M: wherever it is 64 or more.
    tensor_cores: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, tuple[Launch, ...]] = field(default_factory=dict)  # kernel -> launches worth measuring
    rms: float = 1.25  # bound on 16-bit results: root mean square of a kernel's error over PyTorch's; above: say why
