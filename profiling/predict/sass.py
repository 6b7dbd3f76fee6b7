"""Machine code as the model reads it: instructions with ptxas's control bits and source lines, and the tree of loops.

`nvdisasm -hex -gi` prints both 64-bit words of each 128-bit instruction and the source line that it comes from. From
bit 105 on stand the bits with which ptxas schedules: stall cycles (4 bits), yield (1), the scoreboard that the result
sets (3), the one that its operands set once read (3), a mask of scoreboards to wait for (6), and reuse flags (4).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
NONE = 7  # no scoreboard
Line = tuple[tuple[str, int], ...]  # file and line, then those that it is inlined at
CODE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?);?\s*}?\s*/\* (0x\w{16}) \*/"
)
SECOND = re.compile(r"^\s*/\* (0x\w{16}) \*/")
WHERE = re.compile(r'//## File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Control:
    stall: int
    yields: int
    write: int  # the scoreboard that a result of variable latency sets; 7: none
    read: int
    wait: int  # mask of scoreboards to wait for
    reuse: int


def control(high: int) -> Control:
    """The bits from 105 on of an instruction, from its upper 64 bits."""
    bits = high >> 41
    return Control(bits & 15, bits >> 4 & 1, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63, bits >> 17 & 15)


@dataclass(eq=False)
class Instruction:
    address: int
    predicate: str
    opcode: str  # with its suffixes: "LDG.E.128"
    operands: str
    control: Control
    line: Line | None
    target: int | None = None  # of a branch

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass(eq=False)
class Loop:
    """A natural loop: its instructions and loops, by address."""

    items: list[Instruction | Loop]
    index: int = 0
    ttgir: int | None = None  # the loop of TTGIR that it is (trips.py)
    share: float = 0.0  # of its instructions whose lines are that loop's
    factor: int = 1  # iterations of that loop that one of this runs
    remainder: bool = False  # it runs what an unrolled loop leaves

    @property
    def own(self) -> list[Instruction]:
        return [item for item in self.items if isinstance(item, Instruction)]

    @property
    def spins(self) -> bool:
        """Waits for a barrier: the model runs it once."""
        return any(i.name == "SYNCS" and "TRYWAIT" in i.opcode for i in self.own) and len(self.own) <= 4


@dataclass
class Code:
    items: list[Instruction | Loop]
    instructions: list[Instruction]
    loops: list[Loop] = field(default_factory=list)
    blocks: list[list[Instruction]] = field(default_factory=list)  # without a branch inside, by address
    dominators: list[int] = field(default_factory=list)  # of each block: a bit for each block that all ways to it cross
    follows: list[list[int]] = field(default_factory=list)  # of each block: those that it branches to, by address

    def around(self, lines: Collection[Line]) -> set[int]:
        """Addresses in blocks that are of these lines, a third of them or more, in those that only they lead to, and in
        those that lead only there."""
        of = [sum(i.line in lines for i in block) for block in self.blocks]
        marked = sum((3 * n >= len(block) > 0) << at for at, (n, block) in enumerate(zip(of, self.blocks, strict=True)))
        inside = {
            b[0].address for b, dominators in zip(self.blocks, self.dominators, strict=True) if dominators & marked
        }
        for block, follows in zip(reversed(self.blocks), reversed(self.follows), strict=True):
            if follows and inside.issuperset(follows):
                inside.add(block[0].address)
        return {i.address for block in self.blocks if block[0].address in inside for i in block}


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVDISASM), "-hex", "-gi", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[Instruction]:
    """The instructions of the first function in the text of nvdisasm or of `cuobjdump -sass` (which has no lines)."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    line: Line | None = None
    told = False
    first: re.Match[str] | None = None
    for row in text.splitlines():
        if first is not None and (second := SECOND.match(row)):
            address, predicate, opcode, operands, _ = first.groups()
            at = int(address, 16)
            if found and at <= found[-1].address:
                break  # another function
            labels |= dict.fromkeys(pending, at)
            pending.clear()
            found.append(Instruction(at, predicate or "", opcode, operands.strip(), control(int(second[1], 16)), line))
            first, told = None, False
        elif match := CODE.match(row):
            first = match
        elif match := WHERE.search(row):
            at = (Path(match[1]).name, int(match[2]))  # the lines that it is inlined at follow
            line, told = (*line, at) if told and line else (at,), True
        elif row.startswith(".L_") and row.rstrip().endswith(":"):
            pending.append(row.strip()[:-1])
        elif row.startswith(".section") and ".text." not in row and found:
            break
    for i in found:
        if i.name in ("BRA", "CALL", "BRX", "JMP"):
            if match := re.search(r"`\((\.L_\w+)\)", i.operands):
                i.target = labels.get(match[1])
            elif match := re.search(r"\b0x([0-9a-f]+)\s*$", i.operands):
                i.target = int(match[1], 16)
    return found


def parse(text: str) -> Code:
    """Instructions, and the loops among them: back edges of the graph of branches to what dominates their source."""
    found = instructions(text)
    starts = {found[0].address} if found else set()
    for i, following in pairwise(found):
        if i.target is not None:
            starts.add(i.target)
        if i.name in ("BRA", "EXIT", "RET", "BRX", "CALL"):
            starts.add(following.address)
    blocks: dict[int, list[Instruction]] = {}
    for i in found:
        if i.address in starts:
            block = blocks[i.address] = []
        block.append(i)
    order = sorted(blocks)
    follows = {start: _successors(blocks[start], order[n + 1 : n + 2], blocks) for n, start in enumerate(order)}
    order = _reachable(order, follows)
    bodies: dict[int, set[int]] = {}
    dominators = _dominators(order, follows)
    place = {start: n for n, start in enumerate(order)}
    edges = ((u, v) for u in order for v in follows[u])
    for start, header in edges:
        if dominators[start] >> place[header] & 1:  # back
            bodies[header] = bodies.get(header, {header}) | _body(start, header, order, follows)
    code = Code([], [i for start in order for i in blocks[start]])
    code.blocks, code.dominators = [blocks[start] for start in order], [dominators[start] for start in order]
    code.follows = [list(follows[start]) for start in order]
    code.items = _nest(order, set(), bodies, blocks, code.loops)
    for index, loop in enumerate(code.loops):
        loop.index = index
    return code


def _successors(
    block: Sequence[Instruction], following: Sequence[int], blocks: dict[int, list[Instruction]]
) -> list[int]:
    last = block[-1]
    always = not last.predicate and last.name in ("BRA", "EXIT", "RET", "BRX", "JMP")
    if last.name == "BRA" and re.match(r"!?U?P\w+\s*,", last.operands):
        always = False  # a second predicate among the operands
    found = [] if always else list(following)
    return found + [last.target] * (last.target in blocks) if last.target is not None else found


def _reachable(order: Sequence[int], follows: dict[int, list[int]]) -> list[int]:
    seen, todo = set(order[:1]), list(order[:1])
    while todo:
        for v in follows[todo.pop()]:
            if v not in seen:
                seen.add(v)
                todo.append(v)
    return [start for start in order if start in seen]


def _dominators(order: Sequence[int], follows: dict[int, list[int]]) -> dict[int, int]:
    """Of each block: a bit for each block that all ways to it cross, by place in the order."""
    before: dict[int, list[int]] = {start: [] for start in order}
    for u in order:
        for v in follows[u]:
            before[v].append(u)
    everything = (1 << len(order)) - 1
    dominators = dict.fromkeys(order, everything)
    changed = True
    while changed:
        changed = False
        for n, v in enumerate(order):
            new = everything if n else 0
            for u in before[v] if n else ():
                new &= dominators[u]
            new |= 1 << n
            if new != dominators[v]:
                dominators[v], changed = new, True
    return dominators


def _body(u: int, header: int, order: Sequence[int], follows: dict[int, list[int]]) -> set[int]:
    body, todo = {u, header}, [u]
    while todo:
        at = todo.pop()
        if at != header:
            new = {w for w in order if at in follows[w]} - body
            body |= new
            todo += new
    return body


def _nest(
    order: Sequence[int],
    open_: set[int],
    bodies: dict[int, set[int]],
    blocks: dict[int, list[Instruction]],
    loops: list[Loop],
) -> list[Instruction | Loop]:
    items: list[Instruction | Loop] = []
    done: set[int] = set()
    for start in order:
        if start in done:
            continue
        around = [h for h in bodies if h not in open_ and start in bodies[h] and bodies[h] <= {*order}]
        if not around:
            items += blocks[start]
            continue
        header = max(around, key=lambda h: len(bodies[h]))
        loop = Loop([])
        loops.append(loop)
        inside = [b for b in order if b in bodies[header]]
        loop.items = _nest(inside, open_ | {header}, bodies, blocks, loops)
        items.append(loop)
        done |= bodies[header]
    return items
