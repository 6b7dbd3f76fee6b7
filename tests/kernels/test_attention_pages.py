"""Page tables that cannot be meant, tiny and empty pools. A reference on a CPU refuses; kernels neither read nor write
outside the pool, and other rows do not notice. References without TRITON_INTERPRET, kernels with it or on a GPU."""

import math
from typing import Any

import pytest
import torch
from parity import DEVICE, DTYPES, HALF, KERNELS
from torch import Tensor

from tt_kernels import append_attention, context_attention, reference

pytestmark = pytest.mark.kernels
OPS = pytest.mark.parametrize("op", [context_attention, append_attention], ids=lambda op: op.__name__)
REFERENCE_REFUSES = pytest.mark.skipif(KERNELS, reason="kernels do not read tables on the host")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


def heads(B: int, L: int, P: int = 4, Hq: int = 2, Hkv: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.to(DEVICE, dtype) for t in (torch.randn(B, L, Hq, P), *torch.randn(2, B, L, Hkv, P))]


class Pool:
    """Keys and values in the middle of larger memory, of which whatever is outside the pool shows that it changed."""

    def __init__(self, pages: int, page_size: int, P: int = 4, dtype: torch.dtype = torch.float32):
        self.memory = torch.randn(2, 3 * pages, page_size, 1, P).to(DEVICE, dtype)
        self.before = self.memory.clone()
        self.k, self.v = self.memory[:, pages : 2 * pages]
        self.pages = pages

    def outside_is_untouched(self) -> bool:
        parts = slice(0, self.pages), slice(2 * self.pages, None)
        return all(torch.equal(self.memory[:, part], self.before[:, part]) for part in parts)


def table(*rows: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, device=DEVICE, dtype=dtype)


def lengths(*rows: int) -> Tensor:
    return torch.tensor(rows, device=DEVICE)


@REFERENCE_REFUSES
@OPS
@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1, -(2**31)])
def test_pages_outside_the_pool_are_refused(op: Any, page: int) -> None:
    pool, qkv = Pool(6, 4), heads(2, 3)
    with pytest.raises(ValueError) as error:
        op(*qkv, pool.k, pool.v, table([3, 1], [page, 0]), lengths(5, 2))
    assert str(error.value) == f"{op.__name__}: page_table has page {page} in row 1, expected 0 to 5"
    o = op(*qkv, pool.k, pool.v, table([3, 1, page], [0, 5, page]), lengths(5, 2))  # past the end it may be anything
    assert o.isfinite().all()


@REFERENCE_REFUSES
@pytest.mark.parametrize("rows", [([3, 1], [2, 1]), ([3, 1], [1, 2]), ([1, 1], [2, 3]), ([4, 1], [1, 1])])
def test_a_page_that_is_written_is_nobody_elses(rows: tuple[list[int], list[int]]) -> None:
    pool = Pool(6, 4)
    with pytest.raises(
        ValueError, match=r"^append_attention: page_table has page 1 \d times, expected once: row \d wri"
    ):
        append_attention(*heads(2, 3), pool.k, pool.v, table(*rows), lengths(5, 5))
    assert torch.equal(pool.memory, pool.before)


def test_pages_that_are_only_read_may_be_shared() -> None:
    """A prefix of two rows."""
    pool, qkv = Pool(6, 4), heads(2, 3)
    shared = append_attention(*qkv, pool.k, pool.v, table([3, 1], [3, 2]), lengths(4, 4))
    copied = Pool(6, 4)
    copied.memory.copy_(pool.before)
    for t in (copied.k, copied.v):
        t[5] = t[3]
    torch.testing.assert_close(append_attention(*qkv, copied.k, copied.v, table([3, 1], [5, 2]), lengths(4, 4)), shared)
    assert torch.equal(copied.memory[:, 6:11], pool.memory[:, 6:11])
    append_attention(*qkv, pool.k, pool.v, table([3, 1], [3, 1]), lengths(4, 4), lengths(2, 0))  # one of them writes


@pytest.mark.parametrize("page_size,dtype", [(4, torch.float32), (64, HALF)], ids=["small", "tma"])
def test_forks_see_the_shared_tokens_and_never_each_others(page_size: int, dtype: torch.dtype) -> None:
    """Two rows whose page tables have all but the last page in common: a token in a shared page reaches both, a token
    in a row's last page that row alone, and a free slot of a last page none."""
    pool, P = Pool(6, page_size, P=16, dtype=dtype), 16
    qkv, pages = heads(2, 3, P=P, dtype=dtype), table([5, 2, 0], [5, 2, 3])
    n = lengths(3 * page_size - 1, 2 * page_size + 2)

    def of_rows() -> Tensor:
        return context_attention(*qkv, pool.k, pool.v, pages, n)

    before = of_rows()
    for b in range(2):  # each row by itself, with pages of its own
        alone = context_attention(*(t[b : b + 1] for t in qkv), pool.k, pool.v, pages[b : b + 1], n[b : b + 1])
        torch.testing.assert_close(alone[0], before[b])
    for page, slot, reaches in (
        *((5, 0, [True, True]), (2, page_size - 1, [True, True])),
        *((0, 0, [True, False]), (0, page_size - 2, [True, False]), (3, 1, [False, True])),
        *((0, page_size - 1, [False, False]), (3, 2, [False, False]), (1, 0, [False, False])),
    ):
        kept = pool.v[page, slot].clone()
        pool.v[page, slot] = 1000
        changed = (of_rows() != before).flatten(1).any(1).tolist()
        pool.v[page, slot] = kept
        assert changed == reaches, f"slot {slot} of page {page}"
    assert torch.equal(of_rows(), before)


@pytest.mark.skipif(not KERNELS, reason="the reference refuses")
@OPS
@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1, -(2**31), 2**27])
def test_kernels_stay_in_the_pool(page: int, wide: torch.dtype, op: Any) -> None:
    """What is outside is not read, and the other row does not notice."""
    pool, good, qkv = Pool(6, 4), Pool(6, 4), heads(2, 3)
    good.memory.copy_(pool.memory)
    pool.memory[:, :6], pool.memory[:, 12:] = math.nan, math.nan
    o = op(*qkv, pool.k, pool.v, table([3, 1], [page, page], dtype=wide), lengths(5, 2))
    want = op(*(t[:1] for t in qkv), good.k, good.v, table([3, 1], dtype=wide), lengths(5))
    assert o.isfinite().all()
    torch.testing.assert_close(o[:1], want)


@pytest.mark.skipif(not KERNELS, reason="the reference refuses")
@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1, -(2**31), 2**27, 2**32 + 1])
def test_kernels_write_only_in_the_pool(page: int) -> None:
    """Tokens whose page is none do not enter; those beside them do."""
    pool, qkv = Pool(6, 4), heads(2, 3)
    append_attention(*qkv, pool.k, pool.v, table([3, 1], [0, page], dtype=torch.int64), lengths(5, 2))
    assert pool.outside_is_untouched()
    for now, was, new in zip((pool.k, pool.v), pool.before[:, 6:12], qkv[1:], strict=True):
        want = was.clone()
        want[1, 1:4], want[0, 2:4] = new[0], new[1, :2]
        assert torch.equal(now, want)


@pytest.mark.skipif(not KERNELS, reason="the reference refuses")
@pytest.mark.parametrize("page", [-1, 3, 2**25, -(2**25), 2**31 - 1])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
def test_tma_stays_in_the_pool(page: int, dtype: torch.dtype) -> None:
    pool, qkv = Pool(3, 64, P=16, dtype=dtype), heads(2, 3, P=16, dtype=dtype)
    pool.memory[:, :3], pool.memory[:, 6:] = math.nan, math.nan
    pool.before = pool.memory.clone()
    o = append_attention(*qkv, pool.k, pool.v, table([page, page], [1, 2]), lengths(70, 60))
    assert o.isfinite().all() and torch.equal(pool.memory[:, :3].isnan(), pool.before[:, :3].isnan())
    assert pool.memory[:, 6:].isnan().all() and torch.equal(pool.k[0], pool.before[0, 3])
    good = append_attention(*(t[1:] for t in qkv), *pool.before[:, 3:6], table([1, 2]), lengths(60))
    torch.testing.assert_close(o[1:], good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("P,Hq,Hkv", [(1, 1, 1), (5, 3, 1), (12, 4, 4)])
@OPS
def test_any_page_and_head_size(op: Any, P: int, Hq: int, Hkv: int, page_size: int, dtype: torch.dtype) -> None:
    """The same tokens in pages of one size and another."""
    tokens = torch.randn(2, 2, 12, Hkv, P).to(DEVICE, dtype)  # k and v, rows
    qkv, n = heads(2, 4, P, Hq, Hkv, dtype), lengths(7, 8)
    found = []
    for size in (page_size, 12):
        row = -(-12 // size)
        pages = torch.zeros(2, 2 * row, size, Hkv, P, dtype=dtype, device=DEVICE)
        pages.view(2, 2, row * size, Hkv, P)[:, :, :12] = tokens
        order = torch.randperm(2 * row, device=DEVICE)
        shuffled = torch.empty_like(pages)
        shuffled[:, order] = pages
        o = op(*qkv, *shuffled, order.view(2, row), n)
        found.append((o, shuffled[:, order].view(2, 2, row * size, Hkv, P)[:, :, :12]))
    (o, cached), (want, want_cached) = found
    torch.testing.assert_close(o, want, rtol=0, atol=10 * torch.finfo(dtype).eps)
    assert torch.equal(cached, want_cached)


@OPS
@pytest.mark.parametrize("pages,row_pages", [(0, 0), (0, 2), (3, 0)])
@pytest.mark.parametrize("B,L", [(0, 0), (0, 3), (2, 0), (1, 0), (2, 3), (1, 3)])
def test_what_is_empty(op: Any, B: int, L: int, pages: int, row_pages: int) -> None:
    """Empty batches, blocks, pools and tables; nothing enters where there is no page."""
    qkv = heads(B, L)
    pool, n = torch.randn(2, pages, 4, 1, 4, device=DEVICE), torch.zeros(B, dtype=torch.int32, device=DEVICE)
    t = torch.zeros(B, row_pages, dtype=torch.int32, device=DEVICE)
    counts = [torch.zeros_like(n)] * (op is append_attention)
    want = reference.context_attention(
        *qkv, *torch.zeros(2, 1, 4, 1, 4, device=DEVICE), t[:, :0], n, causal=bool(counts)
    )
    o = op(*qkv, *pool, t, n, *counts)
    assert o.shape == qkv[0].shape
    torch.testing.assert_close(o, want)


@pytest.mark.skipif(KERNELS, reason="what is checked on a CPU")
def test_the_reference_on_a_device_drops_what_has_no_page() -> None:
    """As kernels do, without a look at the table."""
    for page, size in ((-1, 2), (6, 2), (1, 2), (1, 9)):
        pool, qkv = Pool(6, 4), heads(2, 3)
        start = lengths(5, size)
        reference.attention._append(*qkv[1:], (pool.k, pool.v, table([3, 4], [0, page]), start), None)
        assert pool.outside_is_untouched()
        for now, was, new in zip((pool.k, pool.v), pool.before[:, 6:12], qkv[1:], strict=True):
            want = was.clone()
            want[4, 1:4] = new[0]
            if size == 2:
                want[0, 2:4] = new[1, :2]
            if page == 1 and size == 2:
                want[1, 0] = new[1, 2]
            assert torch.equal(now, want)
    pool = Pool(6, 4)
    for counts in (lengths(0, 0), lengths(-3, 0)):
        reference.attention._append(*qkv[1:], (pool.k, pool.v, table([3, 4], [0, -1]), lengths(5, 2)), counts)
    assert torch.equal(pool.memory, pool.before)


@pytest.mark.parametrize("counts", [None, "all", "some"])
@pytest.mark.parametrize("before", [[6, 6], [0, 0], [3, 6], [6]], ids=str)
@pytest.mark.parametrize("L", [1, 5])
def test_it_does_not_matter_where_pages_lie(L: int, before: list[int], counts: str | None) -> None:
    """In order the reference has tokens enter first and reads the cache as it lies. fp64: bits of sums may differ."""
    B, page_size, shape = len(before), 4, (2, 3)
    g = torch.Generator().manual_seed(L)
    q, k, v = (torch.randn(B, L, heads, 3, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    caches = torch.randn(2, 3 * B, page_size, *shape, generator=g, dtype=torch.float64)
    ordered = torch.arange(3 * B).view(B, 3)
    order = torch.randperm(3 * B, generator=g)
    entering = {None: None, "all": torch.full((B,), L), "some": torch.full((B,), L - 1)}[counts]
    found = []
    for table in (ordered, order.argsort()[ordered]):
        pages = [t.clone() if table is ordered else t[order] for t in caches]
        o = reference.append_attention(q, k, v, *pages, table, torch.tensor(before), entering)
        found.append((o, *(t[table] for t in pages)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    given = q, k, v, *caches, ordered, torch.tensor(before)
    wanted = reference.context_attention(*given, causal=True)
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-12, atol=1e-12)
