"""What tests of ops share: the cards' cases as parameters, where they run, and a whole case held to its reference."""

from functools import partial

import pytest
import torch
from torch import Tensor

from cards import OPS, Op
from tt_kernels import testing
from tt_kernels.runtime.launch import INTERPRET, ON_CPU
from tt_kernels.testing import (
    POOL,
    assert_as_good,
    assert_rms,
    copies_of_written,
    differentiated,
    fresh_memory_filled,
    is_half,
    leaves,
    outputs,
    results,
    values_and_gradients,
    with_leaves,
)
from tt_kernels.testing import widened as double

__all__ = ["assert_as_good", "differentiated", "double", "fresh_memory_filled", "leaves", "make", "outputs"]
__all__ += ["copies_of_written", "results", "values_and_gradients", "with_leaves"]

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU and not ON_CPU else "cpu"
KERNELS = ON_CPU or GPU  # whether ops that have kernels run as such here
SANITIZE = ON_CPU and not INTERPRET  # in ttsem (tools/sanitize.py): for bf16, the other dtypes are the interpreter's
# The interpreter computes bf16 wrongly, a GPU has no fp64 kernels.
DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [torch.bfloat16] if SANITIZE else DTYPES
HALF = torch.bfloat16 if SANITIZE else torch.float16
# At most: results of fewer than POOL / SEEDS elements are left out, other cases of the op have more. An interpreted
# call takes long, and `make sanitize` has the small results too, in bf16.
SEEDS = 3 if INTERPRET else 11

make = partial(testing.make, device=DEVICE)


def case_id(name: str, dims: dict[str, int]) -> str:
    return f"{name}-" + "-".join(f"{k}{v}" for k, v in dims.items())


CASES = [pytest.param(op, dims, id=case_id(name, dims)) for name, op in OPS.items() for dims in op.cases]
FIRST = [pytest.param(op, op.cases[0], id=name) for name, op in OPS.items()]
WITH_KERNELS = [p for p in CASES if p.values[0].kernels]


def assert_op_as_good(
    op: Op, dims: dict[str, int], dtype: torch.dtype, own: dict[str, torch.dtype] | None = None, *, twice: bool = False
) -> None:
    """Hold a case's values and gradients to the reference's; `own`: dtypes of arguments that differ from `dtype`.
    `twice`: and to those of a second run bit for bit, where fresh memory holds NaN, or the largest integer, until a
    kernel writes it."""
    own, cotangents = own or {}, HALF if own else dtype
    pools: dict[str, list[list[Tensor]]] = {}
    for seed in range(2, 2 + SEEDS):
        kwargs = make(op, dims, dtype, seed=seed)
        kwargs = with_leaves(kwargs, {name: t.to(own[name]) for name, t in leaves(kwargs).items() if name in own})
        got = values_and_gradients(op, op.fn, kwargs, cotangents)
        if twice and seed == 2:
            with fresh_memory_filled():
                again = values_and_gradients(op, op.fn, kwargs, cotangents)
            assert all(torch.equal(again[name], got[name]) for name in got), "two runs differ"
        low = values_and_gradients(op, op.reference, kwargs, cotangents)
        high = values_and_gradients(op, op.reference, double(kwargs), cotangents)
        assert set(got) == set(low) == set(high)
        scale = testing.largest(high)
        for name in got:
            wide = got[name].dtype == low[name].dtype == torch.float64 != dtype
            if wide and name in ("dbranch", "drouting.topk_weights", "dshared_weight"):
                # Passed through the dtype of x on its way, as that of the residual and of what experts return.
                got[name], low[name] = got[name].to(dtype), low[name].to(dtype)
            # A gradient is a sum of terms as large as its largest factors, which may cancel: one rounding of those.
            of_terms = 0.0 if name in (*op.outputs, *op.writes) else scale
            assert_as_good(name, got[name], low[name], high[name], of_terms, op.rms)
            if is_half(got[name]) and POOL <= got[name].numel() * SEEDS < POOL * SEEDS:
                pools.setdefault(name, []).append([t.double().flatten() for t in (got[name], low[name], high[name])])
        if all(sum(len(run[0]) for run in runs) >= POOL for runs in pools.values()):
            break
    for name, runs in pools.items():
        assert_rms(name, *(torch.cat(parts) for parts in zip(*runs, strict=True)), op.rms)
