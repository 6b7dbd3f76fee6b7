"""The model on interpreted kernels, end to end: one short golden case per mode and model, exact tokens.

Of `small` every mode and a second block, which sees the first; of the others, whose odd sizes the cards of the ops have
too, the first block of a denoised case. The rest of them is slow.
"""

import json
from pathlib import Path

import pytest
from test_golden import generates

from tt_kernels.runtime.launch import ON_CPU
from tt_model import TwoTower

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not ON_CPU, reason="kernels on a CPU")]
# Model, mode, and how much of the case: tokens of a mode that writes one at a time, blocks of diffusion.
QUICK = [("small", "mask_diffusion", 2), ("small", "ar", 2), ("small", "mock_ar", 2)]
QUICK += [("uneven", "mask_diffusion", 1), ("large_state", "mask_diffusion", 1)]
SLOW = [(name, mode, 2) for name in ("uneven", "large_state") for mode in ("ar", "mock_ar")]
SLOW += [(name, "mask_diffusion", 3) for name in ("small", "uneven", "large_state")]


def shortened(case: dict, mode: str, much: int) -> dict:
    if mode != "mask_diffusion":
        return case | {"max_new_tokens": much}
    assert case["nfe"] * case["block_size"] == case["max_new_tokens"], "a block is a pass"
    return case | {"max_new_tokens": much * case["block_size"], "nfe": much}


@pytest.mark.parametrize(
    "golden_model,mode,much",
    [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)],
    indirect=["golden_model"],
)
def test_short_generation(golden_model: Path, mode: str, much: int) -> None:
    cases = json.loads((golden_model / "generate.json").read_text())[mode]
    case = min(cases, key=lambda c: (c.get("nfe", 0), len(c["prompt"]) + c["max_new_tokens"]))
    generates(TwoTower.from_pretrained(golden_model, device="cpu"), mode, shortened(case, mode, much))
