"""Passes as CUDA graphs: their sizes, what fills them up, what is kept; captured on a GPU, stood in for elsewhere."""

import copy
import pickle
from typing import Any

import pytest
import torch
from engines import MODES, as_on_a_gpu
from models import random_model

from tt_model import Engine, TwoTower
from tt_model.engine.generate import Lent
from tt_model.engine.passes import Pass
from tt_model.engine.runner import Runner, batch_for, idle_rows
from tt_model.engine.settings import Settings
from tt_model.modeling.state import PAGE_SIZE


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


@pytest.fixture(scope="module")
def bundled() -> TwoTower:
    return TwoTower.from_pretrained()


@pytest.mark.parametrize("kind", ["denoise", "commit", "ar", "mock_ar", "verify"])
def test_passes_over_idle_rows_change_nothing(model: TwoTower, kind: Any) -> None:
    """What is captured, and what fills up a batch: not a bit of any other row, page or state; and no token enters."""
    engine = Engine(model, max_rows=17, max_tokens=8 * PAGE_SIZE, max_prefixes=0)
    for mode in ("ar", "mask_diffusion", "speculative"):
        engine.submit([4, 5, 6], mode=mode, max_new_tokens=30, eos_token_id=None)
    for _ in range(12):
        engine.step()
    board, pool = engine._board, engine._board.pool
    mine = set(board.slot[board.rows :].tolist()), set(board.page_table[board.rows :].flatten().tolist())
    assert len(board.idle) == len(mine[0]) == len(mine[1]) == 3
    slots = [slot for slot in range(len(pool.slots)) if slot not in mine[0]]
    pages = [page for page in range(len(pool.pages)) if page not in mine[1]]

    def everything() -> list[torch.Tensor]:
        found = [t[: board.rows] for t in vars(board).values() if isinstance(t, torch.Tensor)]
        found += [t[: board.rows] for lane in board.lanes.values() for t in lane]
        found += [t[slots] for t in pool.ssm.values()]
        found += [t.unflatten(0, (-1, 2))[slots] for t in pool.conv.values()]
        found += [t[pages] for t in (*pool.keys.values(), *pool.values.values())]
        return [t.clone().nan_to_num() for t in found]

    before = everything()
    for _ in range(100):  # more tokens than a page holds
        engine._batches.passes(Pass(kind, 1 if kind in ("ar", "mock_ar") else 8, 1), torch.tensor(board.idle))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert board.lengths[board.rows :].tolist() == [0] * 3
    assert all(t.isfinite().all() for t in (*pool.ssm.values(), *pool.conv.values()))


def test_batches_have_a_few_sizes() -> None:
    sizes = [batch_for(n) for n in range(1, 300)]
    assert sizes[:4] == [1, 2, 3, 4] and len(set(sizes[:128])) <= 24
    assert all(n <= size <= max(1.25 * n, n + 1) for n, size in enumerate(sizes, 1))
    for most in (1, 2, 13, 16, 100):
        assert max(batch_for(n) - n for n in range(1, most + 1)) <= idle_rows(most) <= 15
    assert idle_rows(1) == 1


def test_contexts_grow_and_rows_come_without_capturing_anew(model: TwoTower) -> None:
    engine = as_on_a_gpu(Engine(model, max_rows=6, max_tokens=6 * 512, max_prefixes=0))
    options = dict(mode="ar", max_new_tokens=150, eos_token_id=None)
    list(map(engine.submit, [[4, 5]] * 4))
    requests = [engine.submit([4 + b], **options) for b in range(5)]
    list(engine)
    captured = engine._batches.runner.captured
    seen = {(what.kind, what.pages, what.repeat, size) for what, size in captured}
    assert {pages for kind, pages, *_ in seen if kind == "ar"} == {1, 2, 4}
    assert {size for *_, size in seen} <= {1, 2, 3, 4, 6}
    again = [engine.submit([9 + b], **options) for b in range(5)]
    known = set(captured)
    list(engine)
    assert {(what.kind, what.pages) for what, _ in set(captured) - known} <= {("ar", 1), ("ar", 2), ("ar", 4)}
    for request in (*requests, *again):
        assert request.tokens == model.generate([request.prompt], **options).tokens[0]


def test_graphs_are_bounded(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tt_model.engine.runner.MOST", 3)
    engine = as_on_a_gpu(Engine(model, max_rows=4))
    runner = engine._batches.runner
    for size in range(1, 8):
        request = engine.submit([4, 5], block_size=size, max_new_tokens=20, eos_token_id=None)
        want = model.generate([[4, 5]], block_size=size, max_new_tokens=20, eos_token_id=None)
        assert request.result().tokens == want.tokens[0]
        assert 0 < len(runner.captured) <= 3
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_free", lambda device: 0)
        request = engine.submit([4, 5], block_size=1, max_new_tokens=20, eos_token_id=None)
        before = dict(runner.captured)
        want = model.generate([[4, 5]], block_size=1, max_new_tokens=20, eos_token_id=None)
        assert request.result().tokens == want.tokens[0] and runner.captured == before


def test_a_copy_of_a_model_leaves_its_engine_behind(bundled: TwoTower) -> None:
    """What a model keeps on a GPU."""
    bundled.__dict__["_lent"] = Lent(bundled, [[4]], Settings())
    try:
        for twin in (copy.deepcopy(bundled), pickle.loads(pickle.dumps(bundled))):
            assert twin.__dict__["_lent"] is None and twin.generate([[4]], max_new_tokens=2).tokens
    finally:
        del bundled.__dict__["_lent"]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_prepared_is_not_captured_later(model: TwoTower, mode: str) -> None:
    engine = as_on_a_gpu(Engine(model, max_rows=3))
    engine.prepare(mode=mode, tokens=300, progress=False)
    captured = set(engine._batches.runner.captured)
    assert captured
    for length in (1, 60, 120, 250):
        engine.submit([4] * length, mode=mode, max_new_tokens=20, eos_token_id=None, seed=1)
    list(engine)
    new = set(engine._batches.runner.captured) - captured
    assert all(what.kind == "ar" and what.repeat < 4 for what, _ in new), "where fewer than four tokens are wanted"
    Engine(model).prepare(mode=mode)  # on a CPU there is nothing to capture
    with pytest.raises(ValueError, match="mode is 'fast'"):
        engine.prepare(mode="fast")


def test_an_engine_is_kept_while_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: for the next call, unless it is too small or a weight has changed; a call inside another has its
    own."""
    monkeypatch.setattr("tt_model.engine.generate._is_kept", lambda model: True)
    model = random_model()
    options = dict(mode="ar", max_new_tokens=6, eos_token_id=None)
    inner: list[list[list[int]]] = []
    want = model.generate([[4, 5], [6]], **options).tokens

    def kept() -> Engine:
        return model.__dict__["_lent"].engine

    engine = kept()
    assert model.generate([[4, 5]], **options).tokens == want[:1] and kept() is engine
    assert model.generate([[4, 5]], on_step=lambda _: inner.append(model.generate([[6]], **options).tokens), **options)
    assert inner == [want[1:]] * 6
    engine = kept()
    model.generate([[4]] * 5, **options)
    larger = kept()
    assert larger is not engine and larger.max_rows >= 5
    with torch.no_grad():
        model.context_lm_head.weight.neg_()
    assert model.generate([[4, 5], [6]], **options).tokens != want and kept() is not larger
    model.generate([[4]], **options)
    with pytest.raises(OSError):
        model.generate([[4]] * 2, on_step=lambda _: (_ for _ in ()).throw(OSError()), **options)
    assert kept().has_room(kept().max_rows, kept().max_tokens), "what failed has given its places back"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_on_a_gpu_are_the_passes(dtype: torch.dtype) -> None:
    """All modes together, rows entering as others leave, batches filled up: what the same engine makes by calls."""
    model = TwoTower.from_pretrained(device="cuda", dtype=dtype)
    made = []
    for graphs in (False, True):
        engine = Engine(model, max_rows=5, max_tokens=4096)
        engine._batches.runner = Runner(engine._batches.passes, graphs=graphs, fill=True)
        requests = [
            engine.submit([5 + b] * (1 + 13 * b), mode=mode, max_new_tokens=40, temperature=t, seed=b, top_k=k)
            for b, (mode, t, k) in enumerate((m, t, k) for m in MODES for t, k in ((0.0, None), (0.7, None), (0.7, 9)))
        ]
        made.append([request.result().tokens for request in requests])
        assert bool(engine._batches.runner.captured) == graphs and not engine._batches.runner.refused
    assert made[0] == made[1]
