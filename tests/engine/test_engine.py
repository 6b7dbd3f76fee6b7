"""The engine: requests of all kinds together get what each would get alone, and nothing is lost."""

import copy
import gc
import pickle
import random
import signal
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from models import CONFIG, prompts_of, random_model

from tt_model import Engine, Event, Request, Step, TwoTower
from tt_model.engine.generate import Lent
from tt_model.engine.passes import Pass, Passes
from tt_model.engine.runner import Runner, batch_for, idle_rows
from tt_model.engine.settings import Settings
from tt_model.modeling.state import PAGE_SIZE

MODES = ("mask_diffusion", "ar", "mock_ar", "speculative")


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


@pytest.fixture(scope="module")
def bundled() -> TwoTower:
    return TwoTower.from_pretrained()


def free(engine: Engine) -> tuple[int, int, int]:
    """Rows, pages and slots that nobody holds."""
    scheduler = engine._scheduler
    return len(scheduler.rows), len(scheduler.pool.pages.free), len(scheduler.pool.slots.free)


def drawn(r: random.Random) -> tuple[list[int], dict[str, Any]]:
    """Any prompt and settings."""
    prompt = [r.randrange(4, CONFIG.vocab_size) for _ in range(r.choice((1, 2, 7, 30, 64, 65, 90, 130)))]
    found = dict(
        mode=r.choice(MODES),
        max_new_tokens=r.choice((0, 1, 2, 5, 9, 16)),
        block_size=r.choice((1, 3, 8)),
        steps_per_block=r.choice((1, 3, 8)),
        draft_steps=r.choice((1, 2)),
        confidence_threshold=r.choice((0.0, 0.15, 0.5, 1.0)),
        temperature=r.choice((0.0, 0.0, 0.7, 1.5)),
        top_k=r.choice((None, None, 3)),
        top_p=r.choice((None, None, 0.6)),
        eos_token_id=r.choice((None, 7, [5, 11, 12, 13, 20, 21, 22])),
        seed=r.randrange(100),
    )
    return prompt, found


def alone(model: TwoTower, prompt: list[int], options: dict[str, Any]) -> tuple[Any, ...]:
    out = model.generate([prompt], **options)
    return out.tokens[0], out.nfe[0], sum(out.cycles), out.finish_reason[0]


def found(request: Request) -> tuple[Any, ...]:
    result = request.so_far()
    return result.tokens, result.nfe, result.cycles, result.finish_reason


class Replay:
    """A CUDA graph's stand-in: the same work on the rows that lie there now, its outcome where it lay before."""

    def __init__(self, passes: Passes, what: Pass, size: int):
        self.graph, self.rows, self.outcome = self, torch.zeros(size, dtype=torch.int64), None
        self.again = lambda: passes(what, self.rows)

    @torch.inference_mode()
    def replay(self) -> None:
        new = self.again()
        if self.outcome is None:
            self.outcome = new
        for there, t in zip(self.outcome, new, strict=True):
            assert (there is None) == (t is None)
            if there is not None:
                there.copy_(t)


class Replaying(Runner):
    """Works as on a GPU: rows and pages filled up, passes kept by their sizes."""

    def __init__(self, passes: Passes):
        super().__init__(passes, graphs=True)

    def _capture(self, what: Pass, size: int) -> Any:
        return Replay(self.passes, what, size)

    def _free(self) -> int:
        return 2 << 30


def as_on_a_gpu(engine: Engine) -> Engine:
    engine._batches.runner, engine._batches.ahead = Replaying(engine._batches.passes), 4
    return engine


@pytest.mark.parametrize("replayed", [False, True], ids=["called", "replayed"])
def test_500_requests_on_a_tiny_pool(model: TwoTower, replayed: bool) -> None:
    """Entering, leaving and cancelled at random."""
    r = random.Random(int(replayed))
    engine = Engine(model, max_rows=5, max_tokens=9 * PAGE_SIZE, max_prefixes=2)
    if replayed:
        as_on_a_gpu(engine)
    before = free(engine)
    shared = [r.randrange(4, CONFIG.vocab_size) for _ in range(130)]
    requests, cancelled = [], set[Request]()
    count = 150 if replayed else 500
    while len(requests) < count or any(request.is_open for request, *_ in requests):
        if len(requests) < count and r.random() < 0.4:
            prompt, options = drawn(r)
            if r.random() < 0.3:
                prompt = shared[: r.choice((65, 100, 129))] + prompt[:20]
            requests.append((engine.submit(prompt, **options), prompt, options))
        if requests and r.random() < 0.02:
            request = r.choice(requests)[0]
            if request.is_open:
                cancelled.add(request)
                request.cancel()
        engine.step()
    for request, prompt, options in requests:
        if request in cancelled:
            assert request.state == "cancelled" and request.result().finish_reason == "cancelled"
        else:
            assert found(request) == alone(model, prompt, options), (prompt, options)
    assert any(request.cached_tokens for request, *_ in requests), "no beginning was shared"
    assert {event.kind for event in engine} >= {"started", "finished"}
    while engine._scheduler.prefixes.drop():
        pass
    assert free(engine) == before
    assert len(cancelled) > 2


# ---- events, and who reads them ----


def written(events: list[Event], request: Request) -> tuple[list[int], str]:
    own = [event for event in events if event.request is request]
    return [t for event in own for t in event.tokens], "".join(event.text for event in own)


def test_events_tell_every_token_once_and_in_order(bundled: TwoTower) -> None:
    engine = Engine(bundled, max_rows=2)
    prompts = ["def f(", "import numpy", "class Stack:"]
    options = [dict(mode=mode, max_new_tokens=20, block_size=8) for mode in ("mask_diffusion", "ar", "speculative")]
    requests = [engine.submit(p, **o) for p, o in zip(prompts, options, strict=True)]
    events = list(engine)
    for request, prompt, option in zip(requests, prompts, options, strict=True):
        kinds = [event.kind for event in events if event.request is request]
        assert kinds[0] == "started" and kinds[-1] == "finished" and set(kinds[1:-1]) == {"tokens"}
        out = bundled.generate(prompt, **option)
        result = request.result()
        assert written(events, request) == (result.tokens, result.text) == (out.tokens[0], out.text[0])
        assert result.tokens_per_forward == out.tokens_per_forward[0] > 0
    first_end = next(i for i, event in enumerate(events) if event.kind == "finished")
    started = next(i for i, event in enumerate(events) if (event.kind, event.request) == ("started", requests[2]))
    assert started > first_end, "the third waits for a row"
    assert list(engine) == [] and engine.submit("x", max_new_tokens=1).result().tokens


def test_a_consumer_that_stops_reading_holds_up_nobody(model: TwoTower) -> None:
    """What is not read is kept, not more than a few events a request; a later reader gets all of it."""
    engine = Engine(model, max_rows=4)
    requests = [engine.submit([4 + i, 9], mode="ar", max_new_tokens=30, eos_token_id=None) for i in range(6)]
    for event in engine:
        if event.kind == "tokens":
            break
    early = list(event.tokens)
    results = [request.result() for request in requests[1:]]
    assert all(len(result.tokens) == 30 for result in results)
    assert len(engine._events) <= 3
    events = list(engine)
    assert early + written(events, requests[0])[0] == requests[0].tokens
    assert {event.request for event in events} == {requests[0]}, "results have been taken"


def test_a_new_prompt_enters_beside_running_rows(model: TwoTower) -> None:
    """A long prompt is read in stretches, and the others write between them."""
    engine = Engine(model, max_rows=2)
    short = engine.submit([4, 9], mode="ar", max_new_tokens=40, eos_token_id=None)
    while len(short.tokens) < 5:
        engine.step()
    (prompt,) = prompts_of([300])
    long = engine.submit(prompt, mode="ar", max_new_tokens=2, eos_token_id=None)
    lengths = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tt_model.engine.batches.BESIDE", 64)
        while not long.tokens:
            engine.step()
            lengths.append((long.length, len(short.tokens)))
    read, wrote = zip(*lengths, strict=True)
    assert max(b - a for a, b in pairwise(read)) <= 64
    assert wrote[-1] - wrote[0] >= 3, "nobody wrote meanwhile"
    assert long.result().tokens == model.generate([prompt], mode="ar", max_new_tokens=2, eos_token_id=None).tokens[0]


def test_rows_at_different_steps_are_told_apart(model: TwoTower) -> None:
    steps: list[Step] = []
    engine = Engine(model, max_rows=3)
    options = dict(max_new_tokens=16, confidence_threshold=0.15, eos_token_id=None, on_step=steps.append)
    requests = [engine.submit(prompt, **options) for prompt in prompts_of([3, 12, 30])]
    list(engine)
    for request in requests:
        own = [(step, step.rows.index(request.number)) for step in steps if request.number in step.rows]
        assert len(own) == request.nfe
        tokens = {s.start[r] + int(i): int(s.tokens[r, i]) for s, r in own for i in s.committed[r].nonzero()}
        assert [tokens[len(request.prompt) + i] for i in range(16)] == request.tokens


def test_passes_are_counted(model: TwoTower) -> None:
    """The reading of the prompt is one: AR writes a token a pass. A block's last pass is followed by one that reads it,
    but for the last block."""
    options = dict(max_new_tokens=16, eos_token_id=None)
    prompts = prompts_of([3, 70])
    out = model.generate(prompts, mode="ar", **options)
    assert out.forwards == [16, 16] and out.tokens_per_forward == [1.0, 1.0]
    out = model.generate(prompts, mode="mock_ar", **options)
    assert out.nfe == [16, 16] and out.forwards == [33, 33] and out.tokens_per_forward == [1.0, 1.0]
    out = model.generate(prompts, confidence_threshold=0.15, **options)
    assert out.forwards == [nfe + 2 for nfe in out.nfe]
    assert out.tokens_per_forward == [16 / nfe for nfe in out.nfe] and max(out.tokens_per_forward) > 1
    out = model.generate(prompts, mode="speculative", **options)
    assert out.forwards == [nfe + cycles + 1 for nfe, cycles in zip(out.nfe, out.cycles, strict=True)]


# ---- admission ----


def test_what_can_never_fit_is_refused_and_what_can_waits(model: TwoTower) -> None:
    engine = Engine(model, max_rows=4, max_tokens=128, max_prefixes=0)
    with pytest.raises(ValueError, match=r"prompt: 100 tokens and 30 new ones need room for 192, .* max_tokens is 128"):
        engine.submit(prompts_of([100])[0], max_new_tokens=30)
    fitting = [engine.submit([5] * 70, max_new_tokens=30, eos_token_id=None) for _ in range(3)]
    engine.step()
    assert [request.state for request in fitting] == ["running", "waiting", "waiting"]
    list(engine)
    assert [request.state for request in fitting] == ["finished"] * 3
    for bad in (dict(max_rows=0), dict(max_tokens=0), dict(max_prefixes=-1), dict(max_rows=True)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Engine(model, **bad)


def test_a_bad_request_among_good_ones(model: TwoTower) -> None:
    engine = Engine(model, max_rows=2)
    good = engine.submit([4, 5], max_new_tokens=8)
    for bad in (dict(mode="fast"), dict(top_p=2), dict(block_size=0), dict(stop="x"), dict(on_step=3), dict(seed="a")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            engine.submit([4, 5], **bad)
    for prompt in ([], [CONFIG.vocab_size], [[4]], None, 3, "text"):
        with pytest.raises(ValueError, match=r"prompt|tokenizer"):
            engine.submit(prompt)
    with pytest.raises(TypeError, match="hurry"):
        engine.submit([4], hurry=True)
    after = engine.submit([4, 5], max_new_tokens=8)
    assert good.result() == after.result() and (good.number, after.number) == (0, 1)


# ---- faults ----


def test_a_callback_that_raises_ends_its_request_alone(model: TwoTower) -> None:
    def fail(step: Step) -> None:
        raise OSError("the disk is full")

    engine = Engine(model, max_rows=3)
    before = free(engine)
    options = dict(max_new_tokens=8, eos_token_id=None)
    bad, good = engine.submit([4, 5], on_step=fail, **options), engine.submit([4, 5], **options)
    kinds = {(event.request.number, event.kind) for event in engine}
    assert (0, "failed") in kinds and (1, "finished") in kinds
    with pytest.raises(OSError, match="the disk is full"):
        bad.result()
    assert good.result().tokens == model.generate([[4, 5]], **options).tokens[0]
    assert bad.state == "failed" and free(engine) == before
    with pytest.raises(OSError, match="the disk is full"):
        model.generate([[4, 5], [6]], on_step=fail, **options)


def test_a_pass_that_fails_ends_those_that_took_part(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_rows=3)
    before = free(engine)
    lost = engine.submit([4, 5], mode="mock_ar", max_new_tokens=8)
    kept = engine.submit([4, 5], mode="ar", max_new_tokens=8)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA: 3 GB")

    with monkeypatch.context() as patch:
        patch.setattr(engine._batches.passes, "_mock_ar", fail)
        list(engine)
    with pytest.raises(torch.OutOfMemoryError):
        lost.result()
    with monkeypatch.context() as patch:
        patch.setattr(engine._board, "enter", fail)
        with pytest.raises(torch.OutOfMemoryError):
            engine.submit([4, 5]).result()
    assert kept.state == "finished" and free(engine) == before
    assert engine.submit([4, 5], mode="mock_ar", max_new_tokens=8).result().tokens


def interrupt(owner: Any, name: str, patch: pytest.MonkeyPatch, call: int = 2) -> None:
    """Ctrl-C at the end of a call of a method: what it has written is there, and nobody knows of it."""
    inner, calls = getattr(owner, name), iter(range(10**6))

    def cut(*args: Any, **more: Any) -> Any:
        out = inner(*args, **more)
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return out

    patch.setattr(owner, name, cut)


@pytest.mark.parametrize("when", ["_denoise", "_commit", "_ar", "_mock_ar", "_verify", "_extend", "enter"])
def test_ctrl_c_in_the_middle_of_a_pass(model: TwoTower, when: str) -> None:
    """It is raised, and whoever goes on with the engine gets what he would have got."""
    engine = Engine(model, max_rows=8, max_prefixes=0)
    before = free(engine)
    r, requests = random.Random(3), []
    for mode in MODES * 2:
        prompt, options = drawn(r)
        options |= dict(mode=mode, max_new_tokens=16, eos_token_id=None)
        requests.append((engine.submit(prompt, **options), prompt, options))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(engine._board if when == "enter" else engine._batches.passes, when, patch)
        with pytest.raises(KeyboardInterrupt):
            list(engine)
        events = list(engine)
        assert {event.kind for event in events} <= {"started", "tokens", "finished"}
    assert sum(event.kind == "started" for event in events) <= len(requests)
    for request, prompt, options in requests:
        assert request.result().tokens == model.generate([prompt], **options).tokens[0], options
    assert free(engine) == before


def test_a_callback_may_cancel_and_may_not_run_the_engine(model: TwoTower) -> None:
    engine = Engine(model, max_rows=4)
    errors = []

    def stop(step: Step) -> None:
        try:
            other.result()
        except RuntimeError as error:
            errors.append(str(error))
        request.cancel()
        other.cancel()

    request = engine.submit([4, 5], mode="ar", max_new_tokens=50, eos_token_id=None, on_step=stop)
    other = engine.submit([4, 6], mode="ar", max_new_tokens=50, eos_token_id=None)
    third = engine.submit([4, 7], mode="ar", max_new_tokens=50, eos_token_id=None)
    list(engine)
    assert len(request.tokens) == len(other.tokens) == 1 and len(third.tokens) == 50
    assert "in the middle of a pass" in errors[0] and len(errors) == 1
    assert request.result().finish_reason == "cancelled"
    third.cancel()
    assert third.state == "finished"


def test_an_engine_that_is_dropped_leaves_nothing(model: TwoTower) -> None:
    engine = Engine(model, max_rows=2)
    engine.submit([4, 5], max_new_tokens=8)
    engine.step()
    pool = weakref.ref(engine._board.pool)
    del engine
    gc.collect()
    assert pool() is None


# ---- beginnings that are shared ----


def test_the_third_prompt_that_begins_alike_reads_the_rest_alone(model: TwoTower) -> None:
    engine = Engine(model, max_rows=2, max_prefixes=2)
    (shared,) = prompts_of([200])
    options = dict(max_new_tokens=8, eos_token_id=None)
    for mode in MODES:
        for end in ([5, 6, 7], [8, 9], [10]):
            request = engine.submit(shared + end, mode=mode, **options)
            assert request.result().tokens == model.generate([shared + end], mode=mode, **options).tokens[0]
    assert request.cached_tokens == 192
    again = engine.submit(shared, **options)
    assert again.result().tokens == model.generate([shared], **options).tokens[0] and again.cached_tokens == 192
    other = engine.submit([5, *shared[1:]], **options)
    assert other.result().tokens == model.generate([[5, *shared[1:]]], **options).tokens[0]
    assert other.cached_tokens == 0, "a beginning is all of its tokens"


def test_prefixes_give_way_to_requests(model: TwoTower) -> None:
    engine = Engine(model, max_rows=2, max_tokens=5 * PAGE_SIZE, max_prefixes=4)
    (shared,) = prompts_of([130])
    for _ in range(3):
        assert engine.submit(shared, max_new_tokens=4, mode="ar").result().tokens
    assert engine._scheduler.prefixes.kept
    assert engine.submit(prompts_of([250])[0], max_new_tokens=4, mode="ar").result().tokens
    assert not engine._scheduler.prefixes.kept
    assert free(engine) == (2, 5, 2 + 4)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_follows_a_cache(model: TwoTower, mode: str) -> None:
    engine = Engine(model, max_rows=2)
    for length in (1, 63, 64, 100):
        before, prompt = prompts_of([length])[0], [7, 8, 9]
        cache = model.prefill([before, [5]]).fork([0])
        options = dict(mode=mode, max_new_tokens=12, temperature=0.7, seed=3, eos_token_id=None)
        request = engine.submit(prompt, prefix=cache, **options)
        model.commit(torch.tensor([[11]]), cache)  # after it was submitted: another text
        assert request.result().tokens == model.generate([before + prompt], **options).tokens[0]
        assert cache.lengths.tolist() == [length + 1]
    for bad, words in ((model.prefill([[4], [5]]), "has 2 rows"), (3, "is 3"), ([4], "is ")):
        with pytest.raises(ValueError, match=f"prefix {words}.*expected a cache of one row"):
            engine.submit(prompt, prefix=bad)
    other = random_model(CONFIG.__class__(**{**vars(CONFIG), "head_dim": 16})).prefill([[4]])
    with pytest.raises(ValueError, match="another size"):
        engine.submit(prompt, prefix=other)
    with pytest.raises(ValueError, match="exceed the model's context of 512"):
        engine.submit([4] * 200, prefix=model.prefill([[5] * 300]), max_new_tokens=20)


# ---- any order of things ----


@hypothesis(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_coming_and_going(model: TwoTower, data: st.DataObject) -> None:
    engine = Engine(model, max_rows=3, max_tokens=6 * PAGE_SIZE, max_prefixes=1)
    before, requests = free(engine), []
    for action in data.draw(st.lists(st.sampled_from(("submit", "step", "step", "cancel")), max_size=30)):
        if action == "submit":
            prompt, options = drawn(random.Random(data.draw(st.integers(0, 10**6))))
            requests.append((engine.submit(prompt, **options), prompt, options))
        elif action == "step":
            engine.step()
        elif requests:
            data.draw(st.sampled_from(requests))[0].cancel()
    list(engine)
    for request, prompt, options in requests:
        if request.state != "cancelled":
            assert found(request) == alone(model, prompt, options)
    while engine._scheduler.prefixes.drop():
        pass
    assert free(engine) == before


# ---- graphs ----


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
        patch.setattr(runner, "_free", lambda: 0)
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
    engine.prepare(mode=mode, tokens=64, progress=False)
    captured = set(engine._batches.runner.captured)
    assert captured
    for prompt in ([4], [5, 6], [7, 8, 9]):
        engine.submit(prompt, mode=mode, max_new_tokens=20, eos_token_id=None, seed=1)
    list(engine)
    assert set(engine._batches.runner.captured) == captured
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
