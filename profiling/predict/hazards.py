"""What a compiled kernel must not do: checks over its TTGIR, machine code and predicted times, and a report of them.

`python -m tools.aot --hazards` prints it. Each check is a pure function that returns what it found in words; nothing
found is an empty list.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

from bench.measure import label
from cards import OPS, Op

from .model import compiled, predict
from .rates import TENSOR

COPY = re.compile(r"\bttg\.async_(?:copy_global_to_local|commit_group)\b")
DOT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b(?!_wait)")
LAYOUT = re.compile(r"^(#mma\w*) = #ttg\.nvidia_mma<\{(.*)\}>$", re.MULTILINE)
WANTED = {80: {"HMMA", "DMMA", "IMMA"}, 90: {"HGMMA", "QGMMA"}, 100: {"UTCHMMA", "UTCQMMA"}}
SMALL = 1e-6  # s: below it a pipe's time is no fault of a kernel that only waits


def loops(ttgir: str) -> Iterator[tuple[str, list[str]]]:
    """Head and own lines (inner loops' left out) of every scf.for."""
    open_: list[tuple[int, str, list[str]]] = []
    depth = 0
    for line in ttgir.splitlines():
        text = re.sub(r"\s*loc\([^()]*\)\s*$", "", line.strip())
        if text.startswith("}"):
            depth -= 1
            if open_ and open_[-1][0] == depth and not text.endswith("{"):
                _, head, body = open_.pop()
                yield head, body
        if text.endswith("{"):
            if "scf.for" in text:
                open_.append((depth, text, []))
            depth += 1
        elif open_:
            open_[-1][2].append(text)


def waits_for_all(ttgir: str) -> list[str]:
    """Loops that wait for every copy under way (`async_wait 0`) and issue copies that a later iteration waits for."""
    found = []
    for head, body in loops(ttgir):
        waits = [n for n, line in enumerate(body) if "ttg.async_wait" in line and re.search(r"\bnum = 0 ", line)]
        copies = [n for n, line in enumerate(body) if COPY.search(line)]
        # A wait for what the same iteration has copied takes that copy's token; a pipelined one takes a carried token.
        carried = set(re.findall(r"(%[\w.-]+) = %[\w.#-]+", head.partition("iter_args(")[2].partition(")")[0]))
        late = [n for n in waits if carried & set(re.findall(r"%[\w.-]+", body[n].partition("async_wait")[2]))]
        if late and copies:
            dots = [n for n, line in enumerate(body) if DOT.search(line)]
            after = bool(dots) and min(copies) > dots[0]
            shown = "after its products" if after else "before its products: they overlap with one iteration"
            found.append(f"a main loop waits for all of its loads, which it issues {shown}")
    return found


def repeats_rows(ttgir: str) -> list[str]:
    """Products whose warps cover more rows or columns than the tile has: some compute what others compute too."""
    found = []
    layouts: dict[str, list[list[int]]] = {}
    for name, text in LAYOUT.findall(ttgir):
        sizes = (re.search(rf"{key} = \[([\d, ]+)\]", text) for key in ("warpsPerCTA", "instrShape"))
        layouts[name] = [[int(n) for n in match[1].split(",")] if match else [] for match in sizes]
    for line in ttgir.splitlines():
        match = DOT.search(line) and re.search(r"-> tensor<((?:\d+x)+)\w+, (#mma\w*)>", line)
        if not match or match[2] not in layouts:
            continue
        warps, shape = layouts[match[2]]
        tile = [int(n) for n in match[1].split("x")[:-1]]
        shape = shape[: len(tile)]  # wgmma's has K at its end
        covered = [w * s for w, s in zip(warps, shape, strict=False)]
        times = prod(max(1.0, c / t) for c, t, w in zip(covered, tile, warps, strict=False) if w > 1)
        if times > 1:
            each, of, whole = ("x".join(map(str, sizes)) for sizes in (warps, covered, tile))
            found.append(f"{each} warps cover {of} of a {whole} tile: computed {times:g} times")
    return list(dict.fromkeys(found))


def busy(pipes: Mapping[str, float], memory: float) -> list[str]:
    """Integer or special-function time above the memory's, and above the products'."""
    names = {"alu": "integer", "imad": "integer multiply", "special": "special-function"}
    over = {name: pipes.get(name, 0.0) for name in names}
    floor = max(memory, pipes.get("tensor", 0.0), SMALL)
    return [f"{names[n]} time {1e6 * s:.1f} us, memory's {1e6 * memory:.1f}" for n, s in over.items() if s > floor]


def no_tensor_cores(opcodes: Collection[str], target: int, promised: bool, ttgir: str) -> list[str]:
    """Products without tensor cores, or with others than the card promises for the target."""
    names = {opcode.partition(".")[0] for opcode in opcodes} & TENSOR
    if promised and not names & WANTED[target]:
        return [f"promises {' or '.join(sorted(WANTED[target]))}, has {' '.join(sorted(names)) or 'none'}"]
    return ["products without a tensor-core instruction"] if DOT.search(ttgir) and not names else []


def of_op(name: str, target: int) -> Iterator[tuple[str, str, str]]:
    """(kernel, shapes, what) at the published shapes, in bf16, forward and backward."""
    from .__main__ import record

    op: Op = OPS[name]
    shapes: dict[tuple[str, str], list[str]] = {}
    first: dict[tuple[str, str], str] = {}
    for dims in op.shapes:
        ways = (False,) if op.forward_only or not op.grads else (False, True)
        for launch in (x for backward in ways for x in record(name, dims, target, torch.bfloat16, backward)):
            for what in of_launch(op, launch, target):
                kernel, _, _, options = launch
                tiles = " ".join(f"{k}={v}" for k, v in options.items() if type(v) is int)
                key = f"{kernel.__name__} [{tiles}]", re.sub(r"[\d.]+", "", what)
                first.setdefault(key, what)
                seen = shapes.setdefault(key, [])
                if label(dims) not in seen:
                    seen.append(label(dims))
    for key, where in shapes.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        yield key[0], where[0] + more, first[key]


def of_launch(op: Op, launch: Sequence[Any], target: int) -> list[str]:
    kernel, grid, args, options = launch
    _, binary = compiled(kernel, args, options, target)
    tile = op.tensor_cores.get(kernel.__name__)
    promised = tile is not None and options.get(tile, 0) >= 64
    opcodes = {i.opcode for i in binary.code.instructions}
    found = waits_for_all(binary.ttgir) + repeats_rows(binary.ttgir)
    found += no_tensor_cores(opcodes, target, promised, binary.ttgir)
    if target == 90:
        p = predict(kernel, grid, args, options, target=target)
        found += busy(p.pipes, p.bounds["DRAM"])
    return found


def report(names: Sequence[str], targets: Sequence[int]) -> int:
    """Prints what every op's kernels do that they should not; how much that is. It fails nothing."""
    count = 0
    for target in targets:
        for name in names:
            source = OPS[name].fn.__module__.replace(".", "/") + ".py"
            for kernel, where, what in of_op(name, target):
                count += 1
                print(f"sm_{target} {name} {kernel}: {what}; at {where} ({source})", flush=True)
    print(f"{count} findings: a report, no fault")
    return count
