"""What `make sanitize` is for, in kernels of a few lines: faults that come out right in the interpreter are named with
the kernel's line, and what is right passes."""

import pytest
import torch
import triton
import triton.language as tl
from parity import SANITIZE
from torch import Tensor

pytestmark = pytest.mark.sanitize
TTSEM = pytest.mark.skipif(not SANITIZE, reason="runs in ttsem: make sanitize")


@triton.jit
def _double_kernel(x_ptr, y_ptr, n, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=(i < n) | (not MASK_LOAD), other=0.0)
    x = (2 * x.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + i, x, mask=(i < n) | (not MASK_STORE))


@triton.jit
def _total_kernel(x_ptr, parts_ptr, ticket_ptr, y_ptr, LAST: tl.constexpr, SEM: tl.constexpr):
    """y = sum of x, one number a program, added up by the last one: by its ticket, or by its place in the grid."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(parts_ptr + program, tl.load(x_ptr + program))
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem=SEM)
    if (ticket if LAST == "ticket" else program) == programs - 1:
        y = 0.0
        for i in range(programs):
            y += tl.load(parts_ptr + i)
        tl.store(y_ptr, y)


@triton.jit
def _first_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def _quotient_kernel(x_ptr, y_ptr, n):
    tl.store(y_ptr, tl.load(x_ptr) // n)


def total(last: str, sem: str = "acq_rel") -> Tensor:
    x, y = torch.arange(4.0), torch.empty(1)
    _total_kernel[(4,)](x, torch.empty(4), torch.zeros(1, dtype=torch.int32), y, LAST=last, SEM=sem)
    return y


@TTSEM
@pytest.mark.parametrize("load,store", [(False, True), (True, False)], ids=["read", "write"])
def test_accesses_outside_a_tensor(load: bool, store: bool) -> None:
    x, y = torch.ones(10), torch.ones(10)
    line = r"tl.load\(x_ptr.*reads 6 element\(s\) past" if not load else r"tl.store\(y_ptr.*writes 6 element\(s\) past"
    with pytest.raises(Exception, match=rf"_double_kernel.*test_sanitize.py:\d+: .*{line}"):
        _double_kernel[(2,)](x, y, 10, MASK_LOAD=load, MASK_STORE=store, BLOCK=8)
    _double_kernel[(2,)](x, y, 10, MASK_LOAD=True, MASK_STORE=True, BLOCK=8)
    assert torch.equal(y, 2 * x)


@TTSEM
def test_programs_that_write_the_same_element() -> None:
    with pytest.raises(Exception, match=r"_first_kernel.*test_sanitize.py:\d+: .* both touch element 0 of `y_ptr`"):
        _first_kernel[(2,)](torch.arange(2.0), torch.zeros(1))
    _first_kernel[(1,)](torch.arange(2.0), torch.zeros(1))


@TTSEM
def test_who_reads_what_others_wrote_needs_a_ticket() -> None:
    assert total("ticket") == 6
    for last, sem in (("place", "acq_rel"), ("ticket", "relaxed")):
        with pytest.raises(Exception, match=r"_total_kernel.*test_sanitize.py:\d+: .* of `parts_ptr`.*not ordered"):
            total(last, sem)


@TTSEM
def test_operations_without_a_result() -> None:
    with pytest.raises(Exception, match=r"_quotient_kernel.*test_sanitize.py:\d+: .*undefined result"):
        _quotient_kernel[(1,)](torch.ones(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 0)


@TTSEM
def test_memory_that_nobody_wrote_is_seen() -> None:
    y = torch.empty(4)
    _double_kernel[(1,)](torch.empty(4), y, 4, MASK_LOAD=True, MASK_STORE=True, BLOCK=4)
    assert y.isnan().all()
    assert torch.empty(4, dtype=torch.int32).eq(2**31 - 1).all()


@TTSEM
def test_bf16_is_rounded_to_the_nearest_even() -> None:
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1e-39, 3.4e38]) / 2
    y = torch.empty(5, dtype=torch.bfloat16)
    _double_kernel[(1,)](x, y, 5, MASK_LOAD=True, MASK_STORE=True, BLOCK=8)
    assert torch.equal(y, (2 * x).bfloat16()) and y[:3].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]
