"""The offline compiler's report: what counts as a fault, and that it sees what launchers launch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cards import OPS
from tools import aot
from tt_kernels.runtime.launch import INTERPRET

SOUND = aot.Compiled(
    "_x_kernel",
    90,
    "BLOCK=64",
    registers=100,
    stack=0,
    shared=1024,
    load=128,
    tensor="HGMMA",
    tma=True,
    hazards=("waits",),
)
LOCK = {SOUND.key: SOUND.row}
COMPILES = pytest.mark.skipif(INTERPRET, reason="kernels that are interpreted cannot be compiled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stack=8), "spills 8 bytes"),
        (dict(shared=228 * 1024), "needs 233472 bytes of shared memory, there are 227 KiB"),
        (dict(registers=111), "takes 111 registers, locked 100"),
        (dict(load=64), "loads 64 bits at a time, locked 128"),
        (dict(tensor="HMMA"), "compiles to HMMA, locked HGMMA"),
        (dict(tma=False), "has lost its TMA loads"),
        (dict(hazards=("waits", "repeats")), "repeats"),
        (dict(launch="BLOCK=32"), "is not in the lock"),
    ],
)
def test_faults(change: dict, message: str) -> None:
    assert aot.faults(SOUND, LOCK) == []
    (fault,) = aot.faults(replace(SOUND, **change), LOCK)
    assert message in fault


def test_spills_outside_the_models_dtype_are_held_to_the_lock() -> None:
    wide = replace(SOUND, stack=8, dtype=torch.float32)
    assert aot.faults(wide, None) == aot.faults(wide, {wide.key: wide.row}) == []
    assert aot.faults(replace(wide, stack=16), {wide.key: wide.row}) == ["spills 16 bytes"]
    assert aot.faults(wide, LOCK) == ["spills 8 bytes"]


def test_empty_kernels() -> None:
    assert aot.faults(replace(SOUND, stores=False), LOCK) == ["stores nothing"]


def test_no_lock_excuses_a_kernel_that_starts_early() -> None:
    early = replace(SOUND, hazards=(aot.hazards.EARLY,))
    assert aot.faults(early, None) == aot.faults(early, {early.key: early.row}) == [aot.hazards.EARLY]


def test_promised_wgmma() -> None:
    assert aot.promises_wgmma(replace(SOUND, tiles=dict(BLOCK=64)), "BLOCK")
    assert not aot.promises_wgmma(replace(SOUND, tiles=dict(BLOCK=32)), "BLOCK")
    assert not aot.promises_wgmma(replace(SOUND, tiles=dict(BLOCK=64), dtype=torch.float32), "BLOCK")
    assert not aot.promises_wgmma(SOUND, None)
    plain = replace(SOUND, tensor="HMMA")
    assert aot.faults(plain, None) == []
    assert aot.faults(plain, None, wgmma=True) == ["compiles to HMMA, expected wgmma (HGMMA)"]
    assert aot.faults(replace(plain, architecture=80), None, wgmma=True) == []


@COMPILES
def test_launches_are_those_of_forward_and_backward() -> None:
    op = OPS["gated_group_norm"]
    seen = {kernel.__name__ for kernel, *_ in aot.launches(op, torch.bfloat16, 90, op.shapes[0])}
    assert seen == set(op.kernels)


@COMPILES
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kernels])
def test_cards_name_the_kernels_that_run(name: str) -> None:
    op = OPS[name]

    def seen(dtype: torch.dtype) -> set[str]:
        return {kernel.__name__ for dims in op.shapes for kernel, *_ in aot.launches(op, dtype, 90, dims)}

    published = seen(torch.bfloat16)
    assert published <= set(op.kernels) <= published | (set() if published == set(op.kernels) else seen(torch.float32))


def test_ladder() -> None:
    assert aot.ladder(3) == [1, 2, 3] and aot.ladder(82) == [*range(1, 66), 72, 73, 80, 81]


@COMPILES
def test_every_launch_between_the_shapes_is_compiled_once() -> None:
    op = replace(OPS["head_sample"], shapes=(OPS["head_sample"].shapes[1],), grows=dict(R=40))
    found = [
        (dtype, options["BLOCK_T"]) for dtype, (_, _, options, _), _ in aot.to_compile(op, 90) if "BLOCK_T" in options
    ]
    assert found == [(aot.MODEL, 16), (aot.MODEL, 32), (aot.MODEL, 64), *((dtype, 16) for dtype in 2 * aot.OTHERS)]
    assert not any(dtype in aot.OTHERS for dtype, *_ in aot.to_compile(op, 80))


@COMPILES
def test_report_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "LOCK", tmp_path / "lock.json")
    arguments = ["gumbel_noise", "--targets", "90", "--jobs", "1"]
    assert aot.main(arguments) == 0 and "NOT HELD TO A LOCK" in capsys.readouterr().out
    assert aot.main([*arguments, "--update"]) == 0
    ((version, lock),) = json.loads(aot.LOCK.read_text()).items()
    assert lock and all(row["load"] and row["stack"] == 0 for row in lock.values())
    capsys.readouterr()
    assert aot.main(arguments) == 0 and " 0 compiled" in capsys.readouterr().out
    assert aot.main([*arguments, "--all"]) == 0 and " 0 compiled" not in capsys.readouterr().out
    key = next(iter(lock))
    other = {"registers": 1, "sources": "0123456789ab"}  # of another source
    aot.LOCK.write_text(json.dumps({version: lock | {key: lock[key] | other}}))
    assert aot.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "registers, locked 1" in shown and f" {len(lock[key]['sources'].split())} compiled" in shown


def test_one_row_holds_the_worse_of_two() -> None:
    other = replace(SOUND, registers=90, load=64, tensor="", tma=False, sources="b")
    both = aot.worse(replace(SOUND, sources="a"), other)
    assert both == replace(SOUND, load=64, tensor="", tma=False) and both.sources == "a b"


@COMPILES
def test_a_changed_source_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint follows the kernel, its helpers, its arguments and its options."""
    ((_, (kernel, args, options, _), _), *_) = aot.to_compile(OPS["rms_norm"], 90)
    known: set[str] = set()
    monkeypatch.setattr(aot.driver, "_active", aot.Target(90))
    monkeypatch.setattr(aot.Target, "get_current_device", lambda self: -1)  # whose cache no other test has filled
    monkeypatch.setattr(aot.knobs.runtime, "jit_cache_hook", lambda **given: not known.add(sources(**given)))

    def sources(**given: object) -> str:
        hook = aot._Known(90, ())
        assert not hook(**given)
        return hook.source

    for changed in ({}, {"num_warps": 2}):
        kernel.warmup(*args, grid=(1,), **{**options, **changed})
    monkeypatch.setattr(kernel, "hash", "another source")
    kernel.warmup(*args, grid=(1,), **options)
    assert len(known) == 3


@COMPILES
def test_unknown_ops_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aot.main(["rms"])
    assert "no op with kernels is called rms" in capsys.readouterr().err
