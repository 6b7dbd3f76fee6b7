"""Convolution and scan at the ends of what they take: decays of 0 and -inf, steps of nothing, limits, empty sequences,
chunks longer than the row. On references, on interpreted kernels, on a GPU."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import values
from fp64 import fp64  # noqa: F401 (a fixture)
from test_scan import cut, mamba_inputs, mamba_recurrence, recurrence, scan_inputs, without
from there import close, randn, there
from torch import Tensor

pytestmark = pytest.mark.kernels
INF = math.inf

causal_conv1d, conv_block_states, conv_state = map(
    there, (values.kernels.causal_conv1d, values.kernels.conv_block_states, values.kernels.conv_state)
)
ssd_advance, ssd_block, ssd_chunk, ssd_step = map(
    there, (values.kernels.ssd_advance, values.kernels.ssd_block, values.kernels.ssd_chunk, values.kernels.ssd_step)
)
mamba_advance, mamba_block, mamba_step = map(
    there, (values.kernels.mamba_advance, values.kernels.mamba_block, values.kernels.mamba_step)
)
L = 9


def token(kw: dict[str, Any], t: int = 0) -> dict[str, Any]:
    return {k: v[:, t] if k in ("x", "dt", "B", "C", "xBC") else v for k, v in kw.items()}


def check_scan(kw: dict[str, Any], want: tuple[Tensor, Tensor], limit: tuple[float, float] = (0.0, INF)) -> None:
    """Every op of one row against y [L, H, P] and the states before and after every token."""
    ys, states = want
    close(ssd_block(**kw, dt_limit=limit)[0], ys)
    close(ssd_advance(**without(kw, "C", "D"), dt_limit=limit)[0], states[-1])
    for counts in (torch.tensor([4]), torch.tensor([4], dtype=torch.int32)):
        close(ssd_advance(**without(kw, "C", "D"), counts=counts, dt_limit=limit)[0], states[4])
        close(ssd_chunk(**kw, counts=counts, chunk_size=None, dt_limit=limit)[1][0], states[4])
    for Q in (4, 10**12, None):
        y, last, before = ssd_chunk(**kw, chunk_size=Q, dt_limit=limit)
        close(y[0], ys)
        close(last[0], states[-1])
        close(before[0], states[:0] if Q is None else states[0:-1:Q])
    y, state = ssd_step(**token(kw), dt_limit=limit)
    close(y[0], ys[0])
    close(state[0], states[1])


def check_mamba(kw: dict[str, Any], limit: tuple[float, float] = (0.0, INF)) -> None:
    ys, columns, states = mamba_recurrence(kw, 0, limit)
    close(mamba_block(**kw, dt_limit=limit)[0], ys)
    for n, counts in ((-1, None), (4, torch.tensor([4])), (4, torch.tensor([4], dtype=torch.int32))):
        column, state = mamba_advance(**without(kw, "D"), counts=counts, dt_limit=limit)
        close(column[0], columns[n])
        close(state[0], states[n])
    y, column, state = mamba_step(**token(kw), dt_limit=limit)
    close(y[0], ys[0])
    close(column[0], columns[1])
    close(state[0], states[1])


@pytest.mark.parametrize("A", [0.0, -INF])
def test_a_decay_of_nothing_and_of_all(A: float) -> None:
    """exp(0) keeps the state, exp(-inf) drops it: also where tokens past a length or of no chunk have a step of 0."""
    kw = scan_inputs(1, L)
    ends = kw | dict(A=torch.full_like(kw["A"], A))
    check_scan(ends, recurrence(ends, 0))
    kw = mamba_inputs(1, L)
    check_mamba(kw | dict(A=torch.full_like(kw["A"], A)))


@pytest.mark.parametrize("A", [-1.0, -INF])
def test_a_step_of_nothing(A: float) -> None:
    """dt of -inf, or a limit of (0, 0): no token decays the state or adds to it."""
    kw = scan_inputs(1, L)
    kw |= dict(A=torch.full_like(kw["A"], A))
    none = kw | dict(dt=torch.full_like(kw["dt"], -INF))
    H = kw["state"].shape[1]
    C = kw["C"][0].repeat_interleave(H // kw["C"].shape[2], 1)
    ys = torch.einsum("hpn,lhn->lhp", kw["state"][0], C) + kw["D"][:, None] * kw["x"][0]
    states = kw["state"].expand(L + 1, -1, -1, -1)
    check_scan(none, (ys, states))
    check_scan(kw, (ys, states), (0, 0))


@pytest.mark.parametrize("limit", [(0, 1), (0.25, 0.25), [0.0, INF]], ids=str)
def test_limits_of_any_numbers(limit: Any) -> None:
    kw = scan_inputs(1, L)
    check_scan(kw, recurrence(kw, 0, tuple(limit)), limit)
    check_mamba(mamba_inputs(1, L), limit)


def test_an_endless_step_is_limited() -> None:
    kw = scan_inputs(1, L)
    endless, longest = (kw | dict(dt=torch.full_like(kw["dt"], value)) for value in (INF, 100.0))
    check_scan(endless, recurrence(longest, 0, (0.0, 2.0)), (0.0, 2.0))


def test_no_state_is_a_state_of_zeros() -> None:
    kw = scan_inputs(2, L)
    none, zeros = kw | dict(state=None), kw | dict(state=torch.zeros_like(kw["state"]))
    counts = torch.tensor([L, 0])
    assert torch.equal(ssd_block(**none), ssd_block(**zeros))
    for n in (None, counts):
        assert torch.equal(
            ssd_advance(**without(none, "C", "D"), counts=n), ssd_advance(**without(zeros, "C", "D"), counts=n)
        )
        for got, want in zip(ssd_chunk(**none, counts=n), ssd_chunk(**zeros, counts=n), strict=True):
            assert torch.equal(got, want)
    x, weight, state = randn(2, L, 3), randn(3, 4), torch.zeros(2, 3, 4)
    assert torch.equal(causal_conv1d(x, weight), causal_conv1d(x, weight, None, state))
    for n in (None, counts):
        assert torch.equal(conv_state(x, n, None, kernel_size=4), conv_state(x, n, state, kernel_size=4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("entries", [[0, 0, 4, 4, 4, 9, 9], [0, 4], [0], [0, 0]], ids=str)
def test_packed_sequences_may_be_empty_and_leave_a_tail(entries: list[int], dtype: torch.dtype) -> None:
    """Two equal entries are an empty sequence, what lies behind the last is one of its own."""
    kw, cu_seqlens = scan_inputs(1, L) | dict(state=None), torch.tensor(entries, dtype=dtype)
    parts = [(a, b) for a, b in pairwise(sorted({*entries, L})) if a < b]
    alone = [ssd_block(**cut(kw, slice(None), slice(a, b))) for a, b in parts]
    for Q in (2, 64, None):
        close(ssd_chunk(**kw, chunk_size=Q, cu_seqlens=cu_seqlens)[0], torch.cat(alone, 1))
    x, weight = randn(1, L, 3), randn(3, 4)
    alone = [causal_conv1d(x[:, a:b], weight) for a, b in parts]
    close(causal_conv1d(x, weight, cu_seqlens=cu_seqlens), torch.cat(alone, 1))
    states = conv_block_states(x, block_size=2, kernel_size=3, cu_seqlens=cu_seqlens)
    for i in range(5):
        start = max(a for a, _ in parts if a <= 2 * i)
        close(states[:, i], conv_state(x[:, start : 2 * i], None, None, kernel_size=3))


@pytest.mark.parametrize("b,length", [(0, 3), (2, 0), (0, 0)])
def test_no_rows_and_no_tokens(b: int, length: int) -> None:
    kw = scan_inputs(b, length)
    y, last, before = ssd_chunk(**kw, chunk_size=4)
    assert y.shape == kw["x"].shape and torch.equal(ssd_block(**kw), y)
    assert before.shape == (b, 1, *last.shape[1:])
    assert length or (torch.equal(last, kw["state"]) and torch.equal(before[:, 0], kw["state"]))
    assert torch.equal(ssd_advance(**without(kw, "C", "D")), last)
    packed = ssd_chunk(**kw | dict(state=None), chunk_size=4, cu_seqlens=torch.tensor([0, 0]))
    assert packed[0].shape == y.shape and not packed[1].any()
    kw = mamba_inputs(b, length)
    assert mamba_block(**kw).shape == y.shape
    column, state = mamba_advance(**without(kw, "D"))
    assert length or (torch.equal(column, kw["conv_state"]) and torch.equal(state, kw["state"]))
    x = randn(b, length, 3)
    assert causal_conv1d(x, randn(3, 4), cu_seqlens=torch.tensor([0, b * length])).shape == x.shape
    assert conv_block_states(x, block_size=2, kernel_size=3).shape == (b, -(-length // 2), 3, 3)
