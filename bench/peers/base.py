"""What an adapter of a peer is: the same inputs, equal results, or a reason in one line."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace as Arguments
from typing import Any

import torch
from torch import Tensor

from cards import Op
from tt_kernels.runtime.launch import ON_CPU
from tt_kernels.testing import outputs

HOW_TO = "bench/peers/README.md"

# The rms difference that an adapter may show from our results. Peers multiply in TF32 or 16 bits where we do not, which
# is 1e-2 at most; a wrong mask, scale, decay or order of heads shows at 1e-1 and above.
TOLERANCE = 3e-2


class Unavailable(Exception):
    """Why a peer takes no part in a row: not installed, not for this device, not for this form of the op."""


Call = Callable[[], Any]  # what is timed: returns the op's results
Adapter = Callable[[Arguments], Call]


@dataclass(frozen=True)
class Peer:
    """`adapter` is given all of an op's arguments, those with a default too, as attributes of one object. It gets ready
    what a user would get ready once (masks, views, plans) and returns the call to be timed, which returns the op's
    results, or those named in `outputs`, in that order."""

    name: str
    adapter: Adapter
    outputs: tuple[str, ...] | None = None  # of the op's; None: all
    backward: bool = False  # whether autograd goes through it

    def call(self, op: Op, kwargs: Mapping[str, Any]) -> Call:
        bound = inspect.signature(op.reference).bind(**kwargs)
        bound.apply_defaults()
        return self.adapter(Arguments(**bound.arguments))

    def results(self, op: Op, result: Any) -> dict[str, Tensor]:
        """What a call returned, by the op's names."""
        return outputs(op if self.outputs is None else replace(op, outputs=self.outputs), result)


def needs(module: str, package: str | None = None) -> Any:
    """The module, imported; a package that lacks it, or cannot be loaded here, is a reason and not an error."""
    top = module.partition(".")[0]
    package = package or top.replace("_", "-")
    try:
        return importlib.import_module(module)
    except Exception as error:  # an extension built for another torch, a GPU that is not there, a moved file
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise Unavailable(f"{package} is not installed ({HOW_TO})") from error
        line = next(iter(str(error).splitlines()), "")
        raise Unavailable(f"{package}: {module} does not load here: {type(error).__name__}: {line}"[:160]) from error


def bare_package(name: str) -> None:
    """Register an installed package without running its __init__, which may want extensions that its Triton files do
    not need."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise Unavailable(f"{name.replace('_', '-')} is not installed ({HOW_TO})")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = package


def stand_in(name: str, **attributes: Any) -> None:
    """Where a module of a peer's package does not load here, one in its name with the few attributes that are used."""
    try:
        needs(name)
    except Unavailable:
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


def only(condition: bool, what: str) -> None:
    """Refuse a device, or a form of the op, that the peer does not have."""
    if not condition:
        raise Unavailable(what)


def on_gpu(t: Tensor, package: str) -> None:
    only(t.is_cuda, f"{package}: runs on an NVIDIA GPU only")


def kernels_run(t: Tensor, package: str) -> None:
    """Refuse a Triton package where neither a GPU runs its kernels nor a tool on the CPU."""
    only(t.is_cuda or ON_CPU, f"{package}: runs on an NVIDIA GPU only")


def difference(got: Tensor, want: Tensor) -> float:
    """Of floats the rms difference over the rms of `want`; of ids the share that differ; inf for other shapes."""
    if got.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return (got != want).double().mean().item()
    size = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / size if size else got.double().norm().item()


# What a row's adapters share over its sets of operands: compiled functions, masks.
_kept: dict[Any, Any] = {}


def fresh() -> None:
    """A new row: forget what the last one compiled. torch.compile keeps a few shapes of a function, then gives up."""
    if _kept:
        torch._dynamo.reset()
        _kept.clear()


def once(key: Any, make: Callable[[], Any]) -> Any:
    """Made by the first set of a row's operands, the same for the others."""
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape, whose backward may run more than once."""
    from torch._functorch import config

    config.donated_buffer = False  # else a backward gives its saved tensors away
    return once(fn, lambda: torch.compile(fn, dynamic=False, fullgraph=True))


def prepared(fn: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """A peer's PyTorch part, compiled on a GPU: it is not to lose by our glue."""
    return compiled(fn) if x.is_cuda else fn
