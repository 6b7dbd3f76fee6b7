"""`python -m profiling.proton OP ...`: Triton's own profiler on ops at their card's shapes, flops and bytes with it.

Writes a .hatchet file that proton-viewer shows as a tree of op, kernel, with time, TFLOP/s and TB/s:
  proton-viewer -m time/us,tflop/s,gbyte/s ops.hatchet
Rates are of what the card says that an op cannot do without, not of what a kernel did. Where an op is one kernel, its
launches carry these numbers (Triton's launch metadata); where it is several, the op's scope does, since the card counts
for all of them together: then the kernels have times, and the op has the rate. Kernels are named with their grid.

As in bench/, every call finds its operands in memory, not in the L2: it goes round as many sets of them as a row has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.clock import DeviceClock, in_a_line, where
from bench.measure import positive
from bench.ops import Case, bind, low_dtype, operands
from bench.oracle import Clock
from cards import OPS

from .common import Refused, command, gpu, launched, op_named, parser, refuse, shape_of


def profiler() -> Any:
    """Triton's proton, where this Triton was built with it."""
    try:
        import triton.profiler as proton
    except Exception as error:
        raise Refused(f"this Triton has no proton: {error}") from error
    return proton


def work(name: str, dims: Mapping[str, int]) -> dict[str, int]:
    """What a call cannot do without, as proton's metrics."""
    op = OPS[name]
    flops, moved = op.cost(low_dtype(op).itemsize, **dims)
    return {"flops": flops, "bytes": moved}


def tell(name: str, dims: dict[str, int]) -> dict[str, int]:
    """Have the kernels of an op tell proton their grid, and a lone one its work; what is left for the op's scope. What
    a launcher passes is untouched."""
    kernels, whole = launched(OPS[name], dims), work(name, dims)
    mine = whole if len(kernels) == 1 else {}
    for kernel in kernels:
        kernel.launch_metadata = lambda grid, metadata, args: {"name": f"{metadata.name} {tuple(grid)}", **mine}
    return {} if mine else whole


def profile(proton: Any, session: Any, name: str, dims: dict[str, int], clock: Clock, calls: int) -> int:
    """Whole rounds over the sets of operands, at least `calls` in all; how many. Only they stand in the profile."""
    case = Case(OPS[name], dims, low_dtype(OPS[name]) if clock.device != "cpu" else torch.float32, backward=False)
    with clock.scope():
        bound = bind(case, case.op.fn, operands(case, clock))
        for call in bound:  # compiles, and leaves the last ones in the L2, so that the first are cold again
            call()
        left = tell(name, dims)
        rounds = -(-calls // len(bound))
        clock.release()
        proton.activate(session)
        for call in bound * rounds:
            with proton.scope(f"{name} {dims}", metrics=left):
                call()
        clock.release()  # waits for the device
        proton.deactivate(session)
    return rounds * len(bound)


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("proton", __doc__)
    p.add_argument("ops", nargs="+", metavar="OP")
    p.add_argument("--shape", metavar="T=16,..", help="one of the cards' (default: each one's first)")
    p.add_argument("--calls", type=positive, default=20, help="at least, in whole rounds (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("ops"), help="file without its suffix (default: %(default)s)")
    o = p.parse_args(arguments)

    def run() -> int:
        shapes = {name: shape_of(op_named(name), o.shape) for name in o.ops}
        if missing := [name for name in shapes if not OPS[name].kernels]:
            refuse(f"{', '.join(missing)}: no kernels yet")
        proton = profiler()
        gpu("proton")
        clock = DeviceClock()
        print(in_a_line(where(clock)) + "\n")
        session = proton.start(str(o.out), hook="triton")
        proton.deactivate(session)
        for name, dims in shapes.items():
            print(f"{name} {dims}: {profile(proton, session, name, dims, clock, o.calls)} calls", flush=True)
            clock.release()
        proton.finalize()
        print(f"{o.out}.hatchet: proton-viewer -m time/us,tflop/s,gbyte/s {o.out}.hatchet")
        return 0

    return command("proton", run)


if __name__ == "__main__":
    sys.exit(main())
