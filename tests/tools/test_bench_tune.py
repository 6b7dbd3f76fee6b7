"""Tuning launches and the GPU tests' driver, with clocks and processes that answer as told."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from test_bench_ops import FakeClock, card
from torch import Tensor

from bench import gpu_tests, ops
from cards import OPS
from tools import tune
from tt_kernels.runtime import launch
from tt_kernels.runtime.launch import Launch

DEFAULT = Launch(BLOCK=16, num_warps=4)
FAST, WRONG, BROKEN, SLOW = (Launch(BLOCK=block, num_warps=8, num_stages=2) for block in (32, 64, 128, 256))
BASE = [1.0 + 0.001 * i for i in range(11)]


def times(factor: float, samples: list[float] = BASE) -> list[float]:
    return [factor * s for s in samples]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty folder of tuned launches."""
    monkeypatch.setattr(launch, "TUNED", tmp_path / "tuned")
    monkeypatch.setattr(tune, "SAMPLES", tmp_path / "tuning")
    launch._table.cache_clear()
    yield tmp_path / "tuned"
    launch._table.cache_clear()


def doubling(candidates: tuple[Launch, ...] = (FAST, WRONG, BROKEN, SLOW), *, key: str = "T") -> Any:
    """An op whose kernel asks for a launch; some of them are wrong or too large."""

    def double(x: Tensor) -> Tensor:
        chosen = launch.tuned("_double_kernel", DEFAULT, 90, **{key: len(x)})
        if chosen == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        return (3 if chosen == WRONG else 2) * x

    shapes = (dict(T=6, D=4), dict(T=6, D=8), dict(T=3, D=4))
    return card(double, shapes=shapes, candidates={"_double_kernel": candidates, "_other_kernel": (FAST,)})


class Turns(FakeClock):
    """Gives each launch its seconds: by what runs, not by name."""

    def __init__(self, fast: float = 0.5):
        super().__init__({tune.HEURISTIC: 1.0, str(FAST): fast, str(SLOW): 2.0, str(DEFAULT): 1.0})


# ---- which launch wins ----


def test_a_launch_wins_by_three_percent_and_beyond_the_noise() -> None:
    assert tune.beats(times(0.96), BASE)
    assert not tune.beats(times(0.98), BASE)  # beyond the noise, but too little
    noisy = [1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 2.0, 2.0, 2.0]
    assert not tune.beats(times(0.9, noisy), noisy)  # enough, but within the noise
    assert tune.beats(times(0.4, noisy), noisy)


def a_trial(heuristic: list[float], **launches: list[float]) -> tune.Trial:
    named = {"fast": FAST, "slow": SLOW}
    return tune.Trial("_k_kernel", "op", ("T=1",), heuristic, {named[n]: s for n, s in launches.items()})


def test_the_fastest_winner_is_chosen_over_all_that_share_a_key() -> None:
    assert tune.choose([a_trial(BASE, fast=times(0.8), slow=times(0.9))]) == FAST
    assert tune.choose([a_trial(BASE, fast=times(0.99), slow=times(1.2))]) is None
    assert tune.choose([a_trial(BASE)]) is None
    # 20 % of a short call is less than 10 % of a long one.
    first = a_trial(BASE, fast=times(0.8), slow=times(1.0))
    second = a_trial(times(10), fast=times(10), slow=times(9))
    assert tune.choose([first]) == FAST and tune.choose([first, second]) == SLOW
    # What does not run everywhere is out.
    assert tune.choose([first, a_trial(times(10), slow=times(9))]) == SLOW


# ---- the file ----


def test_the_table_is_what_launchers_read(folder: Path) -> None:
    table = tune.Table(folder / "sm_90.json", {"date": "today"})
    table.put("_k_kernel", "T=16 D=64", FAST)
    table.put("_k_kernel", "T=1 D=64", SLOW)
    table.put("_k_kernel", "T=2 D=64", None)
    table.save()
    assert launch.tuned("_k_kernel", DEFAULT, 90, T=16, D=64) == FAST
    assert launch.tuned("_k_kernel", DEFAULT, 90, T=2, D=64) == DEFAULT == launch.tuned("_k", DEFAULT, 90)
    assert launch.tuned("_k_kernel", DEFAULT, 80, T=16, D=64) == DEFAULT
    found = json.loads((folder / "sm_90.json").read_text())
    assert found == {
        "provenance": [{"date": "today"}],
        "launches": {"_k_kernel": {"T=1 D=64": SLOW.options, "T=16 D=64": FAST.options}},
    }
    again = tune.Table(folder / "sm_90.json", {"date": "tomorrow"})
    again.put("_k_kernel", "T=16 D=64", None)
    again.save()
    assert launch.tuned("_k_kernel", DEFAULT, 90, T=16, D=64) == DEFAULT, "a key without a winner leaves"
    again.put("_k_kernel", "T=1 D=64", None)
    again.save()
    found = json.loads((folder / "sm_90.json").read_text())
    assert found == {"provenance": [{"date": "today"}, {"date": "tomorrow"}], "launches": {}}
    assert (folder / "sm_90.json").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.Table(folder / "sm_90.json", {"date": "today"}).save()
    before = (folder / "sm_90.json").read_text()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tune.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tune.Table(folder / "sm_90.json", {"date": "tomorrow"}).save()
    assert (folder / "sm_90.json").read_text() == before
    assert [path.name for path in folder.iterdir()] == ["sm_90.json"]


# ---- trials ----


def test_a_trial_times_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    op = doubling()
    case = ops.Case(op, op.shapes[0], torch.float32, backward=False)
    found = tune.trial(case, "_double_kernel", op.candidates["_double_kernel"], Turns(), seconds=0.0)
    assert found.keys == ("T=6",) and set(found.launches) == {FAST, SLOW} and found.heuristic == [1.0] * 10
    assert found.dropped[WRONG].startswith("wrong: y: error") and "shared memory" in found.dropped[BROKEN]
    text = "\n".join(tune.lines(found))
    assert "+50.0 % | wins |" in text and "-100.0 % |      |" in text and "does not run: RuntimeError" in text
    assert tune.trial(case, "_other_kernel", (FAST,), Turns(), 0.0) is None, "nobody asks for that one"


def test_backward_launches_are_tuned_by_the_backward() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            launch.tuned("_forward_kernel", DEFAULT, 90, T=len(x))
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            chosen = launch.tuned("_backward_kernel", DEFAULT, 90, T=len(dy))
            return (3 if chosen == WRONG else 2) * dy

    op = card(lambda x: Double.apply(x))  # no keywords under torch 2.11
    case = ops.Case(op, op.shapes[0], torch.float32, backward=True)
    found = tune.trial(case, "_backward_kernel", (FAST, WRONG), Turns(), 0.0)
    assert set(found.launches) == {FAST} and set(found.dropped) == {WRONG}
    assert tune.trial(case, "_forward_kernel", (FAST,), Turns(), 0.0) is None, "it is not in the timed call"


def test_nothing_is_tuned_on_a_wrong_op() -> None:
    op = card(lambda x: (launch.tuned("_k_kernel", DEFAULT, 90), 3 * x)[1])
    with pytest.raises(tune.Untunable, match="is wrong before anything is tuned: y: error"):
        tune.trial(ops.Case(op, op.shapes[0], torch.float32, False), "_k_kernel", (FAST,), Turns(), 0.0)


def test_tuning_writes_winners_by_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    op, results = doubling(), tune.Table(folder / "sm_90.json", {"op": "double"})
    how = dict(shapes=op.shapes, passes=("forward", "backward"), seconds=0.0)
    samples = lambda: tune.Samples(tune.SAMPLES / "sm_90.jsonl", {"gpu": "Fast", "commit": "a"})
    tune.tune(op, Turns(), results, samples(), **how)
    found = json.loads((folder / "sm_90.json").read_text())["launches"]
    assert found == {"_double_kernel": {"T=3": FAST.options, "T=6": FAST.options}}
    out = capsys.readouterr().out
    assert out.count("_double_kernel: double T=6 D=4 forward, key T=6") == 1
    assert "_other_kernel: no key was asked for" in out
    # Measured again on another day, where the winner is no better than the heuristic.
    again = Turns(fast=0.99)
    tune.tune(op, again, tune.Table(folder / "sm_90.json", {}), samples(), **how, missing=True)
    assert json.loads((folder / "sm_90.json").read_text())["launches"] == found, "all of it was there"
    assert capsys.readouterr().out == "_other_kernel: no key was asked for at these shapes\n"
    tune.tune(op, again, tune.Table(folder / "sm_90.json", {}), samples(), **how)
    assert json.loads((folder / "sm_90.json").read_text())["launches"] == {}


def test_a_later_slice_leaves_an_earlier_win(folder: Path) -> None:
    op = doubling()
    for dims, fast in zip(op.shapes[:2], (0.5, 0.99), strict=True):  # of one key, each in a process of its own
        results = tune.Table(folder / "sm_90.json", {})
        samples = tune.Samples(tune.SAMPLES / "sm_90.jsonl", {"gpu": "Fast", "commit": "a"})
        tune.tune(op, Turns(fast), results, samples, shapes=[dims], passes=["forward"], seconds=0.0)
        assert results.launches == {"_double_kernel": {"T=6": FAST.options}}


def test_a_shared_key_is_chosen_over_all_slices(folder: Path) -> None:
    """Each process tunes one op; the last one is not to undo what another won."""
    path, machine = folder.parent / "tuning/sm_90.jsonl", {"gpu": "Fast", "commit": "a"}

    def slice_of(what: str, heuristic: list[float], fast: list[float], **where: str) -> Launch | None:
        samples = tune.Samples(path, machine | where)
        samples.add(tune.Trial("_k_kernel", what, ("T=1",), heuristic, {FAST: fast}))
        return tune.choose(samples.of("_k_kernel", "T=1"))

    assert slice_of("head_sample", BASE, times(0.9)) == FAST
    assert slice_of("unmask", BASE, times(0.98)) == FAST, "6 % over both; 2 % alone"
    assert slice_of("unmask", BASE, times(1.2), commit="a+") is None, "measured again: its last trial counts"
    assert slice_of("unmask", BASE, times(0.98), commit="b") is None, "another commit's kernel is another"
    assert slice_of("unmask", BASE, times(0.98), gpu="Other") is None
    assert len(tune.Samples(path, machine).of("_k_kernel", "T=1")) == 2
    assert tune.Samples(path, machine).of("_k_kernel", "T=2") == []


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no op is called 'nothing'; to tune: double"),
        (["rms_norm"], "the card of rms_norm proposes no launches; to tune: double"),
        (["double", "--shape", "T=7"], "--shape is T=7, expected sizes of double"),
        (["double", "--shape", "T"], "--shape is T, expected sizes by name"),
        (["double", "--shape", "T=6,D=8"], "launches are measured on an NVIDIA GPU, and there is none"),
    ],
)
def test_tune_refuses_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "OPS", {"double": doubling(), "rms_norm": OPS["rms_norm"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.tune: error: ") and message in line


def test_tune_command_measures_the_shapes_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "OPS", {"double": doubling()})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "DeviceClock", Turns)
    monkeypatch.setattr(tune, "where", lambda clock: {"architecture": 90, "gpu": "Fast"})
    monkeypatch.setattr(tune, "in_a_line", lambda machine: machine["gpu"])
    assert tune.main(["double", "--shape", "T=6", "--passes", "forward", "--seconds", "0"]) == 0
    found = json.loads((folder / "sm_90.json").read_text())
    shapes = [dict(T=6, D=4), dict(T=6, D=8)]
    machine = {"architecture": 90, "gpu": "Fast"}
    assert found["provenance"] == [{"op": "double", "shapes": shapes, "passes": ["forward"], "machine": machine}]
    assert found["launches"] == {"_double_kernel": {"T=6": FAST.options}}
    assert "sm_90.json: 1 launches in all" in capsys.readouterr().out


def test_proposed_launches_have_kernels() -> None:
    for name, op in OPS.items():
        assert set(op.candidates) <= set(op.kernels), name
        assert all(isinstance(c, Launch) for proposed in op.candidates.values() for c in proposed), name


# ---- the GPU tests' driver ----


def test_slices_cover_every_op_with_kernels() -> None:
    found = {part.name: part for part in gpu_tests.slices(sanitizer="/bin/sanitizer", golden=Path("golden"))}
    assert not any(part.skip for part in found.values())
    for group, names in gpu_tests.groups().items():
        assert all(f"[{name}-" in found[f"parity-{group}"].command[-1] for name in names)
        assert all(f"[{name}-" in found["parity-rest"].command[-1] for name in names)
    assert found["parity-rest"].command[-1].startswith("not (")
    parts = gpu_tests.parts()
    assert sorted(name for names in parts.values() for name in names) == sorted(n for n, o in OPS.items() if o.kernels)
    assert parts["norm"] == gpu_tests.groups()["norm"] and parts["experts"] == ["experts"]
    cases = ops.cases("cuda")
    for part, names in parts.items():
        for name in names:
            for kind in ("real", "memcheck", "racecheck", "bench"):
                assert f"[{name}-" in found[f"{kind}-{part}"].command[-1]
            assert any(case.id.startswith(f"{name}-") for case in cases)
    assert {name for names in gpu_tests.groups().values() for name in names} == {n for n, o in OPS.items() if o.kernels}
    assert list(found)[:3] == ["smoke", "parity-moe", "parity-unmask"] and list(found)[-1].startswith("bench-")
    assert found["memcheck-norm"].env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert found["golden-fp32"].env == {"TWOTOWER_GOLDEN": "golden"}


def test_the_smoke_test_has_every_kernel() -> None:
    tests = {
        f"tests/kernels/test_kernels.py::test_matches_reference[{p.id}-torch.bfloat16]" for p in parity.WITH_KERNELS
    }
    rows = {f"bench/bench_ops.py::test_parity[{case.id}]": case for case in ops.cases("cuda")}
    found = gpu_tests.smoke()
    assert set(found) <= tests | set(rows), "one that is not there, and pytest runs none of them"
    assert len([name for name in found if name in tests]) == sum(bool(op.kernels) for op in OPS.values())
    published = [rows[name] for name in found if name in rows]
    assert len(published) > 10 and all(ops.cost(case)[1] <= gpu_tests.SMALL for case in published)


def test_slices_say_why_they_are_skipped() -> None:
    why = {part.name: part.skip for part in gpu_tests.slices() if part.skip}
    assert why["golden-fp32"] == why["golden-bf16"] == "no golden files: set TWOTOWER_GOLDEN to their folder"
    assert why["racecheck-norm"] == "compute-sanitizer is not on the PATH" and "real-norm" not in why


def python(name: str, code: str, **fields: Any) -> gpu_tests.Slice:
    return gpu_tests.Slice(name, (sys.executable, "-c", code), **fields)


def test_slices_run_within_their_limit(tmp_path: Path) -> None:
    assert gpu_tests.run(python("good", "import os; os._exit(int(os.environ['X']))", env={"X": "0"}), 60) == "passed"
    assert gpu_tests.run(python("bad", "raise SystemExit(3)"), 60) == "failed (3)"
    # A child of the slice's own goes with it.
    mark = tmp_path / "mark"
    mark.touch()
    child = f"import time\nwhile time.sleep(0.02) is None: open({str(mark)!r}, 'a').write('.')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_tests.run(python("slow", code), 2) == "timed out"
    size = mark.stat().st_size
    time.sleep(0.3)
    assert mark.stat().st_size == size


def test_driver_reports_skips_failures_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        python("one", "pass"),
        python("none", "pass", skip="no tool"),
        python("two", "raise SystemExit(1)"),
        python("last", "pass"),
    ]
    monkeypatch.setattr(gpu_tests, "slices", lambda **given: parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_tests, "missing", lambda: "")
    assert gpu_tests.main([]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "| one | passed |" in out and "| none | skipped: no tool | 0 |" in out and "| two | failed (1) |" in out
    assert gpu_tests.main(["one", "n*"]) == 0 and gpu_tests.main(["--from", "last"]) == 0
    monkeypatch.setattr(gpu_tests, "run", lambda part, limit: time.sleep(0.2) or "passed")
    capsys.readouterr()
    assert gpu_tests.main(["--budget", "60.1"]) == 1
    assert "Out of time. To go on: make test-gpu ARGS='--from two'" in capsys.readouterr().out
    assert gpu_tests.main(["--list"]) == 0 and "none                 skipped: no tool" in capsys.readouterr().out


def test_driver_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert gpu_tests.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no slice is called 'nothing'; there are: smoke, parity-moe, parity-unmask, " in refused("nothing")
    assert refused().endswith("these tests need an NVIDIA GPU, and there is none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_tests, "NEEDED", ("json", "no-such-module"))
    line = refused()
    assert f"{sys.executable} lacks no-such-module. Where there is a network: pip download" in line
    assert "--no-index --target site wheels/*.whl, then with PYTHONPATH=site" in line


def test_golden_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path / "checkout")
    monkeypatch.delenv("TWOTOWER_GOLDEN", raising=False)
    assert gpu_tests.golden_folder() is None
    for place in (tmp_path / "shared/golden", tmp_path / "checkout/shared/golden", tmp_path / "named"):
        place.mkdir(parents=True)
        with monkeypatch.context() if place.name == "named" else nullcontext() as patch:
            if patch:
                patch.setenv("TWOTOWER_GOLDEN", str(place))
            assert gpu_tests.golden_folder() == place
