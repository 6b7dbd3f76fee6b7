"""What goes wrong in an engine, and that the others go on: callbacks, passes, Ctrl-C at any line."""

import gc
import random
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from engines import MODES, as_on_a_gpu, drawn, free
from models import random_model

from tt_model import Engine, Step, TwoTower
from tt_model.modeling.state import PAGE_SIZE, Pending, View


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


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


def test_what_a_failed_request_had_is_told(model: TwoTower) -> None:
    def fail(step: Step) -> None:
        if len(request.tokens) > 3:
            raise OSError("the disk is full")

    engine = Engine(model, max_rows=1)
    request = engine.submit([4, 5], mode="ar", max_new_tokens=8, eos_token_id=None, on_step=fail)
    events = list(engine)
    assert events[-1].kind == "failed" and [t for event in events for t in event.tokens] == request.tokens
    assert len(request.tokens) == 4


@pytest.mark.parametrize("replayed", [False, True], ids=["called", "replayed"])
def test_pages_hold_whatever_a_pass_may_write(model: TwoTower, replayed: bool) -> None:
    """Also behind what was asked for: a whole block, a few tokens. The page after a row's last is another row's."""
    engine = Engine(model, max_rows=5)
    if replayed:
        as_on_a_gpu(engine)
    prompt = [4] * (PAGE_SIZE - 7)  # what is asked for just fills a page
    requests = {
        mode: engine.submit(prompt, mode=mode, max_new_tokens=7, eos_token_id=None)
        for mode in ("mask_diffusion", "speculative", "ar", "mock_ar")
    }
    engine.submit(
        [4], mode="ar", max_new_tokens=40, eos_token_id=None
    )  # several steps a pass for it, and for all beside
    passes, far, beyond = engine._batches.runner.passes, dict[str, int](), list[tuple[str, int]]()

    def reach(mode: str, last: int) -> None:
        far[mode] = max(last, far.get(mode, 0))
        if last > PAGE_SIZE * len(requests[mode].pages):  # what is raised here would end requests, no more
            beyond.append((mode, last))

    def extend(rows: torch.Tensor, ids: torch.Tensor, view: View, counts: torch.Tensor | None = None) -> torch.Tensor:
        ends = (view.lengths + (ids.shape[1] if counts is None else counts)).tolist()
        for mode, request in requests.items():
            if request.row in rows.tolist() and request.state == "running":
                reach(mode, ends[rows.tolist().index(request.row)])
        return whole(rows, ids, view, counts)

    def let_in(view: View, pending: Pending, entered: torch.Tensor) -> None:
        assert pending.hidden is not None
        reach("speculative", int(view.lengths[0]) + pending.hidden.shape[1])
        entering(view, pending, entered)

    whole, entering = passes._extend, View.let_in
    with mock.patch.object(passes, "_extend", extend), mock.patch.object(View, "let_in", let_in):
        assert "failed" not in {event.kind for event in engine}
    assert beyond == [] and far["speculative"] > PAGE_SIZE and (far["ar"] > PAGE_SIZE) == replayed


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


def again(number: int) -> None:
    """Ctrl-C twice: the second one acts at once."""
    signal.raise_signal(number)
    signal.raise_signal(number)


def interrupt(owner: Any, name: str, patch: pytest.MonkeyPatch, send: Callable[[int], None], call: int = 2) -> None:
    """Ctrl-C at the end of a call of a method: what it has written is there, and nobody knows of it."""
    inner, calls = getattr(owner, name), iter(range(10**6))

    def cut(*args: Any, **more: Any) -> Any:
        out = inner(*args, **more)
        if next(calls) == call:
            send(signal.SIGINT)
        return out

    patch.setattr(owner, name, cut)


@pytest.mark.parametrize("send", [signal.raise_signal, again], ids=["once", "twice"])
@pytest.mark.parametrize("when", ["_denoise", "_commit", "_ar", "_mock_ar", "_verify", "_extend", "enter"])
def test_ctrl_c_in_the_middle_of_a_pass(model: TwoTower, when: str, send: Callable[[int], None]) -> None:
    """It is raised, and whoever goes on with the engine gets what he would have got."""
    engine = Engine(model, max_rows=8, max_prefixes=0)
    before = free(engine)
    r, requests = random.Random(3), []
    for mode in MODES * 2:
        prompt, options = drawn(r)
        options |= dict(mode=mode, max_new_tokens=16, eos_token_id=None)
        requests.append((engine.submit(prompt, **options), prompt, options))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(engine._board if when == "enter" else engine._batches.passes, when, patch, send)
        with pytest.raises(KeyboardInterrupt):
            list(engine)
        events = list(engine)
        assert {event.kind for event in events} <= {"started", "tokens", "finished"}
    assert sum(event.kind == "started" for event in events) <= len(requests)
    for request, prompt, options in requests:
        assert request.result().tokens == model.generate([prompt], **options).tokens[0], options
    assert free(engine) == before


@contextmanager
def interrupted_at(line: int) -> Iterator[list[str]]:
    """Ctrl-C where so many lines of the engine have run; the place, when it has been reached."""
    count, place = iter(range(line)), list[str]()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if "tt_model/engine/" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(count, None) is None and not place:
            place.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield place
    finally:
        sys.settrace(before)


def test_ctrl_c_at_any_line(model: TwoTower) -> None:
    """Of the engine's own code, between passes as in them: every request is there still and gets its tokens."""
    prompts = [[4, 5], [6], [7, 8, 9]]
    options = [dict(mode=mode, max_new_tokens=7, eos_token_id=None) for mode in ("mask_diffusion", "ar", "speculative")]
    want = [model.generate([p], **o).tokens[0] for p, o in zip(prompts, options, strict=True)]
    places, line = set[str](), 1
    while True:
        engine = Engine(model, max_rows=2, max_tokens=192, max_prefixes=1)
        before = free(engine)
        requests = [engine.submit(p, **o) for p, o in zip(prompts, options, strict=True)]
        events: list[Any] = []
        with interrupted_at(line) as place:
            try:
                events += engine
            except KeyboardInterrupt:
                assert place
        if not place:
            break
        places |= set(place)
        events += engine
        assert [request.tokens for request in requests] == want, place
        assert free(engine) == before and not engine._is_busy, place
        line += 41
    assert len(places) > 25, "few places were tried"


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
