"""`python -m profiling.proton OP ...`: Triton's own profiler on ops at their card's shapes, flops and bytes with it.

Writes a .hatchet file that proton-viewer shows as a tree of op, kernel, with time, TFLOP/s and TB/s:
  proton-viewer -m time/us,tflop/s,gbyte/s ops.hatchet
Every op runs in a scope that carries what its card says it cannot do without, so rates are of that, not of what a
kernel did. Kernels are named with their grid.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.ops import low_dtype
from tt_kernels import OPS

from .common import Refused, call_of, command, gpu, launched, op_named, parser, refuse, shape_of


def profiler() -> Any:
    """Triton's proton, where this Triton was built with it."""
    try:
        import triton.profiler as proton
    except Exception as error:
        raise Refused(f"this Triton has no proton: {error}") from error
    return proton


def name_launches(name: str, dims: dict[str, int]) -> None:
    """Have the kernels of an op tell proton their grid with their name. What a launcher passes is untouched."""
    for kernel in launched(OPS[name], dims):
        kernel.launch_metadata = lambda grid, metadata, args: {"name": f"{metadata.name} {tuple(grid)}"}


def work(name: str, dims: dict[str, int]) -> dict[str, int]:
    """What a call cannot do without, as proton's metrics."""
    op = OPS[name]
    flops, moved = op.cost(low_dtype(op).itemsize, **dims)
    return {"flops": flops, "bytes": moved}


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("proton", __doc__)
    p.add_argument("ops", nargs="+", metavar="OP")
    p.add_argument("--shape", metavar="T=16,..", help="one of the cards' (default: each one's first)")
    p.add_argument("--calls", type=int, default=20, help="default: %(default)s")
    p.add_argument("--out", type=Path, default=Path("ops"), help="file without its suffix (default: %(default)s)")
    o = p.parse_args(arguments)

    def run() -> int:
        shapes = {name: shape_of(op_named(name), o.shape) for name in o.ops}
        if missing := [name for name in shapes if not OPS[name].kernels]:
            refuse(f"{', '.join(missing)}: no kernels yet")
        proton = profiler()
        gpu("proton")
        for name, dims in shapes.items():
            name_launches(name, dims)
        calls = {name: call_of(OPS[name], dims, "cuda") for name, dims in shapes.items()}
        for call in calls.values():  # compile outside of the profile
            call()
        torch.cuda.synchronize()
        proton.start(str(o.out), hook="triton")
        for name, call in calls.items():
            for _ in range(o.calls):
                with proton.scope(f"{name} {shapes[name]}", metrics=work(name, shapes[name])):
                    call()
        torch.cuda.synchronize()
        proton.finalize()
        print(f"{o.out}.hatchet: proton-viewer -m time/us,tflop/s,gbyte/s {o.out}.hatchet")
        return 0

    return command("proton", run)


if __name__ == "__main__":
    sys.exit(main())
