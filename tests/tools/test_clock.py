"""The clocks of bench/: what is timed, what is kept out of it, and what a device can do at most."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from bench import clock
from bench.measure import faster, interleaved, percentile, ratio
from tt_kernels.runtime.launch import ON_CPU


def test_percentiles_and_ratios() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0, 0.5, 0.75, 1)] == [1, 2, 2.5, 3]
    # A machine that slows down tenfold between rounds: the ratio of medians would depend on the round.
    assert ratio({"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}, "a", "b") == 2
    assert faster([0.96] * 5, [1.0] * 5) and not faster([0.98] * 5, [1.0] * 5), "by 3 %"
    assert not faster([0.9, 0.9, 0.9, 1.1, 1.1], [1.0] * 5), "beyond the noise"


def test_turns_after_an_untimed_round() -> None:
    calls: list[str] = []
    interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, repeats=2)
    assert calls == ["a", "a", "b", "b"] * 4
    calls.clear()
    samplers = {name: lambda name=name: float(len(calls) + bool(calls.append(name))) for name in "ab"}
    assert clock.interleave(samplers, seconds=0.0, least=3) == {"a": [2.0, 4.0, 6.0], "b": [3.0, 5.0, 7.0]}


def test_host_clock_repeats_short_calls() -> None:
    calls: list[int] = []
    host = clock.HostClock()
    with host.scope():
        samplers, how, errors = host.samplers({"a": [lambda: calls.append(1)]})
        assert 0 < samplers["a"]() < 1e-4 and len(calls) > 50 and how == {"a": "wall"} and errors == {}


class FakeCuda(MagicMock):
    """torch.cuda as far as a clock uses it, noting what happens in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.mode: Any = "default"
        self.get_device_properties.return_value = SimpleNamespace(L2_cache_size=4096, multi_processor_count=1)
        self.CUDAGraph.return_value.replay = lambda: self.log.append("replay")
        self.graph = self.captured
        self.Event.return_value.elapsed_time.return_value = 6.0
        self.Event.return_value.record = lambda: self.log.append("event")
        self.stream.return_value = nullcontext()
        self.get_sync_debug_mode = lambda: self.mode
        self.set_sync_debug_mode = lambda mode: setattr(self, "mode", mode)
        self._sleep = lambda cycles: self.log.append("sleep" if cycles >= 200_000 else "too short")
        self.mem_get_info.return_value = (2**30, 2**31)
        self.memory_reserved.return_value = self.memory_allocated.return_value = 50
        self.max_memory_allocated.return_value = 1074

    @contextmanager
    def captured(self, graph: Any, pool: Any, stream: Any) -> Any:
        self.log.append("capture")
        yield
        self.log.append("captured")

    def _get_child_mock(self, **options: Any) -> MagicMock:
        return MagicMock(**options)


@pytest.fixture
def device() -> clock.DeviceClock:
    return clock.DeviceClock(FakeCuda(), "cpu")


def test_device_clock_flushes_before_the_timed_region(
    device: clock.DeviceClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = device.cuda.log
    summed: list[int] = []
    monkeypatch.setattr(clock.torch, "sum", lambda buffer, *a, **k: (summed.append(buffer.nbytes), log.append("flush")))
    calls = [lambda i=i: log.append(f"call {i}") for i in range(3)]
    samplers, how, errors = device.samplers({"a": calls})
    # Twice outside of a capture: the first may compile, the second shows whether it waits.
    assert log == ["call 0", "call 0", "capture", "call 0", "call 1", "call 2", "captured", "replay"]
    assert how == {"a": "graph"} and errors == {} and device.cuda.mode == "default"
    log.clear()
    assert samplers["a"]() == pytest.approx(6e-3 / 3)
    assert log == ["sleep", "flush", "event", "replay", "event"]
    assert summed == [4 * 4096]


def test_device_clock_times_what_waits_by_events(device: clock.DeviceClock) -> None:
    def waits() -> None:
        device.cuda.log.append("call")
        if device.cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def fails() -> None:
        raise ValueError("no such\nthing")

    def breaks() -> None:
        if device.cuda.mode == "error":
            raise RuntimeError("broken")

    samplers, how, errors = device.samplers({"waits": [waits, waits], "fails": [fails], "breaks": [breaks]})
    assert how == {"waits": "events"} and device.cuda.mode == "default"
    assert errors == {"fails": "ValueError: no such", "breaks": "RuntimeError: broken"}
    device.cuda.log.clear()
    assert samplers["waits"]() == pytest.approx(6e-3 / 2)
    assert device.cuda.log == ["event", "call", "call", "event"]


def test_operand_sets_outgrow_the_cache_within_memory(device: clock.DeviceClock) -> None:
    assert device.sets(moved=4096, room=1) == 8
    assert device.sets(moved=10**9, room=1) == 4
    assert device.sets(moved=0, room=1) == 256
    assert device.sets(moved=10**9, room=0.3 * 2**30) == device.sets(moved=1, room=2**31) == 1
    assert device.peak(lambda: None) == 1024


def test_roofs_are_amounts_over_medians(device: clock.DeviceClock, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_CPU:
        monkeypatch.setattr(clock, "read_stream", lambda x, programs: lambda: x.sum())
    found = clock.roofs(device, torch.float32, steps=1)
    seconds = 6e-3 / 4  # each sample times four calls
    assert found["read"] == found["copy"] == found["bandwidth"] == pytest.approx(4 * 4 * clock.BLOCK / seconds)
    assert found["compute"] == pytest.approx(2 * 16**3 / seconds)


@pytest.mark.kernels
@pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="a kernel")
def test_read_stream_reads_everything_once() -> None:
    x = torch.randint(-8, 9, (3 * 2 * clock.BLOCK,), device="cpu" if ON_CPU else "cuda").float()
    got = clock.read_stream(x, programs=2)()
    assert torch.equal(got, x.view(3, 2, -1).sum((0, 2)))  # whole numbers: exact in any order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="an L2 to be cold or warm")
def test_a_cold_cache_takes_longer_than_a_warm_one() -> None:
    """16 MB from the L2 of a large GPU take less time than from memory."""
    device = clock.DeviceClock()
    with device.scope():
        sets = [torch.randn(4 << 20, device="cuda") for _ in range(8)]
        calls = {
            "cold": [lambda x=x: x.sum() for x in sets],
            "warm": [lambda: sets[0].sum()] * 8,
        }
        samplers, how, errors = device.samplers(calls)
        assert not errors and set(how.values()) == {"graph"}
        times = clock.interleave(samplers, seconds=0.2)
    cold, warm = (percentile(times[name], 0.5) for name in ("cold", "warm"))
    assert cold > 1.15 * warm, f"cold {cold:.2e} s, warm {warm:.2e} s"
