"""A launch without a GPU: compiled, its programs sampled and walked, and what bounds its time."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from math import ceil, prod
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import driver

from tools.aot import TOOLS, Target

from ..aot import programs
from . import rates, sass, trips, ttgir, walk
from .assume import Launched, remembered, useful
from .rates import PIPES, RATES, Rates

SAMPLES = 24  # programs of a launch that are evaluated: spread evenly, the first and the last among them
GOLDEN = 0.618034
UNLIKE = 0.05  # programs whose products differ by more have four times as many samples
SLOW = 0.2  # s: a program that takes longer to evaluate has a quarter of them


@dataclass(eq=False)
class Binary:
    """A compiled kernel, read."""

    name: str
    target: int
    registers: int
    shared: int
    warps: int
    code: sass.Code
    kernel: ttgir.Kernel
    ttgir: str
    unsure: list[str]


@dataclass
class Prediction:
    """One launch."""

    kernel: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    binary: Binary
    resident: int  # programs a multiprocessor
    limited: str  # by what
    waves: float
    active: float  # programs that do more than see that there is nothing to do
    iterations: dict[int, float] = field(default_factory=dict)  # of each TTGIR loop, a program that enters it
    pipes: dict[str, float] = field(default_factory=dict)  # seconds of each
    main: dict[str, float] = field(default_factory=dict)  # instructions of the main loop by pipe, one iteration
    read: dict[str, float] = field(default_factory=dict)  # bytes from memory by argument
    written: dict[str, float] = field(default_factory=dict)
    traffic: float = 0.0  # bytes to multiprocessors
    in_flight: float = 0.0  # bytes a multiprocessor has asked for at once, at most
    rounds: float = 0.0  # dependent waits for memory, of the slowest program
    chain: float = 0.0  # seconds of the slowest program alone
    bounds: dict[str, float] = field(default_factory=dict)  # seconds
    flops: float = 0.0  # of its products, rows that fill up tiles included
    useful: float = 1.0  # the share of them that is not filling
    limit: float = 0.0
    unsure: set[str] = field(default_factory=set)

    @property
    def bytes(self) -> float:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def seconds(self) -> float:
        return max(self.bounds.values(), default=0.0)

    @property
    def binds(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name], default="")


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        found = re.search(r"REG:(\d+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return int(found[1]) if found else 255


_READ: dict[bytes, Binary] = {}


def compiled(kernel: Any, args: Sequence[Any], options: Mapping[str, Any], target: int) -> tuple[Any, Binary]:
    """Triton's compiled kernel, and what the model reads of it."""
    before = driver._active  # what reads `active` looks for a GPU
    driver.set_active(Target(target))
    try:
        made = kernel.warmup(*args, grid=(1,), **options)
    finally:
        driver._active = before
    cubin = made.asm["cubin"]
    if cubin not in _READ:
        code = sass.parse(sass.disassemble(cubin))
        # Triton 3.6 does not say where lines are inlined.
        body = ttgir.parse(made.asm["ttgir"], any(len(i.line or ()) > 1 for i in code.instructions))
        unsure = walk.match(code, body)
        shared, warps = made.metadata.shared, int(options.get("num_warps", made.metadata.num_warps))
        _READ[cubin] = Binary(
            kernel.__name__, target, _registers(cubin), shared, warps, code, body, made.asm["ttgir"], unsure
        )
    return made, _READ[cubin]


def leaves(kind: Any, value: Any, name: str) -> Iterator[tuple[str, Any, str]]:
    """What of an argument reaches the kernel: (type, value, name)."""
    if kind == "constexpr" or kind is None:
        return
    if isinstance(kind, tuple):
        names = getattr(value, "_fields", None) or [str(n) for n in range(len(value))]
        for part, inner, field_ in zip(kind, value, names, strict=True):
            yield from leaves(part, inner, f"{name}.{field_}")
    else:
        yield kind, value, name


def bind(made: Any, kernel: ttgir.Kernel, args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values of the TTGIR function's arguments, the launch's arguments by name)."""
    given: dict[str, Any] = {}
    values: dict[str, Any] = {}
    rest = list(kernel.arguments)
    for (name, kind), value in zip(made.src.signature.items(), args, strict=False):
        for type_, leaf, label in leaves(kind, value, name):
            given[label] = getattr(leaf, "base", leaf)
            if not rest:
                continue
            at, shown, source = rest.pop(0)
            if str(type_).startswith("tensordesc"):
                # Its sizes and strides follow, under its name or (Triton 3.9) as w.shape.0.
                while rest and re.match(rf"{re.escape(source)}(\.(shape|stride)\.\d+)?$", rest[0][2]):
                    rest.pop(0)
            if isinstance(leaf, bool | int) and "ptr" not in shown:
                values[at] = np.int64(leaf)
            elif isinstance(leaf, Tensor) or hasattr(leaf, "base"):
                values[at] = trips.Pointer(label, np.int64(0))
    return values, given


def sampled(grid: Sequence[int], most: int = SAMPLES) -> list[tuple[tuple[int, int, int], float]]:
    """Programs to evaluate, each with how many it stands for: the first, the last and one of each equal part between,
    at a place that is never the same, since tiles that are alike repeat."""
    x, y, z = (*grid, 1, 1, 1)[:3]
    total = x * y * z
    if total <= most:
        some = list(range(total))
    else:
        each = (total - 2) / (most - 2)
        places = (n * each + (n * GOLDEN % 1) * each for n in range(most - 2))
        some = sorted({0, *(1 + int(place) for place in places), total - 1})
    edges = [0, *((a + b) // 2 + 1 for a, b in pairwise(some)), total]
    found = []
    for n, (low, high) in zip(some, pairwise(edges), strict=True):
        found.append(((n % x, n // x % y, n // (x * y)), float(high - low)))
    return found


def predict(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    options: Mapping[str, Any],
    target: int = 90,
    context: int | None = None,
    hot: bool = True,
    near: Callable[[Tensor], bool] = lambda t: False,
) -> Prediction:
    """What the model says of one launch on a target. `near`: a tensor lies in L2, as a launch before has written it."""
    r = RATES[target]
    made, binary = compiled(kernel, args, options, target)
    values, given = bind(made, binary.kernel, args)
    launched = Launched(kernel.__name__, given, dict(options), context, hot)
    memory = cache(lambda name: remembered(launched, name))
    resident, limited = programs(target, binary.registers, binary.shared, binary.warps)
    full = prod(grid)
    p = Prediction(kernel.__name__, tuple(grid), dict(options), binary, max(resident, 1), limited, 0.0, 0.0)
    p.unsure |= set(binary.unsure)
    seen: list[tuple[float, trips.Trace]] = []
    begin = time.process_time()
    trips.Program(binary.kernel, values, memory, (0, 0, 0), (*grid, 1, 1)).run()
    few = SAMPLES // 4 if time.process_time() - begin > SLOW else SAMPLES
    for most in (few, 4 * few):
        seen.clear()
        picked = sampled(grid, most)
        for number, (ids, weight) in enumerate(picked):
            trace = trips.Program(binary.kernel, values, memory, ids, (*grid, 1, 1), number == len(picked) - 1).run()
            if number == len(picked) - 1 and weight > 1:  # only one program is the last
                plain = trips.Program(binary.kernel, values, memory, ids, (*grid, 1, 1)).run()
                seen.append((weight - 1, plain))
                weight = 1
            seen.append((weight, trace))
            p.unsure |= trace.unsure
        if np.std([t.flops for _, t in seen]) <= UNLIKE * np.mean([t.flops for _, t in seen]):
            break
    p.useful = useful(launched)
    _measure(p, r, seen, given, full, {name for name, t in given.items() if isinstance(t, Tensor) and near(t)})
    return p


def _measure(
    p: Prediction,
    r: Rates,
    seen: Sequence[tuple[float, trips.Trace]],
    given: Mapping[str, Any],
    full: int,
    near: set[str],
) -> None:
    binary = p.binary
    traffic: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for weight, trace in seen:
        traffic.update({name: weight * (n - trace.again.get(name, 0)) for name, n in trace.loaded.items()})
        stored.update({name: weight * n for name, n in trace.stored.items()})
        p.flops += weight * trace.flops
    slots = r.multiprocessors * p.resident
    # In the first wave everything comes from memory, later what many programs read is in L2.
    near = near | {name for name, n in traffic.items() if full > slots and n > 4 * (_size(given.get(name)) or n)}
    totals: Counter[str] = Counter()
    heavy: Counter[str] = Counter()
    chains: list[tuple[float, float, float]] = []
    known: dict[Any, tuple[Counter[str], float, float]] = {}
    sharing = max(1.0, binary.warps / 4)
    for weight, trace in seen:
        key = (
            tuple(sorted(trace.iterations.items())),
            tuple(sorted((k or -1, frozenset(v.items())) for k, v in trace.lines.items())),
        )
        if key not in known:
            work: Counter[str] = Counter()
            for opcode, n in walk.counts(binary.code, binary.kernel, trace).items():
                name, cycles = rates.pipe(opcode, r)
                work[name] += n * cycles  # type: ignore[assignment]
                work["issue"] += n
            one = walk.Walk(r, sharing, partial(_latency, r, trace, near))
            walk.chain(binary.code, binary.kernel, trace, one)
            known[key] = work, one.now, one.rounds
        work, cycles, rounds = known[key]
        chains.append((weight, cycles, rounds))
        for name, n in work.items():
            totals[name] += weight * n  # type: ignore[assignment]
            heavy[name] = max(heavy[name], n)
        for g, n in trace.iterations.items():
            if n:
                p.iterations[g] = max(p.iterations.get(g, 0), n / (trace.entries[g] or 1))
    longest = max(cycles for _, cycles, _ in chains)
    # A program that finds nothing to do costs its own time and fills no place in a wave.
    p.active = sum(weight for weight, cycles, _ in chains if cycles > 0.3 * longest)
    p.waves = p.active / slots
    p.rounds = max(rounds for _, cycles, rounds in chains if cycles == longest)
    p.chain = longest / r.clock
    uneven = _uneven(p.active / r.multiprocessors)
    quarters = (
        4 if binary.warps >= 4 else min(4, binary.warps * max(1.0, min(p.resident, p.active / r.multiprocessors)))
    )
    for name in PIPES:
        mean = totals[name] * binary.warps / quarters / r.multiprocessors
        p.pipes[name] = max(mean * uneven, heavy[name] * max(1.0, binary.warps / 4)) / r.clock
    total_chain = sum(weight * cycles for weight, cycles, _ in chains) / slots / r.clock
    p.bounds = {name: seconds for name, seconds in p.pipes.items() if seconds}
    p.bounds["latency"] = max(p.chain, total_chain * _uneven(p.waves))
    for name, n in traffic.items():
        p.read[name] = min(n, _size(given.get(name)) or n)
    for name, n in stored.items():
        p.written[name] = min(n, _size(given.get(name)) or n)
    p.traffic = sum(traffic.values()) + sum(stored.values())
    p.bounds["DRAM"] = p.bytes / r.dram
    p.bounds["L2"] = p.traffic / r.l2
    loops = [loop for loop in binary.code.loops if loop.ttgir is not None]
    if loops:
        main = max(loops, key=lambda loop: p.iterations.get(loop.ttgir or 0, 0) * len(loop.own))
        mix: Counter[str] = Counter()
        for i in main.own:
            mix[_shown(i, r)] += 1
        p.main = dict(mix.most_common())
    p.in_flight = (
        p.resident * binary.shared
        if binary.shared > 8192
        else p.traffic / max(full, 1) * min(p.resident, max(1, full / r.multiprocessors))
    )
    p.limit = max(p.bytes / r.dram, p.useful * p.flops / r.products if p.pipes["tensor"] else 0.0)


def _latency(r: Rates, trace: trips.Trace, near: set[str], i: sass.Instruction) -> float:
    """Cycles that a load from global memory takes: numbers read one by one in a loop lie in L1, mostly."""
    name, size = trace.read_at.get(i.line, ("", 0.0)) if i.line is not None else ("", 0.0)
    in_loop = any(g is not None and i.line in lines for g, lines in trace.lines.items())
    if 0 < size <= 8 and in_loop:
        return r.l1_latency + r.l2_latency / 16
    if "STRONG" in i.opcode and (name in trace.stored or not name):  # past L1: another program has just written it
        return r.l2_latency
    return r.l2_latency if name in near else r.dram_latency * r.clock


def _shown(i: sass.Instruction, r: Rates) -> str:
    name, _ = rates.pipe(i.opcode, r)
    return ".".join(i.opcode.split(".")[:2]) if name == "tensor" else name


def _uneven(each: float) -> float:
    """The fullest multiprocessor's share over the mean one's."""
    return ceil(each) / each if 0 < each <= 4 else 1 + 0.5 / each if each else 1.0


def _size(t: Any) -> int:
    return t.numel() * t.element_size() if isinstance(t, Tensor) else 0
