"""The model on interpreted kernels, end to end: one short golden case per mode and model, exact tokens.

Token by token the models take the same kernels, whose odd sizes the cards have: `small` alone, the others are slow."""

import json
from pathlib import Path

import pytest
from test_golden import generates

from tt_kernels.runtime.launch import ON_CPU
from tt_model import TwoTower

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not ON_CPU, reason="kernels on a CPU")]


def shortened(case: dict, mode: str) -> dict:
    """Its first tokens: two for a mode that writes one at a time, two blocks, of a pass each, for diffusion."""
    if mode == "mask_diffusion":
        assert case["nfe"] * case["block_size"] == case["max_new_tokens"]
        return case | {"max_new_tokens": 2 * case["block_size"], "nfe": 2}
    return case | {"max_new_tokens": 2}


@pytest.mark.parametrize(
    "golden_model,mode",
    [
        pytest.param(name, mode, marks=[pytest.mark.slow] if mode != "mask_diffusion" and name != "small" else [])
        for name in ("small", "uneven", "large_state")
        for mode in ("mask_diffusion", "ar", "mock_ar")
    ],
    indirect=["golden_model"],
)
def test_short_generation(golden_model: Path, mode: str) -> None:
    cases = json.loads((golden_model / "generate.json").read_text())[mode]
    case = min(cases, key=lambda c: (c.get("nfe", 0), len(c["prompt"]) + c["max_new_tokens"]))
    generates(TwoTower.from_pretrained(golden_model, device="cpu"), mode, shortened(case, mode))
