"""Clocks for ops: device time with a cold L2 by graph replay, wall time on a CPU; and the most that a device does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import triton
import triton.language as tl

from .measure import in_turns, percentile, wall

Call = Callable[[], Any]  # the measured work on one set of operands; returns what it wrote
Sampler = Callable[[], float]  # measures once: seconds a call
# By name: a sampler, and how it takes time ("graph", "events", "wall"); or, for others, why there is none.
Samplers = tuple[dict[str, Sampler], dict[str, str], dict[str, str]]


def interleave(samplers: Mapping[str, Sampler], seconds: float, least: int = 10) -> dict[str, list[float]]:
    """Samples of each in turns, after an untimed one: as many rounds as fit into `seconds`, `least` to 100."""
    taken = wall([lambda: in_turns(samplers, 1)])
    return in_turns(samplers, min(max(int(seconds / (taken + 1e-9)), least), 100))


class HostClock:
    """Wall time on a CPU: what DeviceClock does, as far as there is something to do. Operands are warm."""

    device = "cpu"
    scope = nullcontext

    def sets(self, moved: int, room: float) -> int:
        return 1

    def peak(self, work: Callable[[], Any]) -> float:
        return 0.0

    def release(self) -> None:
        pass

    def samplers(self, calls: Mapping[str, Sequence[Call]]) -> Samplers:
        return {name: self._sampler(c) for name, c in calls.items()}, dict.fromkeys(calls, "wall"), {}

    def _sampler(self, calls: Sequence[Call]) -> Sampler:
        wall(calls)
        repeats = max(1, round(5e-4 / (wall(calls) * len(calls) + 1e-9)))  # half a millisecond at a time
        return lambda: wall(calls, repeats)


class DeviceClock:
    """Device time on a GPU, every operand in memory and nothing of it in the L2 when its call begins.

    One graph holds N calls on N sets of operands, each with outputs of its own. Before a replay the L2 is filled with
    other clean lines by reading a buffer of four times its size, outside of the timed region; in it every line is
    touched by one call only. Reading rather than writing: dirty lines would be written back at the calls' expense.
    """

    device = "cuda"

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda"):
        torch.set_float32_matmul_precision("highest")
        self.cuda, self.device = cuda, device
        self.l2 = cuda.get_device_properties().L2_cache_size
        self.stream = cuda.Stream()
        self.buffer = torch.ones(max(4 * self.l2 // 4, 1), device=device)  # fp32
        self.scratch = torch.empty((), device=device)
        self.broken: list[Any] = []  # graphs whose capture failed: the allocator may still ask them

    def scope(self) -> AbstractContextManager[Any]:
        """All that is measured runs inside: backward passes run on the stream of their forward."""
        return self.cuda.stream(self.stream)

    def sets(self, moved: int, room: float) -> int:
        """Calls in a graph that move `moved` bytes and take `room` bytes of memory each: so many that what may stay
        dirty in the L2 after the last one is little beside what they moved, within 4 and 256, as far as memory goes."""
        wanted = min(max(math.ceil(8 * self.l2 / max(moved, 1)), 4), 256)
        free = self.cuda.mem_get_info()[0] + self.cuda.memory_reserved() - self.cuda.memory_allocated()
        return max(1, min(wanted, int(0.4 * free / max(room, 1.0))))  # peers keep as much again, graphs their outputs

    def peak(self, work: Callable[[], Any]) -> float:
        """Bytes that `work` needs at its peak."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        result = work()
        self.cuda.synchronize()
        del result
        return self.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give memory back between rows: graphs and streams have pools of their own."""
        self.cuda.synchronize()
        self.cuda.empty_cache()

    def samplers(self, calls: Mapping[str, Sequence[Call]]) -> Samplers:
        """What waits for the device on the way cannot be captured: it is timed from one event to another, the host's
        share included. The graphs share one pool of memory: none of them reads what another wrote."""
        pool = self.cuda.graph_pool_handle()
        found, how, errors = {}, {}, {}
        begun = len(self.broken)
        for name, c in calls.items():
            try:
                waits = self._waits(c[0])
                eager = lambda c=c: [call() for call in c]
                found[name] = self._sampler(eager, len(c)) if waits else self._graph(c, pool)
                how[name] = "events" if waits else "graph"
            except Exception as error:
                errors[name] = reason(error)
            if len(self.broken) > begun:
                begun, pool = len(self.broken), self._renewed(pool)
        return found, how, errors

    def _waits(self, call: Call) -> bool:
        """Whether a call makes the host wait for the device; the first, which may compile, is not asked."""
        call()
        self.cuda.synchronize()
        before = self.cuda.get_sync_debug_mode()
        self.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return True
        finally:
            self.cuda.set_sync_debug_mode(before)
        return False

    def _graph(self, calls: Sequence[Call], pool: Any) -> Sampler:
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph, pool=pool, stream=self.stream):
                kept = [call() for call in calls]  # until the capture ends, so that no call writes where another did
        except Exception:
            self.broken.append(graph)
            raise
        del kept
        begin = time.perf_counter()
        graph.replay()
        launch = time.perf_counter() - begin
        return self._sampler(graph.replay, len(calls), pause=int(2e9 * (2 * launch + 1e-4)))  # cycles at 2 GHz

    def _renewed(self, pool: Any) -> Any:
        """A pool for those that follow a failed capture. It leaves the allocator recording into the old pool, which
        would refuse the next capture there, and a random generator that thinks it is captured until some capture ends
        well: an empty one does."""
        with suppress(RuntimeError):  # the capture itself ended well: nothing is recorded
            self.cuda.memory._cuda_endAllocateToPool(self.cuda.current_device(), pool)
        pool = self.cuda.graph_pool_handle()
        with suppress(RuntimeError), self.cuda.graph(self.cuda.CUDAGraph(), pool=pool, stream=self.stream):
            self.scratch.zero_()
        return pool

    def _sampler(self, run: Callable[[], Any], count: int, pause: int = 0) -> Sampler:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            if pause:  # the device waits until the host has queued all that follows
                self.cuda._sleep(pause)
            torch.sum(self.buffer, 0, out=self.scratch)
            start.record()
            kept = run()
            end.record()
            end.synchronize()
            del kept
            return start.elapsed_time(end) / 1e3 / count

        return sample


def reason(error: Exception) -> str:
    """An exception in a few words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}"[:120]


# ---- what the device can do at most ----


BLOCK = 4096  # 16 numbers a thread, four loads of 16 bytes


@triton.jit
def _read_kernel(x_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    """Sums blocks of x, all programs side by side: reads every element once and writes next to nothing."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(steps):
        total += tl.load(x_ptr + offs)
        offs += programs * BLOCK
    tl.store(out_ptr + program, tl.sum(total, axis=0))


def read_stream(x: torch.Tensor, programs: int) -> Call:
    """A call that reads x, fp32 of a whole number of blocks for every program, and nothing else."""
    out = torch.empty(programs, device=x.device)
    steps = x.numel() // (programs * BLOCK)
    assert steps * programs * BLOCK == x.numel()

    def call() -> torch.Tensor:
        _read_kernel[(programs,)](x, out, steps, BLOCK=BLOCK, num_warps=8)
        return out

    return call


def roofs(clock: DeviceClock, dtype: torch.dtype = torch.bfloat16, steps: int = 512) -> dict[str, float]:
    """What this device does here and now: bytes/s of a read-only stream and of a copy (read and written), and flop/s
    of a cuBLAS product of random square matrices in `dtype`. Medians; the streams are many times the L2."""
    with clock.scope():
        found = _rates(clock, dtype, steps)
    clock.release()
    return {"bandwidth": max(found["read"], found["copy"]), "compute": found["product"], **found}


def _rates(clock: DeviceClock, dtype: torch.dtype, steps: int) -> dict[str, float]:
    programs = 4 * clock.cuda.get_device_properties().multi_processor_count  # all at once: 64 KB in flight on each
    x = torch.randn(steps * programs * BLOCK, device=clock.device)  # 4.4 GB on 132 multiprocessors
    source, target = x.chunk(2)
    a, b = torch.randn(2, min(8192, 16 * steps), min(8192, 16 * steps), device=clock.device).to(dtype)
    product = torch.empty_like(a)
    read, copy, multiply = read_stream(x, programs), lambda: target.copy_(source), lambda: torch.mm(a, b, out=product)
    samplers, _, errors = clock.samplers({"read": [read] * 4, "copy": [copy] * 4, "product": [multiply] * 4})
    if errors:
        raise RuntimeError(f"no roof to measure against: {errors}")
    amounts = {"read": 4.0 * x.numel(), "copy": 4.0 * x.numel(), "product": 2.0 * len(a) ** 3}
    times = interleave(samplers, seconds=1.0)
    return {name: amount / percentile(times[name], 0.5) for name, amount in amounts.items()}
