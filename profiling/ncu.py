"""`python -m profiling.ncu OP`: Nsight Compute on the kernels of one op at one of its card's shapes.

Writes a report for Nsight Compute's window (ncu-ui) and prints its details: what share of memory and of the tensor
cores a kernel keeps busy, and what its warps wait for. Needs ncu (CUDA toolkit) on the PATH and the right to read
performance counters. --show prints the command and runs nothing.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import command, gpu, launched, op_named, parser, refuse, shape_of

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats", "SchedulerStats")


def commands(o: Any, ncu: str) -> tuple[list[str], list[str]]:
    """The run under ncu, and the one that prints its report."""
    op = op_named(o.op)
    if not op.kernels:
        refuse(f"{o.op} has no kernels yet: its reference runs on every device")
    dims = shape_of(op, o.shape)
    shape = ",".join(f"{k}={v}" for k, v in dims.items())
    kernels = [kernel.__name__ for kernel in launched(op, dims)]
    names = "|".join(dict.fromkeys(kernels))
    sections = [part for name in SECTIONS for part in ("--section", name)]
    run = [ncu, "--target-processes", "all", "--kernel-name", f"regex:^({names})$"]
    # The first call compiles; of the second every kernel is looked at, the caches flushed before it.
    run += [
        "--launch-skip",
        str(len(kernels)),
        "--launch-count",
        str(len(kernels)),
        "--cache-control",
        "all",
        *sections,
    ]
    run += ["--force-overwrite", "--export", str(o.out)]
    run += [sys.executable, "-m", "profiling.one", o.op, "--shape", shape, "--calls", "2"]
    return run, [ncu, "--import", f"{o.out}.ncu-rep", "--page", "details"]


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("ncu", __doc__)
    p.add_argument("op")
    p.add_argument("--shape", metavar="T=16,..", help="one of the card's (default: its first)")
    p.add_argument("--out", type=Path, help="the report (default: the op's name)")
    p.add_argument("--show", action="store_true", help="print the command, run nothing")
    o = p.parse_args(arguments)
    o.out = o.out or Path(o.op)

    def run() -> int:
        found = shutil.which("ncu")
        profile, details = commands(o, found or "ncu")
        if o.show:
            print(shlex.join(profile))
            return 0
        if found is None:
            refuse("ncu is not on the PATH: it comes with the CUDA toolkit (nsight-compute); --show prints the command")
        gpu("Nsight Compute")
        status = subprocess.run(profile).returncode
        if status:
            refuse(f"ncu ended with {status}; ERR_NVGPUCTRPERM: reading counters is left to root on this machine")
        return subprocess.run(details).returncode

    return command("ncu", run)


if __name__ == "__main__":
    sys.exit(main())
