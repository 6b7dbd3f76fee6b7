"""What the programs of a launch execute: the control flow of TTGIR, evaluated with the launch's numbers.

Integers and pointers are followed, tensors of them too (with numpy), floats are not. What comes from memory is asked of
`memory(argument)`: a small array, or None where nobody knows. A condition that is not known counts as true, one that
hangs on a ticket (an atomic) as true for the last program only, and one that is named in RARE as false; a loop whose
bounds are not known runs once; conditions and bounds that are not known are listed in `unsure`. Per program come out:
the iterations of every loop, how often every source line ran in each of them, bytes through each argument (masked lanes
apart where masks are known) and operations of products.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .assume import RARE
from .ttgir import Kernel, Line, Op, lines_of, place, shape_and_item


class Unknown:
    def __init__(self, ticket: bool) -> None:
        self.ticket = ticket


UNKNOWN, TICKET = Unknown(False), Unknown(True)


class Pointer(NamedTuple):
    base: str  # argument
    offset: Any


@dataclass
class Trace:
    """What one program does."""

    iterations: Counter[int] = field(default_factory=Counter)  # of each loop, in all
    entries: Counter[int] = field(default_factory=Counter)
    lines: dict[int | None, Counter[Line]] = field(default_factory=dict)  # by loop: executions of a line
    loaded: Counter[str] = field(default_factory=Counter)  # bytes by argument
    stored: Counter[str] = field(default_factory=Counter)
    again: dict[str, float] = field(default_factory=dict)  # bytes of `loaded` that the program has read before
    read_at: dict[Line, tuple[str, float]] = field(default_factory=dict)  # argument and bytes of one execution
    flops: float = 0.0
    rare: set[Line] = field(default_factory=set)  # of branches that are taken to be left out
    unsure: set[str] = field(default_factory=set)


# ---- evaluating ----


def _divide(a: Any, b: Any) -> Any:  # toward zero, as C does
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where((np.asarray(a) < 0) != (np.asarray(b) < 0), -quotient, quotient)


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
    "sge": np.greater_equal, "ult": np.less, "ule": np.less_equal, "ugt": np.greater, "uge": np.greater_equal,
}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "divsi": _divide, "divui": _divide,
    "remsi": lambda a, b: a - b * _divide(a, b), "remui": lambda a, b: a - b * _divide(a, b),
    "ceildivsi": lambda a, b: -(-a // np.maximum(b, 1)), "floordivsi": lambda a, b: a // np.maximum(b, 1),
    "minsi": np.minimum, "maxsi": np.maximum, "minui": np.minimum, "maxui": np.maximum, "andi": np.bitwise_and,
    "ori": np.bitwise_or, "xori": np.bitwise_xor, "shli": lambda a, b: np.left_shift(a, np.minimum(b, 63)),
    "shrsi": np.right_shift, "shrui": np.right_shift,
}  # fmt: skip
SAME = ("tt.splat", "tt.broadcast", "ttg.convert_layout", "arith.extsi", "arith.extui", "arith.index_cast",
        "tt.bitcast", "arith.bitcast", "tt.unsplat")  # fmt: skip
# Iterations that are walked one by one: of a loop with branches or loops inside, and of one without. Of a longer one
# the first stands for all: its last loads, which are masked out, then count too.
MOST, SHORT = 512, 48
FEW = 32  # loads of an argument whose places are compared


class Program:
    """One program of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        values: Mapping[str, Any],
        memory: Callable[[str], Any],
        ids: Sequence[int],
        grid: Sequence[int],
        last: bool = False,
    ) -> None:
        self.kernel, self.memory, self.ids, self.grid, self.last = kernel, memory, ids, grid, last
        self.values: dict[str, Any] = dict(values)
        self.trace = Trace()
        self.times = 1.0
        self.loop: int | None = None
        self.seen: Counter[tuple[int | None, int]] = Counter()
        self.touched: dict[str, list[Any]] = {}  # places that were read through L1, by argument; [None]: not known

    def run(self) -> Trace:
        with np.errstate(all="ignore"):
            self._block(self.kernel.body)
        for base, places in self.touched.items():
            if places[0] is not None:  # what a program reads again is in L1
                item, again = places[0], sum(map(len, places[1:]))
                self.trace.again[base] = item * (again - len(np.unique(np.concatenate(places[1:]))))
        return self.trace

    def _through_l1(self, pointer: Any, types: str, mask: Any) -> None:
        if not isinstance(pointer, Pointer):
            return
        shape, item = shape_and_item(types)
        known = pointer.offset is not None and not isinstance(mask, Unknown) and self.times == 1
        places = self.touched.setdefault(pointer.base, [item if known else None])
        if places[0] is None or not known or len(places) > FEW or prod(shape) > 1 << 16:
            self.touched[pointer.base] = [None]
            return
        offset, mask = np.broadcast_to(pointer.offset, shape), np.broadcast_to(mask, shape)
        places.append(offset[mask].ravel())

    def of(self, name: str) -> Any:
        return self.values.get(name, UNKNOWN)

    def _block(self, ops: Sequence[Op]) -> list[Any]:
        """Runs operations; what the block yields."""
        stays = False
        for op in ops:
            if op.name == "cf.cond_br":  # an early return follows
                condition = self.of(op.operands[0])
                stays = isinstance(condition, Unknown) or not bool(condition)
                continue
            if op.name == "tt.return" and stays:
                stays = False
                continue
            if op.name in ("scf.yield", "tt.return"):
                return [self.of(v) for v in op.operands]
            result = self._op(op)
            if op.line is not None:
                self._executed(op)
            for name, value in zip(op.results, result if op.regions else [result], strict=False):
                self.values[name] = value
        return []

    def _executed(self, op: Op) -> None:
        """A line runs as often as that of its operations that runs most."""
        assert op.line is not None
        key = (self.loop, id(op))
        self.seen[key] += self.times  # type: ignore[assignment]
        counts = self.trace.lines.setdefault(self.loop, Counter())
        counts[op.line] = max(counts[op.line], self.seen[key])

    def _op(self, op: Op) -> Any:
        name = op.name
        if name == "scf.for":
            return self._for(op)
        if name == "scf.if":
            return self._if(op)
        if op.regions:
            return [self._reduce(op)] if name in ("tt.reduce", "tt.scan") else [UNKNOWN] * max(1, len(op.results))
        if name in ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma"):
            self._dot(op)
            return UNKNOWN
        if name in ("tt.load", "ttg.async_copy_global_to_local"):
            return self._load(op)
        if name == "tt.store":
            pointer, *rest = (self.of(v) for v in op.operands)
            mask = rest[1] if len(rest) > 1 else True
            self._moved(self.trace.stored, pointer, op.types, mask)
            return UNKNOWN
        if name.startswith("ttng.async_tma_"):
            self._tma(op)
            return UNKNOWN
        if name.startswith("tt.atomic"):
            return TICKET
        return self._plain(op)

    def _plain(self, op: Op) -> Any:
        family, _, what = op.name.partition(".")
        if op.name == "arith.constant":
            return self._constant(op.text)
        if op.name == "tt.get_program_id":
            return np.int64(self.ids["xyz".index(op.text.split()[0])])
        if op.name == "tt.get_num_programs":
            return np.int64(self.grid["xyz".index(op.text.split()[0])])
        if op.name == "tt.make_range":
            end, start = (int(re.search(rf"{key} = (\d+)", op.text)[1]) for key in ("end", "start"))  # type: ignore[index]
            return np.arange(start, end)
        args = [self.of(v) for v in op.operands]
        if op.name == "arith.select":
            return self._select(*args)
        if op.name == "ttng.barrier_expect":
            return UNKNOWN
        if unknown := [a for a in args if isinstance(a, Unknown)]:
            if op.name == "tt.addptr" and isinstance(args[0], Pointer):
                return Pointer(args[0].base, None)
            if op.name == "arith.andi" and any(_is(a, False) for a in args):
                return np.False_
            if op.name == "arith.ori" and any(_is(a, True) for a in args):
                return np.True_
            return TICKET if any(a.ticket for a in unknown) else UNKNOWN
        if op.name.endswith("bitcast") and not isinstance(args[0], Pointer) and np.asarray(args[0]).dtype.kind == "f":
            return UNKNOWN  # bits of a float
        if op.name in SAME:
            return args[0]
        if op.name == "tt.addptr":
            pointer, offset = args
            if not isinstance(pointer, Pointer):
                return UNKNOWN
            return Pointer(pointer.base, None if pointer.offset is None else pointer.offset + offset)
        if isinstance(args[0] if args else None, Pointer):
            if what in ("expand_dims", "reshape", "trans"):
                pointer = args[0]
                offset = None if pointer.offset is None else self._shaped(op, pointer.offset)
                return Pointer(pointer.base, offset)
            return UNKNOWN
        if what in ("expand_dims", "reshape", "trans"):
            return self._shaped(op, args[0])
        if what == "trunci":
            bits = re.search(r"to (?:tensor<(?:\d+x)*)?i(\d+)", op.text)
            width = int(bits[1]) if bits else 64
            if width == 1:
                return np.asarray(args[0]) & 1 != 0
            return args[0] if width == 64 else np.asarray(args[0]).astype(f"int{width}").astype(np.int64)
        if what == "cmpi":
            kind = op.text.split(",")[0].strip()
            return COMPARE[kind](_int(args[0]), _int(args[1]))
        if what == "cmpf" and (kind := "s" + op.text.split(",")[0].strip()[1:]) in COMPARE:
            return COMPARE[kind](args[0], args[1])
        if family == "arith" and what in BINARY:
            a, b = (args[0], args[1]) if what in ("andi", "ori", "xori") else map(_int, args)
            return BINARY[what](a, b)
        return UNKNOWN

    def _constant(self, text: str) -> Any:
        match = re.match(r"\s*(?:\{[^}]*\})?\s*(?:dense<)?(true|false|-?\d+(\.\d+e[+-]\d+)?)>?(?: :|$)", text)
        if match is None:
            return UNKNOWN
        if match[2]:
            return np.float64(match[1])
        return np.bool_(match[1] == "true") if match[1][0] in "tf" else np.int64(match[1])

    def _shaped(self, op: Op, value: Any) -> Any:
        value = np.asarray(value)
        if value.ndim == 0:
            return value
        if op.name == "tt.expand_dims":
            return np.expand_dims(value, int(re.search(r"axis = (\d+)", op.text)[1]))  # type: ignore[index]
        before, _, after = op.types.partition("->")
        value = np.broadcast_to(value, shape_and_item(before)[0])
        if op.name == "tt.trans":
            order = re.search(r"order = array<i32: ([\d, ]+)>", op.text)
            return value.transpose([int(n) for n in order[1].split(",")]) if order else UNKNOWN
        return value.reshape(shape_and_item(after)[0])

    def _select(self, condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, Unknown):
            return a if a is b else condition if not isinstance(a, Pointer) else Pointer(a.base, None)
        if np.ndim(condition) == 0:
            return a if bool(condition) else b
        if isinstance(a, Unknown) or isinstance(b, Unknown):
            return UNKNOWN
        if isinstance(a, Pointer) or isinstance(b, Pointer):
            return Pointer(a.base, None) if isinstance(a, Pointer) else UNKNOWN
        return np.where(condition, a, b)

    def _reduce(self, op: Op) -> Any:
        value = self.of(op.operands[0])
        inside = {o.name for o in op.regions[0]} - {"tt.reduce.return", "tt.scan.return"}
        reducers = {"arith.addi": np.sum, "arith.maxsi": np.max, "arith.minsi": np.min, "arith.ori": np.any}
        if op.name == "tt.scan":
            reducers = {"arith.addi": np.cumsum}
        if isinstance(value, Unknown | Pointer) or len(inside) != 1 or not inside <= reducers.keys():
            return value if isinstance(value, Unknown) else UNKNOWN
        axis = re.search(r"axis = (\d+)", op.text)
        shape = shape_and_item(op.text.rpartition(" : ")[2])[0]
        if axis is None or not shape:
            return UNKNOWN
        return reducers[inside.pop()](np.broadcast_to(value, shape), axis=int(axis[1]))

    # ---- memory and products ----

    def _moved(self, into: Counter[str], pointer: Any, types: str, mask: Any) -> None:
        shape, item = shape_and_item(types)
        share = 1.0 if isinstance(mask, Unknown) else float(np.mean(mask))
        base = pointer.base if isinstance(pointer, Pointer) else "?"
        into[base] += prod(shape) * item * share * self.times

    def _read_at(self, op: Op, pointer: Any, types: str) -> None:
        if op.line is not None and isinstance(pointer, Pointer):
            shape, item = shape_and_item(types)
            most = self.trace.read_at.get(op.line, ("", 0.0))[1]
            self.trace.read_at[op.line] = (pointer.base, max(most, float(prod(shape) * item)))

    def _load(self, op: Op) -> Any:
        asynchronous = op.name.startswith("ttg.")
        head = re.sub(r"\bother %[\w.#-]+", "", op.text)
        args = re.findall(r"%[\w.#-]+", head.rpartition(" : ")[0])
        pointer = self.of(args[0])
        mask = self.of(args[1]) if not asynchronous and len(args) > 1 else True
        if asynchronous:
            found = re.search(r"\bmask (%[\w.#-]+)", op.text)
            mask = self.of(found[1]) if found else True
        self._moved(self.trace.loaded, pointer, op.types, mask)
        if not asynchronous:
            self._through_l1(pointer, op.types, mask)
        self._read_at(op, pointer, op.types)
        if asynchronous or not isinstance(pointer, Pointer) or pointer.offset is None:
            return UNKNOWN
        values = self.memory(pointer.base)
        if values is None:
            return UNKNOWN
        values = np.asarray(values).ravel()
        found = values[np.clip(pointer.offset, 0, len(values) - 1)]
        return found if isinstance(mask, Unknown) else np.where(mask, found, 0)

    def _tma(self, op: Op) -> None:
        pointer = self.of(op.operands[0])
        shape, item = shape_and_item(op.types.partition("tensordesc<")[2] or op.types)
        loads = "global_to_local" in op.name or "gather" in op.name
        inside = op.text.partition("]")[2].rpartition(" : ")[0]
        predicate = self.of(found[-1]) if loads and len(found := re.findall(r"%[\w.#-]+", inside)) > 2 else True
        if not _is(predicate, False):
            base = pointer.base if isinstance(pointer, Pointer) else "?"
            (self.trace.loaded if loads else self.trace.stored)[base] += prod(shape) * item * self.times
            if loads:
                self._read_at(op, pointer, "x".join(map(str, (*shape, f"i{8 * item}"))))

    def _dot(self, op: Op) -> None:
        shapes = [tuple(map(int, s.split("x")[:-1])) for s in re.findall(r"<((?:\d+x)+)", op.types)]
        if len(shapes) >= 2 and len(shapes[0]) >= 2:
            self.trace.flops += 2.0 * prod(shapes[0]) * shapes[1][-1] * self.times

    # ---- control ----

    def _if(self, op: Op) -> list[Any]:
        condition = self.of(op.operands[0])
        if re.fullmatch(rf"%({'|'.join(RARE)})(_\d+)?", op.operands[0]):
            self.trace.rare.update(lines_of(op.regions[0]))
            return self._block(op.regions[1]) if len(op.regions) > 1 else []
        taken = self.last if condition is TICKET else True
        if not isinstance(condition, Unknown):
            taken = bool(np.all(condition))
        elif condition is UNKNOWN:
            self.trace.unsure.add(f"a condition at {place(op.line)} is taken to hold")
        if taken:
            return self._block(op.regions[0])
        return self._block(op.regions[1]) if len(op.regions) > 1 else []

    def _for(self, op: Op) -> list[Any]:
        head = re.match(r"\s*(?:unsigned )?(%[\w.-]+) = (%[\w.#-]+) to (%[\w.#-]+) step (%[\w.#-]+)(.*)", op.text)
        assert head is not None, op.text
        variable, *bounds = head.groups()[:4]
        low, high, step = map(self.of, bounds)
        carried = re.findall(r"(%[\w.-]+) = (%[\w.#-]+)", head[5].partition("->")[0])
        state = [self.of(value) for _, value in carried]
        if any(isinstance(x, Unknown) for x in (low, high, step)):
            self.trace.unsure.add(f"the bounds of the loop at {place(op.line)} are not known: taken as one iteration")
            low, count = UNKNOWN if isinstance(low, Unknown) else low, 1
            step = 0
        else:
            count = max(0, -(-(int(high) - int(low)) // max(int(step), 1)))
        assert op.loop is not None
        self.trace.iterations[op.loop] += count * self.times  # type: ignore[assignment]
        self.trace.entries[op.loop] += self.times  # type: ignore[assignment]
        if count == 0:
            return state
        leaf = not any(inner.name in ("scf.for", "scf.if") for inner in op.regions[0])
        walked = min(count, MOST if not leaf or count <= SHORT else 1)
        outer, times = self.loop, self.times
        self.loop, self.times = op.loop, times * count / walked
        for n in range(walked):
            self.values[variable] = low if isinstance(low, Unknown) else np.int64(int(low) + n * int(step))
            self.values.update(zip((name for name, _ in carried), state, strict=True))
            before, state = state, self._block(op.regions[0])
        self.loop, self.times = outer, times
        if walked < count:
            state = [a if _same(a, b) else _later(b) for a, b in zip(before, state, strict=True)]
        return state


def _int(value: Any) -> Any:
    return value if isinstance(value, np.int64) else np.asarray(value).astype(np.int64)


def _is(value: Any, wanted: bool) -> bool:
    return not isinstance(value, Unknown | Pointer) and bool(np.all(np.asarray(value) == wanted))


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, np.int64) and isinstance(b, np.int64) and bool(a == b))


def _later(value: Any) -> Any:
    return Pointer(value.base, None) if isinstance(value, Pointer) else UNKNOWN
