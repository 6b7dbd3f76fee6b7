"""The engine: requests of all kinds together get what each would get alone, and nothing is lost."""

import random
from itertools import pairwise

import pytest
import torch
from engines import MODES, alone, as_on_a_gpu, drawn, found, free
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, prompts_of, random_model

from tt_model import Engine, Event, Request, Step, TwoTower
from tt_model.modeling.state import PAGE_SIZE


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


@pytest.fixture(scope="module")
def bundled() -> TwoTower:
    return TwoTower.from_pretrained()


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
    count = 100 if replayed else 500
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


def test_prefixes_stay_where_their_pages_would_not_be_enough(model: TwoTower) -> None:
    """Nor does a request lose the beginning that it is to begin from."""
    engine = Engine(model, max_rows=3, max_tokens=8 * PAGE_SIZE, max_prefixes=2)
    (shared,) = prompts_of([130])
    options = dict(max_new_tokens=40, mode="ar", eos_token_id=None)
    for _ in range(2):
        engine.submit(shared, **options).result()
    running = engine.submit([4] * 150, **{**options, "max_new_tokens": 100})  # four pages; two are kept, two are free
    while not running.tokens:
        engine.step()
    waiting = engine.submit(shared + [5] * 60, **options)  # four pages, of which two are kept
    third = engine.submit([6] * 200, **options)  # four
    engine.step()
    assert (waiting.state, waiting.cached_tokens, third.state) == ("running", 128, "waiting")
    assert engine._scheduler.prefixes.kept
    list(engine)
    for request in (waiting, third):
        assert request.tokens == model.generate([request.prompt], **options).tokens[0]


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


@settings(max_examples=25, deadline=None)
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
