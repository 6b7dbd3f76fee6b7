"""TTGIR as text, read: operations with their regions and source lines, the kernel's arguments, its loops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

Line = tuple[tuple[str, int], ...]  # file and line, then those that it is inlined at


@dataclass(eq=False)
class Op:
    results: list[str]
    name: str
    text: str  # after the name
    line: Line | None = None
    regions: list[list[Op]] = field(default_factory=list)
    loop: int | None = None  # of scf.for: its place among the loops of the kernel

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w.#-]+", self.text)

    @cached_property
    def types(self) -> str:
        """What stands after the last colon that begins the types."""
        return self.text.rpartition(" : ")[2] if " : " in self.text else ""


@dataclass
class Kernel:
    arguments: list[tuple[str, str, str]]  # (value, type, name in the source)
    body: list[Op]
    loops: list[Op] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)
    lines: dict[int | None, set[Line]] = field(default_factory=dict)  # of each loop's own operations


ITEM = {"i1": 1, "i8": 1, "f8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}


def shape_and_item(text: str) -> tuple[tuple[int, ...], int]:
    """Of the first tensor, memory descriptor or scalar type in a text."""
    match = re.search(r"(?:tensor|memdesc|tensordesc|ptr)?<?(?:tensor<)?((?:\d+x)*)(?:!tt\.ptr<)?([a-z]+\d+)", text)
    if match is None:
        return (), 4
    kind = match[2] if match[2] in ITEM else match[2][:2]
    return tuple(map(int, match[1].split("x")[:-1])), ITEM.get(kind, 1 if kind == "f8" else 4)


OPERATION = re.compile(r'^(?:(%[\w.-]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?(.*)$')


def _strip_location(line: str) -> tuple[str, str | None]:
    match = re.search(r"\s*loc\((#loc\w*|unknown)\)\s*$", line)
    return (line[: match.start()], match[1]) if match else (line, None)


def _locations(text: str, calls: bool) -> dict[str, Line]:
    raw = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", text, re.MULTILINE))
    found: dict[str, Line] = {}

    def resolve(name: str, depth: int = 0) -> Line | None:
        if name in found or depth > 20 or name not in raw:
            return found.get(name)
        body = raw[name]
        if match := re.match(r'"([^"]+)":(\d+)', body):
            line: Line = ((match[1].rpartition("/")[2], int(match[2])),)
        else:  # a name, a call's site (the callee comes first), or several fused
            parts = [resolve(part, depth + 1) for part in re.findall(r"#loc\w*", body)]
            if not parts or parts[0] is None:
                return None
            line = parts[0]
            if calls and body.startswith("callsite") and parts[-1] is not None:
                line += parts[-1]
        found[name] = line
        return line

    for name in raw:
        resolve(name)
    return found


def parse(text: str, calls: bool = True) -> Kernel:
    """A kernel from the text of its TTGIR. calls: lines are told apart by the calls that they stand in."""
    lines = text.splitlines()
    where = _locations(text, calls)
    begin = next(n for n, line in enumerate(lines) if "tt.func public" in line)
    names: dict[str, str] = {}
    arguments = []
    for value, kind, name in re.findall(r'(%[\w.-]+): (.+?)(?: \{[^}]*\})? loc\((?:"([^"]+)"\(|#)', lines[begin]):
        if not name:
            name = names.get(value, value[1:])
        arguments.append((value, kind, name))
    if any(re.fullmatch(r"#loc\w+", name) for _, _, name in arguments) or not arguments:
        arguments = [(v, k, v[1:]) for v, k in re.findall(r"(%[\w.-]+): ([^,{]+?)(?= \{|,| loc|\))", lines[begin])]
    kernel = Kernel(arguments, [])
    at = begin + 1

    def block() -> tuple[list[Op], str, str | None]:
        nonlocal at
        found: list[Op] = []
        while at < len(lines):
            stripped, place = _strip_location(lines[at].strip())
            at += 1
            if stripped.startswith("}"):
                return found, stripped, place
            if stripped.startswith("^"):
                continue
            match = OPERATION.match(stripped)
            if match is None:
                continue
            result, count, name, rest = match.groups()
            results = [] if result is None else [f"{result}#{i}" for i in range(int(count))] if count else [result]
            op = Op(results, name, rest, where.get(place or ""))
            found.append(op)
            if rest.endswith("{"):
                if name == "scf.for":
                    op.loop = len(kernel.loops)
                    kernel.loops.append(op)
                while True:
                    region, closing, place = block()
                    op.regions.append(region)
                    if not closing.endswith("{"):
                        op.line = where.get(place or "")
                        op.text += closing[1:].strip(")")
                        break
        return found, "", None

    kernel.body, _, _ = block()
    kernel.parents = [None] * len(kernel.loops)

    def own(ops: Sequence[Op], loop: int | None) -> Iterator[tuple[int | None, Op]]:
        for op in ops:
            yield loop, op
            if op.loop is not None:
                kernel.parents[op.loop] = loop
            for region in op.regions:
                yield from own(region, op.loop if op.loop is not None else loop)

    for loop, op in own(kernel.body, None):
        if op.line is not None:
            kernel.lines.setdefault(loop, set()).add(op.line)
    return kernel


def lines_of(ops: Sequence[Op]) -> Iterator[Line]:
    """The lines of operations, and of those inside them."""
    for op in ops:
        if op.line is not None:
            yield op.line
        for region in op.regions:
            yield from lines_of(region)


def place(line: Line | None) -> str:
    return f"{line[0][0]}:{line[0][1]}" if line else "an unknown line"
