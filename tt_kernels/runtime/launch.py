"""How kernels are launched, with which compile-time parameters, and how to see their launches without a GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from triton import knobs

from .structs import by_row as by_row

INTERPRET = bool(knobs.runtime.interpret)  # TRITON_INTERPRET=1: Triton's interpreter runs kernels line by line
# Whether tensors on the CPU go to kernels, to be tested: in the interpreter, or, with TT_KERNELS_ON_CPU=1, in a tool
# that takes Triton's launches over (ttsem).
ON_CPU = INTERPRET or os.environ.get("TT_KERNELS_ON_CPU") == "1"
# Kernels start while the launch before them ends, from Hopper on (`lang.programmatic_launch`); TT_KERNELS_PDL=0: never.
PROGRAMMATIC = os.environ.get("TT_KERNELS_PDL", "1") != "0"
L = TypeVar("L", bound="Launch")
TUNED = Path(__file__).parents[1] / "tuned"


class Launch:
    """Compile-time parameters of a kernel: tile sizes in capitals, warps, pipeline stages. Equal by value.

    Those that are measured (`tuned`) are a frozen dataclass of their own that derives from this one.
    """

    num_warps: int
    num_stages: int

    def __init__(self, *, num_warps: int = 4, num_stages: int = 1, **tiles: int):
        self.__dict__.update(tiles, num_warps=num_warps, num_stages=num_stages)

    @property
    def options(self) -> dict[str, int]:
        """All of them, as a launch takes them."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __getattr__(self, name: str) -> int:  # for type checkers: tiles of launches that have no class of their own
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Launch) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(sorted(vars(self).items())))

    def __repr__(self) -> str:
        return f"Launch({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


class _Recorder(NamedTuple):
    """Set by `recording` for its thread or task: what is told of launches instead of a device, and the architecture."""

    tell: Callable[..., None]
    architecture: int


_recording: ContextVar[_Recorder | None] = ContextVar("recording", default=None)


@contextmanager
def recording(architecture: int) -> Iterator[list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]]:
    """Collect (kernel, grid, arguments, options) of every launch in the `with` block; nothing runs.

    Meant for tensors on the meta device: the offline compiler sees what the launchers really pass. Other threads launch
    as before; backward passes run in this one.
    """
    launches: list[Any] = []
    before = _recording.set(_Recorder(lambda *launch: launches.append(launch), architecture))
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield launches
    finally:
        _recording.reset(before)


def is_recording() -> bool:
    # torch.compile cannot trace a context variable; nothing is recorded while it traces.
    return not torch.compiler.is_compiling() and _recording.get() is not None


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, tuple):  # an operand
            yield from _tensors(a)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, launch: Launch, **constexprs: Any) -> None:
    """Launch a kernel on the device of its first tensor. An empty grid is no launch."""
    if 0 in grid:
        return
    # Triton 3.10 flips the default of fp fusion; kernels here are meant with it.
    options = {**constexprs, **launch.options, "enable_fp_fusion": True}
    if (recorded := _recording.get()) is not None:
        recorded.tell(kernel, grid, args, options)
        return
    first = next(_tensors(args))
    device = first.device
    if PROGRAMMATIC and device.type == "cuda" and architecture(first) >= 90:
        options["launch_pdl"] = True
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def architecture(x: Tensor) -> int:
    """80, 90, 100, ...: what the launch of a kernel on x is chosen for. A CPU counts as 90."""
    if (recorded := _recording.get()) is not None:
        return recorded.architecture
    if not x.is_cuda:
        return 90
    properties = _properties(x.device.index)
    return 10 * properties.major + properties.minor


def multiplies_fp64(x: Tensor) -> bool:
    """Whether tensor cores of its device take fp64: those of A100 and of Hopper do, but for H20, which has 1 TFLOP/s;
    other Ampere, Ada and Blackwell have none or next to none."""
    if architecture(x) not in (80, 90):
        return False
    return is_recording() or not x.is_cuda or "H20" not in _properties(x.device.index).name.replace("-", " ").split()


def by_tma(t: Tensor, architecture: int) -> bool:
    """Whether TMA can load tiles of this matrix: it needs 16-byte multiples, and Hopper."""
    aligned = t.stride(0) * t.element_size() % 16 == 0 and t.stride(1) == 1 and t.data_ptr() % 16 == 0
    return architecture >= 90 and aligned and t.numel() > 0


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of the device of x: how many programs a persistent kernel takes. 132 on an H200; off a
    GPU 4, so that a persistent program has more than one tile to walk."""
    if is_recording():
        return 132
    return _properties(x.device.index).multi_processor_count if x.is_cuda else 4


@cache
def _table(architecture: int) -> dict[str, dict[str, dict[str, int]]]:
    path = TUNED / f"sm_{architecture}.json"
    return json.loads(path.read_text())["launches"] if path.exists() else {}


class _Override(NamedTuple):
    """Set by `overriding` for its thread or task: a launch in place of all others, and the keys asked for."""

    kernel: str
    launch: Launch | None
    keys: list[str]


_override: ContextVar[_Override | None] = ContextVar("override", default=None)


@contextmanager
def overriding(kernel: str, launch: Launch | None) -> Iterator[list[str]]:
    """Have `tuned` answer with this launch for one kernel in the `with` block (None: with the heuristic's, whatever the
    table says); collects the keys it is asked for. Other threads are not affected; backward passes run in this one."""
    keys: list[str] = []
    before = _override.set(_Override(kernel, launch, keys))
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield keys
    finally:
        _override.reset(before)


def tuned(kernel: str, default: L, architecture: int, **key: int | str) -> L:
    """The measured launch for this key from tuned/sm_<architecture>.json, or the heuristic's."""
    name = " ".join(f"{k}={v}" for k, v in key.items())
    if (override := _override.get()) is not None and override.kernel == kernel:
        override.keys.append(name)
        return cast(L, override.launch or default)
    row = _table(architecture).get(kernel, {}).get(name)
    return default if row is None else type(default)(**row)
