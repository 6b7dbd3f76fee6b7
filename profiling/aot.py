"""`python -m profiling.aot OP ...`: what the compiler made of an op's kernels, and how many fit on a multiprocessor.

From the lock (tools/aot.lock.json), so without a GPU and without compiling; `python -m tools.aot OP` compiles anew.
Programs a multiprocessor: the fewest that registers, shared memory and threads allow. Beside it what limits, and the
shared memory of all of them together: loads in flight live there, and bandwidth wants about 100 KB of them on each of
an H200's 132 multiprocessors.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

from bench.measure import parser, table
from cards import OPS
from tools.aot import LOCK

# A multiprocessor of each target: registers, bytes of shared memory (1 KB of each program's is the system's), threads,
# programs.
LIMITS = {80: (65536, 164 << 10, 2048, 32), 90: (65536, 228 << 10, 2048, 32), 100: (65536, 228 << 10, 2048, 32)}
COLUMNS = ("registers", "spill", "shared KB", "load bits", "tensor cores", "TMA", "programs", "limit", "KB in flight")


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


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("profiling.aot", __doc__)
    p.add_argument("ops", nargs="+", choices=[name for name, op in OPS.items() if op.kernels], metavar="OP")
    p.add_argument("--sm", type=int, choices=tuple(LIMITS), default=90, help="target (default: %(default)s)")
    p.add_argument("--find", default="", metavar="TEXT", help='only launches that hold it: "BLOCK_T=16 "')
    o = p.parse_args(arguments)
    locks = json.loads(LOCK.read_text())
    version = max(locks, key=lambda name: [int(part) for part in name.split(".")])
    kernels = [kernel for name in o.ops for kernel in OPS[name].kernels]
    rows = {}  # forms that differ in alignment only: one line
    for key, found in locks[version].items():
        kernel, sm, launch = key.split(" ", 2)
        options = launch.partition(" (")[0]
        if kernel not in kernels or sm != f"sm_{o.sm}" or o.find not in f"{kernel} {options} ":
            continue
        warps = re.search(r"num_warps=(\d+)", options)
        fit, limit = programs(o.sm, found["registers"], found["shared"], int(warps[1]) if warps else 4)
        shared, tensor = found["shared"], found["tensor"] or "-"
        cells = (
            found["registers"],
            found["stack"],
            f"{shared / 1024:.0f}",
            found["load"],
            tensor,
            "yes" * found["tma"],
        )
        rows[(kernel, *cells, fit, limit, f"{fit * shared / 1024:.0f}", options)] = None
    print(f"Triton {version}, sm_{o.sm}\n\n{table(('kernel', *COLUMNS, 'launch'), list(rows))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
