"""`use`, `skip_checks`, `recording` and `overriding` hold for the thread or task that enters them, and for no other."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch

import tt_kernels
from tt_kernels.runtime import checks, registry
from tt_kernels.runtime.launch import Launch, architecture, is_recording, overriding, recording, tuned
from tt_model import TwoTower

X, WEIGHT = torch.ones(2, 4), torch.ones(4)
LAUNCH = Launch(BLOCK=64)


def skips() -> bool:
    try:
        checks.check("t", x=(X, "D"))
    except ValueError:
        return False
    return True


CONTEXTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], bool]]] = {
    "use": (lambda: tt_kernels.use("reference"), registry._uses_reference),
    "skip_checks": (tt_kernels.skip_checks, skips),
    "recording": (lambda: recording(80), lambda: is_recording() and architecture(X) == 80),
    "overriding": (lambda: overriding("k", LAUNCH), lambda: tuned("k", Launch(), 90) == LAUNCH),
}
BY_NAME = pytest.mark.parametrize("name", CONTEXTS)


@BY_NAME
def test_threads_that_overlap_leave_nothing(name: str) -> None:
    """They enter and leave in the order A, B, A, B."""
    enter, holds = CONTEXTS[name]
    a_in, b_in, a_out = (threading.Event() for _ in range(3))
    seen: dict[str, list[bool]] = {}

    def visit(who: str, before: threading.Event | None, inside: threading.Event, until: threading.Event) -> None:
        assert before is None or before.wait(10)
        found = [holds()]
        with enter():
            inside.set()
            assert until.wait(10)
            found.append(holds())
        a_out.set()
        seen[who] = [*found, holds()]

    threads = [
        threading.Thread(target=visit, args=("A", None, a_in, b_in)),
        threading.Thread(target=visit, args=("B", a_in, b_in, a_out)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {"A": [False, True, False], "B": [False, True, False]}
    assert not holds()


@BY_NAME
def test_a_thread_beside_is_not_in_it(name: str) -> None:
    enter, holds = CONTEXTS[name]
    found: list[bool] = []
    with enter():
        thread = threading.Thread(target=lambda: found.append(holds()))
        thread.start()
        thread.join(10)
        assert holds()
    assert found == [False]


@BY_NAME
def test_tasks_that_overlap_leave_nothing(name: str) -> None:
    enter, holds = CONTEXTS[name]

    async def visit(delay: int) -> list[bool]:
        found = []
        for _ in range(delay):
            await asyncio.sleep(0)
        with enter():
            found.append(holds())
            for _ in range(3):
                await asyncio.sleep(0)
            found.append(holds())
        return [*found, holds()]

    async def both() -> list[list[bool]]:
        return await asyncio.gather(visit(0), visit(1))

    assert asyncio.run(both()) == [[True, True, False]] * 2


@BY_NAME
def test_blocks_nest(name: str) -> None:
    enter, holds = CONTEXTS[name]
    with ExitStack() as outer:
        outer.enter_context(enter())
        with enter():
            assert holds()
        assert holds()
    assert not holds()


@BY_NAME
def test_an_error_leaves_the_block(name: str) -> None:
    enter, holds = CONTEXTS[name]
    with pytest.raises(KeyError), enter():
        raise KeyError
    assert not holds()


def test_a_backward_pass_is_recorded_and_overridden() -> None:
    """It runs in the thread whose context says so, also where a device has an autograd thread of its own."""
    seen = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: torch.Tensor) -> torch.Tensor:
            seen.append((is_recording(), tuned("k", Launch(), 90), threading.get_ident()))
            return d

    x = torch.ones(2, requires_grad=True)
    with recording(90), overriding("k", LAUNCH):
        Ask.apply(x).sum().backward()
    assert seen == [(True, LAUNCH, threading.get_ident())]


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_use_reaches_compiled_graphs(fresh_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a graph, entered and left again; inside; and not from the thread beside."""

    def which(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if registry._uses_reference() else 2)

    def inside(x: torch.Tensor) -> torch.Tensor:
        with tt_kernels.use("reference"):
            y = which(x)
        return y + 10 * which(x)

    compiled = torch.compile(which, fullgraph=True, backend="eager")
    zero = torch.zeros(1)
    assert compiled(zero) == 2
    with tt_kernels.use("reference"):
        assert compiled(zero) == 1
    assert compiled(zero) == 2
    assert torch.compile(inside, fullgraph=True, backend="eager")(zero) == 21
    assert not registry._uses_reference()


def test_skip_checks_is_traced(fresh_graphs: None) -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        with tt_kernels.skip_checks():
            return tt_kernels.rms_norm(x, WEIGHT)

    assert torch.equal(torch.compile(norm, fullgraph=True, backend="eager")(X), tt_kernels.rms_norm(X, WEIGHT))
    assert not skips()


def test_four_threads_generate_as_one() -> None:
    """The model trusts itself inside its towers; behind them every thread's ops are checked again."""
    model = TwoTower.from_pretrained(progress=False)
    prompts = [[1, 5 + i, 90, 17] for i in range(4)]
    alone = [model.generate([prompt], max_new_tokens=20, seed=3).tokens for prompt in prompts]
    together: dict[int, list[list[int]]] = {}
    checked: dict[int, bool] = {}

    def go(i: int) -> None:
        together[i] = model.generate([prompts[i]], max_new_tokens=20, seed=3).tokens
        checked[i] = not skips()

    threads = [threading.Thread(target=go, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [together[i] for i in range(4)] == alone
    assert checked == dict.fromkeys(range(4), True) and not skips()
