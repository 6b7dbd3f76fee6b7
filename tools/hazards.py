"""What the compiler's output must not show: checks over the text of TTGIR and of machine code, and over what the static
model (profiling/predict) makes of it.

Each returns what it found in words; nothing found is an empty list. `tools.aot` keeps what is known in its lock and
fails where more appears.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod

COPY = re.compile(r"\bttg\.async_(?:copy_global_to_local|commit_group)\b")
DOT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b(?!_wait)")
MEMORY = re.compile(
    r"\b(?:LDG|LDGSTS|STG|ATOMG?|RED|UTMALDG|UTMASTG|UBLKCP|UBLKRED)\b"
)  # global memory, by machine code
EARLY = "touches memory before it waits for the launches before it: programmatic_launch() comes first"
BUSY = {"alu": "integer", "imad": "integer multiply", "special": "special-function"}
SMALL = 1e-6  # s: below it a pipe's time is no fault of a kernel that only waits
LAYOUT = re.compile(r"^(#mma\w*) = #ttg\.nvidia_mma<\{(.*)\}>$", re.MULTILINE)


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


def starts_early(sass: str) -> bool:
    """Whether a kernel touches global memory before it waits for the launches before it (ACQBULK, which is
    griddepcontrol.wait): launched programmatically it could read what they have not written yet."""
    touch, wait = MEMORY.search(sass), sass.find("ACQBULK")
    return touch is not None and not 0 <= wait < touch.start()


def busy(pipes: Mapping[str, float], memory: float) -> list[str]:
    """Integer or special-function time above the memory's, and above the products', in seconds."""
    least = max(memory, pipes.get("tensor", 0.0), SMALL)
    return [
        f"takes longer for {what} instructions than for memory"
        for name, what in BUSY.items()
        if pipes.get(name, 0.0) > least
    ]


def found(ttgir: str, tensor: Collection[str]) -> tuple[str, ...]:
    """All of it for one kernel. `tensor`: the names of its tensor-core instructions."""
    missing = ["products without a tensor-core instruction"] if DOT.search(ttgir) and not tensor else []
    return tuple(sorted({*waits_for_all(ttgir), *repeats_rows(ttgir), *missing}))
