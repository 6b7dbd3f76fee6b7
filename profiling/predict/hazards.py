"""A report of what compiled kernels should not do at the published shapes: by their code, and by their predicted times.

`python -m tools.aot --hazards` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.measure import label
from cards import OPS, Op
from tools import hazards

from .model import compiled, predict
from .rates import TENSOR

SMALL = 1e-6  # s: below it a pipe's time is no fault of a kernel that only waits


def busy(pipes: Mapping[str, float], memory: float) -> list[str]:
    """Integer or special-function time above the memory's, and above the products'."""
    names = {"alu": "integer", "imad": "integer multiply", "special": "special-function"}
    over = {name: pipes.get(name, 0.0) for name in names}
    floor = max(memory, pipes.get("tensor", 0.0), SMALL)
    return [f"{names[n]} time {1e6 * s:.1f} us, memory's {1e6 * memory:.1f}" for n, s in over.items() if s > floor]


def of_op(name: str, target: int) -> Iterator[tuple[str, str, str]]:
    """(kernel, shapes, what) at the published shapes, in bf16, forward and backward."""
    from .__main__ import record

    op: Op = OPS[name]
    shapes: dict[tuple[str, str], list[str]] = {}
    first: dict[tuple[str, str], str] = {}
    for dims in op.shapes:
        ways = (False,) if op.forward_only or not op.grads else (False, True)
        for launch in (x for backward in ways for x in record(name, dims, target, torch.bfloat16, backward)):
            for what in of_launch(launch, target):
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


def of_launch(launch: Sequence[Any], target: int) -> list[str]:
    kernel, grid, args, options = launch
    _, binary = compiled(kernel, args, options, target)
    found = [*hazards.found(binary.ttgir, {i.name for i in binary.code.instructions} & TENSOR)]
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
