"""The measuring of ops: clocks, judgements, rows and their table. What they count, not how fast anything is."""

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import clock, conftest, golden, ops, oracle, rows
from bench.peers import Peer, Unavailable, peers_of
from tt_kernels import OPS, Op
from tt_kernels.launch import INTERPRET

ROOT = Path(__file__).resolve().parents[1]
DIMS = dict(T=6, D=4)


def card(fn: Any = None, *, reference: Any = None, **fields: Any) -> Op:
    """An op that doubles: what it returns and what it should are up to the test."""

    def double(x: Tensor) -> Tensor:
        return 2 * x

    given = dict(
        fn=fn or double,
        reference=reference or double,
        inputs=lambda dtype, T, D: dict(x=torch.randn(T, D, dtype=dtype)),
        cases=(DIMS,),
        shapes=(DIMS,),
        outputs=("y",),
        grads=("x",),
        cost=lambda itemsize, T, D: (T * D, 2 * T * D * itemsize),
    )
    return Op(**given | fields)


def a_case(op: Op, *, backward: bool = False, dtype: torch.dtype = torch.float32) -> ops.Case:
    return ops.Case(op, DIMS, dtype, backward)


class FakeClock(clock.HostClock):
    """Calls everything once and answers with the seconds it was given."""

    def __init__(self, seconds: dict[str, float], errors: dict[str, str] | None = None, how: str = "graph"):
        self.seconds, self.errors, self.how, self.device = seconds, errors or {}, how, "cpu"

    def samplers(self, calls: Any) -> Any:
        for c in calls.values():
            c[0]()
        timed = [name for name in calls if name not in self.errors]
        return {n: lambda n=n: self.seconds[n] for n in timed}, dict.fromkeys(timed, self.how), self.errors


# ---- clocks ----


def test_percentile() -> None:
    assert [clock.percentile([3.0, 1.0, 2.0], share) for share in (0, 0.5, 0.75, 1)] == [1, 2, 2.5, 3]
    assert clock.percentile([7.0], 0.2) == 7


def test_interleaved_samples() -> None:
    calls: list[str] = []
    samplers = {name: lambda name=name: float(len(calls) + bool(calls.append(name))) for name in "ab"}
    times = clock.interleave(samplers, seconds=0.0, least=3)
    assert calls == ["a", "b"] * 4
    assert times == {"a": [2.0, 4.0, 6.0], "b": [3.0, 5.0, 7.0]}  # the first round is not timed
    assert len(clock.interleave({"a": lambda: 0.0}, seconds=1.0, most=5)["a"]) == 5


def test_host_clock_repeats_short_calls() -> None:
    calls: list[int] = []
    host = clock.HostClock()
    before = torch.get_num_threads()
    with host.scope():
        assert torch.get_num_threads() == 1
        samplers, how, errors = host.samplers({"a": [lambda: calls.append(1)]})
        seconds = samplers["a"]()
    assert torch.get_num_threads() == before and how == {"a": "wall"} and errors == {}
    assert 0 < seconds < 1e-4 and len(calls) > 50


class FakeCuda:
    """torch.cuda as far as a clock uses it, noting what happens in which order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.mode: Any = "default"
        self.free = 2**30

    def get_device_properties(self) -> Any:
        return SimpleNamespace(L2_cache_size=4096, multi_processor_count=1)

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any) -> Any:
        assert pool == "pool" and stream == "stream"
        self.log.append("capture")
        yield
        self.log.append("captured")

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(synchronize=lambda: None, elapsed_time=lambda end: 6.0)
        event.record = lambda: self.log.append("event")
        return event

    def Stream(self) -> str:
        return "stream"

    def stream(self, stream: str) -> Any:
        return nullcontext()

    def graph_pool_handle(self) -> str:
        return "pool"

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.mode = mode

    def get_sync_debug_mode(self) -> Any:
        return self.mode

    def _sleep(self, cycles: int) -> None:
        assert cycles >= 200_000
        self.log.append("sleep")

    def mem_get_info(self) -> tuple[int, int]:
        return self.free, 2**31

    def memory_reserved(self) -> int:
        return 50

    def memory_allocated(self) -> int:
        return 50

    def max_memory_allocated(self) -> int:
        return 1074

    def synchronize(self) -> None: ...
    def empty_cache(self) -> None: ...
    def reset_peak_memory_stats(self) -> None: ...


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
    if not INTERPRET:
        monkeypatch.setattr(clock, "read_stream", lambda x, programs: lambda: x.sum())
    found = clock.roofs(device, torch.float32, steps=1)
    seconds = 6e-3 / 4  # each sample times four calls
    assert found["read"] == found["copy"] == found["bandwidth"] == pytest.approx(4 * 4 * clock.BLOCK / seconds)
    assert found["compute"] == pytest.approx(2 * 16**3 / seconds)


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="a kernel")
def test_read_stream_reads_everything_once() -> None:
    x = torch.randn(3 * 2 * clock.BLOCK, device="cpu" if INTERPRET else "cuda")
    got = clock.read_stream(x, programs=2)()
    torch.testing.assert_close(got, x.view(3, 2, -1).sum((0, 2)))


def test_where_names_commit_and_versions() -> None:
    found = clock.where(clock.HostClock())
    assert {"commit", "triton", "torch", "date", "cpu"} <= set(found) and found["threads"] == 1
    assert found["commit"] in clock.in_a_line(found) and "GPU" not in clock.in_a_line(found)
    on_gpu = found | {"gpu": "Fast", "driver": "1.2", "cuda": "13.0"}
    assert clock.in_a_line(on_gpu).startswith("Fast, driver 1.2, CUDA 13.0, Triton ")


# ---- judgements ----


def test_right_results_pass_with_their_errors() -> None:
    checked = ops.Checked(clock.HostClock())
    op = OPS["rms_norm"]
    for backward, names in ((False, {"y"}), (True, {"dx", "dweight"})):
        note, judgement = checked(ops.Case(op, op.cases[0], torch.float32, backward))
        assert note == "fp64" and judgement.faults == {} and set(judgement.errors) == names
        assert all(0 < ours < 1e-6 and 0 < theirs < 1e-6 for ours, theirs in judgement.errors.values())
    assert len(checked.known) == 1, "one run of the op showed both"


def test_wrong_results_are_red_in_their_pass() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 2.001 * dy

    checked = ops.Checked(clock.HostClock())
    assert "y: error" in checked(a_case(card(lambda x: 2.001 * x)))[1].faults["y"]
    op = card(Wrong.apply)
    assert checked(a_case(op))[1].faults == {} and set(checked(a_case(op, backward=True))[1].faults) == {"dx"}
    nothing = ops.Checked(clock.HostClock())(a_case(card(lambda x: 2 * x.detach()), backward=True))[1]
    assert nothing.faults == {"dx": "there on one side only"}


def test_kernels_without_a_backward_are_judged_where_they_run() -> None:
    """With gradients such an op runs as its reference: that would hide a wrong forward."""
    fn = lambda x: 2 * x if torch.is_grad_enabled() and x.requires_grad else 3 * x
    op = card(fn, forward_only=True, kernels=("_k_kernel",))
    checked = ops.Checked(clock.HostClock())
    assert checked(a_case(op))[1].faults and not checked(a_case(op, backward=True))[1].faults


def test_oracles_shrink_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "FEW", 2)
    limit = 0

    def reference(x: Tensor) -> Tensor:
        if x.nbytes > limit:
            raise torch.OutOfMemoryError
        return 2 * x

    notes = []
    for limit in (8 * 24, 8 * 8, 4 * 8):  # noqa: B007
        checked = ops.Checked(clock.HostClock())
        note, judgement = checked(a_case(card(reference=reference), dtype=torch.float16))
        notes.append(note)
        assert not judgement.faults
    assert notes == ["fp64", "fp64 T=2", "fp32 T=2"]
    limit = 0
    with pytest.raises(MemoryError, match="no oracle fits"):
        ops.Checked(clock.HostClock())(a_case(card(reference=reference)))


# ---- rows ----


def test_every_card_makes_rows() -> None:
    for device, shapes in (("cuda", lambda op: op.shapes), ("cpu", lambda op: op.cases[:1])):
        found = ops.cases(device)
        assert len({case.id for case in found}) == len(found)
        for name, op in OPS.items():
            mine = [case for case in found if case.name == name]
            assert len(mine) == len(shapes(op)) * (2 if op.grads else 1)
            assert all(flops >= 0 and moved > 0 for flops, moved in map(ops.cost, mine))
    wide = {case.name for case in ops.cases("cuda") if case.dtype == torch.float32}
    assert wide == {"commit", "gumbel_noise"}  # confidences and keys have no bf16 form


def test_a_backward_moves_its_gradients_too() -> None:
    op = card()
    assert ops.cost(a_case(op, dtype=torch.bfloat16)) == (24, 96)
    assert ops.cost(a_case(op, backward=True, dtype=torch.bfloat16)) == (48, 96 + 48)


@pytest.mark.parametrize("backward", [False, True])
def test_a_row_has_times_shares_and_ratios(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer("compiled", lambda **kwargs: lambda: 2 * kwargs["x"], backward=True)
    monkeypatch.setattr(ops, "peers_of", lambda op, wanted: [*peers_of(op, ["eager"]), peer])
    fake = FakeClock({"ours": 2e-6, "eager": 5e-6}, errors={"compiled": "does not compile"})
    roofs = {"bandwidth": 96e6, "compute": 1e12, "read": 96e6, "copy": 90e6}
    case = a_case(card(kernels=("_k_kernel",)), backward=backward, dtype=torch.bfloat16)
    row = ops.measure(case, fake, ops.Checked(fake), roofs, peers=("eager", "compiled"), seconds=0.0)
    assert (row.p20, row.p50, row.p80, row.rounds, row.sets) == (2e-6, 2e-6, 2e-6, 10, 1)
    assert row.roof == pytest.approx((1.5 if backward else 1) * 1e-6) and row.share == pytest.approx(row.roof / 2e-6)
    assert row.peers["eager"] == {"seconds": 5e-6, "ratio": pytest.approx(2.5), "clock": "graph"}
    assert row.peers["compiled"] == {"why": "does not compile"}
    assert json.loads(json.dumps(row.record()))["share"] == row.share
    text = " ".join("\n".join(rows.report([row], roofs)).split())
    assert f"| {75 if backward else 50} % |" in text and "| 2.50 |" in text
    assert f"no time of compiled (double {case.which}): does not compile" in text


@pytest.mark.parametrize("backward", [False, True])
def test_a_peer_with_other_results_is_not_timed(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**kwargs: Any) -> Any:
        raise Unavailable("not installed")

    def square(x: Tensor) -> Tensor:  # right in the first row only
        return torch.cat([2 * x[:1], 2.2 * x[1:]])

    found = [
        Peer("wrong", lambda x: lambda: square(x), backward=True),
        Peer("absent", absent, backward=True),
        Peer("breaks", lambda x: lambda: x.view(-1, 5), backward=True),
        Peer("forward", lambda x: lambda: 2 * x),
        Peer("right", lambda x: lambda: x + x, backward=True),
    ]
    monkeypatch.setattr(ops, "peers_of", lambda op, wanted: found)
    fake = FakeClock({"ours": 1.0, "right": 1.5, "forward": 3.0})
    row = ops.measure(a_case(card(), backward=backward), fake, ops.Checked(fake), seconds=0.0)
    why = {name: peer["why"] for name, peer in row.peers.items() if "why" in peer}
    assert (
        why["wrong"].startswith(f"other results: {'dx' if backward else 'y'} is ") and why["absent"] == "not installed"
    )
    assert why["breaks"].startswith("RuntimeError: ") and row.peers["right"]["ratio"] == 1.5
    assert why.get("forward") == ("forward: forward only" if backward else None)


def test_a_slower_kernel_shows() -> None:
    """Real clock, real work: twice the work takes longer, and the ratio to the same peer says so."""
    x = torch.randn(256, 256)

    def rows_of(times: int) -> ops.Row:
        def fn(x: Tensor) -> Tensor:
            for _ in range(times):
                y = x @ x
            return y

        op = card(fn, reference=lambda x: x @ x, inputs=lambda dtype, T, D: dict(x=x.to(dtype)), grads=())
        host = clock.HostClock()
        return ops.measure(a_case(op), host, ops.Checked(host), seconds=0.0)

    honest, slow = rows_of(1), rows_of(4)
    assert not honest.fault and not slow.fault and slow.p50 > 2 * honest.p50
    assert honest.peers["eager"]["ratio"] > 0.6 and slow.peers["eager"]["ratio"] < 0.45


def test_wrong_rows_are_not_timed() -> None:
    fake = FakeClock({})  # would fail if asked
    row = ops.measure(a_case(card(lambda x: 3 * x)), fake, ops.Checked(fake))
    assert row.fault and not row.p50
    text = "\n".join(rows.report([row], None))
    assert " RED | " in text and f"RED {row.op} {DIMS} fp32 forward: y: error" in text


def test_a_kernel_that_waits_for_the_host_is_red() -> None:
    fake = FakeClock({"ours": 1.0, "eager": 1.0}, how="events")
    assert not ops.measure(a_case(card()), fake, ops.Checked(fake)).fault  # a reference may
    on_device = FakeClock({"ours": 1.0, "eager": 1.0}, how="events")
    checked = ops.Checked(clock.HostClock())
    case = a_case(card(kernels=("_k_kernel",)))
    checked(case)
    on_device.device = "meta"
    row = ops.measure(case, on_device, checked)
    assert row.fault == "waits for the host: not fit for a CUDA graph"


def test_notes_name_exceptions() -> None:
    row = ops.Row("f", DIMS, "fp32", "forward", False, 1, 1, oracle="fp64 T=2", clock="events", sets=2)
    assert rows.notes(row) == "reference, fp32, host's share in it, 2 sets, oracle fp64 T=2"
    row = ops.Row("f", DIMS, "bf16", "forward", True, 1, 1, oracle="fp64", clock="graph", sets=4)
    assert rows.notes(row) == ""
    row.p50, row.roof = 1.0, 1.01
    assert rows.notes(row).startswith("ABOVE THE ROOF")


@pytest.mark.skipif(INTERPRET or torch.cuda.is_available(), reason="CPU rows")
def test_pytest_bench_prints_a_table() -> None:
    command = [sys.executable, "-m", "pytest", "bench/bench_ops.py", "-q", "-k", "[rms_norm- or [commit-"]
    for plugin in ("no:cacheprovider", "no:benchmark"):  # with pytest-benchmark, and without
        done = subprocess.run([*command, "-p", plugin], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("CPU, reference") == 3 and "| rms_norm |" in done.stdout


def test_peers_are_chosen_by_name() -> None:
    assert conftest.chosen("all", "cuda")[:2] == ["eager", "compiled"] and "flex" in conftest.chosen("all", "cuda")
    assert "eager" in conftest.chosen("all", "cpu") and not {"compiled", "flex"} & set(conftest.chosen("all", "cpu"))
    assert conftest.chosen("", "cuda") == [] and conftest.chosen("liger,fla", "cuda") == ["liger", "fla"]
    with pytest.raises(pytest.UsageError, match="nobody is called sonic"):
        conftest.chosen("eager,sonic", "cuda")


def test_bench_refuses_to_run_side_by_side() -> None:
    config: Any = SimpleNamespace(option=SimpleNamespace(numprocesses=2), stash={}, addinivalue_line=lambda *a: None)
    with pytest.raises(pytest.UsageError, match="without -n"):
        conftest.pytest_configure(config)
    config.option.numprocesses = None
    conftest.pytest_configure(config)
    assert config.stash[conftest.ROWS] == []


# ---- golden models in 16 bits ----


def test_golden_error_is_a_median_over_tokens() -> None:
    want = [torch.ones(2, 3), torch.ones(3, 3)]
    got = [want[0] * 1.1, want[1].clone()]
    assert golden.error(got, want) == 0
    got[1][:2] *= 5
    assert golden.error(got, want) == pytest.approx(0.1)
    got[1][2, 2] = float("nan")
    assert golden.error(got, want) == float("inf")


@pytest.mark.skipif(INTERPRET, reason="bf16")
def test_golden_model_in_bf16(golden_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, (ours, theirs) in golden.compare(golden_dir / "small", "cpu").items():
        assert ours == theirs < 0.03, part  # on a CPU both are references
    assert golden.main([str(ROOT / "docs")]) == 2 and "no golden models" in capsys.readouterr().err
