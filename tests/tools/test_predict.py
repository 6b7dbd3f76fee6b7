"""The static model: machine code and control flow are read as they are, and its checks find what they are for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import report
from profiling.predict import __main__ as predict
from profiling.predict import model, sass, trips, ttgir, walk
from profiling.predict.assume import expert_rows
from profiling.predict.rates import RATES, pipe
from tools import hazards
from tt_kernels.runtime.launch import INTERPRET

COMPILES = pytest.mark.skipif(INTERPRET, reason="kernels that are interpreted cannot be compiled")


def code(*lines: tuple[int, str, int, int, int]) -> str:
    """Text as nvdisasm prints it: (address, instruction, stall, scoreboard it sets, mask of those it waits for)."""
    rows = []
    for address, text, stall, write, wait in lines:
        high = (stall | write << 5 | 7 << 8 | wait << 11) << 41
        rows += [f"        /*{address:04x}*/     {text} ;   /* 0x{0:016x} */", f"         /* 0x{high:016x} */"]
    return "\n".join(rows)


CHAIN = code(
    (0x00, "LDG.E.128 R4, desc[UR4][R2.64]", 2, 0, 0),
    (0x10, "IADD3 R4, R4, R5, RZ", 4, 7, 1),
    (0x20, "LDG.E R6, desc[UR4][R4.64]", 2, 1, 0),
    (0x30, "FADD R7, R6, R6", 4, 7, 2),
    (0x40, "@P0 BRA 0x30", 5, 7, 0),
    (0x50, "EXIT", 5, 7, 0),
)


def test_control_bits_of_ptxas() -> None:
    # I2F.RP sets scoreboard 2, MUFU.RCP waits for it: from a kernel of this repository, sm_90.
    assert sass.control(0x000EB00000209400) == sass.Control(stall=8, yields=1, write=2, read=7, wait=0, reuse=0)
    assert sass.control(0x004EA40000001000) == sass.Control(stall=2, yields=1, write=2, read=7, wait=4, reuse=0)


def test_instructions_loops_and_the_chain_of_loads() -> None:
    found = sass.parse(CHAIN)
    assert [i.name for i in found.instructions] == ["LDG", "IADD3", "LDG", "FADD", "BRA", "EXIT"]
    (loop,) = found.loops
    assert [i.address for i in loop.own] == [0x30, 0x40]
    one = walk.Walk(RATES[90], 1, lambda _: 1000.0)
    walk.chain(found, ttgir.Kernel([], []), trips.Trace(), one)
    assert one.rounds == 2 and 2000 < one.now < 2050


@pytest.mark.parametrize(
    ("opcode", "where"),
    [
        ("HGMMA.64x256x16.F32.BF16", ("tensor", 153.6)),
        ("DMMA.16x8x16", ("tensor", 64.0)),
        ("DMMA.8x8x4", ("tensor", 8.0)),
        ("HMMA.16816.F32.BF16", ("tensor", 6.5)),
        ("LDG.E.128", ("lsu", 16.0)),
        ("LDG.E.U16", ("lsu", 4.0)),
        ("IMAD.WIDE.U32", ("imad", 4.0)),
        ("MUFU.EX2", ("special", 8.0)),
        ("FFMA", ("fma", 1.0)),
        ("LOP3.LUT", ("alu", 2.0)),
    ],
)
def test_pipes(opcode: str, where: tuple[str, float]) -> None:
    assert pipe(opcode, RATES[90]) == pytest.approx(where)


KERNEL = """
#loc = loc("kernels.py":1:0)
module {
  tt.func public @k(ARGUMENTS) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c4 = arith.constant 4 : i32 loc(#loc1)
    %i = tt.get_program_id x : i32 loc(#loc1)
    %at = tt.addptr %ends_ptr, %i : !tt.ptr<i32>, i32 loc(#loc1)
    %end = tt.load %at : !tt.ptr<i32> loc(#loc1)
    %range = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32> loc(#loc1)
    %p = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>> loc(#loc1)
    %sum = scf.for %j = %c0 to %end step %c4 iter_args(%a = %c0) -> (i32) : i32 {
      %s = tt.splat %n : i32 -> tensor<8xi32> loc(#loc2)
      %m = arith.cmpi slt, %range, %s : tensor<8xi32> loc(#loc2)
      %v = tt.load %p, %m : tensor<8x!tt.ptr<f32>> loc(#loc2)
      %b = arith.addi %a, %c4 : i32 loc(#loc2)
      scf.yield %b : i32 loc(#loc2)
    } loc(#loc2)
    %t = tt.atomic_rmw add, acq_rel, gpu, %at, %c0 : (!tt.ptr<i32>, i32) -> i32 loc(#loc1)
    %last = arith.cmpi eq, %t, %sum : i32 loc(#loc1)
    scf.if %last {
      tt.store %at, %sum : !tt.ptr<i32> loc(#loc3)
    } loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
#loc1 = loc("/somewhere/kernels.py":2:4)
#loc2 = loc(callsite(#loc4 at #loc1))
#loc3 = loc("/somewhere/kernels.py":9:4)
#loc4 = loc("/somewhere/lang.py":7:4)
""".replace(
    "ARGUMENTS",
    '%x_ptr: !tt.ptr<f32> loc("x_ptr"(#loc)), %ends_ptr: !tt.ptr<i32> loc("ends_ptr"(#loc)), %n: i32 loc("n"(#loc))',
)


def run(i: int, last: bool = False, known: bool = True) -> trips.Trace:
    kernel = ttgir.parse(KERNEL)
    assert [name for _, _, name in kernel.arguments] == ["x_ptr", "ends_ptr", "n"] and len(kernel.loops) == 1
    pointers = {f"%{name}": trips.Pointer(name, np.int64(0)) for name in ("x_ptr", "ends_ptr")}
    memory = {"ends_ptr": np.array([0, 10, 16])}.get if known else lambda name: None
    return trips.Program(kernel, pointers | {"%n": np.int64(5)}, memory, (i, 0, 0), (3, 1, 1), last).run()


def test_control_flow_is_evaluated() -> None:
    assert [run(i).iterations[0] for i in range(3)] == [0, 3, 4]
    trace = run(1)
    assert trace.loaded["x_ptr"] == 3 * 5 * 4 and not trace.unsure  # five of eight lanes
    assert trace.lines[0] == {(("lang.py", 7), ("kernels.py", 2)): 3}  # with the call that it stands in
    assert not trace.stored and run(1, last=True).stored["ends_ptr"] == 4  # the last program's work
    assert (
        run(1, known=False).iterations[0] == 1 and "bounds of the loop at lang.py:7" in run(1, known=False).unsure.pop()
    )


def test_sampled_programs_are_not_all_of_a_kind() -> None:
    """Tiles that are alike repeat: of a grid of 8 tiles of columns all are among the samples, about as often."""
    picked = model.sampled((4000,), 24)
    ids = [i for (i, _, _), _ in picked]
    assert ids[0] == 0 and ids[-1] == 3999 and sum(weight for _, weight in picked) == 4000 and len(set(ids)) == 24
    assert len({i % 8 for i in ids}) == 8 and max(weight for _, weight in picked) < 3 * 4000 / 24
    assert [i for (i, _, _), _ in model.sampled((5,), 24)] == list(range(5))


def test_routing_hits_as_many_experts_as_one_expects() -> None:
    rows = expert_rows(96, 128, 16)
    assert rows.sum() == 96 and abs((rows > 0).sum() - 68.6) < 1.5
    assert expert_rows(49152, 128, 8192).sum() == 49152


@COMPILES
def test_trip_counts_of_a_real_kernel() -> None:
    for D, loops in ((2688, 21), (1024, 8)):
        dims = dict(T=16, D=D, N=1856, E=128, K=6)
        (up,) = (row for row in predict.of_op("experts", dims, 90, torch.bfloat16) if "_up_" in row.name)
        p = up.prediction
        assert p is not None and list(p.iterations.values()) == [loops] and not p.unsure
        distinct = p.read["w"] / (1856 * D * 2)
        assert 67 < distinct < 71 and p.binds in ("DRAM", "L2", "latency") and p.main["HGMMA.64x16x16"] > 0


@COMPILES
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert predict.main(["rms_norm", "--shape", "T=8192", "--json", str(file)]) == 0
    assert "the card's limit is" in capsys.readouterr().out
    (found,) = json.loads(file.read_text())
    assert found["seconds"] == pytest.approx(20.5e-6, rel=0.05) == found["limit"]  # its bytes
    options = ("--shape", "T=8192", "--beside", "T=4096", "--json", str(file))
    assert predict.main(["rms_norm", *options]) == 0
    whole, half = json.loads(file.read_text())
    assert whole["dims"]["T"] == 8192 and half["dims"]["T"] == 4096
    times = half["seconds"] / whole["seconds"]
    assert times == pytest.approx(0.5, abs=0.1) and f"with T=4096 {times:.2f} times" in capsys.readouterr().out
    for wrong in ([], ["--all", "--beside", "T=4096"]):
        with pytest.raises(SystemExit):
            predict.main(wrong)


def test_an_op_is_recorded_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "predicted.json"
    monkeypatch.setattr(predict, "PREDICTED", file)
    old = [dict(op=op, dims=dict(T=16), seconds=1.0, limit=0.5) for op in ("experts", "route")]
    file.write_text(json.dumps(dict(triton=predict.triton.__version__, passes=[1], ops=old)))
    new = [old[0] | dict(seconds=2.0), old[0] | dict(dims=dict(T=32))]
    predict.keep(new)
    assert json.loads(file.read_text()) == dict(triton=predict.triton.__version__, passes=[1], ops=[old[1], *new])
    file.write_text(json.dumps(dict(triton="1.0", passes=[], ops=[])))
    with pytest.raises(SystemExit, match=r"recorded with Triton 1\.0, here is .* use --all --record"):
        predict.keep(new)


@COMPILES
def test_fit_against_recorded_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = dict(op="rms_norm", dims=dict(T=4096, D=2688), dtype="bf16", which="forward", kernel=True, p50=11.5e-6)
    file = tmp_path / "some-gpu.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (row, {"tokens_per_s": 3}, row | {"kernel": False})))
    assert predict.main(["--fit", str(file)]) == 0
    assert "1 rows, mean error" in capsys.readouterr().out
    assert predict.fit([], print) is None


# ---- checks ----

WAITS = """
  %k_1 = ttg.async_commit_group tokens %k_0 loc(#loc1)
  %o = scf.for %i = %a to %b step %c iter_args(%acc = %zero, %k_2 = %k_1) -> (x, !ttg.async.token) : i32 {
    %w = ttg.async_wait %k_2 {num = N : i32} loc(#loc1)
    FIRST
    SECOND
    scf.yield %d, %k_4 : tensor<64x64xf32, #mma>, !ttg.async.token loc(#loc1)
  } loc(#loc1)
  %all = ttg.async_wait {num = 0 : i32} loc(#loc1)
"""
PRODUCT = (
    "%d = tt.dot %x, %y, %acc : tensor<64x16xbf16, #a> * tensor<16x64xbf16, #b> -> tensor<64x64xf32, #mma> loc(#loc2)"
)
COPIES = (
    "%k_3 = ttg.async_copy_global_to_local %p, %s : x loc(#loc2)\n%k_4 = ttg.async_commit_group tokens %k_3 loc(#loc2)"
)


def test_main_loops_that_wait_for_all_of_their_loads() -> None:
    text = WAITS.replace("FIRST", PRODUCT).replace("SECOND", COPIES)
    assert hazards.waits_for_all(text.replace("N :", "2 :")) == []
    (late,) = hazards.waits_for_all(text.replace("N :", "0 :"))
    assert "after its products" in late
    (early,) = hazards.waits_for_all(WAITS.replace("FIRST", COPIES).replace("SECOND", PRODUCT).replace("N :", "0 :"))
    assert "overlap with one iteration" in early


def test_warps_that_compute_the_same_rows() -> None:
    layout = "#mma = #ttg.nvidia_mma<{{versionMajor = 3, warpsPerCTA = [{}, 1], instrShape = [16, 64, 16]}}>\n"
    assert hazards.repeats_rows(layout.format(4) + PRODUCT) == []
    assert hazards.repeats_rows(layout.format(8) + PRODUCT) == [
        "8x1 warps cover 128x64 of a 64x64 tile: computed 2 times"
    ]


def test_kernels_busier_with_integers_than_with_memory() -> None:
    assert hazards.busy({"alu": 5e-6, "special": 2e-6}, 6e-6) == []
    assert hazards.busy({"alu": 5e-6, "special": 9e-6, "tensor": 10e-6}, 4e-6) == []
    assert hazards.busy({"alu": 5e-6, "special": 2e-6}, 4e-6) == [
        "takes longer for integer instructions than for memory"
    ]
    assert hazards.busy({"alu": 5e-7}, 1e-7) == []  # a kernel that only waits


def test_a_kernel_waits_for_the_launches_before_it_touches_memory() -> None:
    load, wait, shared = "/*0040*/ LDG.E R2, desc[UR4][R2.64] ;\n", "/*0010*/ ACQBULK ;\n", "/*0020*/ LDS R4, [R3] ;\n"
    assert not hazards.starts_early(wait + shared + load) and not hazards.starts_early(shared)
    assert hazards.starts_early(load) and hazards.starts_early(shared + load + wait)


def test_missing_tensor_cores() -> None:
    (missing,) = hazards.found(PRODUCT, ())
    assert missing == "products without a tensor-core instruction"
    assert hazards.found(PRODUCT, ("HMMA",)) == hazards.found("", ()) == ()


def test_predictions_in_speed_md_are_marked(tmp_path: Path) -> None:
    a_pass = dict(kind="ar", length=0, batch=1, floor=1.5e-3, limit=1.6e-3, graph=2.0e-3, triton=200, aten=60)
    an_op = dict(op="rms_norm", dims=dict(T=8192), limit=20e-6, seconds=21e-6)
    (tmp_path / "predicted.json").write_text(json.dumps(dict(triton="3.9.0", passes=[a_pass], ops=[an_op])))
    text = "\n".join(report.predicted_section(tmp_path / "predicted.json"))
    assert "nothing here is measured" in text and "1.33" in text and "200 + 60" in text and "1.05" in text
    assert not list(report.predicted_section(tmp_path / "none.json"))
