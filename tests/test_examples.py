"""Every example runs, and says that it agrees with plain PyTorch."""

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
PAGES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "comparison"))


@pytest.mark.parametrize("name", PAGES)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert f"python -m examples.{name}\n" in text and len(text.splitlines()) <= 120
    with torch.random.fork_rng():
        importlib.import_module(f"examples.{name}").main()
    assert "plain PyTorch" in capsys.readouterr().out


def test_what_differs_is_told() -> None:
    from examples.comparison import compare

    with pytest.raises(AssertionError, match=r"zeros: differs by 1\.0e\+00"):
        compare("zeros", lambda: torch.zeros(3), lambda: torch.ones(3))
