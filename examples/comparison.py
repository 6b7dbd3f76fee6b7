"""What every example ends with: ours beside plain PyTorch."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def milliseconds(function: Callable[[], object], rounds: int = 5) -> float:
    """The best of some rounds, after one that is not counted."""
    best = float("inf")
    for i in range(rounds + 1):
        began = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        if i:
            best = min(best, time.perf_counter() - began)
    return 1000 * best


def compare(what: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor], within: float = 1e-4) -> None:
    """Hold two functions against each other and print a line; AssertionError where they differ."""
    found, expected = ours(), plain()
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert apart <= within, f"{what}: differs by {apart:.1e} of the largest"
    how = "kernels" if DEVICE.type == "cuda" else "references"
    times = f"{how} {milliseconds(ours):.2f} ms, plain PyTorch {milliseconds(plain):.2f} ms"
    print(f"{what}: {apart:.0e} of the largest apart; {times}, on {DEVICE.type}")
