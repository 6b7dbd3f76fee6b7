"""The whole-model bench and the profiling commands: what they print and write on a CPU, and what they refuse."""

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import clock, cpu, figures, generate, measure, report, results, whole
from bench.clock import HostClock
from bench.models import PUBLISHED, random_on_device
from cards import OPS
from profiling import aot, common, host, ncu, one, proton, timeline
from tt_kernels.runtime.launch import INTERPRET, ON_CPU
from tt_model import TwoTowerConfig

COMMANDS = {"timeline": timeline, "host": host, "aot": aot, "ncu": ncu, "one": one, "proton": proton}
CPU = pytest.mark.skipif(ON_CPU or torch.cuda.is_available(), reason="what a CPU does")

TINY = TwoTowerConfig(
    vocab_size=61,
    hidden_size=16,
    pattern="ME*E",
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=12,
    block_size=8,
    mask_token_id=3,
)

SMALL = ["--batch", "1", "--context", "8", "--new", "4", "--rounds", "1"]

# ---- the whole model ----


@pytest.fixture
def subject() -> generate.Subject:
    return generate.Subject("tiny", random_on_device(TINY, "cpu", torch.float32), None)


@CPU
def test_both_towers_lie_on_the_same_memory(subject: generate.Subject) -> None:
    model = subject.model
    assert model.lm_head.weight is model.context_lm_head.weight
    mine, theirs = (tower.layers[1].mixer.experts.up_proj for tower in (model.context_tower, model.denoiser_tower))
    assert mine is theirs and torch.isfinite(model.context_logits(torch.arange(8).unsqueeze(0))).all()
    assert not any(p.is_meta for p in model.parameters())


@CPU
def test_passes_are_measured_beside_what_they_need(subject: generate.Subject) -> None:
    lines = list(generate.passes(subject, batch=2, context=5, rounds=2))
    assert [line["pass"] for line in lines] == [whole.DENOISER, whole.COMMIT, whole.AR]
    for line in lines:
        assert line["p20"] <= line["p50"] <= line["p80"] and line["clock"] == "wall" and line["rounds"] == 2
        assert 2 <= line["experts"] <= 4 and line["flops"] > 0 and line["bytes"] > 0 and line["floor"] is None
        json.dumps(line)
    table = whole.regime(TINY, lines)
    assert table is not None and table.count("\n") == 2 and "floor" not in table, "no roofs, no floors"
    beside = whole.regime(TINY, [line | {"floor": line["p50"] / 2} for line in lines])
    assert beside is not None and beside.count("floor: ") == 2
    with pytest.raises(ZeroDivisionError):
        generate.experts_hit(subject.model, lambda: 1 / 0)
    assert all(m.load is None for m in subject.model.modules() if hasattr(m, "load"))


@CPU
def test_the_denoiser_pass_is_the_one_that_generation_runs(
    subject: generate.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a block: hidden states, then head and commit rule in one op. No logits are made."""
    seen: list[str] = []
    model, unmask, linear = subject.model, generate.decoder.unmask, torch.nn.Linear.forward
    denoise = model.denoise
    monkeypatch.setattr(model, "denoise", lambda *a, **k: seen.append(k["output"]) or denoise(*a, **k))
    monkeypatch.setattr(generate.decoder, "unmask", lambda *a, **k: seen.append("unmask") or unmask(*a, **k))
    monkeypatch.setattr(
        torch.nn.Linear,
        "forward",
        lambda self, x: seen.append("logits") if self.out_features == TINY.vocab_size else linear(self, x),
    )
    assert next(generate.passes(subject, batch=2, context=5, rounds=1))["pass"] == whole.DENOISER
    assert set(seen) == {"hidden", "unmask"} and seen.count("hidden") == seen.count("unmask")
    seen.clear()
    block, committed, _, masked = generate.denoiser_pass(subject, model.prefill(subject.prompts(2, 5)), 2)()
    assert seen[-2:] == ["hidden", "unmask"] and block.shape == (2, TINY.block_size)
    assert (masked + committed.sum(-1) == TINY.block_size // 2).all() and committed.any()


@CPU
def test_decoding_counts_tokens_and_passes(subject: generate.Subject) -> None:
    line = generate.decoding(subject, 2, 5, "mask_diffusion", new=8, threshold=0.0, rounds=3)
    assert line["tokens_per_pass"] == 8 and line["rounds"] == 3  # every position is above no threshold
    assert 0 < line["tokens_p20"] <= line["tokens_per_s"] <= line["tokens_p80"]
    assert generate.decoding(subject, 1, 5, "ar", new=3, threshold=0.5, rounds=1)["tokens_per_pass"] is None


@CPU
def test_generate_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert generate.main([*SMALL, "--modes", "ar", "--record"]) == 0
    out = capsys.readouterr().out
    assert "no claim about kernels" in out and "experts hit of uniform" in out and "When diffusion beats AR" in out
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["pass"] * 3 + ["decode"] and lines[-1]["rounds"] >= 5
    assert {line["dtype"] for line in lines} == {"fp32"}
    assert generate.main([*SMALL, "--context", "8", "16", "--modes", "ar", "--dtype", "bf16", "--record"]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()][4:]
    assert {line["dtype"] for line in lines} == {"bf16"}
    assert [line["context"] for line in lines if line["kind"] == "decode"] == [8, 16]
    found = results.read(file)
    assert len(found.lines["decode"]) == 3, "a line for each dtype and context"
    assert len([kind for kind in figures.expected(found) if kind.startswith("context")]) == 1
    capsys.readouterr()
    monkeypatch.setattr(measure, "RESULTS", Path("/dev/null/results"))
    assert generate.main([*SMALL, "--no-decoding", "--record"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.generate: error: --record: ") and error.count("\n") == 1


@CPU
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no/such/folder"], "--model no/such/folder: "),
        (["--context", "64", "100000000"], "--context 100000000 and 32 new tokens exceed its context of 4096"),
        (["--new", "5000"], "--context 64 and 5000 new tokens exceed its context of 4096"),
    ],
)
def test_generate_refuses_in_a_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.generate: error: ") and said in error and error.count("\n") == 1


def test_a_model_from_a_folder_goes_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(generate.TwoTower, "from_pretrained", lambda path, **other: asked.update(other, path=path))
    assert generate.load(str(tmp_path / "deep/mine"), "cpu", torch.float16).name == "mine"
    assert asked == {"path": str(tmp_path / "deep/mine"), "device": "cpu", "dtype": torch.float16}


# ---- profiling ----


@CPU
def test_a_timeline_names_ops_and_their_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "deep/trace.json"
    assert timeline.main(["--passes", "1", "--context", "8", "--out", str(trace)]) == 0
    out = capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    for op in ("experts", "route", "unmask", "mamba_block", "context_attention", "linear"):
        assert f"\n| {op} " in out and f"op {op}" in names
    assert "between them" in out and "aten::mm" in out and "floor of the whole pass" in out
    assert common.OPS["experts"].fn.__name__ == "experts"  # and nothing stays wrapped
    from tt_model.modeling import moe

    assert moe.experts is OPS["experts"].fn


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_floors_are_the_cards() -> None:
    roofs = {"bandwidth": 4e12, "compute": 800e12}
    for name, dims in timeline.dims_of_pass(PUBLISHED, 1, 256).items():
        known = [shape | {k: v for k, v in dims.items() if k == "S"} for shape in OPS[name].shapes]
        assert name == "unmask" or any(dims.items() <= shape.items() for shape in known), (name, dims)
    found = {"experts": (23.0, 9e-3), "modulated_rms_norm": (53.0, 1e-3), "linear": (80.0, 1e-3), "odd": (1.0, 1.0)}
    size = dict(batch=1, context=256, format=whole.BF16, roofs=roofs)
    floors = timeline.floors_of_pass(found, PUBLISHED, **size)
    assert floors.keys() == {"experts", "modulated_rms_norm", "linear"}
    flops, moved = OPS["experts"].cost(2, T=16, D=2688, N=1856, E=128, K=6, M=3712)
    assert floors["experts"] == pytest.approx(23 * moved / 4e12) and moved / 4e12 > flops / 800e12
    parts = whole.parts(PUBLISHED, whole.DENOISER, batch=1, context=256)
    assert floors["experts"] == pytest.approx(parts["experts"][0] / 4e12, rel=0.02)  # as the pass's own count has it


def test_times_stand_beside_floors() -> None:
    found = {"mamba_block": (1.0, 4e-3), "rms_norm": (3.0, 1e-3)}
    rows = cells(timeline.op_table(found, 10e-3, {"mamba_block": 1e-3}))
    assert ["mamba_block", "1", "4000.0", "40.0 %", "1000.0", "25 %"] in rows
    assert ["rms_norm", "3", "1000.0", "10.0 %", "-", "-"] in rows
    assert ["between them", "", "5000.0", "50.0 %", "-", "-"] in rows


def test_kernels_share_the_floor_of_their_op() -> None:
    def event(key: str, us: float, kind: str = "CUDA") -> Any:
        return SimpleNamespace(key=key, device_type=kind, count=2, self_device_time_total=us)

    events = [
        event("_experts_up_kernel", 1200.0),
        event("_experts_down_kernel", 400.0),
        event("_modulated_rms_norm_fwd_kernel", 200.0),
        event("gemm", 200.0),
        event("op experts", 9999.0),
        event("aten::mm", 9999.0, "CPU"),
    ]
    ops = ("experts", "modulated_rms_norm", "linear")  # rms_norm, whose kernel it is too, did not run
    floors = {"experts": 400e-6, "modulated_rms_norm": 50e-6}
    rows = cells(timeline.kernel_table(events, 2, True, 3, ops, floors))[2:]
    assert rows == [
        ["_experts_up_kernel", "experts", "1", "600.0", "60.0 %", "400.0", "50 %"],
        ["_experts_down_kernel", "experts", "1", "200.0", "20.0 %", "400.0", "50 %"],
        ["_modulated_rms_norm_fwd_kernel", "modulated_rms_norm", "1", "100.0", "10.0 %", "50.0", "50 %"],
    ]


@CPU
def test_the_host_is_counted_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main(["--model", "bundled", "--context", "16", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "_experts_up_kernel" in out and "PyTorch operators" in out and "the host's own time" in out
    assert f", commit {clock.commit()}\n" in out, "what it ran on"


def test_the_offline_report_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["experts", "rms_norm"]) == 0
    out = capsys.readouterr().out
    assert "_experts_up_kernel" in out and "_modulated_rms_norm_fwd_kernel" in out and "HGMMA" in out
    # 34 registers and 100 KB: shared memory lets two in. 40 registers a thread after rounding, 255 of four warps: two.
    assert aot.programs(90, 34, 102400, 4) == (2, "shared memory")
    assert aot.programs(90, 255, 0, 4) == (2, "registers")
    assert aot.programs(90, 32, 0, 1) == (32, "programs")
    assert aot.main(["linear_cross_entropy"]) == 2 and "no kernels yet" in capsys.readouterr().err
    assert aot.main(["experts", "--triton", "1.0.0"]) == 2 and "the lock has no Triton 1.0.0" in capsys.readouterr().err


@pytest.mark.skipif(INTERPRET, reason="launches are not recorded")
def test_ncu_looks_at_the_second_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert ncu.main(["experts", "--shape", "T=16", "--show"]) == 0
    out = capsys.readouterr().out
    assert "--launch-skip 4 --launch-count 4" in out and "T=16,D=2688" in out
    assert "_experts_up_kernel|_experts_down_kernel" in out and "_experts_bwd_hidden_kernel" not in out


@CPU
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("ncu", ["experts"], "ncu is not on the PATH"),
        ("ncu", ["linear_cross_entropy"], "has no kernels yet"),
        ("ncu", ["experts", "--shape", "T=3"], "--shape is T=3, the card of experts has T=1"),
        ("ncu", ["experts", "--shape", "T=x"], "expected sizes by name"),
        ("proton", ["experts"], "needs an NVIDIA GPU"),
        ("one", ["expert"], "no op is called 'expert'"),
        ("one", ["experts"], "needs an NVIDIA GPU"),
        ("timeline", ["--model", "no/such/folder"], "--model no/such/folder"),
        ("timeline", ["--out", "/dev/null/trace.json"], "--out /dev/null/trace.json: "),
        ("timeline", ["--out", "/"], "--out /: "),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    name: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert COMMANDS[name].main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"profiling.{name}: error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (timeline, ["--passes", "0"], "argument --passes: is 0, expected a whole number of at least 1"),
        (timeline, ["--batch", "-1"], "argument --batch: is -1"),
        (host, ["--rounds", "x"], "argument --rounds: is x"),
        (proton, ["experts", "--calls", "0"], "argument --calls: is 0"),
        (one, ["experts", "--calls", "0"], "argument --calls: is 0"),
        (generate, ["--batch", "1", "0"], "argument --batch: is 0"),
        (generate, ["--threshold", "2"], "argument --threshold: is 2, expected a number from 0 to 1"),
        (generate, ["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (cpu, ["--context", "0"], "argument --context: is 0"),
        (cpu, ["--prompt", "100000000"], "are 100000064 tokens; the model takes 4096"),
        (cpu, ["--context", "64", "4081"], "are 4097 tokens; the model takes 4096"),
        (report, ["--base", "HEAD", "--rounds", "0"], "argument --rounds: is 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    command: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS[name].main(["--help"])
    out = capsys.readouterr().out
    assert f"python -m profiling.{name}" in out and len(out.splitlines()) > 8


def test_proton_metrics_are_the_cards() -> None:
    dims = dict(OPS["rms_norm"].shapes[0])
    assert proton.work("rms_norm", dims) == {"flops": 4 * 16 * 2688, "bytes": (2 * 16 + 1) * 2688 * 2}


@pytest.fixture
def untold() -> Iterator[None]:
    """Afterwards kernels say nothing of themselves, as before."""
    yield
    for name in ("rms_norm", "experts"):
        for kernel in common.launched(OPS[name], OPS[name].shapes[0]):
            kernel.launch_metadata = None


@pytest.mark.skipif(INTERPRET, reason="launches are not recorded")
def test_triton_hands_the_cards_work_to_proton(untold: None) -> None:
    """Through the code of Triton's that makes a launch's metadata, for a kernel that nothing was compiled of."""
    from triton.compiler.compiler import ASTSource, CompiledKernel

    def metadata_of(kernel: Any, grid: tuple[int, ...]) -> dict[str, Any]:
        source = ASTSource.__new__(ASTSource)
        source.fn = kernel
        name = SimpleNamespace(name=kernel.__name__)
        made = SimpleNamespace(_init_handles=lambda: None, name="", function=0, src=source, metadata=name)
        return CompiledKernel.launch_metadata(made, grid, 0, "x").get()

    one, several = (dict(OPS[name].shapes[0]) for name in ("rms_norm", "experts"))
    assert proton.tell("rms_norm", one) == {}, "a lone kernel has it all"
    (kernel,) = common.launched(OPS["rms_norm"], one)
    found = metadata_of(kernel, (16, 1, 1))
    assert proton.work("rms_norm", one).items() <= found.items()
    assert found["name"] == "_modulated_rms_norm_fwd_kernel (16, 1, 1)"
    assert proton.tell("experts", several) == proton.work("experts", several), "of several the scope has it"
    for kernel in common.launched(OPS["experts"], several):
        assert metadata_of(kernel, (3,)).keys() & {"flops", "bytes"} == set()


@CPU
def test_proton_sees_cold_operands_and_nothing_else(untold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    fake = SimpleNamespace(
        activate=lambda session: log.append("on"),
        deactivate=lambda session: log.append("off"),
        scope=lambda name, metrics: log.append((name, metrics)) or nullcontext(),
    )

    class Three(HostClock):
        def sets(self, moved: int, room: float) -> int:
            return 3

    bind = proton.bind
    inputs: list[int] = []

    def noting(case: Any, fn: Any, sets: Any) -> Any:
        inputs.extend(kwargs["x"].data_ptr() for kwargs in sets)
        return [lambda i=i, call=call: log.append(i) or call() for i, call in enumerate(bind(case, fn, sets))]

    monkeypatch.setattr(proton, "bind", noting)
    dims = dict(OPS["rms_norm"].shapes[0])
    assert proton.profile(fake, 7, "rms_norm", dims, Three(), calls=5) == 6
    assert len(set(inputs)) == 3
    scope = (f"rms_norm {dims}", {})
    assert log == [0, 1, 2, "on", *[x for i in (0, 1, 2, 0, 1, 2) for x in (scope, i)], "off"]


@CPU
def test_the_walk_shows_what_the_commands_print(
    subject: generate.Subject, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The static card to the letter; of what was measured, and of what compilers made, the columns."""
    text = (Path(__file__).resolve().parents[2] / "profiling/README.md").read_text()
    assert generate.main(["--card", "--model", "published", "--batch", "1", "32", "--context", "2048"]) == 0
    assert capsys.readouterr().out in text
    assert timeline.main(["--passes", "1", "--context", "8", "--out", str(tmp_path / "trace.json")]) == 0
    assert host.main(["--model", "bundled", "--context", "16", "--rounds", "1"]) == 0
    assert aot.main(["experts", "--find", "BLOCK_T=16 BLOCK_N=64 BLOCK_K=128"]) == 0
    printed = capsys.readouterr().out + whole.pass_table(list(generate.passes(subject, 1, 5, 1)))
    shape = lambda line: [cell.strip() for cell in line.split("|")]
    shown = [shape(line) for line in text.splitlines()]
    headers = [line for line in printed.splitlines() if line.startswith(("| op ", "| PyTorch", "| pass", "| launched"))]
    assert len(headers) == 4 and all(shape(line) in shown for line in headers)
    (columns,) = (line for line in printed.splitlines() if line.startswith("kernel  "))
    assert columns in text
