"""One warp through the machine code: ptxas's stalls and scoreboards, the pipes it shares, the loads it waits for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import rates
from .rates import Rates
from .sass import NONE, Code, Instruction, Loop
from .trips import Trace
from .ttgir import Kernel

STEADY = 8  # iterations of a loop that are walked before the others are taken as alike: more than pipeline stages


# ---- which loop of the machine code is which of TTGIR ----


def match(code: Code, kernel: Kernel) -> list[str]:
    """Names the TTGIR loop of every loop of the machine code, by the source lines of its own instructions, in order
    where several fit alike. What is not sure is returned in words."""
    unsure: list[str] = []
    used: set[int] = set()

    def visit(items: Sequence[Instruction | Loop], outer: int | None) -> None:
        for loop in (item for item in items if isinstance(item, Loop)):
            lines = [i.line for i in loop.own if i.line is not None]
            if not loop.spins and kernel.loops:
                score = {
                    g: sum(line in kernel.lines.get(g, ()) for line in lines) / max(len(lines), 1)
                    + 0.02 * (kernel.parents[g] == outer)
                    for g in range(len(kernel.loops))
                }
                best = max(score.values())
                alike = [g for g, s in score.items() if s >= best - 0.05]
                fresh = [g for g in alike if g not in used]
                if best >= 0.3:
                    loop.ttgir, loop.share = (fresh or alike)[0], min(best, 1.0)
                    used.add(loop.ttgir)
                if 0.3 <= best < 0.6:
                    unsure.append(
                        f"loop at {loop.own[0].address if loop.own else 0:#x} is {best:.0%} TTGIR loop {loop.ttgir}"
                    )
                elif best < 0.3 and len(loop.own) > 4:
                    unsure.append(f"loop at {loop.own[0].address:#x} is none of TTGIR's: taken as one iteration")
            visit(loop.items, loop.ttgir if loop.ttgir is not None else outer)

    visit(code.items, None)
    by_loop: dict[int, list[Loop]] = {}
    for loop in code.loops:
        if loop.ttgir is not None:
            by_loop.setdefault(loop.ttgir, []).append(loop)
    for same in by_loop.values():
        same.sort(key=lambda loop: len(loop.own))
        if len(same) == 2 and (factor := round(len(same[1].own) / max(len(same[0].own), 1))) > 1:
            same[1].factor, same[0].factor, same[0].remainder = factor, factor, True
    return unsure


def trips(loop: Loop, outer: int | None, trace: Trace) -> float:
    """Iterations of a loop each time that it is come to."""
    if loop.ttgir is None:
        return 1.0
    whole = trace.iterations[loop.ttgir]
    n = whole / (trace.iterations[outer] or 1) if outer is not None else float(whole)
    if loop.factor > 1:
        per = trace.entries[loop.ttgir] or 1
        each = whole / per
        n = (each % loop.factor if loop.remainder else each // loop.factor) * (n / each if each else 0)
    return n


class Weights:
    """How often an instruction runs in an iteration of its loop (outside of loops: in a program), by its line."""

    def __init__(self, code: Code, kernel: Kernel, trace: Trace) -> None:
        self.kernel, self.trace = kernel, trace
        self.ran = {line for counts in trace.lines.values() for line, n in counts.items() if n}
        self.known = {line for lines in kernel.lines.values() for line in lines}
        self.entered = {line[n:] for line in self.ran for n in range(1, len(line))}  # calls that ran
        self.calls = {line[n:] for line in self.known for n in range(1, len(line))}
        # Lines that run elsewhere too do not tell.
        self.left_out = code.around(trace.rare - self.ran) if trace.rare else set()

    def __call__(self, i: Instruction, loop: int | None) -> float:
        if i.address in self.left_out:
            return 0.0
        if i.line is None or i.line not in self.known:  # of ptxas's own: with the call that it stands in
            missed = i.line is not None and i.line[1:] in self.calls and i.line[1:] not in self.entered
            return float(not missed)
        if i.line not in self.ran:
            return 0.0
        if i.line not in self.kernel.lines.get(loop, ()):
            return 1.0
        count = self.trace.lines.get(loop, Counter())[i.line]
        return min(1.0, count / (self.trace.iterations[loop] or 1)) if loop is not None else float(count > 0)


def counts(code: Code, kernel: Kernel, trace: Trace) -> Counter[str]:
    """Executions of every opcode by a warp of the program."""
    weight = Weights(code, kernel, trace)
    found: Counter[str] = Counter()

    def visit(items: Sequence[Instruction | Loop], outer: int | None, times: float) -> None:
        for item in items:
            if isinstance(item, Instruction):
                found[item.opcode] += times * weight(item, outer)  # type: ignore[assignment]
            elif not item.spins:
                inside = item.ttgir if item.ttgir is not None else outer
                visit(item.items, inside, times * trips(item, outer, trace))

    visit(code.items, None, 1.0)
    return found


# ---- the walk ----


@dataclass
class Walk:
    rates: Rates
    sharing: float  # warps of the program on a quarter: between two barriers its pipes serve all of them
    memory: Callable[[Instruction], float]  # latency of a load from global memory, in cycles
    now: float = 0.0
    rounds: float = 0.0  # times it waited for memory
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    remote: list[bool] = field(default_factory=lambda: [False] * 6)  # the board waits for memory
    free: Counter[str] = field(default_factory=Counter)  # when a pipe is free again
    served: Counter[str] = field(default_factory=Counter)  # when it has served all warps since the last barrier
    copying: float = 0.0
    copies: list[float] = field(default_factory=list)  # committed groups of cp.async
    boxes: list[float] = field(default_factory=list)  # groups of TMA loads, by the barrier that expects them
    groups: list[float] = field(default_factory=list)  # committed groups of wgmma

    def wait(self, until: float, remote: bool) -> None:
        if remote and until - self.now > self.rates.l2_latency / 2:
            self.rounds += 1
        self.now = max(self.now, until)

    def meet(self) -> None:
        """All warps of the program come to the same place: every pipe has served them all."""
        if self.sharing > 1:
            self.now = max(self.now, *self.served.values(), self.now)
            self.served = Counter(dict.fromkeys(rates.PIPES, self.now))

    def step(self, i: Instruction) -> None:
        c, r = i.control, self.rates
        for board in range(6):
            if c.wait >> board & 1:
                self.wait(self.boards[board], self.remote[board])
        number = re.search(r",\s*0x([0-9a-f]+)", i.operands)
        if i.name in ("BAR", "WARPGROUP", "DEPBAR") or (i.name == "SYNCS" and "TRYWAIT" in i.opcode):
            self.meet()
        if i.name == "DEPBAR" and number:
            pending = self.copies[: len(self.copies) - int(number[1], 16)]
            self.wait(max(pending, default=0.0), True)
            del self.copies[: len(pending)]
        elif i.opcode.startswith("WARPGROUP.DEPBAR") and number:
            done = self.groups[: len(self.groups) - int(number[1], 16)]
            self.wait(max(done, default=0.0), False)
            del self.groups[: len(done)]
        elif i.name == "SYNCS" and "TRYWAIT" in i.opcode and self.boxes:
            self.wait(self.boxes.pop(0), True)
        name, cycles = rates.pipe(i.opcode, r)
        queued = i.name in ("HGMMA", "QGMMA", "IGMMA")  # asynchronous: the warp goes on
        start = self.now if queued else max(self.now, self.free[name])
        self.free[name] = max(start, self.free[name]) + cycles * (self.sharing if queued else 1)  # type: ignore[assignment]
        if not queued:
            self.served[name] += cycles * self.sharing  # type: ignore[assignment]
        self.served["issue"] += self.sharing  # type: ignore[assignment]
        self.now = start + max(c.stall, 1)
        if i.name == "BAR":
            self.now += r.barrier
        ready = start + rates.latency(i.name, cycles, self.memory(i), r)
        if i.name == "LDGSTS":
            self.copying = max(self.copying, ready)
        elif i.name == "LDGDEPBAR":
            self.copies.append(self.copying)
        elif i.name == "SYNCS" and "ARRIVE" in i.opcode:
            self.boxes.append(start)
        elif i.name in ("UTMALDG", "UBLKCP"):
            if not self.boxes:
                self.boxes.append(start)
            self.boxes[-1] = max(self.boxes[-1], start + self.memory(i))
        elif i.name in ("HGMMA", "QGMMA", "IGMMA") and "gsb0" in i.operands:
            self.groups.append(self.free["tensor"] + r.sfu_latency)
        if c.write != NONE and i.name not in ("LDGDEPBAR", "LDGSTS"):
            self.boards[c.write] = max(self.boards[c.write], ready)
            self.remote[c.write] = i.name in rates.GLOBAL or i.name in rates.ATOMIC - {"ATOMS"}
        if c.read != NONE:
            self.boards[c.read] = max(self.boards[c.read], start + r.sfu_latency)
            self.remote[c.read] = False

    def skip(self, cycles: float, rounds: float) -> None:
        """Time passes with everything in flight as it was."""
        self.now += cycles
        self.rounds += rounds
        self.boards = [b + cycles for b in self.boards]
        self.free = Counter({pipe: at + cycles for pipe, at in self.free.items()})
        self.served = Counter({pipe: at + cycles for pipe, at in self.served.items()})
        self.copying += cycles
        for queue in (self.copies, self.boxes, self.groups):
            queue[:] = [at + cycles for at in queue]


def chain(code: Code, kernel: Kernel, trace: Trace, walk: Walk) -> None:
    """Walks one warp of a program through all that it executes."""
    weight = Weights(code, kernel, trace)

    def run(items: Sequence[Instruction | Loop], outer: int | None, rare: bool) -> float:
        """The smallest share of what was left out, where `rare` instructions are."""
        least = 1.0
        for item in items:
            if isinstance(item, Instruction):
                share = weight(item, outer)
                if share > 0:
                    least = min(least, share)
                    if share > 0.99 or rare:
                        walk.step(item)
                continue
            n = trips(item, outer, trace)
            if item.spins or n <= 0:
                continue
            inside = item.ttgir if item.ttgir is not None else outer
            before: list[tuple[float, float]] = [(walk.now, walk.rounds)]
            some = 1.0
            whole = max(1, min(round(n), STEADY))
            for _ in range(whole):
                some = run(item.items, inside, False)
                before.append((walk.now, walk.rounds))
            back = max(0, len(before) - 1 - (4 if whole == STEADY else 1))
            steps = len(before) - 1 - back
            each, waits = ((a - b) / steps for a, b in zip(before[-1], before[back], strict=True))
            if n > whole:
                walk.skip((n - whole) * each, (n - whole) * waits)
            if some < 0.99:  # an iteration with all that only some have
                now, rounds = walk.now, walk.rounds
                run(item.items, inside, True)
                more, again = walk.now - now - each, walk.rounds - rounds - waits
                extra = max(n * some - 1, -1)
                walk.skip(extra * max(more, 0) - each, extra * max(again, 0) - waits)
        return least

    run(code.items, None, True)
