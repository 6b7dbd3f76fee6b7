"""What the tests share that compare two exact ways to the same numbers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def fp64() -> Iterator[None]:
    """fp64 by default, seeded."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    yield
    torch.set_default_dtype(torch.float32)


def close(got: Tensor, want: Tensor) -> None:
    """Two orders of summation differ by a few eps of the largest term, 2e-16 each. 1e-12 leaves room for sums of a
    hundred terms and for factors of 1e3; a wrong element, mask or index shows at 1e-3."""
    assert got.dtype == want.dtype == torch.float64
    largest = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * max(1.0, largest))
