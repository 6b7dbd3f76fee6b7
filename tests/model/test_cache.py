"""The state of generation: buffers with fixed addresses, and caches that share them and see their own tokens only."""

import copy
import gc
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, prompts_of, random_model
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tt_kernels.runtime.launch import recording
from tt_model import Cache, TwoTower
from tt_model.modeling.pool import PAGE_SIZE, Layers, Places

BLOCK = 8


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


def block_of(rows: int, seed: int) -> Tensor:
    return torch.randint(4, CONFIG.vocab_size, (rows, BLOCK), generator=torch.Generator().manual_seed(seed))


def assert_holds(model: TwoTower, cache: Cache, texts: list[list[int]]) -> None:
    """The cache is what prefilling the texts gives, and a block is denoised on it as on that."""
    want = model.prefill(texts)
    assert cache.lengths.tolist() == [len(text) for text in texts]
    torch.testing.assert_close(cache.last_logits, want.last_logits, rtol=1e-9, atol=1e-9)  # fp64, sums reordered
    for i in CONFIG.layers_of("M"):
        torch.testing.assert_close(cache.states(i), want.states(i), rtol=1e-9, atol=1e-9)
    block, t = block_of(len(texts), 9), torch.full((len(texts),), 0.5)
    close = dict(rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.denoise(block, t, cache), model.denoise(block, t, want), **close)


def buffers(cache: Cache) -> dict[str, int]:
    """Addresses of all that passes read and write."""
    pool = cache.pool
    found = {name: getattr(cache, name) for name in ("lengths", "page_table", "last_hidden", "ssm", "ssm_out")}
    found |= {name: getattr(cache, name) for name in ("conv", "conv_out")}
    for name in ("keys", "values", "conv", "ssm"):
        found |= {f"{name} {i}": t for i, t in getattr(pool, name).items()}
    return {name: t.data_ptr() for name, t in found.items()}


def pointers(arguments: Iterable) -> Iterator[int]:
    """Of all tensors among a launch's arguments, inside operands and descriptors too."""
    for a in arguments:
        if isinstance(a, Tensor):
            yield a.data_ptr()
        elif isinstance(a, tuple):
            yield from pointers(a)
        elif isinstance(a, TensorDescriptor):
            yield a.base.data_ptr()


# ---- addresses ----


def test_passes_leave_every_address(model: TwoTower) -> None:
    """Launches of two rounds of passes, recorded: each takes the state from where it took it before."""
    cache = model.prefill(prompts_of([70, 5]), reserve=2 * 5 * BLOCK)
    before, rounds = buffers(cache), []
    for _ in range(2):
        with recording(90) as launches:
            model.denoise(block_of(2, 1), torch.ones(2), cache)
            model.commit(block_of(2, 2), cache)
            _, pending = model.verify(block_of(2, 3), cache)
        known = set(before.values())
        rounds.append([[p if p in known else None for p in pointers(args)] for _, _, args, _ in launches])
        with recording(90):  # on the device the lengths would have grown
            cache.advance(pending, torch.tensor([3, 3]))
    assert rounds[0] == rounds[1] and len(rounds[0]) > len(CONFIG.pattern)
    seen = {p for row in rounds[0] for p in row}
    assert seen >= {address for name, address in before.items() if name != "last_hidden"}
    assert buffers(cache) == before


def test_growing_in_the_pool_copies_nothing(model: TwoTower) -> None:
    (text,) = prompts_of([60])
    cache = model.prefill([text], reserve=3 * PAGE_SIZE)
    pages = {i: (k.data_ptr(), v.data_ptr()) for i in CONFIG.layers_of("*") for k, v in [cache.kv(i)]}
    for seed in range(12):
        block = block_of(1, seed)
        model.commit(block, cache)
        text = text + block[0].tolist()
    assert {i: (k.data_ptr(), v.data_ptr()) for i in pages for k, v in [cache.kv(i)]} == pages
    assert_holds(model, cache, [text])


def test_a_full_pool_grows(model: TwoTower) -> None:
    texts = prompts_of([60, 3])
    cache = model.prefill(texts, reserve=0)
    had = len(cache.pool.pages)
    for seed in range(10):
        block = block_of(2, seed)
        model.commit(block, cache)
        texts = [text + new for text, new in zip(texts, block.tolist(), strict=True)]
    assert len(cache.pool.pages) > had
    assert_holds(model, cache, texts)


# ---- forks ----


def test_forks_never_see_each_other(model: TwoTower) -> None:
    """Inside a page, at its edge, and where rows are listed twice and in another order."""
    texts = prompts_of([PAGE_SIZE - 3, PAGE_SIZE, 5])
    cache = model.prefill(texts, reserve=PAGE_SIZE, forks=4)
    fork = cache.fork([2, 0, 0, 1])
    new, other = block_of(4, 1), block_of(3, 2)
    model.commit(new, fork)
    assert_holds(model, cache, texts)
    model.commit(other, cache)
    assert_holds(model, cache, [text + tail for text, tail in zip(texts, other.tolist(), strict=True)])
    assert_holds(model, fork, [texts[i] + tail for i, tail in zip([2, 0, 0, 1], new.tolist(), strict=True)])


def test_a_fork_copies_nothing_but_what_is_written(model: TwoTower) -> None:
    cache = model.prefill(prompts_of([3 * PAGE_SIZE + 5]), reserve=PAGE_SIZE, forks=1)
    before = buffers(cache)
    taken = len(cache.pool.pages.free), len(cache.pool.slots.free)
    fork = cache.fork()
    assert (len(cache.pool.pages.free), len(cache.pool.slots.free)) == taken
    model.denoise(block_of(1, 1), torch.ones(1), fork)
    assert (len(cache.pool.pages.free), len(cache.pool.slots.free)) == taken
    free = set(cache.pool.pages.free)
    kept = {i: [t.clone() for t in cache.kv(i)] for i in CONFIG.layers_of("*")}
    model.commit(block_of(1, 2), fork)
    written = free - set(cache.pool.pages.free)
    assert len(written) == 1 and len(cache.pool.slots.free) == taken[1] - 1  # the page that goes on, and one state
    for i, pages in kept.items():
        for old, new in zip(pages, cache.kv(i), strict=True):
            changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
            assert set(changed) <= written
    assert buffers(cache) == before


def test_what_a_cache_held_is_free_when_it_goes(model: TwoTower) -> None:
    cache = model.prefill(prompts_of([20, 30]), reserve=2 * BLOCK, forks=2)
    fork = cache.fork([1])
    pool = cache.pool
    del cache
    gc.collect()
    assert len(pool.slots.free) == len(pool.slots) - 1
    state = pool.ssm[CONFIG.layers_of("M")[0]]
    slot = fork._rows[0].slot
    model.commit(block_of(1, 1), fork)
    assert fork._rows[0].slot == slot and state is pool.ssm[CONFIG.layers_of("M")[0]]  # nobody else's: written in place
    del fork
    gc.collect()
    assert len(pool.slots.free) == len(pool.slots) and len(pool.pages.free) == len(pool.pages)


@pytest.mark.parametrize("is_apart", [False, True])
@settings(max_examples=20)
@given(data=st.data())
def test_any_tree_of_forks(model: TwoTower, is_apart: bool, data: st.DataObject) -> None:
    """Commits, advances by parts, forks and drops in any order: every cache holds its own text. Where the denoiser
    reads copies, those that it looks at now and then hold it too."""
    model = copy.copy(model)
    model.is_apart = is_apart
    texts = prompts_of(data.draw(st.lists(st.integers(1, PAGE_SIZE + 2), min_size=1, max_size=3)))
    caches = [(model.prefill(texts, reserve=data.draw(st.sampled_from([0, BLOCK, 2 * PAGE_SIZE]))), texts)]
    for seed in range(data.draw(st.integers(1, 6))):
        i = data.draw(st.integers(0, len(caches) - 1))
        cache, texts = caches[i]
        block = block_of(len(texts), seed)
        match data.draw(st.sampled_from(["commit", "advance", "fork", "drop", *["denoise"] * is_apart])):
            case "denoise":
                model.denoise(block, torch.ones(len(texts)), cache)
            case "commit":
                model.commit(block, cache)
                caches[i] = cache, [text + new for text, new in zip(texts, block.tolist(), strict=True)]
            case "advance":
                counts = data.draw(st.lists(st.integers(0, BLOCK), min_size=len(texts), max_size=len(texts)))
                _, pending = model.verify(block, cache)
                cache.advance(pending, torch.tensor(counts))
                new = [row[:n] for row, n in zip(block.tolist(), counts, strict=True)]
                caches[i] = cache, [text + tail for text, tail in zip(texts, new, strict=True)]
            case "fork":
                rows = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=3))
                caches.append((cache.fork(rows), [texts[row] for row in rows]))
            case "drop":
                if len(caches) > 1:
                    caches.pop(i)
        cache = None
    for cache, texts in caches:
        assert_holds(model, cache, texts)


def test_places() -> None:
    buffer = Layers([5], torch.ones(1, 4, 3))  # two planes a place
    places = Places(2, buffer)
    a, b = places.take(2)
    assert (a, b) == (0, 1) and not places.free
    places.hold(a)
    assert places.is_shared(a) and not places.is_shared(b)
    places.leave(a)
    assert not places.is_shared(a) and not places.free
    places.leave(a)
    assert places.free == [0]
    assert places.take(3) == [0, 2, 3] and len(places) == 4
    assert buffer[5].shape == (8, 3) and bool((buffer[5][:4] == 1).all())
