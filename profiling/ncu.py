"""`python -m profiling.ncu OP`: Nsight Compute on the kernels of one op at one of its card's shapes.

Writes a report for Nsight Compute's window (ncu-ui) and prints its details: what share of memory and of the tensor
cores a kernel keeps busy, and what its warps wait for. Needs ncu (CUDA toolkit) on the PATH and the right to read
performance counters. --show prints the command and runs nothing; --bare is the op alone, for ncu to look at.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch

from bench.measure import label, parser, sizes
from bench.ops import low_dtype
from bench.oracle import make
from cards import OPS, Op
from tt_kernels.runtime.launch import recording

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats", "SchedulerStats")


def launched(op: Op, dims: Mapping[str, int]) -> list[str]:
    """The kernels that one forward call launches, in their order: its launchers run on meta tensors, nothing else."""
    kwargs = make(op, dims, low_dtype(op), "meta", seed=0)
    with torch.no_grad(), recording(90) as seen:
        op.fn(**kwargs)
    return [kernel.__name__ for kernel, *_ in seen]


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("profiling.ncu", __doc__)
    p.add_argument("op", choices=[name for name, op in OPS.items() if op.kernels], metavar="OP")
    p.add_argument("--shape", type=sizes, default={}, metavar="T=16,..", help="one of the card's (default: its first)")
    p.add_argument("--out", help="the report (default: the op's name)")
    p.add_argument("--show", action="store_true", help="print the command, run nothing")
    p.add_argument("--bare", action="store_true", help="call the op twice and nothing else")
    o = p.parse_args(arguments)
    op = OPS[o.op]
    dims = next((dims for dims in op.shapes if o.shape.items() <= dims.items()), None)
    if dims is None:
        p.error(f"--shape is {label(o.shape)}, the card of {o.op} has {'; '.join(map(label, op.shapes))}")
    kernels = launched(op, dims)
    ncu, count, names, out = shutil.which("ncu"), str(len(kernels)), "|".join(dict.fromkeys(kernels)), o.out or o.op
    # The first call compiles; of the second every kernel is looked at, the caches flushed before it.
    command = [ncu or "ncu", "--target-processes", "all", "--kernel-name", f"regex:^({names})$"]
    command += ["--launch-skip", count, "--launch-count", count, "--cache-control", "all"]
    command += [part for name in SECTIONS for part in ("--section", name)]
    command += ["--force-overwrite", "--export", out]
    command += [sys.executable, "-m", "profiling.ncu", o.op, "--bare", "--shape", label(dims).replace(" ", ",")]
    if o.show:
        print(shlex.join(command))
        return 0
    if not torch.cuda.is_available():
        p.error("this needs an NVIDIA GPU, and there is none; --show prints the command")
    if o.bare:
        kwargs = make(op, dims, low_dtype(op), "cuda", seed=0)
        with torch.no_grad():
            op.fn(**kwargs), op.fn(**kwargs)
        torch.cuda.synchronize()
        return 0
    if ncu is None:
        p.error("ncu is not on the PATH: it comes with the CUDA toolkit (nsight-compute); --show prints the command")
    if status := subprocess.run(command).returncode:
        p.error(f"ncu ended with {status}; ERR_NVGPUCTRPERM: reading counters is left to root on this machine")
    return subprocess.run([ncu, "--import", f"{out}.ncu-rep", "--page", "details"]).returncode


if __name__ == "__main__":
    sys.exit(main())
