"""One smoke test of each measuring command, and what a wrong answer of one would cost most: resuming, choosing."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rows import FakeClock, card
from torch import Tensor

from bench import compare, conftest, figures, generate, measure, report, whole
from bench.models import PUBLISHED
from bench.targets import H200, TARGETS, shortfall, target_of
from cards import OPS
from profiling import aot, host, ncu, timeline
from tools import gpu, owed, tune
from tt_kernels.runtime import launch
from tt_kernels.runtime.launch import ON_CPU, Launch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(ON_CPU or torch.cuda.is_available(), reason="what a CPU says")


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pytest_bench_prints_a_table_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = python("pytest", "bench/bench_ops.py", "-q", "-k", "[rms_norm- or [commit-", "-p", "no:cacheprovider")
    assert out.count("fp32, reference") == 3 and "| rms_norm " in out
    assert set(compare.times(out)) >= {"rms_norm T=3 D=64 forward", "rms_norm T=3 D=64 backward"}
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    where = measure.where() | {"cpu": "Some(R) Fast CPU 9 @ 2.40GHz (AVX2)"}
    file, _ = (measure.record({"run": i, "machine": where}) for i in range(2))
    assert file.name == "some-fast-9-avx2.jsonl" and [line["run"] for line in measure.recorded(file)] == [0, 1]
    with pytest.raises(pytest.UsageError, match="nobody is called sonic"):
        conftest.chosen("eager,sonic", "cuda")


def test_speed_md_is_what_the_results_give(tmp_path: Path) -> None:
    assert report.main(["--check"]) == 0
    assert report.main(["--out", str(tmp_path)]) == 0 and report.main(["--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "SPEED.md").write_text("edited")
    assert report.main(["--out", str(tmp_path), "--check"]) == 1
    (tmp_path / "broken.jsonl").write_text("{}\n{")
    assert report.main(["--results", str(tmp_path)]) == 2


def a_row(op: str = "experts", p50: float = 4e-4, commit: str = "a", **more: Any) -> dict[str, Any]:
    where = measure.where() | dict(gpu="Fast", driver="1", cuda="13", tuned="", commit=commit)
    roofs = dict(read=4e12, copy=4e12, compute=8e14, bandwidth=4e12)
    row = dict(op=op, dims=dict(OPS["experts"].shapes[0]), dtype="bf16", which="forward", kernel=True, fault="")
    row |= dict(p20=p50, p50=p50, p80=p50, share=3e-4 / p50, roof=3e-4, memory=1, error=0, eager_error=0, oracle="fp64")
    row |= dict(
        flops=10**9, bytes=10**9, clock="graph", sets=4, peers={"eager": dict(seconds=1, ratio=2, clock="graph")}
    )
    return dict(kind="row", machine=where, roofs=roofs) | row | more


def test_of_each_measurement_the_newest_line_counts(tmp_path: Path) -> None:
    rows = [a_row(p50=1.0), a_row(commit="b"), a_row("an_old_name"), a_row(dims=dict(T=7))]
    for row in rows:
        measure.append(tmp_path / "fast.jsonl", row)
    (machine,) = report.machines(tmp_path)
    assert machine.gpu == "Fast" and machine.lines["row"] == rows[1:3], "a shape that no card has is left out"
    parts = list(report.speed([machine]))
    text = "\n".join(map(str, parts))
    assert (
        "commit b" in text
        and "400 (400-400)" in text
        and "an_old_name" in text
        and "| 2.00 |" in " ".join(text.split())
    )
    (roofline,) = (part for part in parts if isinstance(part, figures.Figure))
    figures.draw([roofline], tmp_path)
    assert roofline.is_in(tmp_path)


def test_targets_are_of_published_shapes() -> None:
    listed = [(name, dims) for name, op in OPS.items() for dims in op.shapes]
    assert {id(target_of(name, dims, "forward")) for name, dims in listed} >= {id(target) for target in TARGETS}
    dims = OPS["experts"].shapes[0] | {"T": 16}
    assert shortfall(a_row(dims=dims, share=0.795)) == [], "compared as it is shown"
    assert len(shortfall(a_row(dims=dims, share=0.79, peers={"vllm": {"ratio": 0.9}}))) == 2


def test_generate_measures_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--batch", "1", "--context", "8", "--new", "4", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("| denoiser pass |") == 2 and "| mask_diffusion " in out
    paper = whole.Pass(PUBLISHED, whole.DENOISER, batch=1, context=2048)
    assert paper.floor(H200) == pytest.approx(8.2e-3, rel=0.01)  # as README has it


def test_two_trees_are_compared(tmp_path: Path) -> None:
    times = {"base": 100, "ours": 110}
    for name, ms in times.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "says.py").write_text(
            f'print("the time  {ms}.5 ms (1-2)\\n| op | us |\\n| - | - |\\n| f | 7 |")'
        )
    text, slower = compare.compare((tmp_path / "base", tmp_path / "ours"), ["says"], rounds=2)
    assert slower == ["the time"] and "| f " in text and "1.100 |" in text
    (tmp_path / "ours/says.py").write_text("1 / 0")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        compare.compare((tmp_path / "base", tmp_path / "ours"), ["says"], rounds=1)


def test_profiling_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main(["--model", "bundled", "--rounds", "1", "--context", "8", "--engine", "--kinds", *host.KINDS]) == 0
    said = capsys.readouterr().out
    assert "the host's own time" in compare.times(said) and all(f"\n| {kind} " in said for kind in host.MODES)
    out = tmp_path / "pass.json"
    assert timeline.main(["--passes", "1", "--context", "8", "--out", str(out)]) == 0
    assert "| experts_norm " in capsys.readouterr().out and json.loads(out.read_text())["traceEvents"]
    assert ncu.main(["experts", "--shape", "T=16", "--show"]) == 0
    assert "_experts_up_kernel" in capsys.readouterr().out
    assert aot.main(["rms_norm"]) == 0 and "_norm_" in capsys.readouterr().out
    assert aot.programs(90, registers=128, shared=100 << 10, warps=4) == (2, "shared memory")
    with pytest.raises(SystemExit):
        ncu.main(["experts", "--shape", "T=17"])


def test_what_is_owed_can_be_run() -> None:
    tasks = list(owed.tasks())
    assert len({task.name for task in tasks}) == len(tasks) and all(task.expected for task in tasks)
    for task in tasks:
        files = [word.partition("::")[0] for word in task.command if word.endswith(".py") or ".py::" in word]
        assert all((ROOT / file).is_file() for file in files), task.name
        assert "pytest" not in task.command or files or "tests" in task.command, task.name
    nodes = [node for node in owed.smoke() if node.startswith("tests/")]  # those of bench/ are there on a GPU only
    out = python("pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *nodes)
    assert out.count("test_matches_reference[") == len(nodes) == sum(bool(op.kernels) for op in OPS.values())


def test_tests_that_run_on_a_device_are_owed_from_one() -> None:
    """What names the device that it runs on; test_kernels and test_ops go by op."""
    run = {Path(word).name for task in owed.tasks() for word in task.command if word.startswith("tests/kernels/")}
    for file in (ROOT / "tests/kernels").glob("test_*.py"):
        assert file.name in run or "DEVICE" not in file.read_text(), file.name


def test_gpu_tasks_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dict(ROOT=tmp_path, STATE=tmp_path / ".gpu.json", LOGS=tmp_path / ".gpu").items():
        monkeypatch.setattr(gpu, name, value)
    gpu.LOGS.mkdir()
    archive = tmp_path / "out/gpu.tar.gz"

    def task(name: str, code: str, lacks: str = "") -> owed.Task:
        return owed.Task(name, (sys.executable, "-c", f"open('ran', 'a').write('{name} ')\n{code}"), "", {}, lacks)

    tasks = [task("good", "print(7)"), task("bad", "1 / 0"), task("long", "import time; time.sleep(60)")]
    tasks.append(task("never", "", lacks="no ncu"))

    def work(again: bool = False, seconds: float = 1e9) -> str:
        (tmp_path / "ran").write_text("")
        gpu.work(tasks, "abc", archive, again=again, limit=1, end=time.monotonic() + seconds)
        return (tmp_path / "ran").read_text()

    assert work(seconds=0) == "", "no time, nothing begun"
    assert work() == "good bad long "
    assert work() == "long ", "what was cut goes on"
    assert work(again=True) == "bad long "
    assert work() == "", "three turns"
    outcomes = {name: known["outcome"] for name, known in gpu.read_state("abc").items()}
    assert outcomes == dict(good="passed", bad="failed (1)", long="cut", never="skipped: no ncu")
    assert gpu.read_state("another commit") == {}
    with tarfile.open(archive) as packed:
        assert {".gpu.json", ".gpu/good.log", ".gpu/bad.log"} <= set(packed.getnames())
    assert gpu.main(["--list", "smoke"]) == 0


# ---- tuning ----

DEFAULT = Launch(BLOCK=16, num_warps=4)
FAST, WRONG, BROKEN, SLOW = (Launch(BLOCK=block, num_warps=8, num_stages=2) for block in (32, 64, 128, 256))


def test_tuning_keeps_what_is_right_and_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(x: Tensor) -> Tensor:
        chosen = launch.tuned("_double_kernel", DEFAULT, 90, T=len(x))
        if chosen == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        return (3 if chosen == WRONG else 2) * x

    monkeypatch.setattr(launch, "TUNED", tmp_path / "tuned")
    monkeypatch.setattr(tune, "SAMPLES", tmp_path / "tuning")
    seconds = {json.dumps(FAST.options): 0.5, json.dumps(SLOW.options): 2.0, tune.HEURISTIC: 1.0}
    op = card(double, grads=(), candidates={"_double_kernel": (FAST, WRONG, BROKEN, SLOW), "_other_kernel": (FAST,)})
    machine = dict(architecture=90, gpu="Fast", commit="abc")
    options = type("Options", (), dict(shape=None, missing=False, seconds=0.0))
    launch._table.cache_clear()
    try:
        tune.tune(op, FakeClock(seconds), machine, options)
        table = json.loads((tmp_path / "tuned/sm_90.json").read_text())
        assert table["launches"] == {"_double_kernel": {"T=6": FAST.options}}
        assert launch.tuned("_double_kernel", DEFAULT, 90, T=6) == FAST
        options.missing = True
        tune.tune(op, FakeClock({}), machine, options)  # would fail if it measured anything twice
        options.missing, seconds[json.dumps(FAST.options)] = False, 0.98
        tune.tune(op, FakeClock(seconds), machine, options)
        assert json.loads((tmp_path / "tuned/sm_90.json").read_text())["launches"] == {}, "no winner takes it out again"
        (trial,) = tune.known(machine).values()
        assert tune.choose([trial]) is None and tune.known(machine | {"commit": "b"}) == {}
    finally:
        launch._table.cache_clear()
