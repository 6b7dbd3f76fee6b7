"""What the commands share: the op at a shape, and names of ops around their work."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from bench.measure import label, sizes
from bench.ops import low_dtype
from bench.oracle import make
from cards import OPS, Op
from tt_kernels.runtime.launch import recording

RANGE = "op "  # what the name of a range in a profile begins with


def shape_of(p: argparse.ArgumentParser, name: str, wanted: dict[str, int] | None) -> dict[str, int]:
    """The card's shape that has all of the sizes wanted; the first for None. Ends the command if there is none."""
    if name not in OPS or not OPS[name].kernels:
        p.error(
            f"no op with kernels is called {name!r}; there are: {', '.join(n for n, op in OPS.items() if op.kernels)}"
        )
    found = next((dims for dims in OPS[name].shapes if (wanted or {}).items() <= dims.items()), None)
    if found is None:
        p.error(f"--shape is {label(wanted or {})}, the card of {name} has {'; '.join(map(label, OPS[name].shapes))}")
    return found


def shape_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--shape", type=sizes, metavar="T=16,..", help="one of the card's (default: its first)")


def call_of(op: Op, dims: Mapping[str, int], device: str) -> Callable[[], Any]:
    kwargs = make(op, dims, low_dtype(op) if device == "cuda" else torch.float32, device, seed=0)
    return torch.no_grad()(lambda: op.fn(**kwargs))


def launched(op: Op, dims: Mapping[str, int]) -> list[Any]:
    """The kernels that one forward call launches, in their order: its launchers run on meta tensors, nothing else."""
    with torch.device("meta"):
        kwargs = op.inputs(low_dtype(op), **dims)
    with torch.no_grad(), recording(90) as seen:
        op.fn(**kwargs)
    return [kernel for kernel, *_ in seen]


@contextmanager
def labelled() -> Iterator[None]:
    """Every op that the model calls, and every linear layer, as a named range in whatever profiles meanwhile."""
    names = {op.fn: name for name, op in OPS.items()}
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, attribute: str, label: str) -> None:
        fn = getattr(owner, attribute)

        @functools.wraps(fn)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(RANGE + label):
                return fn(*args, **kwargs)

        undo.append((owner, attribute, fn))
        setattr(owner, attribute, ranged)

    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "tt_model"]:
        for attribute, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in names:
                put(module, attribute, names[value])
    put(torch.nn.Linear, "forward", "linear")
    try:
        yield
    finally:
        for owner, attribute, fn in reversed(undo):
            setattr(owner, attribute, fn)
