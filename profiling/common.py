"""What the commands share: arguments, errors in a line, the op at a shape, names of ops around their work."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from bench.ops import low_dtype
from bench.oracle import make
from cards import OPS, Op
from tt_kernels.runtime.launch import INTERPRET, recording

RANGE = "op "  # what the name of a range in a profile begins with


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m profiling.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


class Refused(Exception):
    """Something that cannot be done here, in a line."""


def command(name: str, run: Callable[[], int]) -> int:
    """Run a command; what it refuses is one line on stderr and exit status 2."""
    try:
        return run()
    except Refused as error:
        print(f"profiling.{name}: error: {error}", file=sys.stderr)
        return 2


def refuse(what: str) -> NoReturn:
    raise Refused(what)


def op_named(name: str) -> Op:
    if name not in OPS:
        refuse(f"no op is called {name!r}; there are: {', '.join(OPS)}")
    return OPS[name]


def shape_of(op: Op, wanted: str | None) -> dict[str, int]:
    """The card's shape that has all of "T=16,D=2688"; the first for None."""
    if wanted is None:
        return op.shapes[0]
    try:
        sizes = {k: int(v) for k, _, v in (part.partition("=") for part in wanted.split(","))}
    except ValueError:
        refuse(f"--shape is {wanted}, expected sizes by name: T=16,D=2688")
    found = next((dims for dims in op.shapes if sizes.items() <= dims.items()), None)
    if found is None:
        shapes = "; ".join(",".join(f"{k}={v}" for k, v in dims.items()) for dims in op.shapes)
        refuse(f"--shape is {wanted}, the card of {op.fn.__name__} has {shapes}")
    return found


def gpu(what: str) -> None:
    if not torch.cuda.is_available():
        refuse(f"{what} needs an NVIDIA GPU, and there is none")


def call_of(op: Op, dims: Mapping[str, int], device: str) -> Callable[[], Any]:
    kwargs = make(op, dims, low_dtype(op) if device == "cuda" else torch.float32, device, seed=0)

    def call() -> Any:
        with torch.no_grad():
            return op.fn(**kwargs)

    return call


def launched(op: Op, dims: Mapping[str, int]) -> list[Any]:
    """The kernels that one forward call launches, in their order: its launchers run on meta tensors, nothing else."""
    if INTERPRET:
        refuse("TRITON_INTERPRET is set: nothing is launched")
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
