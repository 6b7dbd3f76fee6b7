"""`python -m profiling.one OP`: one op a few times on a GPU and nothing else, for a profiler to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from bench.measure import positive

from .common import call_of, command, gpu, op_named, parser, shape_of


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("one", __doc__)
    p.add_argument("op")
    p.add_argument("--shape", metavar="T=16,..", help="one of the card's (default: its first)")
    p.add_argument("--calls", type=positive, default=4, help="default: %(default)s; the first compiles")
    o = p.parse_args(arguments)

    def run() -> int:
        op = op_named(o.op)
        dims = shape_of(op, o.shape)
        gpu("an op for a profiler")
        call = call_of(op, dims, "cuda")
        for _ in range(o.calls):
            call()
        torch.cuda.synchronize()
        print(f"{o.op} {dims}: {o.calls} calls")
        return 0

    return command("one", run)


if __name__ == "__main__":
    sys.exit(main())
