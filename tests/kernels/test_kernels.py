"""Every kernel by its op's card, against the reference: values and gradients within the derived bound, registration,
memory it must not read. Runs where kernels do: with TRITON_INTERPRET=1, in `make sanitize`, on a GPU."""

from typing import Any

import pytest
import torch
from parity import (
    DEVICE,
    DTYPES,
    HALF,
    KERNELS,
    WITH_KERNELS,
    assert_op_as_good,
    leaves,
    make,
    results,
    values_and_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tt_kernels
from cards import OPS, Op
from tt_kernels.runtime.launch import INTERPRET

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not KERNELS, reason="kernels run in the interpreter, in ttsem or on a GPU"),
]
FIRST_WITH_KERNELS = [pytest.param(op, op.cases[0], id=name) for name, op in OPS.items() if op.kernels]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op,dims", WITH_KERNELS)
def test_matches_reference(op: Op, dims: dict[str, int], dtype: torch.dtype) -> None:
    """In fp32 whatever fresh memory holds, and twice the same bits."""
    assert_op_as_good(op, dims, dtype, twice=dtype == torch.float32)


# Op, dtype of all other floats, and who has one of its own.
FULL, WIDE = torch.float32, torch.float64
MIXED = [
    ("rms_norm", HALF, dict(weight=FULL)),
    ("rms_norm", FULL, dict(weight=HALF)),
    ("rms_norm", FULL, dict(weight=WIDE)),
    ("modulated_rms_norm", HALF, dict(weight=FULL)),
    ("modulated_rms_norm", FULL, dict(weight=HALF, branch=HALF)),
    ("modulated_rms_norm", FULL, dict(weight=WIDE)),
    ("modulated_rms_norm", WIDE, dict(weight=FULL, gate=FULL)),
    ("modulated_rms_norm", HALF, dict(shift=FULL, scale=FULL, gate=FULL)),
    ("modulated_rms_norm", HALF, dict(branch=FULL)),
    ("modulated_rms_norm", FULL, dict(shift=WIDE, scale=HALF, branch=WIDE, gate=HALF)),
    ("gated_group_norm", HALF, dict(weight=FULL)),
    ("gated_group_norm", FULL, dict(x=HALF)),
    ("gated_group_norm", HALF, dict(x=FULL)),
    ("gated_group_norm", FULL, dict(weight=WIDE)),
    ("gated_group_norm", FULL, dict(z=WIDE)),
    ("experts", HALF, {"routing.topk_weights": HALF}),
    ("experts", FULL, {"routing.topk_weights": HALF}),
    ("experts", FULL, {"routing.topk_weights": WIDE}),
    ("experts", HALF, {"shared_weight": FULL}),
    ("experts", FULL, {"shared_weight": HALF}),
    ("experts", FULL, {"shared_weight": WIDE}),
    ("route", HALF, dict(weight=HALF, bias=HALF)),
    ("route", FULL, dict(weight=WIDE)),
    ("route", FULL, dict(bias=WIDE)),
]


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "name,dtype,own,case",
    [
        pytest.param(name, dtype, own, case, id=f"{name}-{dtype}-{'-'.join(f'{k}_{d}' for k, d in own.items())}-{case}")
        for name, dtype, own in MIXED
        if INTERPRET or WIDE not in (dtype, *own.values())
        for case in range(3)
        if own.keys() <= leaves(make(OPS[name], OPS[name].cases[case], dtype)).keys()
    ],
)
def test_mixed_dtypes_match_reference(name: str, dtype: torch.dtype, own: dict[str, torch.dtype], case: int) -> None:
    """Dtypes of results and of sums are those that the reference has, also where arguments differ."""
    assert_op_as_good(OPS[name], OPS[name].cases[case], dtype, own)


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 kernels exist only in the interpreter")
def test_experts_are_summed_in_the_dtype_of_weights() -> None:
    """Two equal experts with weights that differ by 2^-30, which fp32 does not see beside 1."""
    x, up, down = torch.ones(2, 4), torch.ones(2, 3, 4), torch.ones(2, 4, 3)
    weights = torch.tensor([[1 + 2**-30, -1.0]] * 2, dtype=torch.float64)
    y = tt_kernels.experts(
        x, tt_kernels.Routing(torch.tensor([[0, 1]] * 2), weights), tt_kernels.ExpertWeights(up, down)
    )
    assert torch.equal(y, torch.full((2, 4), 48 * 2.0**-30))


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 kernels exist only in the interpreter")
def test_experts_add_the_shared_one_in_the_dtype_of_its_weight() -> None:
    x, one = torch.ones(2, 4), tt_kernels.ExpertWeights(torch.ones(3, 4), torch.ones(4, 3))
    routing = tt_kernels.Routing(torch.zeros(2, 1, dtype=torch.long), -torch.ones(2, 1))
    every = tt_kernels.ExpertWeights(one.up[None], one.down[None])
    weight = torch.tensor([1 + 2**-30, 2.0], dtype=torch.float64)
    y = tt_kernels.experts(x, routing, every, shared=one, shared_weight=weight)
    assert torch.equal(y, torch.tensor([[48 * 2.0**-30], [48.0]]).expand(2, 4))


@pytest.mark.parametrize("name", ["conv_advance", "ssd_advance", "ssd_chunk", "mamba_advance", "mamba_extend"])
def test_counts_are_cut_to_the_row(name: str) -> None:
    """A kernel cannot refuse what it would have to wait for: below 0 counts as 0, above L as L."""
    op, B = OPS[name], "B" if name == "conv_advance" else "b"
    kwargs, L = make(op, op.cases[0] | {B: 2}, torch.float32), op.cases[0]["L"]
    wild, cut = (results(op, op.fn, kwargs | dict(counts=torch.tensor(n).to(DEVICE))) for n in ([L + 2, -3], [L, 0]))
    assert all(torch.equal(wild[written], cut[written]) for written in op.writes)


@pytest.mark.parametrize("argument", ["A", "dt"])
@pytest.mark.parametrize("name", [name for name in OPS if name.startswith(("ssd_", "mamba_"))])
def test_decay_does_not_hide_a_nan(name: str, argument: str) -> None:
    """Limits, and the smallest decay that counts, are no way for it to become a number."""
    op = OPS[name]
    kwargs = make(op, op.cases[0], torch.float32) | dict(dt_limit=(0.01, 0.1))
    if "counts" in kwargs:
        kwargs["counts"] = None
    (kwargs["weights"].A if argument == "A" and "weights" in kwargs else kwargs[argument])[..., 1] = float("nan")
    got, want = (results(op, fn, kwargs) for fn in (op.fn, op.reference))
    assert all(torch.equal(got[key].isnan(), want[key].isnan()) for key in want)
    assert any(t.isnan().any() for t in want.values())


class Calls(TorchDispatchMode):
    """The registered ops that run, and what with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "tt":
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.seen.setdefault(function, copies)
        return function(*args, **(kwargs or {}))


# Its first case has all arguments.
WITHOUT_OPTIONS = pytest.param(OPS["experts"], OPS["experts"].cases[1], id="experts, no shared_weight")


@pytest.mark.parametrize("op,dims", [*FIRST_WITH_KERNELS, WITHOUT_OPTIONS])
def test_registered_ops_pass_opcheck(op: Op, dims: dict[str, int]) -> None:
    calls = Calls()
    with calls:
        values_and_gradients(op, op.fn, make(op, dims, torch.float32))
    assert calls.seen, "it runs no registered op"
    for function, args in calls.seen.items():
        if function.__name__.partition(".")[0] in OPS.keys() - {op.fn.__name__}:
            continue  # another op's, which its own case checks
        torch.library.opcheck(function, args)
        turned = tuple(a.mT.contiguous().mT if isinstance(a, Tensor) and a.dim() > 1 else a for a in args)
        torch.library.opcheck(function, turned, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op,dims", FIRST_WITH_KERNELS)
def test_nothing_falls_back(op: Op, dims: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of an op with kernels calls a reference."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a reference ran")

    for name in OPS:
        monkeypatch.setattr(tt_kernels.reference, name, fail)
    values_and_gradients(op, op.fn, make(op, dims, torch.float32))


@pytest.mark.skipif(not INTERPRET, reason="bf16 is right on a GPU")
def test_the_interpreter_refuses_bf16() -> None:
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="rms_norm: Triton's interpreter computes bf16 wrongly"):
        tt_kernels.rms_norm(x, x[0])


@pytest.mark.skipif(DEVICE != "cuda", reason="fp64 is right in the interpreter")
def test_a_gpu_refuses_fp64() -> None:
    x = torch.ones(2, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="rms_norm: no fp64 kernel on a GPU"):
        tt_kernels.rms_norm(x, x[0])


def test_cards_name_kernels() -> None:
    assert all(name.startswith("_") and name.endswith("_kernel") for op in OPS.values() for name in op.kernels)
    assert all(set(op.tensor_cores) <= set(op.kernels) for op in OPS.values())
