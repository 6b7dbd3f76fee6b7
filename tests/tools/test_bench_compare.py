"""Two checkouts in turns: what is called a change, what is refused, and that both measure the same."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bench import compare, report
from tt_kernels.runtime.launch import ON_CPU

ROOT = Path(__file__).resolve().parents[2]


def test_verdicts_are_beyond_three_percent_and_the_noise() -> None:
    base = [1.0, 1.01, 0.99, 1.0, 1.0]
    assert compare.verdict([t * 1.02 for t in base], base)[1] == ""
    assert compare.verdict([t * 1.1 for t in base], base)[1] == "slower"
    assert compare.verdict([t * 0.9 for t in base], base)[1] == "faster"
    noisy = [0.8, 0.9, 1.1, 1.3, 1.4]
    ratio, word = compare.verdict(noisy, base)
    assert ratio == pytest.approx(1.1) and word == ""


@pytest.mark.skipif(ON_CPU, reason="times")
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


@pytest.mark.parametrize("reference", ["no-such-commit", "", "--output=x", "HEAD:README.md"])
def test_a_commit_that_is_not_there(reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([f"--base={reference}"]) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"bench.report: error: --base {reference}: ") and error.count("\n") == 1 and not out
    assert not (ROOT / "x").exists()


def test_both_sides_measure_on_as_many_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes on one device the second finds less memory free."""
    asked: list[tuple[str, Any, int]] = []

    class Side:
        def __init__(self, name: str, room: int):
            self.name, self.room = name, room

        def ask(self, **request: Any) -> dict[str, Any]:
            if "case" not in request:
                return {"cases": ["rms_norm-a"]}
            asked.append((self.name, request.get("sets"), request["samples"]))
            return {"fault": "", "sets": min(self.room, request.get("sets") or 99), "samples": [1.0] * 3}

    monkeypatch.setattr(compare, "sides", lambda new, base: nullcontext((Side("new", 8), Side("base", 5))))
    (found,) = compare.compare(ROOT, ROOT, "*", rounds=1)
    assert asked == [("new", None, 0), ("base", None, 0), *[("new", 5, 3), ("base", 5, 3)] * 2]
    assert found["ratio"] == 1
