"""The router's tickets under load: launches on two streams at once, replays of CUDA graphs, every result the same.

20 s on a GPU. In the interpreter, which has neither, launches follow each other.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity import DEVICE, leaves, with_leaves

from cards import OPS
from tt_kernels import reference, route
from tt_kernels.moe import tickets as counters
from tt_kernels.runtime.launch import ON_CPU

Call = tuple[dict[str, Any], tuple[torch.Tensor, ...]]
# One token and one tile, D in parts; several tiles, D in parts; many tiles.
SMALL = (dict(T=1, D=600), dict(T=9, D=600), dict(T=37, D=600), dict(T=70, D=40))
FULL = (dict(T=1, D=2688), dict(T=16, D=2688), dict(T=64, D=2688), dict(T=512, D=2688))


def calls(sizes: Sequence[dict[str, int]], E: int, K: int) -> list[Call]:
    """Arguments, and what comes of them when nothing else runs: the reference's choice."""
    found = []
    for size in sizes:
        torch.manual_seed(5)
        kwargs = OPS["route"].inputs(torch.float32, **size, E=E, K=K)
        kwargs = with_leaves(kwargs, {name: t.to(DEVICE) for name, t in leaves(kwargs).items()})
        alone = route(**kwargs)
        for value, want in zip(alone, reference.route(**kwargs), strict=True):
            torch.testing.assert_close(value, want)
        found.append((kwargs, alone))
    return found


def assert_same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_tickets_are_back() -> None:
    assert not any(pool.slots.any() for pool in counters._pools.values())


@pytest.mark.kernels
@pytest.mark.skipif(not ON_CPU, reason="sequential launches, on a CPU")
def test_launches_one_after_the_other() -> None:
    made = calls(SMALL, E=20, K=4)
    for turn in range(2 * len(made)):
        kwargs, want = made[turn % len(made)]
        assert_same(route(**kwargs), want)
        assert_tickets_are_back()


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    made = calls(FULL, E=128, K=6)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for turn in range(20):
        results = []
        for stream in streams:  # asleep while the host fills their queues: kernels are shorter than launching them
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
        for n in range(150):
            for s, stream in enumerate(streams):
                kwargs, want = made[(turn + n * (s + 1) + s) % len(made)]
                with torch.cuda.stream(stream):
                    results.append((route(**kwargs), want))
        torch.cuda.synchronize()
        for got, want in results:
            assert_same(got, want)
        assert_tickets_are_back()


@pytest.mark.gpu
def test_a_stream_that_waits_shares_no_tickets() -> None:
    """However many launches another stream has had since its own were asked for."""
    kwargs, want = calls(FULL[2:3], E=128, K=6)[0]
    waits, runs = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(waits):
        torch.cuda._sleep(50_000_000)
        results = [route(**kwargs) for _ in range(20)]
    with torch.cuda.stream(runs):
        results += [route(**kwargs) for _ in range(2 * counters.STREAMS)]
    torch.cuda.synchronize()
    for got in results:
        assert_same(got, want)
    assert_tickets_are_back()


@pytest.mark.gpu
def test_graphs_replayed_beside_each_other_and_beside_launches() -> None:
    made = calls(FULL, E=128, K=6)
    graphs, captured = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured += [(route(**kwargs), want) for _ in range(8) for kwargs, want in made]
        graphs.append((graph, torch.cuda.Stream()))
    for _ in range(20):
        for got, _ in captured:
            for value in got:
                value.zero_()
        torch.cuda.synchronize()
        for _ in range(25):
            for graph, stream in graphs:
                with torch.cuda.stream(stream):
                    graph.replay()
        results = [(route(**kwargs), want) for kwargs, want in made * 10]
        torch.cuda.synchronize()
        for got, want in captured + results:
            assert_same(got, want)
        assert_tickets_are_back()
