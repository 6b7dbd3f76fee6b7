"""Convolution and scan against tests/literal, token by token in fp64, at every length up to two blocks.

A block is its tokens one by one, two segments are the whole, packed sequences are separate ones, padding does not show.
On references, on interpreted kernels in fp64, and on a GPU in fp32. 5 s on one core, 45 s interpreted.
"""

import math
from itertools import pairwise
from typing import Any

import literal
import pytest
import torch
import values
from fp64 import fp64  # noqa: F401 (a fixture)
from there import DTYPE, close, randn, there
from torch import Tensor

from tt_kernels.runtime.launch import INTERPRET, ON_CPU

S = 16  # block size
NAN = math.nan
pytestmark = pytest.mark.kernels
LIMITS = [(0.0, math.inf), (0.1, 0.5)]

causal_conv1d, conv_block_states, conv_state = map(
    there, (values.kernels.causal_conv1d, values.kernels.conv_block_states, values.kernels.conv_state)
)
ssd_advance, ssd_block, ssd_chunk, ssd_step = map(
    there, (values.kernels.ssd_advance, values.kernels.ssd_block, values.kernels.ssd_chunk, values.kernels.ssd_step)
)
mamba_advance, mamba_block, mamba_step = map(
    there, (values.kernels.mamba_advance, values.kernels.mamba_block, values.kernels.mamba_step)
)


# Convolution


def conv_inputs(B: int, L: int, C: int = 5, K: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return randn(B, L, C), randn(C, K), randn(C), randn(B, C, K)


def test_conv_at_every_length() -> None:
    x, weight, bias, state = conv_inputs(2, 2 * S)
    for b in range(2):
        column, want = state[b], []
        for t in range(2 * S):
            y, column = literal.conv_step(column, x[b, t], weight[:, None], bias)
            want.append(literal.silu(y))
            close(causal_conv1d(x[b : b + 1, : t + 1], weight, bias, state[b : b + 1])[0], torch.stack(want))
            close(conv_state(x[b : b + 1, : t + 1], None, state[b : b + 1], kernel_size=4)[0], column)
    rows, counts = all_lengths(dict(x=x[:1], state=state[:1]))  # all at once, and NaN past each
    dirty = rows["x"].masked_fill(torch.arange(2 * S)[None, :, None] >= counts[:, None, None], NAN)
    after = conv_state(dirty, counts, rows["state"], kernel_size=4)
    columns = torch.cat([state[0], x[0].T], -1)
    assert torch.equal(after, torch.stack([columns[:, n : n + 4] for n in range(2 * S + 1)]))


def test_conv_in_two_segments_and_token_by_token() -> None:
    x, weight, bias, state = conv_inputs(2, 9)
    whole = causal_conv1d(x, weight, bias, state)
    for cuts in ([4, 5], [1] * 9, [1, 8]):
        now, parts = state, []
        for part in x.split(cuts, 1):
            parts.append(causal_conv1d(part, weight, bias, now))
            now = conv_state(part, None, now, kernel_size=4)
        close(torch.cat(parts, 1), whole)
        close(now, conv_state(x, None, state, kernel_size=4))
    short = causal_conv1d(x, weight, bias, state[..., 1:])  # the oldest column is not read
    close(short, whole)


def test_conv_packed_and_block_states() -> None:
    x, weight, bias, _ = conv_inputs(1, 20)
    cuts, cu_seqlens = [8, 4, 8], torch.tensor([0, 8, 12, 20], dtype=torch.int32)
    alone = [causal_conv1d(part, weight, bias) for part in x.split(cuts, 1)]
    close(causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens), torch.cat(alone, 1))
    states = [conv_block_states(part, block_size=4, kernel_size=4) for part in x.split(cuts, 1)]
    close(conv_block_states(x, block_size=4, kernel_size=4, cu_seqlens=cu_seqlens), torch.cat(states, 1))
    for i in range(5):
        want = conv_state(x[:, : 4 * i], None, None, kernel_size=4)
        close(conv_block_states(x, block_size=4, kernel_size=4)[:, i], want)


# Scan


# An interpreted kernel takes 5 ms for each row and head: two heads there.
HEADS = dict(H=2, G=1) if ON_CPU else dict(H=4, G=2)


def scan_inputs(
    b: int, L: int, H: int = HEADS["H"], P: int = 3, G: int = HEADS["G"], N: int = 5, scale: float = 1e3
) -> dict[str, Tensor]:
    """A state a thousand times the tokens, and time steps that make it forget at very different speeds."""
    return dict(
        x=randn(b, L, H, P),
        dt=2 * randn(b, L, H),
        A=-torch.linspace(0.01, 16, H).to(DTYPE).double(),
        B=randn(b, L, G, N),
        C=randn(b, L, G, N),
        D=randn(H),
        dt_bias=randn(H),
        state=(scale * randn(b, H, P, N)).to(DTYPE).double(),
    )


def recurrence(kw: dict[str, Any], b: int, limit: tuple[float, float] = (0.0, math.inf)) -> tuple[Tensor, Tensor]:
    """y of every token [L, H, P] and the state before and after every token [L + 1, H, P, N]."""
    ys, states = [], [kw["state"][b]]
    for t in range(kw["x"].shape[1]):
        dt = literal.softplus(kw["dt"][b, t] + kw["dt_bias"]).clamp(*limit)
        y, state = literal.ssd_step(states[-1], kw["x"][b, t], kw["B"][b, t], kw["C"][b, t], dt, kw["A"], kw["D"])
        ys.append(y)
        states.append(state)
    return torch.stack(ys), torch.stack(states)


def cut(kw: dict[str, Any], *slices: slice) -> dict[str, Any]:
    """Rows and tokens of all that has rows and tokens; the state keeps its rows."""
    rows, tokens = slices
    per_token = {k: kw[k][rows, tokens] for k in ("x", "dt", "B", "C")}
    return kw | per_token | dict(state=None if kw["state"] is None else kw["state"][rows])


def advance(kw: dict[str, Any], counts: Tensor | None = None, **options: Any) -> Tensor:
    return ssd_advance(*(kw[k] for k in ("x", "dt", "A", "B", "dt_bias", "state")), counts, **options)


# Interpreted, those around the edges of chunks and tiles; `all_lengths` has every one, as counts of one launch.
LENGTHS = (1, 2, 3, 6, 7, 8, 14, S - 1, S, S + 1, 21, 2 * S - 1, 2 * S) if ON_CPU else range(1, 2 * S + 1)


def all_lengths(kw: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """One row again and again, and how much of it each is to take: every length from 0 on."""
    counts = torch.arange(2 * S + 1)
    rows = ("x", "dt", "B", "C", "state", "xBC", "conv_state")
    return {k: t.repeat(len(counts), *[1] * (t.dim() - 1)) if k in rows else t for k, t in kw.items()}, counts


@pytest.mark.parametrize("limit", LIMITS)
def test_ssd_block_at_every_length(limit: tuple[float, float]) -> None:
    kw = scan_inputs(1, 2 * S)
    want, _ = recurrence(kw, 0, limit)
    for L in LENGTHS:
        close(ssd_block(**cut(kw, slice(None), slice(L)), dt_limit=limit), want[None, :L])


@pytest.mark.parametrize("limit", LIMITS)
def test_ssd_advance_at_every_length(limit: tuple[float, float]) -> None:
    kw = scan_inputs(1, 2 * S)
    _, states = recurrence(kw, 0, limit)
    rows, counts = all_lengths(kw)
    close(advance(rows, counts, dt_limit=limit), states)
    for L in (1, S, S + 1, 2 * S):
        close(advance(cut(kw, slice(None), slice(L)), dt_limit=limit), states[None, L])


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("Q", [7, S])  # chunks with a rest, and a chunk that the block does not fill
def test_ssd_chunk_at_every_length(limit: tuple[float, float], Q: int) -> None:
    kw = scan_inputs(1, 2 * S)
    want, states = recurrence(kw, 0, limit)
    for L in LENGTHS:
        y, state, before = ssd_chunk(**cut(kw, slice(None), slice(L)), chunk_size=Q, dt_limit=limit)
        close(y, want[None, :L])
        close(state, states[None, L])
        close(before, states[None, 0:L:Q])
    rows, counts = all_lengths(kw)
    y, state, _ = ssd_chunk(**rows, counts=counts, chunk_size=Q, dt_limit=limit)
    close(state, states)
    for L in counts.tolist():
        close(y[L, :L], want[:L])


@pytest.mark.parametrize("limit", LIMITS)
def test_step_after_step_is_the_recurrence(limit: tuple[float, float]) -> None:
    kw = scan_inputs(2, 2 * S)
    state = kw["state"]
    for t in range(2 * S):
        token = {k: kw[k][:, t] for k in ("x", "dt", "B", "C")}
        y, state = ssd_step(**kw | token | dict(state=state), dt_limit=limit)
        for b in range(2):
            ys, states = recurrence(kw, b, limit)
            close(y[b], ys[t])
            close(state[b], states[t + 1])


def test_scan_in_two_segments_and_token_by_token() -> None:
    kw = scan_inputs(2, 11)
    whole, last = ssd_block(**kw), advance(kw)
    for cuts in ([0, 4, 11], [0, 1, 11], list(range(12))):
        state, parts = kw["state"], []
        for start, end in pairwise(cuts):
            part = cut(kw, slice(None), slice(start, end)) | dict(state=state)
            parts.append(ssd_block(**part))
            state = advance(part)
        close(torch.cat(parts, 1), whole)
        close(state, last)


def test_scan_does_not_see_past_a_row() -> None:
    kw = scan_inputs(3, 10)
    counts = torch.tensor([10, 3, 0])
    past = torch.arange(10) >= counts[:, None]
    dirty = kw | {k: kw[k].clone() for k in ("x", "dt", "B", "C")}
    for k in ("x", "dt", "B", "C"):
        dirty[k][past] = NAN
    for Q in (16,) if ON_CPU else (4, 16):
        y, state, _ = ssd_chunk(**dirty, counts=counts, chunk_size=Q)
        for b, n in enumerate(counts.tolist()):
            alone = cut(kw, slice(b, b + 1), slice(n))
            close(y[b : b + 1, :n], ssd_block(**alone))
            close(state[b : b + 1], advance(alone))
            close(advance(dirty, counts)[b : b + 1], advance(alone))
    assert torch.equal(advance(dirty, counts)[2], kw["state"][2])


def test_scan_of_packed_sequences() -> None:
    kw = scan_inputs(1, 20) | dict(state=None)
    ends = [0, 8, 9, 12, 20]
    alone = [ssd_chunk(**cut(kw, slice(None), slice(a, b)), chunk_size=4) for a, b in pairwise(ends)]
    for Q in (3, 4, 64):
        y, state, _ = ssd_chunk(**kw, chunk_size=Q, cu_seqlens=torch.tensor(ends))
        close(y, torch.cat([part[0] for part in alone], 1))
        close(state, alone[-1][1])
    whole = [0, 8, 12, 20]  # as training packs: every sequence is whole blocks
    parts = [ssd_chunk(**cut(kw, slice(None), slice(a, b)), chunk_size=4) for a, b in pairwise(whole)]
    before = ssd_chunk(**kw, chunk_size=4, cu_seqlens=torch.tensor(whole))[2]
    close(before, torch.cat([part[2] for part in parts], 1))


def test_state_after_any_token() -> None:
    """From the states before the chunks, as the docstring says: rows, and the ends of packed sequences."""
    kw, Q, ends = scan_inputs(1, 30) | dict(state=None), 8, [0, 5, 8, 13, 30]
    before = ssd_chunk(**kw, chunk_size=Q, cu_seqlens=torch.tensor(ends))[2]
    for start, end in pairwise(ends):
        s = max(start, (end - 1) // Q * Q)
        seed = before[:, s // Q] if s % Q == 0 else None
        want = advance(cut(kw, slice(None), slice(start, end)))
        close(advance(cut(kw, slice(None), slice(s, end)) | dict(state=seed)), want)
    kw = scan_inputs(1, 30)
    before, (_, states) = ssd_chunk(**kw, chunk_size=Q)[2], recurrence(kw, 0)
    for n in (3, 8, 21, 30):
        s = (n - 1) // Q * Q
        close(advance(cut(kw, slice(None), slice(s, n)) | dict(state=before[:, s // Q])), states[None, n])


def test_scan_keeps_its_state_in_fp32() -> None:
    kw = {k: t.float() for k, t in scan_inputs(1, S).items()}
    half = torch.float16 if INTERPRET else torch.bfloat16
    narrow = kw | {k: kw[k].to(half) for k in ("x", "dt", "B", "C")}
    assert ssd_block(**narrow).dtype == half and advance(narrow).dtype == torch.float32
    wide = {k: t.double() for k, t in narrow.items() if k not in ("C", "D")}
    # 16 decays and a sum of 16 terms in fp32; a bf16 state would be off by 4e-3.
    torch.testing.assert_close(
        advance(narrow).double(), values.reference.ssd_advance(**wide), rtol=1e-5, atol=1e-5 * 1e3
    )


# Both together


def mamba_inputs(b: int, L: int, scale: float = 1.0, K: int = 4, **dims: int) -> dict[str, Tensor]:
    """What `mamba_block` takes, by name: xBC and dt are views of one projection."""
    scan = scan_inputs(b, L, scale=scale, **dims)
    (H, P), (G, N) = scan["x"].shape[2:], scan["B"].shape[2:]
    C = H * P + 2 * G * N
    projected = randn(b, L, 3 + C + H)
    states = dict(conv_state=randn(b, C, K), state=scan["state"])
    convolution = dict(weight=randn(C, K), bias=randn(C))
    raw = dict(xBC=projected[..., 3 : 3 + C], dt=projected[..., 3 + C :])
    return raw | convolution | {k: scan[k] for k in ("A", "D", "dt_bias")} | states


def mamba_recurrence(
    kw: dict[str, Tensor], b: int, limit: tuple[float, float] = (0.0, math.inf)
) -> tuple[Tensor, Tensor, Tensor]:
    """y of every token [L, H, P], and conv and SSM state before and after every token [L + 1, ...]."""
    ys, columns, states = [], [kw["conv_state"][b]], [kw["state"][b]]
    H, P, N = states[0].shape
    for t in range(kw["xBC"].shape[1]):
        out, column = literal.conv_step(columns[-1], kw["xBC"][b, t], kw["weight"][:, None], kw["bias"])
        out = literal.silu(out)
        x, (B, C) = out[: H * P].view(H, P), out[H * P :].view(2, -1, N)
        dt = literal.softplus(kw["dt"][b, t] + kw["dt_bias"]).clamp(*limit)
        y, state = literal.ssd_step(states[-1], x, B, C, dt, kw["A"], kw["D"])
        ys.append(y)
        columns.append(column)
        states.append(state)
    return torch.stack(ys), torch.stack(columns), torch.stack(states)


def without(kw: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v for k, v in kw.items() if k not in names}


def first(kw: dict[str, Tensor], start: int, end: int, **states: Tensor) -> dict[str, Tensor]:
    return kw | {k: kw[k][:, start:end] for k in ("xBC", "dt")} | states


@pytest.mark.parametrize("limit", LIMITS)
def test_mamba_block_at_every_length(limit: tuple[float, float]) -> None:
    kw = mamba_inputs(1, 2 * S)
    want, _, _ = mamba_recurrence(kw, 0, limit)
    for L in LENGTHS:
        close(mamba_block(**first(kw, 0, L), dt_limit=limit), want[None, :L])


@pytest.mark.parametrize("limit", LIMITS)
def test_mamba_advance_at_every_length(limit: tuple[float, float]) -> None:
    kw = mamba_inputs(1, 2 * S)
    _, columns, states = mamba_recurrence(kw, 0, limit)
    rows, counts = all_lengths(without(kw, "D"))
    column, state = mamba_advance(**rows, counts=counts, dt_limit=limit)
    close(column, columns)
    close(state, states)
    for L in (1, S, S + 1, 2 * S):
        column, state = mamba_advance(**without(first(kw, 0, L), "D"), dt_limit=limit)
        close(column, columns[None, L])
        close(state, states[None, L])


def test_mamba_block_is_its_tokens_one_by_one_and_its_segments() -> None:
    kw = mamba_inputs(2, 11)
    whole, last = mamba_block(**kw), mamba_advance(**without(kw, "D"))
    for cuts in ([0, 4, 11], [0, 1, 11]):
        parts, now = [], (kw["conv_state"], kw["state"])
        for start, end in pairwise(cuts):
            part = first(kw, start, end, conv_state=now[0], state=now[1])
            parts.append(mamba_block(**part))
            now = mamba_advance(**without(part, "D"))
        close(torch.cat(parts, 1), whole)
        close(now[0], last[0])
        close(now[1], last[1])
    now = kw["conv_state"], kw["state"]
    for t in range(11):
        token = kw | dict(xBC=kw["xBC"][:, t], dt=kw["dt"][:, t], conv_state=now[0], state=now[1])
        y, *now = mamba_step(**token)
        close(y, whole[:, t])
    close(now[0], last[0])
    close(now[1], last[1])


def test_mamba_advance_does_not_see_past_a_row() -> None:
    kw = without(mamba_inputs(4, 20), "D")
    counts = torch.tensor([20, 17, 3, 0])
    past = torch.arange(20) >= counts[:, None]
    dirty = kw | {k: kw[k].masked_fill(past[..., None], NAN) for k in ("xBC", "dt")}
    column, state = mamba_advance(**dirty, counts=counts)
    for b, n in enumerate(counts.tolist()):
        _, columns, states = mamba_recurrence(kw | dict(D=torch.zeros_like(kw["A"])), b)
        close(column[b], columns[n])
        close(state[b], states[n])


def test_large_states_stay_exact_in_fp32() -> None:
    """States of 1e4, as the golden model `large_state` has: fp32 against fp64."""
    low = {k: t.float() for k, t in mamba_inputs(1, S, scale=1e4).items()}
    long = {k: t.float() for k, t in scan_inputs(1, 3 * S, scale=1e4).items()}
    wide, long_wide = ({k: t.double() for k, t in kw.items()} for kw in (low, long))
    token = lambda kw: kw | dict(xBC=kw["xBC"][:, 0], dt=kw["dt"][:, 0])
    pairs = [
        (mamba_block(**low), values.reference.mamba_block(**wide)),
        (mamba_advance(**without(low, "D"))[1], values.reference.mamba_advance(**without(wide, "D"))[1]),
        *zip(mamba_step(**token(low)), values.reference.mamba_step(**token(wide)), strict=True),
        *zip(ssd_chunk(**long, chunk_size=None), values.reference.ssd_chunk(**long_wide, chunk_size=None), strict=True),
    ]
    for got, want in pairs:
        assert got.isfinite().all()
        # Sums of up to 2 S terms, each off by the rounding of its decay, its product and the sum's own: 4 eps of fp32
        # at most for each doubling of terms, 5 of them. TF32 or a 16-bit state would be off by 1e-3.
        largest = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=20 * torch.finfo(torch.float32).eps * largest)


def test_chunks_without_states_between_them() -> None:
    kw = scan_inputs(2, 41)
    y, state, before = ssd_chunk(**kw, chunk_size=16)
    y_alone, state_alone, none = ssd_chunk(**kw, chunk_size=None)
    close(y_alone, y)
    close(state_alone, state)
    assert before.shape[1] == 3 and none.shape == (2, 0, *state.shape[1:])
