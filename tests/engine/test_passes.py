"""An engine's passes are what a CUDA graph can hold: on meta tensors, which hold nothing that the host could read, and
whose addresses can be told apart all the same."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import CONFIG
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tt_kernels.runtime.launch import INTERPRET, recording
from tt_model import TwoTower
from tt_model.engine.board import Board
from tt_model.engine.passes import Outcome, Pass, Passes
from tt_model.modeling.two_tower import _frequencies

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing is interpreted here")
ROWS, L = 5, CONFIG.block_size
PASSES = [
    Pass("denoise", L, 2),
    Pass("denoise", L, 2, narrow=True),
    Pass("denoise", L, 2, rules=True),
    Pass("commit", L, 2),
    Pass("ar", 1, 2),
    Pass("ar", 1, 2, narrow=True),
    Pass("ar", 1, 2, repeat=4),
    Pass("mock_ar", 1, 2),
    Pass("mock_ar", 1, 2, narrow=True),
    Pass("verify", L, 2),
    Pass("verify", L, 2, narrow=True),
]


@pytest.fixture
def passes() -> Iterator[Passes]:
    with torch.device("meta"):
        model = TwoTower(replace(CONFIG, dtype=torch.bfloat16)).to(torch.bfloat16).requires_grad_(False)
    with torch.inference_mode():
        board = Board(model, rows=ROWS, pages=8, slots=ROWS)
    yield Passes(model, board)
    _frequencies.cache_clear()


def address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in a launch's arguments: in tuples, and behind descriptors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(base := getattr(value, "base", None), Tensor):
        yield base


def plain(value: Any) -> Any:
    """An argument without its tensors: what a graph would keep of it by value."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    return repr(value) if isinstance(value, int | float | str | bool | type(None)) else type(value)


class Memory(TorchDispatchMode):
    """What operators and launches touch that was neither there before nor made meanwhile."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.alive, self.foreign, self.calls = known, list[Tensor](), list[Any](), list[Any]()

    def check(self, what: Any, arguments: Any) -> None:
        if strangers := [tuple(t.shape) for t in tensors_in(arguments) if address(t) not in self.known]:
            self.foreign.append((what, strangers))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.check(function, (args, tuple((kwargs or {}).values())))
        out = function(*args, **(kwargs or {}))
        made = list(tensors_in(out))
        self.alive += made  # an address is not used again meanwhile
        self.known |= {address(t) for t in made}
        self.calls.append((str(function), plain(args)))
        return out


def everything(passes: Passes) -> list[Tensor]:
    """What stays where it is: weights and what is made of them, frequencies of time, and the board."""
    found: list[Tensor] = [*passes.model.parameters(), *passes.model.buffers()]
    found.append(_frequencies(passes.model.t_embedder.size // 2, torch.float32, torch.device("meta")))
    for module in passes.model.modules():
        for constant in vars(module).values():
            found += [t for t in getattr(constant, "__dict__", {}).values() if isinstance(t, Tensor)]
    board = passes.board
    for holder in (vars(board), board.pool.keys, board.pool.values, board.pool.conv, board.pool.ssm):
        found += [t for t in holder.values() if isinstance(t, Tensor)]
    return found + [t for lane in board.lanes.values() for t in lane]


@pytest.mark.parametrize("what", PASSES, ids=str)
def test_a_replay_is_the_same_work_on_the_same_addresses(passes: Passes, what: Pass) -> None:
    """No value is read by the host; whatever the rows are, launches have equal arguments, and touch the weights, the
    board, the batch's rows and memory of their own."""
    rows = torch.zeros(3, dtype=torch.int64, device="meta")

    def made() -> tuple[Memory, list[Any], Outcome]:
        with recording(90) as launches:
            memory = Memory({address(t) for t in (*everything(passes), rows)})
            with memory:
                outcome = passes(what, rows)
        for kernel, grid, args, _ in launches:
            memory.check(kernel.__name__, args)
            memory.calls.append((kernel.__name__, grid, plain(args)))
        return memory, launches, outcome

    with recording(90):
        passes(what, rows)  # constants of weights are made in the first pass
    before = [address(t) for t in everything(passes)]
    first, launches, outcome = made()
    again, *_ = made()
    assert not first.foreign and not again.foreign
    assert first.calls == again.calls and len(launches) >= len(CONFIG.pattern)
    assert [address(t) for t in everything(passes)] == before
    assert outcome.listed.shape[0] == 3


@pytest.mark.parametrize("what", PASSES, ids=str)
def test_no_number_of_the_host_is_copied_to_the_device(passes: Passes, what: Pass) -> None:
    """`t[rows] = 0` does, through a tensor on the CPU, which a graph cannot hold. On meta it is an index_put of a
    tensor that has no dimensions."""
    rows = torch.zeros(3, dtype=torch.int64, device="meta")
    memory = Memory(set())
    with recording(90), memory:
        passes(what, rows)
    put = [arguments[2] for name, arguments, *_ in memory.calls if "index_put" in name]
    put += [arguments[3] for name, arguments, *_ in memory.calls if "index_copy" in name]
    assert put and all(len(value[0]) > 0 for value in put)


def test_what_is_written_lies_on_the_board(passes: Passes) -> None:
    """The test above sees a tensor that is nobody's."""
    stray = torch.zeros(3, dtype=torch.int64, device="meta")
    memory = Memory({address(t) for t in everything(passes)})
    with memory, torch.inference_mode():
        passes.board.token[torch.zeros(3, dtype=torch.int64, device="meta")] = stray
    assert memory.foreign
