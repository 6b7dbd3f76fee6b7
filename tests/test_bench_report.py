"""SPEED.md, its figures and comparisons: what they make of recorded lines, a GPU's among them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import compare, measure, report, results, whole
from bench.models import PUBLISHED
from bench.targets import TARGETS, says, shortfall, target_of
from tt_kernels import OPS
from tt_kernels.launch import INTERPRET

ROOT = Path(__file__).resolve().parents[1]
H200 = {
    "date": "2027-01-02 03:04 UTC",
    "cpu": "some processor",
    "cores": 16,
    "threads": 1,
    "load": 0.1,
    "python": "3.12.3",
    "torch": "2.11.0",
    "transformers": "not installed",
    "triton": "3.6.0",
    "commit": "0123456789ab",
    "gpu": "NVIDIA Made Up",
    "architecture": 90,
    "multiprocessors": 132,
    "l2": 60 << 20,
    "driver": "1.2.3",
    "cuda": "13.0",
}
ROOFS = {"bandwidth": 4e12, "compute": 700e12, "read": 4e12, "copy": 3.9e12, "product": 700e12}


def row(op: str, dims: dict[str, int], us: float, share: float, *, fault: str = "", **peers: Any) -> dict[str, Any]:
    dims = next(shape for shape in OPS[op].shapes if dims.items() <= shape.items())
    return {
        "kind": "row",
        "machine": H200,
        "roofs": ROOFS,
        "op": op,
        "dims": dims,
        "dtype": "bf16",
        "which": "forward",
        "kernel": True,
        "flops": 10**9,
        "bytes": 10**8,
        "oracle": "fp64",
        "error": 1e-3,
        "eager_error": 1e-3,
        "fault": fault,
        "clock": "graph",
        "sets": 4,
        "rounds": 50,
        "p20": us * 0.9e-6,
        "p50": 0 if fault else us * 1e-6,
        "p80": us * 1.1e-6,
        "share": share,
        "memory": 2.5e6,
        "peers": {name: {"ratio": r} if isinstance(r, float) else {"why": r} for name, r in peers.items()},
    }


def a_pass(kind: str, batch: int, ms: float) -> dict[str, Any]:
    floor = whole.floor(PUBLISHED, kind, batch=batch, context=2048, roofs=ROOFS)
    return {
        "kind": "pass",
        "machine": H200,
        "model": "published size, random weights",
        "config": PUBLISHED.to_dict(),
        "dtype": "bf16",
        "pass": kind,
        "batch": batch,
        "context": 2048,
        "clock": "device",
        "p20": ms / 1.1e3,
        "p50": ms / 1e3,
        "p80": ms / 0.9e3,
        "wall": ms / 500,
        "floor": floor,
        "roofs": ROOFS,
        "experts": 60.0,
        "experts_worst": 68.6,
    }


def decode(mode: str, batch: int, rate: float) -> dict[str, Any]:
    return {
        "kind": "decode",
        "machine": H200,
        "model": "published size, random weights",
        "dtype": "bf16",
        "mode": mode,
        "batch": batch,
        "context": 2048,
        "threshold": None,
        "tokens_per_s": rate,
        "tokens_per_pass": 3.3,
    }


LINES = [
    row("experts", dict(T=16, D=2688), 900.0, 0.5, eager=3.0),  # replaced by the next
    row("experts", dict(T=16, D=2688), 412.0, 0.82, eager=3.1, grouped_mm=1.7, vllm="vllm is not installed"),
    row("experts", dict(T=64, D=2688), 800.0, 0.7, eager=3.2, vllm=0.9),
    row("route", dict(T=64, D=2688), 7.5, 0.05, eager=9.0),
    row("rms_norm", dict(T=4096, D=2688), 0.0, 0.0, fault="y: error 1e-1 above 1e-3"),
    a_pass(whole.AR, 1, 2.0),
    a_pass(whole.DENOISER, 1, 10.0),
    a_pass(whole.COMMIT, 1, 10.0),
    decode("ar", 1, 500.0),
    decode("ar", 8, 1300.0),
    decode("mask_diffusion", 1, 300.0),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPU's results beside the CPU's that are in the repository."""
    made = tmp_path / "results"
    shutil.copytree(measure.RESULTS, made)
    (made / "nvidia-made-up.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return made


def test_speed_of_a_gpu(folder: Path, tmp_path: Path) -> None:
    assert report.main(["--results", str(folder), "--out", str(tmp_path)]) == 0
    text = " ".join((tmp_path / "SPEED.md").read_text().split())
    assert "## NVIDIA Made Up Driver 1.2.3, CUDA 13.0, Triton 3.6.0" in text and "No GPU results" not in text
    assert text.index("NVIDIA Made Up") < text.index("CPU, references, small shapes")
    assert (
        "| experts | T=16 D=2688 N=1856 E=128 K=6 M=3712 | forward | 412 (371-453) |" in text and "900 (" not in text
    ), "the newest line counts"
    assert "| 82 % | 80 %, > vllm | 2.5 | 3.10 | 1.70 | - |" in text
    heads = {part: text.split(f"#### {part} ")[1].split(" | | -")[0] for part in ("norm", "moe")}
    assert "vllm/ours" in heads["moe"] and "vllm/ours" not in heads["norm"], "columns of a part's own peers only"
    assert "| rms_norm | T=4096 D=2688 | forward | RED |" in text
    short = text[text.index("Short of its target") :]
    assert (
        "`experts` T=64 D=2688 N=1856 E=128 K=6 M=3712 forward: 70 % of the roof, target 85 %; vllm takes 0.90" in short
    )
    assert "`route` T=64 D=2688 E=128 K=6 forward: 7.5 us, target 5 us" in short and "forward: 82" not in short
    assert "| 10.0 (9.1-11.1) | 20 |" in text and "even at tokens/pass" in text and "| 60.0 of 68.6 |" in text
    for kind in ("roofline", "peers", "decoding"):
        picture = tmp_path / f"docs/speed_nvidia-made-up_{kind}.svg"
        assert f"(docs/{picture.name})" in text and picture.stat().st_size > 5000
        before = picture.read_bytes()
        assert report.main(["--results", str(folder), "--out", str(tmp_path)]) == 0
        assert picture.read_bytes() == before, "the same results, the same figure"
    assert report.main(["--results", str(folder), "--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "SPEED.md").write_text(text.replace("412 (", "41.2 ("))
    assert report.main(["--results", str(folder), "--out", str(tmp_path), "--check"]) == 1


def test_the_speed_that_is_committed_is_what_the_results_give() -> None:
    assert report.main(["--check"]) == 0, "python -m bench.report"
    text = (ROOT / "SPEED.md").read_text()
    if not any(machine.gpu for machine in results.machines()):
        assert "**No GPU results are recorded yet.**" in text and "no claim about kernels" in text


def test_report_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "holds no results: make bench" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text('{"op": "x", "machine": {}}\nnot json\n')
    assert report.main(["--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl:2 is no record" in error and error.count("\n") == 1


def test_newest_lines_count(folder: Path) -> None:
    machine = results.read(folder / "nvidia-made-up.jsonl")
    assert [len(machine.lines[kind]) for kind in results.KINDS] == [4, 3, 3, 0] and machine.gpu
    assert machine.commits == ["0123456789ab"]
    stale = {"op": "rms_norm", "dims": {"T": 1, "D": 12345}}
    assert not results.listed(stale) and not results.listed(stale | {"op": "gone"}), "what no card lists is not shown"
    assert all(map(results.listed, machine.lines["row"]))
    (cpu,) = (machine for machine in results.machines(folder) if not machine.gpu)
    assert cpu.name == measure.machine_name(cpu.where[0])
    assert not cpu.gpu and len(cpu.lines["cpu"]) == len({line["machine"]["threads"] for line in cpu.lines["cpu"]})


# ---- targets ----


def test_targets_name_published_shapes() -> None:
    for target in TARGETS:
        assert any(target.holds_for(target.op, dims, "forward") for dims in OPS[target.op].shapes), target
    assert target_of("experts", {"T": 16}, "backward") is None


def test_a_peer_that_was_not_there_is_not_missed() -> None:
    target = target_of("experts", {"T": 16}, "forward")
    assert target is not None
    assert shortfall(target, {"share": 0.9, "p50": 1.0, "peers": {"vllm": {"why": "absent"}}}) == []
    assert shortfall(target, {"fault": "wrong", "share": 0.0, "p50": 0.0, "peers": {}}) == ["no right result"]


def test_a_target_may_be_a_multiple_of_a_peer() -> None:
    target = target_of("block_diffusion_attention", {"N": 8192}, "forward")
    assert target is not None and says(target) == "1.2 x flex"
    missed = [shortfall(target, {"share": 0.5, "p50": 1.0, "peers": {"flex": {"ratio": r}}}) for r in (1.1, 1.2, 1.3)]
    assert missed == [["flex takes 1.10 of our time, target 1.2"], [], []]


# ---- the whole model on paper ----


def test_floors_are_those_of_the_design() -> None:
    """AR 1.53 ms, denoiser 8.21 ms, even at 8.1 tokens a pass at batch 1; 1.5 and twice AR's tokens/s at 32."""
    times = {
        batch: [
            whole.floor(PUBLISHED, kind, batch=batch, context=2048, roofs=whole.H200)
            for kind in (whole.AR, whole.DENOISER, whole.COMMIT)
        ]
        for batch in (1, 32)
    }
    assert times[1] == pytest.approx([1.53e-3, 8.21e-3, 8.1e-3], rel=0.03)
    assert whole.even(PUBLISHED, *times[1]) == pytest.approx(8.1, abs=0.3)
    assert whole.even(PUBLISHED, *times[32]) == pytest.approx(1.5, abs=0.1)
    assert whole.times_ar(PUBLISHED, *times[32], 3.3) == pytest.approx(2.04, abs=0.1)
    assert whole.even(PUBLISHED, 1.0, 1.0, 20.0) is None
    limit = whole.even(PUBLISHED, 2.0, 10.0, 9.0)
    assert limit is not None and whole.times_ar(PUBLISHED, 2.0, 10.0, 9.0, limit) == pytest.approx(1)


def test_a_pass_computes_what_its_tokens_need() -> None:
    one = whole.pass_flops(PUBLISHED, whole.AR, batch=1, context=0)
    assert one == pytest.approx(2 * 3.2e9, rel=0.1)  # 3.6 G active parameters, the embedding table among them
    assert whole.pass_flops(PUBLISHED, whole.DENOISER, batch=2, context=0) > 31 * one


# ---- two checkouts ----


def test_verdicts_are_beyond_three_percent_and_the_noise() -> None:
    base = [1.0, 1.01, 0.99, 1.0, 1.0]
    assert compare.verdict([t * 1.02 for t in base], base)[1] == ""
    assert compare.verdict([t * 1.1 for t in base], base)[1] == "slower"
    assert compare.verdict([t * 0.9 for t in base], base)[1] == "faster"
    noisy = [0.8, 0.9, 1.1, 1.3, 1.4]
    ratio, word = compare.verdict(noisy, base)
    assert ratio == pytest.approx(1.1) and word == ""


@pytest.mark.skipif(INTERPRET, reason="times")
def test_a_slower_checkout_shows_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    for name in ("slow", "wrong"):
        for package in ("tt_kernels", "tt_model"):
            shutil.copytree(
                ROOT / package, tmp_path / name / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
            )
    source = (ROOT / "tt_kernels/norm/rms.py").read_text()
    start = "    check("
    assert source.count(start) == 1
    (tmp_path / "slow/tt_kernels/norm/rms.py").write_text(
        source.replace(start, "    [x.exp() for _ in range(40)]\n" + start)
    )
    (tmp_path / "wrong/tt_kernels/norm/rms.py").write_text(
        source.replace(start, "    weight = weight * 1.01\n" + start)
    )
    (slow, *_) = compare.compare(tmp_path / "slow", ROOT, "rms_norm", rounds=4)
    assert slow["case"].startswith("rms_norm") and slow["verdict"] == "slower" and slow["ratio"] > 1.5
    (wrong, *_) = compare.compare(tmp_path / "wrong", ROOT, "rms_norm", rounds=1)
    assert "y: error" in wrong["fault"] and "ratio" not in wrong
    assert "RED here: y: error" in "\n".join(compare.lines([wrong]))


def test_a_commit_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main("no-such-commit", "*", 1) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.report: error: --base no-such-commit: ") and error.count("\n") == 1
