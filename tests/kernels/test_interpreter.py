"""What tests/interpreter.py leaves out changes no result."""

import pytest
import torch
import triton
import triton.language as tl

from tt_kernels.runtime.launch import INTERPRET

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not INTERPRET, reason="of Triton's interpreter")]


@triton.jit
def _numbers_kernel(x_ptr, i_ptr, y_ptr, j_ptr, NAN: tl.constexpr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, 2)[None, :]
    x, i = tl.load(x_ptr + tl.arange(0, 4)), tl.load(i_ptr + tl.arange(0, 4))
    at = tl.arange(0, 4)
    # Numbers that are equal and not the same, one after the other.
    tl.store(y_ptr + at, x + 0.0)
    tl.store(y_ptr + 4 + at, x + -0.0)
    tl.store(y_ptr + 8 + at, x + 1)
    tl.store(y_ptr + 12 + at, x + True)
    tl.store(y_ptr + 16 + at, x * NAN)
    tl.store(y_ptr + 20 + at, 1 - x)
    tl.store(y_ptr + 24 + at, x - 1)
    # Operands of one type, of two types, and of two shapes.
    tl.store(y_ptr + 28 + at, x + i)
    tl.store(j_ptr + at, i // 2 + i % 3)
    tl.store(j_ptr + 4 + at, (i.to(tl.uint32) >> 1).to(tl.int32))
    tl.store(j_ptr + 8 + rows * 2 + columns, rows * 10 + columns + i[:, None])


def test_numbers_and_types_stay_what_they_are() -> None:
    x, i = torch.tensor([-0.0, 0.0, 1.5, -3.0]), torch.tensor([-7, -1, 2, 2**31 - 9], dtype=torch.int32)
    for _ in range(2):  # what is kept from the first time
        y, j = torch.empty(8, 4), torch.empty(16, dtype=torch.int32)
        _numbers_kernel[(1,)](x, i, y, j, NAN=float("nan"))
        want = torch.stack((x + 0.0, x + -0.0, x + 1, x + 1, x * torch.nan, 1 - x, x - 1, x + i))
        assert torch.equal(y.view(torch.int32)[:4], want.view(torch.int32)[:4])
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
        assert j[:4].tolist() == [-3 + -1, 0 + -1, 1 + 2, (2**31 - 9) // 2 + (2**31 - 9) % 3]  # C's division
        assert j[4:8].tolist() == [(n % 2**32) >> 1 for n in i.tolist()]
        grid = 10 * torch.arange(4)[:, None] + torch.arange(2) + i[:, None].long()
        assert torch.equal(j[8:].view(4, 2).long(), grid.int().long())
