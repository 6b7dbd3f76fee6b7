"""`python -m tools.aot`: compile every kernel for every target without a GPU, and hold what comes out to a lock.

Every op with kernels runs on meta tensors, forward and backward, and what its launchers would launch is compiled for
sm_80, sm_90 and sm_100 instead: in bf16 at its card's shapes, and once for every other launch that a size which changes
from call to call can get (`Op.grows`); in fp16 and fp32 at the card's first and its largest shape for sm_90. The lock
(aot.lock.json, a part for each Triton version) keeps of every kernel its registers, stack, shared memory, widest load
from global memory, tensor-core instructions and hazards (hazards.py). The run fails on spills (in bf16; elsewhere on
more than the lock says), on more shared memory than the target has, on a kernel that stores nothing, on a narrower
load, a lost tensor-core instruction or TMA load, a hazard that is not in the lock, and on 10 % more registers than it
says; `--update` writes the lock anew.

A row also keeps fingerprints of what the compiler was given. What comes out follows from that, so where a kernel's
fingerprint is in the lock it is not compiled again; `--all` compiles it all the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cards import OPS, Op
from tt_kernels.runtime.launch import INTERPRET, recording

from . import hazards
from .meta import without_python

LOCK = Path(os.environ.get("TT_AOT_LOCK", Path(__file__).parent / "aot.lock.json"))
TARGETS = (80, 90, 100)
SHARED = {80: 163, 90: 227, 100: 227}  # KiB a program may have
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR = re.compile(r"\b(DMMA|HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA)\b")  # HGMMA is wgmma, UTC*MMA tcgen05
GLOBAL_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E((?:\.\w+)*)")
STORE = re.compile(r"\b(?:STG|ATOMG?|RED|UTMASTG|UBLKRED)\b")
MODEL, OTHERS = torch.bfloat16, (torch.float16, torch.float32)
COLUMNS = ("registers", "stack", "shared", "load", "tensor", "tma")


class Target:
    """Stands in for Triton's driver: names a GPU that is not there, so that its own code compiles what it would run."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # a key of kernel caches: one device for each target

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel as it came out for one target."""

    kernel: str
    architecture: int
    launch: str  # its options, and what the compiler was told of its arguments
    registers: int
    stack: int  # bytes a thread: above 0 is a spill
    shared: int  # bytes a program
    load: int  # bits, the widest from global memory into registers or shared memory
    tensor: str
    tma: bool
    stores: bool = field(default=True, compare=False)  # anything at all to memory
    dtype: torch.dtype = field(default=MODEL, compare=False)  # what its op was called with
    tiles: dict[str, int] = field(default_factory=dict, compare=False)
    hazards: tuple[str, ...] = ()  # what tools/hazards.py finds
    sources: str = field(default="", compare=False)  # fingerprints of what the compiler was given for this row

    @property
    def key(self) -> str:
        return f"{self.kernel} sm_{self.architecture} {self.launch}"

    @property
    def row(self) -> dict[str, Any]:
        row = {column: getattr(self, column) for column in (*COLUMNS, "sources")}
        return row | (dict(hazards=list(self.hazards)) if self.hazards else {})


def on_meta(value: Any, grads: Sequence[str], name: str) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().to("meta")
        return value.requires_grad_() if name in grads else value
    if is_dataclass(value) or hasattr(value, "_fields"):
        names = getattr(value, "_fields", None) or [f.name for f in fields(value)]
        return type(value)(**{part: on_meta(getattr(value, part), grads, f"{name}.{part}") for part in names})
    return value


Seen = tuple[Any, tuple[Any, ...], dict[str, Any], tuple[int, ...]]  # kernel, arguments, options, grid


@lru_cache(maxsize=2048)
def _inputs(make: Callable[..., dict], dtype: torch.dtype, dims: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """An op's inputs at a shape, on meta, made once for all targets."""
    with torch.device("meta"):
        return make(dtype, **dict(dims))


def launches(op: Op, dtype: torch.dtype, architecture: int, dims: Mapping[str, int]) -> list[Seen]:
    """Everything the op would launch at a shape, forward and backward."""
    grads = () if op.forward_only else op.grads
    made = _inputs(op.inputs, dtype, tuple(dims.items()))
    inputs = {name: on_meta(value, grads, name) for name, value in made.items()}
    with recording(architecture) as seen:
        result = op.fn(**inputs)
        results = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None and t.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.empty_like(t) for t in results])
    return [(kernel, args, options, grid) for kernel, grid, args, options in seen]


def ladder(largest: int) -> list[int]:
    """Every size up to 64, from there on eight an octave and those that follow: where heuristics change their minds."""
    above = {n << e for e in range(3, largest.bit_length()) for n in range(8, 16)}
    return sorted(n for n in {*range(1, 65), *above, *(n + 1 for n in above)} if n <= largest)


def _launch(seen: Seen) -> tuple[Any, ...]:
    """The kernel and the numbers that it is compiled for, tiles, warps and stages among them; no flags and dtypes."""
    return seen[0], *((k, v) for k, v in sorted(seen[2].items()) if type(v) is int)


def to_compile(op: Op, architecture: int) -> Iterator[tuple[torch.dtype, Seen, bool]]:
    """What the lock holds of an op for a target, by the dtype that it is called with; whether at a card's shape."""
    known = set()
    for dims in op.shapes:
        for seen in launches(op, MODEL, architecture, dims):
            known.add(_launch(seen))
            yield MODEL, seen, True
    between = (
        tuple({**dims, g: n}.items()) for dims in op.shapes for g, most in op.grows.items() for n in ladder(most)
    )
    for sizes in dict.fromkeys(between):
        for seen in launches(op, MODEL, architecture, dict(sizes)):
            if (launch := _launch(seen)) not in known:
                known.add(launch)
                yield MODEL, seen, False
    if architecture == 90:
        largest = max(op.shapes, key=lambda dims: op.cost(2, **dims))
        for dims in (op.shapes[0], largest):
            yield from ((dtype, seen, True) for dtype in OTHERS for seen in launches(op, dtype, architecture, dims))


def _inspect(binary: Any, architecture: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def dump(flag: str) -> str:
            command = [TOOLS / "cuobjdump", flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
        sass = dump("-sass")
    widths = [next((int(w) for w in re.findall(r"\.U?(\d+)\b", suffix)), 32) for suffix in GLOBAL_LOAD.findall(sass)]
    tensor = sorted(set(TENSOR.findall(sass)))
    early = [hazards.EARLY] if architecture >= 90 and hazards.starts_early(sass) else []
    return dict(
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=binary.metadata.shared,
        load=max(widths, default=0),
        tensor=" ".join(tensor),
        tma="UTMALDG" in sass or "UBLKCP" in sass,
        stores=STORE.search(sass) is not None,
        hazards=(*early, *hazards.found(binary.asm["ttgir"], tensor)),
    )


class _Known:
    """Triton's hook before it compiles: takes a fingerprint of kernel, arguments and options, and skips known ones."""

    def __init__(self, architecture: int, known: Collection[str]):
        self.architecture, self.known, self.source = architecture, known, ""

    def __call__(self, *, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        data = json.loads(compile["specialization_data"])
        del data["key"], data["options"]["extern_libs"]  # which name folders of this machine
        given = (triton.__version__, self.architecture, fn.jit_function.cache_key, json.dumps(data, sort_keys=True))
        self.source = hashlib.sha256(repr(given).encode()).hexdigest()[:12]
        return self.source in self.known


@cache
def _ask_for_keys() -> None:
    """Of all functions that kernels call: under Triton 3.6 a kernel's key lacks the globals of those that nobody has
    asked for theirs before, and would depend on which op comes first."""
    for name in sorted(name for name in sys.modules if name.startswith("tt_kernels.")):
        for _, function in sorted(vars(sys.modules[name]).items()):
            if isinstance(function, triton.JITFunction) and not function.__name__.endswith("_kernel"):
                _ = function.cache_key


def _compile_op(name: str, architecture: int, locked: Mapping[str, Mapping[str, Any]]) -> tuple[list[Compiled], int]:
    """All kernels of an op for one target, and how many were compiled; runs in a process of its own.

    One whose fingerprint is in a row of `locked` is taken from there."""
    from profiling.predict.model import predict

    driver.set_active(Target(architecture))
    _ask_for_keys()
    rows = {source: (key, row) for key, row in locked.items() for source in row.get("sources", "").split()}
    knobs.runtime.jit_cache_hook = hook = _Known(architecture, rows)
    found: dict[str, Compiled] = {}
    count = 0
    for dtype, (kernel, args, options, grid), published in to_compile(OPS[name], architecture):
        hook.source = ""
        binary = kernel.warmup(*args, grid=(1,), **options)
        if not hook.source:  # met before, in this op
            continue
        shown = {k: v for k, v in options.items() if k != "enable_fp_fusion"}
        if binary is None:
            key, row = rows[hook.source]
            launch = key.split(" ", 2)[2]
            facts = {column: row[column] for column in COLUMNS} | dict(hazards=tuple(row.get("hazards", ())))
        else:
            count += 1
            signature = " ".join(str(t) for t in binary.src.signature.values() if t != "constexpr")
            launch = " ".join(f"{k}={v}" for k, v in shown.items()) + f" ({signature})"
            facts = _inspect(binary, architecture)
            if published and dtype == MODEL and architecture == 90:
                p = predict(kernel, grid, args, options)
                facts["hazards"] += tuple(hazards.busy(p.pipes, p.bounds["DRAM"]))
        new = Compiled(kernel.__name__, architecture, launch, dtype=dtype, tiles=shown, sources=hook.source, **facts)
        found[new.key] = worse(new, found.get(new.key))
    return list(found.values()), count


def worse(a: Compiled, b: Compiled | None) -> Compiled:
    """Two kernels of one row of the lock (they differ in which sizes divide by 16), as one: the worse of both."""
    if b is None:
        return a
    return replace(
        a,
        **{column: max(getattr(a, column), getattr(b, column)) for column in ("registers", "stack", "shared")},
        load=min(a.load, b.load),
        tensor=" ".join(sorted({*a.tensor.split()} & {*b.tensor.split()})),
        tma=a.tma and b.tma,
        stores=a.stores and b.stores,
        hazards=tuple(sorted({*a.hazards, *b.hazards})),
        sources=" ".join(sorted({*a.sources.split(), *b.sources.split()})),
    )


def compile_all(
    names: Sequence[str], targets: Sequence[int], jobs: int, locked: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Compiled], int]:
    """Kernels of all these ops for all these targets, each once, and how many were compiled."""
    with ProcessPoolExecutor(jobs, initializer=without_python) as pool:
        work = [pool.submit(_compile_op, name, target, locked) for name in names for target in targets]
        done = track(work, "ops and targets", console=Console(stderr=True), disable=not sys.stderr.isatty())
        results = [future.result() for future in done]
    unique: dict[str, Compiled] = {}
    for compiled in (c for kernels, _ in results for c in kernels):
        unique[compiled.key] = worse(compiled, unique.get(compiled.key))
    return [unique[key] for key in sorted(unique)], sum(count for _, count in results)


def promises_wgmma(compiled: Compiled, tile: str | None) -> bool:
    """Whether a card's promise holds for this form: 16-bit operands, and 64 rows or more of the tile it names."""
    return tile is not None and compiled.dtype != torch.float32 and compiled.tiles.get(tile, 0) >= 64


def faults(compiled: Compiled, lock: dict[str, Any] | None, *, wgmma: bool = False) -> list[str]:
    """What is wrong with a kernel by itself and, where there is one for this Triton, against the lock."""
    found = []
    locked = None if lock is None else lock.get(compiled.key)
    # What no model runs in may spill: then the lock says how much. By itself that is no fault.
    allowed = 0 if compiled.dtype == MODEL else locked["stack"] if locked else compiled.stack
    if compiled.stack > allowed:
        found.append(f"spills {compiled.stack} bytes")
    if not compiled.stores:
        found.append("stores nothing")
    if hazards.EARLY in compiled.hazards:  # a race, whatever the lock says
        found.append(hazards.EARLY)
    if compiled.shared > SHARED[compiled.architecture] * 1024:
        found.append(f"needs {compiled.shared} bytes of shared memory, there are {SHARED[compiled.architecture]} KiB")
    if wgmma and compiled.architecture == 90 and "HGMMA" not in compiled.tensor:
        found.append(f"compiles to {compiled.tensor or 'no tensor-core instruction'}, expected wgmma (HGMMA)")
    if lock is None:
        return found
    if locked is None:
        return [*found, "is not in the lock: look at it, then run with --update"]
    if compiled.registers > 1.1 * locked["registers"]:
        found.append(f"takes {compiled.registers} registers, locked {locked['registers']}")
    if compiled.load < locked["load"]:
        found.append(f"loads {compiled.load} bits at a time, locked {locked['load']}")
    if set(locked["tensor"].split()) - set(compiled.tensor.split()):
        found.append(f"compiles to {compiled.tensor or 'no tensor-core instruction'}, locked {locked['tensor']}")
    if locked["tma"] and not compiled.tma:
        found.append("has lost its TMA loads")
    known = {hazards.EARLY, *locked.get("hazards", ())}
    found += [hazard for hazard in compiled.hazards if hazard not in known]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these (default: all that have kernels)")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, metavar="SM")
    parser.add_argument("--update", action="store_true", help="write what comes out into the lock")
    parser.add_argument("--all", action="store_true", help="compile also what the lock has a fingerprint of")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    names = options.ops or [name for name, op in OPS.items() if op.kernels]
    if unknown := [name for name in names if name not in OPS or not OPS[name].kernels]:
        parser.error(f"no op with kernels is called {', '.join(unknown)}")
    version, locks = triton.__version__, json.loads(LOCK.read_text()) if LOCK.exists() else {}
    locked = locks.get(version, {})
    lock = None if options.update else locks.get(version)
    promised = {kernel: tile for op in OPS.values() for kernel, tile in op.tensor_cores.items()}
    compiled, count = compile_all(names, options.targets, options.jobs, {} if options.all else locked)
    print(f"Triton {version}")
    print(f"{'kernel':40s} {'sm':>4s}" + "".join(f"{column:>10s}" for column in COLUMNS) + "  launch")
    failed, rows = 0, {}
    for c in compiled:
        shown = "".join(f"{getattr(c, column)!s:>10s}" for column in COLUMNS)
        print(f"{c.kernel:40s} {c.architecture:4d}{shown}  {c.launch}")
        found = faults(c, lock, wgmma=promises_wgmma(c, promised.get(c.kernel)))
        failed += len(found)
        rows[c.key] = {**c.row, "sources": ""} if found else c.row  # a fault is found again
        for fault in found:
            print(f"    FAULT: {fault}")
    if options.update:
        kept = locked if options.ops or set(options.targets) != set(TARGETS) else {}
        locks[version] = kept | rows
        partial = LOCK.with_name(f".{LOCK.name}.partial")
        partial.write_text(json.dumps(locks, indent=0, sort_keys=True) + "\n")
        partial.replace(LOCK)
    if lock is None and not options.update:
        print(f"NOT HELD TO A LOCK: there is none for Triton {version}, only for {', '.join(locks) or 'none'}")
    print(f"{len(compiled)} kernels, {count} compiled, the others known by their fingerprints; {failed} faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
