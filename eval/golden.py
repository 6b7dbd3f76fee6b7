"""`python -m eval.golden DIR`: the golden models in bf16 on a GPU, kernels beside references.

Both run the same rounded weights and are compared with the published implementation's fp32 logits, token by token over
all prompts of a model. Fails where a logit is not finite, or where the median error over the tokens is more than 1.5
times the references': both round the same numbers, a kernel never more often, so only the draw of the roundings
differs. The median, because a token that takes another expert after a rounding is off by many times the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file

import tt_kernels
from bench.measure import table
from tt_model import TwoTower

ALLOWED = 1.5
PARTS = ("context logits", "denoiser logits")


@torch.inference_mode()
def logits(model: TwoTower, forward: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Of every prompt and every noisy block behind it, in the files' order."""
    found: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
    i = 0
    while f"forward{i}.prompt" in forward:
        prompt = forward[f"forward{i}.prompt"].to(model.device)
        found[PARTS[0]].append(model.context_logits(prompt)[0])
        cache = model.prefill(prompt)
        for j in range(4):
            block, t = (forward[f"forward{i}.block{j}.{name}"].to(model.device) for name in ("tokens", "t"))
            found[PARTS[1]].append(model.denoise(block, t, cache)[0])
        i += 1
    return found


def golden(forward: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What `logits` should find."""
    found: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
    i = 0
    while f"forward{i}.prompt" in forward:
        found[PARTS[0]].append(forward[f"forward{i}.context_logits"])
        found[PARTS[1]] += [forward[f"forward{i}.block{j}.denoiser_logits"] for j in range(4)]
        i += 1
    return found


def error(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Median over tokens of |difference| / |what is wanted|; infinite where anything is not finite."""
    got, want = (torch.cat([t.double().cpu() for t in parts]) for parts in (got, want))  # [tokens, V]
    if not got.isfinite().all():
        return float("inf")
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


def compare(folder: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[float, float]]:
    """Errors by part: of the kernels, of the references."""
    forward = load_file(folder / "forward.safetensors")
    want, model = golden(forward), TwoTower.from_pretrained(folder, device=device, dtype=dtype)
    found = []
    for around in (nullcontext(), tt_kernels.use("reference")):
        with around:
            got = logits(model, forward)
        found.append({part: error(got[part], want[part]) for part in PARTS})
    return {part: (found[0][part], found[1][part]) for part in PARTS}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the golden files: a folder for each model")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    folders = sorted(path.parent for path in options.folder.glob("*/forward.safetensors"))
    if not folders:
        print(f"eval.golden: error: no golden models in {options.folder}", file=sys.stderr)
        return 2
    rows, red = [], False
    for folder in folders:
        for part, (ours, theirs) in compare(folder, options.device).items():
            bad = not (ours < float("inf") and ours <= ALLOWED * theirs)
            red |= bad
            rows.append((folder.name, part, f"{ours:.2e}", f"{theirs:.2e}", "RED" if bad else ""))
    print(table(("model", "", "kernels' error", "references'", ""), rows))
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
