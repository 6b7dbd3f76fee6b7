"""What every test shares: exact arithmetic, reproducible Hypothesis, and the golden files."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from interpreter import patch_once

from tools.sticky import pytest_runtest_makereport  # noqa: F401  a hook

ROOT = Path(__file__).resolve().parents[1]

# The tests' tensors are tiny: a second thread only costs. The other cores run other tests (pytest-xdist).
torch.set_num_threads(1)
# TF32 keeps 10 bits of mantissa; parity with the golden files is stated for full fp32.
torch.set_float32_matmul_precision("highest")
torch.backends.cudnn.allow_tf32 = False

patch_once()

# Under nohup or behind `&` they are ignored, in the processes that tests start as well; tests of signals want what a
# shell gives.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first call of a shape pays for allocation and thread pools.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden models: $TWOTOWER_GOLDEN, or shared/golden beside the checkout."""
    path = Path(os.environ.get("TWOTOWER_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not path.is_dir():
        pytest.skip(f"no golden files at {path}: set TWOTOWER_GOLDEN to their folder")
    return path


@pytest.fixture(scope="session", params=["small", "uneven", "large_state"])
def golden_model(golden_dir: Path, request: pytest.FixtureRequest) -> Path:
    """One golden checkpoint after the other."""
    return golden_dir / request.param
