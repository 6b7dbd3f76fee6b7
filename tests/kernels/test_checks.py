"""What ops share to check their arguments: sizes by name, products, and leaving it out."""

import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

import tt_kernels
from tt_kernels import reference
from tt_kernels.runtime import checks
from tt_kernels.runtime.launch import ON_CPU, recording

pytestmark = pytest.mark.kernels


def test_skip_checks_skips_them() -> None:
    with pytest.warns(DeprecationWarning, match="skip_checks"), tt_kernels.trusted():
        checks.check("t", a=(torch.ones(2), "A B"))
    with tt_kernels.skip_checks(), tt_kernels.skip_checks():
        checks.check("t", a=(torch.ones(2), "A B"))
    with pytest.raises(ValueError, match="t: a is"):
        checks.check("t", a=(torch.ones(2), "A B"))


def test_check_remembers_what_passed_and_nothing_else() -> None:
    good, bad = torch.ones(2, 3), torch.ones(3, 3)
    for _ in range(2):
        checks.check("t", a=(good, "A B"), b=(good, "A B"), c=(None, "A"))
        with pytest.raises(ValueError, match=r"t: b has A=3, but a has A=2"):
            checks.check("t", a=(good, "A B"), b=(bad, "A B"), c=(None, "A"))
    checks.check("t", a=(torch.ones(2, 1, 3), "* B"), b=(torch.ones(2, 1), "*"), c=(torch.ones(2, 1, 5, 3), "* A B"))


def test_products_are_compared() -> None:
    """A size named by an expression is no label: T*K of what other arguments bind, and sequences+1 binds sequences."""
    x, ids = torch.ones(5, 3), torch.ones(5, 2).long()
    for good in (torch.ones(10), None):
        checks.check("t", x=(x, "T D"), ids=(ids, "T K", int), order=(good, "T*K"))
    for size in (6, 20):
        with pytest.raises(ValueError, match=rf"^t: order has {size} elements, expected T\*K=10 \(T=5, K=2\)$"):
            checks.check("t", order=(torch.ones(size), "T*K"), x=(x, "T D"), ids=(ids, "T K", int))
    checks.check("t", a=(torch.ones(4), "S+1"), b=(torch.ones(3), "S"))
    with pytest.raises(ValueError, match=r"^t: b has S=4, but a has S=3$"):
        checks.check("t", a=(torch.ones(4), "S+1"), b=(torch.ones(4), "S"))
    with pytest.raises(ValueError, match=r"^t: a is \[0\], expected \[S\+1\]$"):
        checks.check("t", a=(torch.ones(0), "S+1"))


@pytest.mark.skipif(ON_CPU, reason="kernels run on the CPU here")
def test_ops_inside_skip_checks_ask_nothing_where_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded is launched all the same, and what is traced is the op."""
    (x, z), weight = torch.randn(2, 2, 8), torch.ones(8)
    want = reference.gated_group_norm(x, z, weight, groups=2)
    asked: list[str] = []
    module = sys.modules["tt_kernels.norm.gated_group_norm"]
    asks = module.takes_kernel  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "takes_kernel", lambda op, *tensors: asked.append(op) or asks(op, *tensors))
    with tt_kernels.skip_checks():
        assert torch.equal(tt_kernels.gated_group_norm(x, z, weight, groups=2), want) and not asked
        with recording(90) as launches:
            tt_kernels.gated_group_norm(x, z, weight, groups=2)
        assert len(launches) == 1 and len(asked) == 1
    assert torch.equal(tt_kernels.gated_group_norm(x, z, weight, groups=2), want) and len(asked) == 2


def test_numbers_of_other_types_are_numbers() -> None:
    """Without a warning of theirs that the bounds of a Python float are beyond their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (np.float32(30), np.float16(0.5), np.int64(3), Fraction(1, 3)):
            assert checks.is_real(number) and checks.as_float(number) == float(number)
        for other in (np.float32("inf"), np.float32("nan"), Fraction(10**400), np.bool_(True), 10**400, "1", None):
            assert not checks.is_real(other)
