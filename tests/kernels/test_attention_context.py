"""Attention to a paged cache, and its append: every length, block and page edge, a block as its tokens one by one,
dirty memory. References without TRITON_INTERPRET, kernels with it or on a GPU.

Shapes: B rows, L tokens of a block, S cached tokens; 2 query heads to a KV head.
"""

import math

import pytest
import torch
from parity import DEVICE, DTYPES, KERNELS
from torch import Tensor

from tt_kernels import append_attention, context_attention
from tt_kernels.attention import context_attention_launch
from tt_kernels.attention.context_attention_launch import Splits
from tt_kernels.runtime.launch import ON_CPU

pytestmark = pytest.mark.kernels
DTYPE = torch.float32 if DEVICE == "cuda" else torch.float64  # a GPU has no fp64 kernels
PAGE = 64
EDGES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]
NOBODY = 10**6  # a page that is not there


def close(got: Tensor, want: Tensor) -> None:
    """fp64: 4500 eps. fp32: 80, for products summed in another order over 200 terms. A wrong token shows at 1e-2. 16
    bits: weights and results are rounded by half an eps each, of values up to 5; a NaN shows."""
    if got.dtype.itemsize == 2:
        torch.testing.assert_close(got.double(), want, rtol=0, atol=5 * torch.finfo(got.dtype).eps)
        return
    bound = 1e-12 if got.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want.to(got), rtol=bound, atol=bound)


def heads(B: int, L: int, *, Hkv: int = 1, P: int = 4, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, L, 2 * Hkv, P), *torch.randn(2, B, L, Hkv, P)
    return tuple(t.to(DEVICE, dtype) for t in (q, k, v))


def edges(L: int) -> list[int]:
    """Lengths to try with a block of L: all with a short one, else two in turn, a second to interpret."""
    return EDGES if L <= 3 else [EDGES[L % 6], EDGES[(L + 3) % 6]]


class Rows:
    """Cached tokens of rows of some lengths: densely, and in shuffled pages with room for `more`, NaN wherever no token
    lies, a nonsense page wherever no token will lie."""

    def __init__(self, lengths: list[int], more: int = 0, *, spare: int = 2, **shape: int):
        B, longest = len(lengths), max(lengths)
        _, self.k, self.v = heads(B, longest, **shape)
        row = max(1, -(-(longest + more) // PAGE))
        table = torch.randperm(B * row + spare)[: B * row].view(B, row)
        pages = torch.full((2, B * row + spare, PAGE, *self.k.shape[2:]), math.nan, dtype=self.k.dtype, device=DEVICE)
        for b, n in enumerate(lengths):
            for s in range(0, n, PAGE):
                pages[:, table[b, s // PAGE], : min(n - s, PAGE)] = torch.stack([self.k, self.v])[
                    :, b, s : min(s + PAGE, n)
                ]
            table[b, -(-(n + more) // PAGE) :] = NOBODY
        self.pages, self.table = pages, table.int().to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    @property
    def cache(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.pages, self.table, self.lengths

    def want(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Row by row, head by head, in fp64."""
        o, L = torch.empty_like(q, dtype=torch.float64), q.shape[1]
        for b, n in enumerate(self.lengths.tolist()):
            keys, values = (torch.cat([x[b, :n], y[b]]).double() for x, y in ((self.k, k), (self.v, v)))
            unseen = torch.ones(L, n + L, dtype=torch.bool, device=DEVICE).triu(n + 1 if causal else n + L)
            for h in range(q.shape[2]):
                scores = q[b, :, h].double() @ keys[:, h // 2].T * q.shape[-1] ** -0.5
                o[b, :, h] = scores.masked_fill(unseen, -math.inf).softmax(1) @ values[:, h // 2]
        return o

    def token(self, b: int, s: int) -> tuple[Tensor, Tensor]:
        """What the pages hold of row b's token s: k, v [Hkv, P]."""
        return tuple(self.pages[:, self.table[b, s // PAGE], s % PAGE])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


# ---- values ----


# Interpreted, blocks around the edges of tiles: each takes its masks alone, and other lengths of the cache.
@pytest.mark.parametrize("L", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64] if ON_CPU else range(1, 65))
def test_every_length_with_every_block(L: int) -> None:
    lengths = edges(L)
    rows, (q, k, v) = Rows(lengths), heads(len(lengths), L)
    close(context_attention(q, k, v, *rows.cache), rows.want(q, k, v, False))


@pytest.mark.parametrize("lengths", [[700], [128, 300, 64]])
def test_many_splits(lengths: list[int]) -> None:
    rows, (q, k, v) = Rows(lengths, Hkv=2), heads(len(lengths), 2, Hkv=2)
    close(context_attention(q, k, v, *rows.cache), rows.want(q, k, v, False))


@pytest.mark.skipif(not KERNELS, reason="the reference has no splits")
@pytest.mark.parametrize("fill", [1, 2, 4])
def test_splits_of_a_row_in_a_larger_batch(fill: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewer keep the GPU busy, the longer splits get, up to where they are cheap: 1024 tokens for these blocks."""
    monkeypatch.setattr(context_attention_launch, "context_splits", lambda *sizes: Splits(fill, 4, 64))
    rows, (q, k, v) = Rows([2113, 1025, 1024, 300, 0, 65]), heads(6, 2)
    close(context_attention(q, k, v, *rows.cache), rows.want(q, k, v, False))


@pytest.mark.skipif(not KERNELS, reason="PyTorch computes so on a GPU only")
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
@pytest.mark.parametrize("P", [16, 128])
@pytest.mark.parametrize("L", [1, 5, 33] if DEVICE == "cuda" else [1, 5])  # a long one takes 10 s to interpret
def test_sixteen_bits_by_tma(L: int, P: int, dtype: torch.dtype) -> None:
    """Tiles of pages that TMA brings hold NaN behind a row's end, and tokens enter there; shared memory has no mask."""
    lengths = [*EDGES, 3 * PAGE - 5]
    rows, (q, k, v) = Rows(lengths, L, Hkv=2, P=P, dtype=dtype), heads(7, L, Hkv=2, P=P, dtype=dtype)
    close(context_attention(q, k, v, *rows.cache), rows.want(q, k, v, False))
    counts = torch.tensor([L, 0, 1, L - 1, L, 2, L], device=DEVICE).clamp(max=L)
    close(append_attention(q, k, v, *rows.cache, counts), rows.want(q, k, v, True))
    for b, (n, c) in enumerate(zip(lengths, counts.tolist(), strict=True)):
        for t in range(c):
            assert all(torch.equal(*pair) for pair in zip(rows.token(b, n + t), (k[b, t], v[b, t]), strict=True))
    assert int(rows.pages[1, ..., 0, 0].isfinite().sum()) == sum(lengths) + int(counts.sum())


@pytest.mark.parametrize("L", [1, 3, 17, 33, 64])
def test_append_attends_and_appends(L: int) -> None:
    lengths = edges(L)
    rows, (q, k, v) = Rows(lengths, L), heads(len(lengths), L)
    close(append_attention(q, k, v, *rows.cache), rows.want(q, k, v, True))
    for b, n in enumerate(lengths):
        for t in range(L):
            assert all(torch.equal(*pair) for pair in zip(rows.token(b, n + t), (k[b, t], v[b, t]), strict=True))
    assert int(rows.pages[0, ..., 0, 0].isfinite().sum()) == sum(lengths) + L * len(lengths), (
        "something else was written"
    )


@pytest.mark.parametrize("counts", [[0, 1, 5, 4, 2, 3], [0] * 6, [9, -1, 5, 0, 0, 0]])
def test_only_tokens_that_count_enter(counts: list[int]) -> None:
    """Pages that only the others would need are nobody's; what nobody asked for stays NaN."""
    rows, (q, k, v) = Rows(EDGES, 0), heads(6, 5)
    enter = [min(max(c, 0), 5) for c in counts]
    more = Rows([n + c for n, c in zip(EDGES, enter, strict=True)])  # a table with just the pages that are needed
    pages = torch.full_like(more.pages, math.nan)
    for b, n in enumerate(EDGES):
        for s in range(n):
            at = more.table[b, s // PAGE], s % PAGE
            pages[:, *at] = torch.stack(rows.token(b, s))
    more.pages, more.lengths = pages, rows.lengths
    o = append_attention(q, k, v, *more.cache, torch.tensor(counts, device=DEVICE))
    close(o, rows.want(q, k, v, True))
    for b, (n, c) in enumerate(zip(EDGES, enter, strict=True)):
        for t in range(c):
            assert all(torch.equal(*pair) for pair in zip(more.token(b, n + t), (k[b, t], v[b, t]), strict=True))
    assert int(more.pages[1, ..., 0, 0].isfinite().sum()) == sum(EDGES) + sum(enter)


@pytest.mark.skipif(not KERNELS, reason="the reference refuses")
def test_a_full_row_writes_no_page_of_others() -> None:
    rows, (q, k, v) = Rows([PAGE, 2 * PAGE - 2], 0), heads(2, 5)
    rows.table[0, 1] = rows.table[1, 1]  # room for more, but not here: only what follows the second row is free
    rows.table = rows.table.contiguous()
    before = rows.pages.clone()
    append_attention(q, k, v, *rows.cache, torch.tensor([0, 5], device=DEVICE))
    changed = (rows.pages.nan_to_num() != before.nan_to_num())[0, ..., 0, 0]
    assert int(changed.sum()) == 2 and changed[rows.table[1, 1], -2:].all()


@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("below", [-1, -PAGE, -(2**31)])
def test_a_length_below_zero_is_none(below: int, wide: torch.dtype) -> None:
    rows, (q, k, v) = Rows([0, 70], 3), heads(2, 3)
    rows.lengths, table = torch.tensor([below, 70], device=DEVICE, dtype=wide), rows.table.to(wide)
    if not KERNELS:
        for op in (context_attention, append_attention):
            with pytest.raises(ValueError, match=f"cache_lengths goes down to {below}, expected 0 or more"):
                op(q, k, v, *rows.pages, table, rows.lengths)
        return
    none = Rows([0, 70], 3)
    none.k, none.v, none.pages, none.table = rows.k, rows.v, rows.pages.clone(), rows.table
    close(context_attention(q, k, v, *rows.pages, table, rows.lengths), none.want(q, k, v, False))
    close(append_attention(q, k, v, *rows.pages, table, rows.lengths), none.want(q, k, v, True))
    append_attention(q, k, v, *none.cache)
    assert torch.equal(rows.pages.nan_to_num(7), none.pages.nan_to_num(7))


@pytest.mark.skipif(not KERNELS, reason="the reference refuses")
@pytest.mark.parametrize("beyond", [1, 2**30])
def test_a_length_beyond_the_pages_is_cut(beyond: int) -> None:
    rows, (q, k, v) = Rows([3 * PAGE, PAGE]), heads(2, 2)
    table, want = rows.table.clone(), rows.want(q, k, v, True)
    table[1] = rows.table[1, 0]  # as if it had as many
    lengths = rows.lengths + torch.tensor([beyond, 0], device=DEVICE, dtype=torch.int32)
    before = rows.pages.clone()
    close(append_attention(q, k, v, *rows.pages, table, lengths, torch.tensor([2, 0], device=DEVICE)), want)
    assert torch.equal(rows.pages.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("permuted", [False, True])
def test_pages_of_any_strides_are_written(permuted: bool) -> None:
    rows, (q, k, v) = Rows([3, 70], 5, Hkv=2), heads(2, 5, Hkv=2)
    stored = rows.pages.clone()
    append_attention(q, k, v, *rows.cache)
    if permuted:
        pages = stored.mT.contiguous().mT
    else:  # every second slot of larger pages
        pages = torch.stack([stored, torch.zeros_like(stored)], 3).flatten(2, 3)[:, :, ::2]
    append_attention(q, k, v, *pages, rows.table, rows.lengths)
    assert torch.equal(pages.nan_to_num(7), rows.pages.nan_to_num(7))


# ---- NaN ----


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("where", ["q", "k_pages", "v_pages", "k", "v"])
def test_nan_reaches_who_sees_it_and_nobody_else(where: str, append: bool) -> None:
    """One NaN in row 0: in query head 1, or in KV head 0, which query heads 0 and 1 use."""
    rows, (q, k, v) = Rows([200, 70], 4, Hkv=2), heads(2, 4, Hkv=2)
    place = rows.table[0, 130 // PAGE], 130 % PAGE
    seen = torch.zeros(q.shape, dtype=torch.bool, device=DEVICE)  # who has to be NaN
    maybe = torch.zeros_like(seen)  # who may be: weights of 0
    clean = append_attention(q, k, v, *rows.pages.clone(), *rows.cache[2:]) if append else None
    clean = context_attention(q, k, v, *rows.cache) if clean is None else clean
    if where == "q":
        q[0, 2, 1, 3] = math.nan
        seen[0, 2, 1] = True
    elif where == "k_pages":
        rows.pages[0][*place, 0, 3] = math.nan
        seen[0, :, :2] = True
    elif where == "v_pages":
        rows.pages[1][*place, 0, 3] = math.nan
        seen[0, :, :2, 3] = True
    elif where == "k":
        k[0, 2, 0, 3] = math.nan
        seen[0, 2 if append else 0 :, :2] = True
    else:
        v[0, 2, 0, 3] = math.nan
        seen[0, 2 if append else 0 :, :2, 3] = True
        maybe[0, :, :2, 3] = True
    got = (append_attention if append else context_attention)(q, k, v, *rows.cache)
    assert got[seen].isnan().all()
    others = ~(seen | maybe)
    close(got[others], clean[others])


# ---- one way and another ----


def test_a_block_is_its_tokens_one_by_one() -> None:
    lengths, L = [0, PAGE - 3], 6
    whole, (q, k, v) = Rows(lengths, L), heads(2, L)
    parts = Rows(lengths, L)
    parts.pages, parts.table = whole.pages.clone(), whole.table
    o = append_attention(q, k, v, *whole.cache)
    for t in range(L):
        one = slice(t, t + 1)
        close(append_attention(q[:, one], k[:, one], v[:, one], *parts.cache), o[:, one])
        parts.lengths = parts.lengths + 1
    assert torch.equal(parts.pages.nan_to_num(7), whole.pages.nan_to_num(7))


@pytest.mark.parametrize("first", [1, 16])
def test_two_segments_are_the_whole(first: int) -> None:
    lengths, L = [0, 50], 20
    whole, (q, k, v) = Rows(lengths, L), heads(2, L)
    parts = Rows(lengths, L)
    parts.pages, parts.table = whole.pages.clone(), whole.table
    o = append_attention(q, k, v, *whole.cache)
    for part in (slice(0, first), slice(first, L)):
        close(append_attention(q[:, part], k[:, part], v[:, part], *parts.cache), o[:, part])
        parts.lengths = parts.lengths + part.stop - part.start
    assert torch.equal(parts.pages.nan_to_num(7), whole.pages.nan_to_num(7))


def test_neither_room_nor_neighbours_show() -> None:
    """Bit for bit: a row alone in a cache that just holds it, and beside longer ones with a table of 300 pages. Splits
    of both are the shortest there are, whatever the batch."""
    lengths = [5, 200]
    rows, (q, k, v) = Rows(lengths, dtype=torch.float32), heads(2, 3, dtype=torch.float32)
    wide = torch.full((2, 300), NOBODY, dtype=torch.int32, device=DEVICE)
    wide[:, : rows.table.shape[1]] = rows.table
    o = context_attention(q, k, v, *rows.pages, wide, rows.lengths)
    for b, n in enumerate(lengths):
        table = rows.table[b : b + 1, : -(-n // PAGE)].contiguous()
        alone = context_attention(*(t[b : b + 1] for t in (q, k, v)), *rows.pages, table, rows.lengths[b : b + 1])
        if KERNELS:
            assert torch.equal(alone[0], o[b])
        else:  # PyTorch's own attention sums by what it was given room for
            torch.testing.assert_close(alone[0], o[b], rtol=1e-5, atol=1e-6)
