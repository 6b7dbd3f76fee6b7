"""SPEED.md, its figures and comparisons: what they make of recorded lines, a GPU's among them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import figures, generate, measure, ops, report, results, whole
from bench.models import PUBLISHED
from bench.oracle import DTYPES
from bench.peers import peers_of
from bench.targets import REASONS, TARGETS, says, shortfall, target_of
from cards import OPS

ROOT = Path(__file__).resolve().parents[2]
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


def decode(mode: str, batch: int, rate: float, **other: Any) -> dict[str, Any]:
    return {
        "kind": "decode",
        "machine": H200,
        "model": "published size, random weights",
        "dtype": "bf16",
        "mode": mode,
        "batch": batch,
        "context": 2048,
        "threshold": None,
        "new": 128,
        "rounds": 5,
        "tokens_per_s": rate,
        "tokens_p20": 0.9 * rate,
        "tokens_p80": 1.2 * rate,
        "tokens_per_pass": 3.3,
        **other,
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


def rendered(folder: Path, out: Path) -> str:
    """SPEED.md of the results in a folder, its runs of blanks as one."""
    assert report.main(["--results", str(folder), "--out", str(out)]) == 0
    return " ".join((out / "SPEED.md").read_text().split())


def test_speed_of_a_gpu(folder: Path, tmp_path: Path) -> None:
    text = rendered(folder, tmp_path)
    assert "## NVIDIA Made Up - Run 1: commit 0123456789ab, driver 1.2.3, CUDA 13.0, Triton 3.6.0" in text
    assert "No GPU results" not in text and text.index("NVIDIA Made Up") < text.index("CPU, references, small shapes")
    assert "**experts** D=2688 N=1856 E=128 K=6 M=3712 Run 1, commit 0123456789ab, load 0.1 before: | shape" in text
    assert "| T=16 | forward | 412 (371-453) |" in text and "900 (" not in text, "the newest line counts"
    assert "| 82 % | 80 % | 2.5 | 1.0e-03 (1.0e-03) | bf16 |" in text
    assert "| T=16 | forward | 412 | 3.10 | 1.70 | - |" in text
    assert "- no time of `vllm`: vllm is not installed" in text
    assert "- no time of `triton_kernels`: not asked in that run" in text
    assert "| T=4096 D=2688 | forward | RED |" in text and "forward: y: error 1e-1 above 1e-3" in text
    assert f"cards no longer have: {len(ops.cases('cuda')) - 4} rows, of rms_norm, " in text
    short = text[text.index("Short of its target") :]
    assert (
        "| experts | T=64 D=2688 N=1856 E=128 K=6 M=3712 | forward | 70 % of the roof, target 85 %; vllm takes 0.90"
        in short
    )
    assert "| route | T=64 D=2688 E=128 K=6 | forward | 7.5 us, target 5 us | 1 |" in short
    assert "82 % of the roof" not in short and "reason, from a profile" not in short
    assert "| 10.0 (9.1-11.1) | 20 |" in text and "even at tokens/pass" in text and "| 60.0 of 68.6 |" in text
    assert "| ar | 1 | 2048 | 128 | 500 (450-600) |" in text and "floor: even at" in text
    (machine, *_) = results.machines(folder)
    expected = figures.expected(machine)
    assert {"roofline", "peers_moe", "batch_published-size-random-weights_bf16"} == expected.keys()
    for figure in expected.values():
        picture = tmp_path / "docs" / figure.file
        assert f"(docs/{picture.name})" in text and picture.stat().st_size > 5000
        before = picture.read_bytes()
        assert report.main(["--results", str(folder), "--out", str(tmp_path)]) == 0
        assert picture.read_bytes() == before, "the same results, the same figure"


def test_what_is_not_of_the_results_is_found(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rendered(folder, tmp_path)
    check = ["--results", str(folder), "--out", str(tmp_path), "--check"]
    assert report.main(check) == 0
    speed, picture = tmp_path / "SPEED.md", tmp_path / "docs/speed_nvidia-made-up_roofline.svg"
    text, drawn = speed.read_text(), picture.read_text()
    speed.write_text(text.replace("412 (", "41.2 ("))
    assert report.main(check) == 1 and "give: SPEED.md: python" in capsys.readouterr().err
    speed.write_text(text)
    (machine, *_) = results.machines(folder)
    picture.write_text(drawn.replace(figures.expected(machine)["roofline"].digest, "0" * 16))
    assert report.main(check) == 1 and f"give: docs/{picture.name}: python" in capsys.readouterr().err
    picture.unlink()
    assert report.main(check) == 1


def test_every_row_and_peer_fits_a_page(tmp_path: Path) -> None:
    """All that a GPU day can record, of two commits: no table is wide, every figure is drawn, nothing is left out."""
    lines = []
    for i, case in enumerate(ops.cases("cuda")):
        line = row("experts", dict(T=16, D=2688), 4000.0 + i, 0.5)
        peers = {peer.name: {"ratio": 1.25} for peer in peers_of(case.op)}
        which = dict(op=case.name, dims=dict(case.dims), dtype=DTYPES[case.dtype], which=case.which, peers=peers)
        lines.append(line | which | {"machine": H200 | {"commit": f"{i % 2:012x}+"}})
    for batch in (1, 128):
        for context in (2048, 32768):
            lines += [decode(mode, batch, 100.0 * batch, context=context) for mode in ("ar", "mask_diffusion")]
    (tmp_path / "nvidia-made-up.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "SPEED.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) < 200 and max(line.count("|") - 1 for line in tables) <= 12
    assert sum(line.count(" bf16 |") + line.count(" fp32 |") + line.count("reference |") for line in tables) >= 234
    assert text.count("speed_nvidia-made-up_peers_") == len({figures.part_of(line) for line in lines if "op" in line})
    assert "tokens/s over context](docs/speed_nvidia-made-up_context_published-size-random-weights_bf16.svg)" in text
    assert "| run |" in text and "Run 1, commit 000000000000+, load 0.1 before; Run 2, commit 000000000001+" in text


def test_reasons_stand_beside_what_falls_short(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REASONS, "route", "two tickets, one after the other")
    text = rendered(folder, tmp_path)
    assert "7.5 us, target 5 us | 1 | two tickets, one after the other |" in text


def test_the_speed_that_is_committed_is_what_the_results_give() -> None:
    assert report.main(["--check"]) == 0, "python -m bench.report"
    text = (ROOT / "SPEED.md").read_text()
    if not any(machine.gpu for machine in results.machines()):
        assert "**No GPU results are recorded yet.**" in text and "no claim about kernels" in text
        assert "floor" not in text, "a CPU's passes beside nothing"


def line_of(kind: str) -> dict[str, Any]:
    return json.loads(json.dumps(next(line for line in LINES if line["kind"] == kind)))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([json.dumps(line_of("row")), "not json"], "a.jsonl:2 is no record: JSONDecodeError"),
        (
            [json.dumps({k: v for k, v in line_of("row").items() if k != "dims"})],
            "a.jsonl:1 is no record: KeyError: 'dims'",
        ),
        ([json.dumps(line_of("row") | {"p50": "fast"})], "ValueError: p50 is 'fast'"),
        ([json.dumps(line_of("pass") | {"machine": {}})], "KeyError: 'date'"),
        ([json.dumps(line_of("decode") | {"kind": "song"})], "KeyError: 'song'"),
        (["[]"], "a.jsonl:1 is no record: TypeError"),
        ([], "holds no results: make bench"),
    ],
)
def test_results_that_are_none_are_one_line(
    lines: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert report.main(["--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_cannot_be_written_or_drawn_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report.main(["--results", str(folder), "--out", "/dev/null"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.report: error: --out /dev/null: ") and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(["--results", str(folder), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "figures need matplotlib" in error and error.count("\n") == 1


def test_newest_lines_count(folder: Path) -> None:
    machine = results.read(folder / "nvidia-made-up.jsonl")
    assert [len(machine.lines[kind]) for kind in results.KINDS] == [4, 3, 3, 0] and machine.gpu == "NVIDIA Made Up"
    (run,) = machine.runs()
    assert run.where["commit"] == "0123456789ab" and machine.numbers(*machine.rows) == "1"
    (cpu,) = (machine for machine in results.machines(folder) if not machine.gpu)
    assert cpu.name == measure.machine_name(cpu.runs()[-1].where)
    assert not cpu.gpu and len(cpu.lines["cpu"]) == len({line["machine"]["threads"] for line in cpu.lines["cpu"]})


def test_only_rows_that_a_run_would_have_today_are_shown() -> None:
    mine = row("experts", dict(T=16, D=2688), 1.0, 0.5)
    assert results.listed(mine)
    for other in ({"dims": {"T": 1, "D": 12345}}, {"op": "gone"}, {"dtype": "fp64"}, {"which": "sideways"}):
        assert not results.listed(mine | other), other
    op = OPS["experts"]
    on_cpu = mine | {"machine": {k: v for k, v in H200.items() if k != "gpu"}, "dtype": "fp32"}
    assert not results.listed(on_cpu), "a published shape is none of a CPU's"
    assert [results.listed(on_cpu | {"dims": dims}) for dims in op.cases].count(True) == 1, "one case of a card"


def test_a_quick_look_does_not_replace_a_measurement(tmp_path: Path) -> None:
    lines = [decode("ar", 1, 500.0), decode("ar", 1, 100.0, rounds=1), decode("ar", 1, 90.0, new=4, rounds=1)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["tokens_per_s"] for line in results.read(path).lines["decode"]] == [500.0, 90.0]
    path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, decode("ar", 1, 510.0))))
    assert [line["tokens_per_s"] for line in results.read(path).lines["decode"]] == [510.0, 90.0]


def test_curves_have_names_of_their_own(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    lines = [
        decode(mode, batch, 100.0 * batch + i, context=context, threshold=0.8 if mode == "mask_diffusion" else None)
        for i, mode in enumerate(generate.MODES)
        for batch in (1, 8)
        for context in (64, 128)
    ]
    for over, count in ((figures.over_batch, 2), (figures.over_context, 2)):
        canvas, axes = pyplot.subplots()
        over(lines, axes)
        labels = axes.get_legend_handles_labels()[1]
        looks = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() not in "_|"}
        assert len(set(labels)) == len(labels) == count * len(generate.MODES) == len(looks)
        assert len(axes.get_yticks()) > 3
        pyplot.close(canvas)


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


def test_nothing_that_reads_as_reached_is_short() -> None:
    target = target_of("experts", {"T": 64}, "forward")
    assert target is not None and target.share == 0.85
    missed = [shortfall(target, {"share": share, "p50": 1.0, "peers": {}}) for share in (0.844, 0.8451, 0.8499, 0.85)]
    assert missed == [["84 % of the roof, target 85 %"], [], [], []]


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
