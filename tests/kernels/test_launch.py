"""Launches: values, tables of tuned ones over heuristics, recordings that end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tt_kernels.runtime import launch
from tt_kernels.runtime.launch import Launch, overriding, recording, tuned


def test_launch_is_a_value() -> None:
    one = Launch(BLOCK_T=16, num_warps=8)
    assert one == Launch(num_warps=8, BLOCK_T=16) != Launch(BLOCK_T=16)
    assert hash(one) == hash(Launch(num_warps=8, BLOCK_T=16)) and one.BLOCK_T == 16 and one.num_stages == 1
    assert repr(one) == "Launch(BLOCK_T=16, num_warps=8, num_stages=1)"
    with pytest.raises(AttributeError):
        _ = one.BLOCK_N


def test_tuned_rows_win_over_heuristics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict(BLOCK_T=32, num_warps=4, num_stages=2)
    (tmp_path / "sm_90.json").write_text(json.dumps({"launches": {"_x_kernel": {"T=16 N=64": row}}}))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    launch._table.cache_clear()
    try:
        heuristic = Launch(BLOCK_T=16)
        assert tuned("_x_kernel", heuristic, 90, T=16, N=64) == Launch(**row)
        assert (
            tuned("_x_kernel", heuristic, 90, T=32, N=64) == tuned("_x_kernel", heuristic, 80, T=16, N=64) == heuristic
        )
        with overriding("_x_kernel", Launch(BLOCK_T=64)) as keys:
            assert tuned("_x_kernel", heuristic, 90, T=16, N=64).BLOCK_T == 64
        assert keys == ["T=16 N=64"]
        with overriding("_x_kernel", None):
            assert tuned("_x_kernel", heuristic, 90, T=16, N=64) == heuristic
    finally:
        launch._table.cache_clear()


def test_recording_ends() -> None:
    with recording(80), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
    from tt_kernels.runtime.launch import is_recording

    assert not is_recording()


@pytest.mark.parametrize(
    ("capability", "name", "does"),
    [
        ((8, 0), "NVIDIA A100-SXM4-80GB", True),
        ((9, 0), "NVIDIA H200", True),
        ((9, 0), "NVIDIA H20", False),
        ((9, 0), "NVIDIA H20-3e", False),
        ((8, 9), "NVIDIA L40S", False),
        ((10, 0), "NVIDIA B200", False),
        ((10, 3), "NVIDIA B300", False),
    ],
)
def test_who_multiplies_fp64(
    capability: tuple[int, int], name: str, does: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    monkeypatch.setattr(launch, "_properties", lambda _: SimpleNamespace(major=major, minor=minor, name=name))
    x = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    assert launch.multiplies_fp64(x) == does  # type: ignore[arg-type]
