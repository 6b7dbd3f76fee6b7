"""Sliding windows and soft caps of attention: edges of windows, pages, blocks and splits against the dense formula,
what lies before a window, tanh. References without TRITON_INTERPRET, kernels with it or on a GPU."""

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DEVICE, KERNELS
from test_attention_masks import DTYPE, close
from torch import Tensor

from cards import OPS
from tools.aot import launches
from tt_kernels import causal_attention, context_attention, reference
from tt_kernels.attention import context_attention_kernels, context_attention_launch
from tt_kernels.attention.block_attention import _block
from tt_kernels.attention.context_attention_launch import Splits
from tt_kernels.attention.lang import tanh
from tt_kernels.runtime.launch import INTERPRET

pytestmark = pytest.mark.kernels
PAGE = 64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


def heads(B: int, N: int, P: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads, one KV head."""
    return tuple(t.to(DEVICE, DTYPE) for t in (torch.randn(B, N, 2, P), *torch.randn(2, B, N, 1, P)))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """o and log-sum-exp over the keys [B, S, 1, P] that are seen [B, L, S], in fp64."""
    q, k, v, seen = (t.to(DEVICE, torch.bool if t.dtype == torch.bool else torch.float64) for t in (q, k, v, seen))
    scores = torch.einsum("blhp,bsp->bhls", q, k[:, :, 0]) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.unsqueeze(1), -math.inf)
    o = torch.einsum("bhls,bsp->blhp", scores.softmax(-1), v[:, :, 0])
    return o, scores.logsumexp(-1).transpose(1, 2)


class Rows:
    """Rows of so many cached tokens in shuffled pages, and a block of L behind each."""

    def __init__(self, lengths: list[int], L: int, page_size: int = PAGE):
        B, row = len(lengths), max(1, -(-max(lengths) // page_size))
        self.block, self.lengths, self.page_size = heads(B, L), lengths, page_size
        _, k, v = heads(1, B * row * page_size)
        self.pages = [t.view(B * row, page_size, 1, -1).clone() for t in (k, v)]
        self.table = torch.randperm(B * row).view(B, row).int().to(DEVICE)

    def call(self, op: Any = context_attention, **options: Any) -> Any:
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        return op(*self.block, *self.pages, self.table, lengths, **options)

    def want(self, window: int | None, softcap: float | None, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = self.block
        L, found = q.shape[1], []
        for b, n in enumerate(self.lengths):
            past = [pages[self.table[b].long()].flatten(0, 1)[:n] for pages in self.pages]
            keys, values = (torch.cat([t, own[b]])[None] for t, own in zip(past, (k, v), strict=True))
            at, token = torch.arange(n + L), n + torch.arange(L)[:, None]
            seen = at > token - (n + L if window is None else window)
            if causal:
                seen = seen & (at <= token)
            found.append(dense(q[b : b + 1], keys, values, seen[None], softcap))
        o, lse = zip(*found, strict=True)
        return torch.cat(o), torch.cat(lse)

    def check(self, window: int | None, softcap: float | None, causal: bool) -> None:
        o, lse = self.call(window=window, softcap=softcap, causal=causal, return_lse=True)
        for got, want in zip((o, lse), self.want(window, softcap, causal), strict=True):
            close(got, want)


# ---- on a cache ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, 63, 64, 65, 130, 10**9])
@pytest.mark.parametrize("L", [1, 5])
def test_windows_around_pages_and_blocks(L: int, window: int, causal: bool) -> None:
    Rows([0, 1, 63, 64, 65, 140], L).check(window, None, causal)


@pytest.mark.parametrize(("L", "window"), [(40, 3), (40, 39), (40, 70), (70, 33)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_shorter_than_a_block(L: int, window: int, causal: bool) -> None:
    """Of several tiles of queries: each begins where its own first token's window does."""
    Rows([100, 3], L).check(window, 2.0, causal)


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("window", [4, 30])
def test_small_pages(page_size: int, window: int) -> None:
    Rows([90, 17], 3, page_size).check(window, None, True)


@pytest.mark.parametrize("window", [None, 100, 260, 700])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_splits(window: int | None, softcap: float | None) -> None:
    Rows([700, 130, 0], 2).check(window, softcap, False)


@pytest.mark.skipif(not KERNELS, reason="the reference has no splits")
@pytest.mark.parametrize("fill", [1, 3])
def test_splits_of_a_row_in_a_larger_batch(fill: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_attention_launch, "context_splits", lambda *sizes: Splits(fill, 4, 64))
    Rows([2113, 1024, 300], 2).check(1100, None, True)


def test_a_window_has_the_splits_of_a_context_of_its_size() -> None:
    """However long the context is: programs, and with them the workspace."""

    def grid(S: int, window: int = 0) -> tuple[int, ...]:
        dims = dict(B=1, L=1, Hq=32, Hkv=8, P=128, S=S, window=window, causal=1, shuffled=2)
        return launches(OPS["context_attention"], torch.float16, 90, dims)[0][3]

    assert grid(131072, 449) == grid(512) != grid(131072)
    assert grid(1024, 2000) == grid(1024)


@pytest.mark.skipif(not INTERPRET, reason="counts what an interpreted kernel does")
def test_tiles_before_a_window_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token against 640 others multiplies with 10 tiles of pages, in a window of 70 with two or three."""
    calls: list[int] = []
    cached = context_attention_kernels.cached
    monkeypatch.setattr(context_attention_kernels, "cached", lambda *args: calls.append(1) or cached(*args))
    monkeypatch.setattr(context_attention_launch, "context_splits", lambda *sizes: Splits(1, 1, 64))
    rows, counts = Rows([640], 1), []
    for window in (None, 70, 64, 1):
        calls.clear()
        rows.check(window, None, True)
        counts.append(len(calls))
    tile = 640 // counts[0]
    assert counts[1:] == [-(-(69 + (640 - 69) % tile) // tile), -(-(63 + (640 - 63) % tile) // tile), 0]


def test_what_is_before_every_window_may_be_anything() -> None:
    """NaN in all tokens before the first token's window, in the tile in which it begins too."""
    rows = Rows([200, 70], 3)
    clean = rows.call(window=20, causal=True)
    for b, n in enumerate(rows.lengths):
        for s in range(n - 19):
            for pages in rows.pages:
                pages[rows.table[b, s // PAGE], s % PAGE] = math.nan
    if DEVICE == "cpu" or KERNELS:  # on a GPU the reference adds its masks
        close(rows.call(window=20, causal=True), clean)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_score_is_the_cap() -> None:
    q, k, v = heads(1, 3)
    q[0, 1, 0, 0], k[..., 0] = math.inf, 1.0
    want = q.clone()
    want[0, 1, 0, 0] = 1e6  # at the cap as well
    close(causal_attention(q, k, v, softcap=2.0), causal_attention(want, k, v, softcap=2.0))


# ---- causal, without a cache ----


@pytest.mark.parametrize("N", [1, 31, 33, 100])
@pytest.mark.parametrize("window", [1, 7, 32, 33, 65, 200])
def test_causal(N: int, window: int) -> None:
    q, k, v = heads(1, N)
    seen = torch.ones(1, N, N).tril().triu(1 - window).bool()
    o, lse = dense(q, k, v, seen, None)
    close(causal_attention(q, k, v, window=window), o)
    if KERNELS:
        close(_block(q, k, v, None, 0.5, 1, None, None, window)[1], lse)


@pytest.mark.parametrize("ends", [[0, 40, 80], [0, 1, 2, 35, 80], [0, 32, 48, 80]])
@pytest.mark.parametrize(("window", "softcap"), [(3, None), (33, 1.0), (None, 0.5)])
def test_causal_packed(ends: list[int], window: int | None, softcap: float | None) -> None:
    q, k, v = heads(2, 40)
    at = torch.arange(80).view(2, 40)
    sequence = sum((at >= end).int() for end in ends)
    together = (sequence.unsqueeze(2) == sequence.unsqueeze(1)) & torch.ones(40, 40).tril().bool()
    o, lse = dense(q, k, v, together & torch.ones(40, 40).triu(1 - (window or 40)).bool(), softcap)
    cu_seqlens = torch.tensor(ends, device=DEVICE)
    close(causal_attention(q, k, v, cu_seqlens=cu_seqlens, window=window, softcap=softcap), o)
    if KERNELS:
        close(_block(q, k, v, cu_seqlens, 0.5, 1, None, None, window, softcap)[1], lse)


@pytest.mark.skipif(not KERNELS, reason="the reference has no tiles")
def test_causal_tiles_before_a_window_are_skipped() -> None:
    """A value that is masked, and not skipped, would be NaN: a weight of 0 times NaN."""
    q, k, v = heads(1, 400)
    clean = causal_attention(q, k, v, window=20)
    v[:, :100] = math.nan
    close(causal_attention(q, k, v, window=20)[:, 256:], clean[:, 256:])


# ---- the reference ----


SIZES = st.integers(1, 12)


@settings(max_examples=40)
@given(B=st.integers(1, 3), N=SIZES, window=st.integers(1, 14), softcap=st.sampled_from([None, 0.3, 2.0, 50.0]))
def test_the_causal_reference_is_the_formula(B: int, N: int, window: int, softcap: float | None) -> None:
    q, k, v = (t.requires_grad_() for t in heads(B, N))
    want, _ = dense(q, k, v, torch.ones(1, N, N).tril().triu(1 - window).bool(), softcap)
    got = reference.causal_attention(q, k, v, window=window, softcap=softcap)
    close(got, want)
    weights = torch.randn_like(got)
    for ours, theirs in zip(
        *(torch.autograd.grad((o.to(got) * weights).sum(), (q, k, v)) for o in (got, want)), strict=True
    ):
        close(ours, theirs)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    L=SIZES,
    page_size=st.integers(1, 5),
    window=st.integers(1, 26),
    softcap=st.sampled_from([None, 0.3, 2.0]),
    causal=st.booleans(),
)
def test_the_reference_on_a_cache_is_the_formula(
    lengths: list[int], L: int, page_size: int, window: int, softcap: float | None, causal: bool
) -> None:
    rows = Rows(lengths, L, page_size)
    got = rows.call(reference.context_attention, window=window, softcap=softcap, causal=causal, return_lse=True)
    for ours, want in zip(got, rows.want(window, softcap, causal), strict=True):
        close(ours, want)


@pytest.mark.parametrize("op", [context_attention, causal_attention])
def test_in_one_graph(op: Any) -> None:
    torch._dynamo.reset()
    rows = Rows([20, 7], 5)
    tensors = rows.block if op is causal_attention else None
    run = lambda fn: (
        fn(*tensors, window=4, softcap=2.0) if tensors else rows.call(fn, window=4, softcap=2.0, causal=True)
    )
    close(run(torch.compile(op, fullgraph=True, backend="aot_eager")), run(op))


# ---- tanh ----


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tanh(tl.load(x_ptr + at)))


@pytest.mark.skipif(not KERNELS, reason="of kernels")
def test_tanh() -> None:
    """To 4 eps of the value, however small it is: a large cap multiplies it. exp2 of a GPU is right to 2 ulp."""
    size = torch.cat([torch.logspace(-30, 3, 100), torch.linspace(0.1, 0.15, 154), torch.tensor([0.125, math.inf])])
    x = torch.cat([size, -size]).to(DEVICE)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, BLOCK=len(x))
    want = x.double().tanh()
    assert ((y.double() - want).abs() <= 4 * torch.finfo(x.dtype).eps * want.abs()).all()
    x.fill_(math.nan)
    _tanh_kernel[(1,)](x, y, BLOCK=len(x))
    assert y.isnan().all()
