"""The model on interpreted kernels, end to end: one short golden case per mode and model, exact tokens."""

import json
from pathlib import Path

import pytest
from test_golden import generates

from tt_kernels.runtime.launch import ON_CPU
from tt_model import TwoTower

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not ON_CPU, reason="kernels on a CPU")]


def shortened(case: dict, mode: str) -> dict:
    """Its first tokens: two for a mode that writes one at a time, the first block for diffusion."""
    return case if mode == "mask_diffusion" else case | {"max_new_tokens": 2}


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
def test_short_generation(golden_model: Path, mode: str) -> None:
    cases = json.loads((golden_model / "generate.json").read_text())[mode]
    case = min(cases, key=lambda c: (c.get("nfe", 0), len(c["prompt"]) + c["max_new_tokens"]))
    generates(TwoTower.from_pretrained(golden_model, device="cpu"), mode, shortened(case, mode))
