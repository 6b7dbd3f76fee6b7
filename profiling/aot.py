"""`python -m profiling.aot OP ...`: what the compiler made of an op's kernels, and how many fit on a multiprocessor.

From the lock (tools/aot.lock.json), so without a GPU and without compiling; `python -m tools.aot OP` compiles
anew. Programs a multiprocessor: the fewest that registers, shared memory and threads allow. Beside it what limits, and
the shared memory of all of them together: loads in flight live there, and bandwidth wants about 100 KB of them on each
of an H200's 132 multiprocessors.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cards import OPS
from tools.aot import LOCK

from .common import command, op_named, parser, refuse

# A multiprocessor of each target: registers, bytes of shared memory (1 KB of each program's is the system's), threads,
# programs.
LIMITS = {80: (65536, 164 << 10, 2048, 32), 90: (65536, 228 << 10, 2048, 32), 100: (65536, 228 << 10, 2048, 32)}
COLUMNS = (
    "registers",
    "spill",
    "shared KB",
    "load bits",
    "tensor cores",
    "TMA",
    "programs",
    "limited by",
    "KB in flight",
)


def programs(architecture: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """How many programs a multiprocessor holds at once, and what stops more. Registers are given out by 8 a thread."""
    have, memory, threads, most = LIMITS[architecture]
    rounded = -(-max(registers, 1) // 8) * 8
    fits = {
        "registers": have // (rounded * warps * 32),
        "shared memory": memory // (shared + 1024),
        "threads": threads // (warps * 32),
        "programs": most,
    }
    limit = min(fits, key=lambda name: fits[name])
    return fits[limit], limit


def rows(lock: Mapping[str, Mapping[str, Any]], kernels: Sequence[str], architecture: int) -> Iterator[tuple[Any, ...]]:
    for key, found in lock.items():
        kernel, sm, launch = key.split(" ", 2)
        if kernel not in kernels or sm != f"sm_{architecture}":
            continue
        options = launch.partition(" (")[0]
        warps = int(re.search(r"num_warps=(\d+)", options)[1])
        fit, limit = programs(architecture, found["registers"], found["shared"], warps)
        yield (
            kernel,
            found["registers"],
            found["stack"],
            f"{found['shared'] / 1024:.0f}",
            found["load"],
            found["tensor"] or "-",
            "yes" if found["tma"] else "-",
            fit,
            limit,
            f"{fit * found['shared'] / 1024:.0f}",
            re.sub(r"(\w+)=(True|False)\b", lambda m: m[1] if m[2] == "True" else f"no-{m[1]}", options),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("aot", __doc__)
    p.add_argument("ops", nargs="+", metavar="OP")
    p.add_argument("--sm", type=int, choices=tuple(LIMITS), default=90, help="target (default: %(default)s)")
    p.add_argument("--triton", help="whose part of the lock (default: the newest)")
    p.add_argument("--find", default="", metavar="TEXT", help='only launches that hold it: "BLOCK_T=16 "')
    o = p.parse_args(arguments)

    def run() -> int:
        locks = json.loads(LOCK.read_text())
        version = o.triton or max(locks, key=lambda name: [int(part) for part in name.split(".")])
        if version not in locks:
            refuse(f"the lock has no Triton {version}, it has {', '.join(locks)}")
        kernels = [kernel for name in o.ops for kernel in op_named(name).kernels]
        if not kernels:
            there = ", ".join(name for name, op in OPS.items() if op.kernels)
            refuse(f"{', '.join(o.ops)}: no kernels yet; with kernels: {there}")
        listed = dict.fromkeys(rows(locks[version], kernels, o.sm))  # forms that differ in alignment only: one line
        found = [row for row in listed if o.find in f"{row[0]} {row[-1]} "]
        print(
            f"Triton {version}, sm_{o.sm}\n\n{'kernel':<32s}" + "".join(f"{name:>14s}" for name in COLUMNS) + "  launch"
        )
        for kernel, *cells, launch in found:
            print(f"{kernel:<32s}" + "".join(f"{cell!s:>14s}" for cell in cells) + f"  {launch}")
        return 0

    return command("aot", run)


if __name__ == "__main__":
    sys.exit(main())
